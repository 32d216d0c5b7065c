# SPDX-License-Identifier: Apache-2.0
"""LibriSpeech in miniature, end to end: prepare, train, evaluate."""

import json

from tests.librispeech import write_librispeech
from transducer_toolkit.cli import evaluate, prepare, train
from transducer_toolkit.inference.recognizer import Recognizer

SUBSETS = {"train": "train-clean-100", "val": "dev-clean", "test": "test-clean"}
SMALL = [
    "trainer=default",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "+trainer.limit_train_batches=2",
    "trainer.max_epochs=1",
    "data.num_workers=0",
    "model.encoder.conv_channels=4",
    "model.encoder.hidden_dim=16",
    "model.encoder.num_layers=1",
    "model.predictor.embedding_dim=8",
    "model.joiner.joiner_dim=16",
    "num_threads=1",
]


def test_prepare_train_evaluate(tmp_path, console, capsys):
    write_librispeech(tmp_path)
    data = [f"data.corpus.root={tmp_path}", f"data.corpus.cache_dir={tmp_path / 'cache'}"]
    data += [f"data.corpus.{name}=[{subset}]" for name, subset in SUBSETS.items()]

    console(prepare.main, tmp_path, "data=librispeech", *data)
    lines = capsys.readouterr().out.splitlines()
    sets = [line.split()[:2] for line in lines[1:]]
    assert sets == [["train", "12"], ["val", "3"], ["test-clean", "4"]]
    assert not (tmp_path / "outputs").exists()

    vocabulary = ["data.tokenizer.vocab_size=30", "data.max_utterances=4"]
    console(train.main, tmp_path, "experiment=librispeech", *data, *vocabulary, *SMALL)
    run = tmp_path / "outputs" / "librispeech" / "run"
    results = json.loads((run / "results.json").read_text())
    assert results["optimizer_steps"] == 2 and list(results["test_wer"]) == ["test-clean"]

    # The checkpoint holds the word pieces: nothing else is needed.
    checkpoint = run / "checkpoints" / "best.ckpt"
    tokenizer = Recognizer.from_checkpoint(checkpoint).tokenizer
    assert tokenizer.vocab_size == 30
    assert tokenizer.decode(tokenizer.encode("THE BOY READ")) == "THE BOY READ"
    capsys.readouterr()
    arguments = ["data=librispeech", *data, f"checkpoint={checkpoint}", "trainer.accelerator=cpu"]
    arguments += ["data.num_workers=0", "~callbacks.utterance_picture"]
    console(evaluate.main, tmp_path, *arguments)
    table = capsys.readouterr().out
    assert "test-clean" in table and f"{100 * results['test_wer']['test-clean']:.2f}" in table
