# SPDX-License-Identifier: Apache-2.0
"""TDT and multi-blank transducers from the command line: train, go on, fine-tune, use."""

import csv
import json
from functools import partial

import pytest
import torch

from transducer_toolkit.cli import align, evaluate, train, transcribe
from transducer_toolkit.data.audio import read_audio
from transducer_toolkit.decoding import BeamSearch
from transducer_toolkit.inference.recognizer import Recognizer, load_checkpoint


@pytest.fixture(scope="module", params=["tdt", "fused_tdt", "multi_blank"])
def run_dir(request, tmp_path_factory, console, train_overrides):
    folder = tmp_path_factory.mktemp(request.param)
    console(train.main, folder, *train_overrides, f"loss={request.param}")
    return folder / "outputs" / "transducer" / "run"


def test_training_ends_with_results(run_dir):
    results = json.loads((run_dir / "results.json").read_text())
    assert results["optimizer_steps"] > 0
    with open(run_dir / "metrics" / "metrics.csv") as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert len(losses) >= 4 and all(loss < 1e3 for loss in losses)


def test_the_checkpoint_knows_its_durations(run_dir, tones, tmp_path, console, capsys):
    checkpoint = run_dir / "checkpoints" / "best.ckpt"
    recognizer = Recognizer.from_checkpoint(checkpoint)
    assert recognizer.topology.startswith(("tdt-0-1-2-3-4", "multi_blank-2-4-8"))
    assert recognizer.model.joiner.num_extra in (5, 3)
    console(transcribe.main, tmp_path, "--checkpoint", checkpoint, tones / "test-0.wav")
    assert "test-0" in capsys.readouterr().out
    options = ["--text", "a b", tones / "test-0.wav", "--output-dir", tmp_path / "aligned"]
    console(align.main, tmp_path, "--checkpoint", checkpoint, *options)
    assert list((tmp_path / "aligned").iterdir())
    console(evaluate.main, tmp_path, f"checkpoint={checkpoint}")
    capsys.readouterr()
    console(
        transcribe.main, tmp_path, "--checkpoint", checkpoint, "--beam", 2, tones / "test-0.wav"
    )
    beam = Recognizer.from_checkpoint(checkpoint, search=partial(BeamSearch, beam=2))
    assert beam.search.topology.name == recognizer.topology
    (text,) = beam.transcribe([read_audio(tones / "test-0.wav")])
    assert capsys.readouterr().out.rstrip("\n").endswith(f"test-0.wav\t{text}")
    options = ["search=beam", "search.beam=2", "~callbacks.utterance_picture"]
    console(evaluate.main, tmp_path, f"checkpoint={checkpoint}", *options)


def test_fine_tuning_copies_the_durations(run_dir, tmp_path, console, train_overrides):
    checkpoint = run_dir / "checkpoints" / "best.ckpt"
    before = torch.load(checkpoint, weights_only=True)["state_dict"]["model.joiner.output.weight"]
    options = ["optimizer.lr=1e-9", "test=false"]
    console(train.main, tmp_path, *train_overrides, *options, f"init_from={checkpoint}")
    last = tmp_path / "outputs" / "transducer" / "run" / "checkpoints" / "last.ckpt"
    after = torch.load(last, weights_only=True)["state_dict"]["model.joiner.output.weight"]
    torch.testing.assert_close(after, before, atol=1e-4, rtol=0)
    again = [f"ckpt_path={last}", "run_dir=on", "trainer.max_epochs=3"]
    console(train.main, tmp_path, *train_overrides, *options, *again)
    found = load_checkpoint(tmp_path / "on" / "checkpoints" / "last.ckpt")
    assert found["recognizer"]["topology"] == Recognizer.from_checkpoint(checkpoint).topology


def test_hat_from_the_command_line(tmp_path, console, train_overrides, tones, capsys):
    options = ["loss.normalization=hat", "search=beam"]
    console(train.main, tmp_path, *train_overrides, *options)
    checkpoint = tmp_path / "outputs" / "transducer" / "run" / "checkpoints" / "best.ckpt"
    joiner = Recognizer.from_checkpoint(checkpoint).model.joiner
    assert (joiner.normalization, joiner.blank) == ("hat", 0)
    aligned = ["--manifest", tones / "test.jsonl", "--output-dir", tmp_path / "aligned"]
    console(align.main, tmp_path, "--checkpoint", checkpoint, *aligned)
    assert list((tmp_path / "aligned").iterdir())


def test_a_regular_model_becomes_one_with_durations(trained, tmp_path, console, train_overrides):
    checkpoint = trained / "checkpoints" / "best.ckpt"
    before = torch.load(checkpoint, weights_only=True)["state_dict"]["model.joiner.output.weight"]
    options = ["loss=fused_tdt", f"init_from={checkpoint}", "optimizer.lr=1e-9", "test=false"]
    console(train.main, tmp_path, *train_overrides, *options)
    last = tmp_path / "outputs" / "transducer" / "run" / "checkpoints" / "last.ckpt"
    after = torch.load(last, weights_only=True)["state_dict"]["model.joiner.output.weight"]
    assert len(after) == len(before) + 5
    torch.testing.assert_close(after[: len(before)], before, atol=1e-4, rtol=0)
