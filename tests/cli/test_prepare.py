# SPDX-License-Identifier: Apache-2.0
"""transducer-prepare."""

from transducer_toolkit.cli.prepare import main


def test_a_set_that_is_null_is_left_out(console, tmp_path, tones, capsys):
    sets = [f"data.corpus.train={tones}/train.jsonl", "data.corpus.val=null"]
    console(main, tmp_path, "data=manifest", *sets)
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["set", "utterances", "minutes", "words", "manifest"]
    assert [row.split()[:2] for row in rows] == [["train", "32"]]
