# SPDX-License-Identifier: Apache-2.0
"""Alignment-restricted training from the command line, on the output of transducer-align."""

import csv
import json
import shutil

import pytest

from transducer_toolkit.cli import align, train


@pytest.fixture(scope="module")
def alignments(trained, tones, tmp_path_factory, console):
    folder = tmp_path_factory.mktemp("alignments")
    options = ["--manifest", tones / "train.jsonl", "--output-dir", folder, "--format", "json"]
    checkpoint = trained / "checkpoints" / "best.ckpt"
    console(align.main, folder, "--checkpoint", checkpoint, *options)
    return folder


def losses_of(folder):
    run = folder / "outputs" / "transducer" / "run" / "metrics" / "metrics.csv"
    with open(run) as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


def test_training_sums_over_fewer_paths(alignments, tmp_path, console, train_overrides):
    found = {}
    for name, options in {
        "fused": ["loss=fused"],
        "wide": ["loss=restricted", "loss.left=1000", "loss.right=1000"],
        "narrow": ["loss=restricted", "loss.left=1", "loss.right=2"],
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        options += [f"data.alignment_dir={alignments}", "test=false", "optimizer.lr=1e-9"]
        console(train.main, folder, *train_overrides, *options)
        found[name] = losses_of(folder)
    assert found["wide"] == pytest.approx(found["fused"], rel=1e-5)
    assert all(narrow > wide for narrow, wide in zip(found["narrow"], found["wide"], strict=True))
    assert all(loss < 1e3 for loss in found["narrow"])


def test_an_utterance_without_alignment(alignments, tmp_path, console, train_overrides, capsys):
    some = tmp_path / "some"
    shutil.copytree(alignments, some)
    (some / "train-3.json").unlink()
    options = ["loss=restricted", f"data.alignment_dir={some}"]
    with pytest.raises(SystemExit):
        console(train.main, tmp_path, *train_overrides, *options)
    assert "no alignments of 1 of 32 utterances, e.g. train-3.json" in capsys.readouterr().err


def test_an_alignment_of_another_text(alignments, tmp_path, console, train_overrides, capsys):
    some = tmp_path / "some"
    shutil.copytree(alignments, some)
    content = json.loads((some / "train-3.json").read_text())
    content["tokens"].pop()
    (some / "train-3.json").write_text(json.dumps(content))
    options = ["loss=restricted", f"data.alignment_dir={some}"]
    with pytest.raises(SystemExit):
        console(train.main, tmp_path, *train_overrides, *options)
    error = capsys.readouterr().err
    assert "utterance 'train-3'" in error and "align with the tokenizer" in error


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "set data.alignment_dir=DIR, a folder that transducer-align"),
        (["data.alignment_dir=nowhere"], "no folder of alignments at nowhere; make them"),
        (["loss.left=-1"], "left: expected at least 0, got -1"),
        (["loss.right=0.5"], "right: expected an int, got float"),
    ],
)
def test_bad_options(options, message, tmp_path, console, train_overrides, capsys):
    with pytest.raises(SystemExit):
        console(train.main, tmp_path, *train_overrides, "loss=restricted", *options)
    assert message in capsys.readouterr().err
