# SPDX-License-Identifier: Apache-2.0
"""The encoder decides the size of lattices: with one of 8x subsampling, from the command line."""

import dataclasses
import re

import pytest

from transducer_toolkit.cli.evaluate import main as evaluate
from transducer_toolkit.cli.prepare import main as prepare
from transducer_toolkit.cli.train import main as train
from transducer_toolkit.data.datamodule import TransducerDataModule
from transducer_toolkit.data.features import Fbank
from transducer_toolkit.data.manifest import read_manifest, write_manifest

OPTIONS = ["model.encoder._target_=tests.cli.eightfold.EightfoldEncoder", "data.max_utterances=100"]


def lattice_sizes(manifest):
    """Encoder frames, at 8x, and symbols of each utterance."""
    frames = [Fbank().num_frames(round(16_000 * row.duration_s)) for row in manifest]
    return [(-(-n // 8), len(row.text)) for n, row in zip(frames, manifest, strict=True)]


@pytest.fixture(scope="module")
def eightfold(tmp_path_factory, console, train_overrides):
    folder = tmp_path_factory.mktemp("eightfold")
    console(train, folder, *train_overrides, *OPTIONS, "trainer.max_epochs=1", "test=false")
    return folder / "outputs" / "transducer" / "run"


def test_batches_are_bounded_by_the_cells_there_are(eightfold, tones):
    sizes = lattice_sizes(read_manifest(tones / "train.jsonl"))
    cells = sum(t * (u + 1) for t, u in sizes)
    assert f"most cells (32 utterances, {cells} cells)" in (eightfold / "train.log").read_text()


def test_utterances_without_a_path_are_left_out(tmp_path, console, train_overrides, tones):
    rows = read_manifest(tones / "train.jsonl")
    for row in rows[::4]:  # six feature frames a letter: enough at 4x, too few at 8x
        doubled = "".join(2 * letter for letter in row.text.replace(" ", ""))
        rows[rows.index(row)] = dataclasses.replace(row, text=doubled)
    write_manifest(tmp_path / "train.jsonl", rows)
    too_short = sum(t < u + 1 for t, u in lattice_sizes(rows))
    assert 0 < too_short < 32
    options = ["loss=packed", "loss.topology=one_sym_per_frame", "+trainer.fast_dev_run=true"]
    options.append(f"data.corpus.train={tmp_path}/train.jsonl")
    console(train, tmp_path, *train_overrides, *OPTIONS, *options)
    (log,) = tmp_path.rglob("train.log")
    (dropped,) = re.findall(r"train: dropped (\d+) of 32 utterances that are too", log.read_text())
    assert int(dropped) == too_short


def test_evaluate_asks_the_encoder_too(
    eightfold, tmp_path, console, data_overrides, tones, monkeypatch
):
    sizes = lattice_sizes(read_manifest(tones / "test.jsonl"))
    cells, made = sum(t * (u + 1) for t, u in sizes), []
    make = TransducerDataModule.test_dataloader

    def recorded(self):
        made.extend(make(self))
        return made

    monkeypatch.setattr(TransducerDataModule, "test_dataloader", recorded)
    options = [*data_overrides, "data.max_utterances=100", f"data.max_cells={cells}"]
    options += ["trusted_packages=[tests]", "trainer.accelerator=cpu"]
    console(evaluate, tmp_path, f"checkpoint={eightfold}/checkpoints/best.ckpt", *options)
    assert [len(loader) for loader in made] == [1]  # within the bound, and only just


@pytest.mark.parametrize("command", [train, evaluate, prepare])
def test_an_old_config_that_sets_it_is_refused(
    command, tmp_path, console, data_overrides, trained, capsys
):
    checkpoint = f"checkpoint={trained}/checkpoints/best.ckpt"
    options = [*data_overrides, *([checkpoint] if command is evaluate else [])]
    with pytest.raises(SystemExit):
        console(command, tmp_path, *options, "+data.subsampling=8")
    assert "data.subsampling is no option any more: the encoder decides" in capsys.readouterr().err
    if command is not prepare:
        with pytest.raises(SystemExit):
            console(command, tmp_path, *options, "data.subsampling=4")
        lines = capsys.readouterr().err.splitlines()
        assert "Could not override 'data.subsampling'." in lines[0]
        assert "data.subsampling is no option any more: the encoder decides" in lines[-1]
