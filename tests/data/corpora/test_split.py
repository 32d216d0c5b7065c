# SPDX-License-Identifier: Apache-2.0
import pytest

from transducer_toolkit.data.corpora.split import split_of


def test_parts_are_about_as_large_as_asked():
    names = [split_of(f"text {number}", val=0.2, test=0.3) for number in range(2000)]
    for name, part in (("train", 0.5), ("val", 0.2), ("test", 0.3)):
        assert abs(names.count(name) / 2000 - part) < 0.04


def test_more_validation_takes_nothing_from_the_test_set():
    keys = [f"text {number}" for number in range(500)]
    tested = [[key for key in keys if split_of(key, val=val) == "test"] for val in (0.05, 0.4)]
    assert tested[0] == tested[1] != []


@pytest.mark.parametrize(("val", "test"), [(-0.1, 0.1), (0.1, 1.0), (0.5, 0.5)])
def test_errors(val, test):
    with pytest.raises(ValueError, match=rf"sum to less than 1, got val={val}, test={test}"):
        split_of("a", val=val, test=test)
