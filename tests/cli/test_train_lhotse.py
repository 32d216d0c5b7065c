# SPDX-License-Identifier: Apache-2.0
"""Training on Lhotse's shards."""

import gzip
import json

import pytest

from tests.cuts import write_cuts
from transducer_toolkit.cli import prepare, train


def test_prepare_looks_whether_there_are_cuts(tmp_path, console, capsys):
    write_cuts(tmp_path, 5)
    plain = tmp_path / "plain.jsonl"  # by its name it might be a manifest of ours
    plain.write_bytes(gzip.decompress((tmp_path / "train.jsonl.gz").read_bytes()))
    for train_set in ("plain.jsonl", "shar", "train.jsonl.gz"):
        sets = [f"data.corpus.{name}={tmp_path / train_set}" for name in ("train", "val")]
        console(prepare.main, tmp_path, "data=lhotse", *sets)
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[:2] for line in lines[1:]] == [["train", "-"], ["val", "-"]]
    sets = [f"data.corpus.{name}={tmp_path / 'train.jsonl'}" for name in ("train", "val")]
    with pytest.raises(SystemExit):
        console(prepare.main, tmp_path, "data=lhotse", *sets)
    assert f"{tmp_path / 'train.jsonl'} is no manifest of Lhotse's cuts" in capsys.readouterr().err


@pytest.mark.parametrize("shards", [True, False])
def test_train(tmp_path, console, train_overrides, shards):
    write_cuts(tmp_path, 20)
    model = [text for text in train_overrides if not text.startswith(("data", "+data"))]
    data = [
        "data=lhotse",
        f"data.corpus.train={tmp_path / ('shar' if shards else 'train.jsonl.gz')}",
        f"data.corpus.val={tmp_path / 'val.jsonl.gz'}",
        f"+data.corpus.test.noise={tmp_path / 'val.jsonl.gz'}",
        "data.tokenizer.vocab_size=14",
        "data.num_workers=0",
        "data.num_buckets=2",
        "data.max_utterances=5",
    ]
    length = ["data.steps_per_epoch=3"] if shards else ["+trainer.limit_train_batches=3"]
    console(train.main, tmp_path, *model, *data, *length, "name=cuts")
    results = json.loads((tmp_path / "outputs" / "cuts" / "run" / "results.json").read_text())
    assert results["optimizer_steps"] == 2 * 3
    assert list(results["test_wer"]) == ["noise"]
