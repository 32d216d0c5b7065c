# SPDX-License-Identifier: Apache-2.0
"""The mutants of the soak test still fit the code, and name tests that there are."""

import re
from pathlib import Path

import pytest

from tests.soak.mutants import MUTANTS, ROOT, Mutant, mutated


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_fits_the_code(mutant):
    assert mutated(mutant) != (ROOT / mutant.file).read_text()
    for test in mutant.tests:
        file, _, name = test.partition("::")
        text = (ROOT / file).read_text()
        assert not name or re.search(rf"^def {name}\(", text, re.MULTILINE), test


def test_names_are_unique_and_a_place_that_is_not_there_is_named():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    assert f"| {len(MUTANTS)} one-line defects" in (ROOT / "docs" / "reliability.md").read_text()
    gone = Mutant("gone", Path(__file__).relative_to(ROOT).as_posix(), "no" + "where", "", ())
    with pytest.raises(ValueError, match=r"gone: '.*' is in tests/test_mutants.py 0 times"):
        mutated(gone)
