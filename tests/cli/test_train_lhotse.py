# SPDX-License-Identifier: Apache-2.0
"""Training on Lhotse's shards."""

import json

import pytest

from tests.cuts import write_cuts
from transducer_toolkit.cli import train


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
