# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import torch.multiprocessing

from transducer_toolkit.training.scoring import (
    CharacterErrors,
    SymbolDelay,
    Transcript,
    WordErrors,
    count_character_errors,
    count_word_errors,
    gather_transcripts,
    measure_symbol_delay,
    real_time_factor,
    symbol_delays_ms,
)


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([("one two", "one two")], WordErrors(0, 0, 0, 2, 1)),
        ([("one two three", "one too")], WordErrors(1, 1, 0, 3, 1)),
        ([("one", "one one"), ("two", "")], WordErrors(0, 1, 1, 2, 2)),
        ([("", "one"), ("", "")], WordErrors(0, 0, 1, 0, 2)),
        ([], WordErrors(0, 0, 0, 0, 0)),
    ],
)
def test_count_word_errors(pairs, expected):
    assert count_word_errors(Transcript(str(i), *pair) for i, pair in enumerate(pairs)) == expected


def test_wer():
    assert WordErrors(1, 2, 3, 12, 4).wer == 0.5
    assert WordErrors(0, 0, 0, 0, 0).wer == 0.0


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([("one two", "one  two ")], CharacterErrors(0, 0, 0, 7, 1)),
        ([("one two", "onetwo"), ("a", "b")], CharacterErrors(1, 1, 0, 8, 2)),
        ([("", "ab"), ("", "")], CharacterErrors(0, 0, 2, 0, 2)),
        ([], CharacterErrors(0, 0, 0, 0, 0)),
    ],
)
def test_count_character_errors(pairs, expected):
    found = count_character_errors(Transcript(str(i), *pair) for i, pair in enumerate(pairs))
    assert found == expected
    errors = expected.substitutions + expected.deletions + expected.insertions
    assert found.cer == errors / max(1, expected.num_characters)


def test_real_time_factor():
    rows = [Transcript("a", "", "", None, 3.0, 0.5), Transcript("b", "", "", None, 1.0, 0.5)]
    assert real_time_factor(rows) == 0.25
    assert real_time_factor([Transcript("a", "", "")]) is None


def test_symbol_delays():
    assert symbol_delays_ms([0.5, 1.0], [0.25, 1.5]) == (250.0, -500.0)
    assert symbol_delays_ms([], []) == ()
    with pytest.raises(ValueError, match="expected the same number of times, got 1 and 2"):
        symbol_delays_ms([0.5], [0.25, 1.5])


@pytest.mark.parametrize(
    ("delays", "expected"),
    [
        ([], None),
        ([None, None], None),
        ([None, ()], None),  # an utterance without words
        ([(100.0,), None, (300.0, 0.0, -40.0)], SymbolDelay(90.0, 50.0, 4)),
    ],
)
def test_measure_symbol_delay(delays, expected):
    transcripts = [Transcript(str(i), "", "", delay) for i, delay in enumerate(delays)]
    assert measure_symbol_delay(transcripts) == expected


def gather(rank, folder):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    parts = [["c", "a"], ["b", "a"]]  # "a" on both, as padded samplers may do
    found = gather_transcripts([Transcript(id, "", "") for id in parts[rank]])
    assert [transcript.id for transcript in found] == ["a", "b", "c"]
    torch.distributed.destroy_process_group()


def test_gather_transcripts(tmp_path):
    assert [
        t.id for t in gather_transcripts([Transcript("b", "", ""), Transcript("a", "", "")])
    ] == [
        "a",
        "b",
    ]
    torch.multiprocessing.spawn(gather, args=(str(tmp_path),), nprocs=2)
