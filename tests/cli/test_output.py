# SPDX-License-Identifier: Apache-2.0
from transducer_toolkit.cli.output import print_word_errors
from transducer_toolkit.training.scoring import SymbolDelay, WordErrors

ERRORS = {"a": WordErrors(1, 2, 3, 60, 10), "longer name": WordErrors(0, 0, 0, 5, 1)}


def printed(capsys, *arguments):
    print_word_errors(ERRORS, *arguments)
    return capsys.readouterr().out.strip("\n").splitlines()


def test_word_errors(capsys):
    header, first, second = printed(capsys)
    assert header.split() == ["test", "set", "WER", "%", "sub", "del", "ins", "words", "utterances"]
    assert first.split() == ["a", "10.00", "1", "2", "3", "60", "10"]
    assert second.startswith("longer name ")
    assert printed(capsys, {"a": None, "longer name": None}) == [header, first, second]


def test_delays_have_columns_where_a_set_has_them(capsys):
    header, first, second = printed(capsys, {"a": SymbolDelay(251.6, 199.5, 60)})
    assert header.endswith("utterances   delay ms   median")
    assert first.split()[-2:] == ["252", "200"] and second.split()[-2:] == ["-", "-"]
    assert len(header) == len(first) == len(second)
