# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import torch.multiprocessing

from transducer_toolkit.training.scoring import (
    Transcript,
    WordErrors,
    count_word_errors,
    gather_transcripts,
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
