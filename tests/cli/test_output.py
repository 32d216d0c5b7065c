# SPDX-License-Identifier: Apache-2.0
from transducer_toolkit.cli.output import print_unwritable, print_word_errors
from transducer_toolkit.data.tokenizer import CharTokenizer
from transducer_toolkit.training.scoring import CharacterErrors, SymbolDelay, Transcript, WordErrors

ERRORS = {"a": WordErrors(1, 2, 3, 60, 10), "longer name": WordErrors(0, 0, 0, 5, 1)}
CHARACTERS = {
    "a": CharacterErrors(1, 2, 3, 300, 10),
    "longer name": CharacterErrors(0, 0, 0, 25, 1),
}


def printed(capsys, *arguments):
    print_word_errors(ERRORS, CHARACTERS, *arguments)
    return capsys.readouterr().out.strip("\n").splitlines()


def test_word_errors(capsys):
    header, first, second = printed(capsys)
    names = "test set WER % CER % sub del ins words utterances"
    assert header.split() == names.split(" ")
    assert first.split() == ["a", "10.00", "2.00", "1", "2", "3", "60", "10"]
    assert second.startswith("longer name ")
    assert printed(capsys, {"a": None, "longer name": None}) == [header, first, second]


def test_delays_have_columns_where_a_set_has_them(capsys):
    header, first, second = printed(capsys, {"a": SymbolDelay(251.6, 199.5, 60)})
    assert header.endswith("utterances   delay ms   median")
    assert first.split()[-2:] == ["252", "200"] and second.split()[-2:] == ["-", "-"]
    assert len(header) == len(first) == len(second)


def test_references_that_the_model_cannot_write_are_counted_and_named(capsys):
    tokenizer = CharTokenizer.from_texts(["one"])
    rows = [
        Transcript("x", "One", "one"),
        Transcript("y", "one", "one"),
        Transcript("z", "Öne!", "one"),
    ]
    print_unwritable({"dev": rows, "good": rows[1:2]}, tokenizer, None)
    out = capsys.readouterr().out
    assert out.startswith("dev: 2 of 3 references have characters that the model cannot write")
    assert "'!' in 1, 'O' in 1, 'Ö' in 1; e.g. x, z" in out and "good" not in out
    print_unwritable({"dev": rows[:2]}, tokenizer, str.lower)
    assert capsys.readouterr().out == ""
    print_unwritable(
        {"dev": [Transcript("x", "".join(map(chr, range(99, 199))), "")]}, tokenizer, None
    )
    assert " and " in capsys.readouterr().out
