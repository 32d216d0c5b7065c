# SPDX-License-Identifier: Apache-2.0
"""Trainings that start with the model, the symbols and the weights of a checkpoint."""

import pytest
import torch

from transducer_toolkit.cli.train import main
from transducer_toolkit.inference.recognizer import load_checkpoint

FEW = ["trainer.max_steps=2", "trainer.accelerator=cpu", "optimizer.lr=0.0", "test=false"]


@pytest.fixture
def start(trained):
    return f"init_from={trained}/checkpoints/best.ckpt"


def test_the_model_of_a_checkpoint(start, trained, data_overrides, console, tmp_path, capsys):
    options = [*data_overrides, start, "model=checkpoint", "data/tokenizer=checkpoint", *FEW]
    console(main, tmp_path, *options, "model.encoder.dropout=0.4", "optimizer.weight_decay=0.0")
    said = capsys.readouterr().out
    assert "weights taken over from" in said and "not in the checkpoint" not in said
    run = tmp_path / "outputs" / "transducer" / "run"
    old = load_checkpoint(trained / "checkpoints" / "best.ckpt")
    new = load_checkpoint(run / "checkpoints" / "last.ckpt")
    for name, value in old["state_dict"].items():
        torch.testing.assert_close(new["state_dict"][name], value)
    assert new["recognizer"]["model"].pop("encoder") == {
        **old["recognizer"]["model"].pop("encoder"),
        "dropout": 0.4,
    }
    assert new["recognizer"]["model"] == old["recognizer"]["model"]
    again = [f"ckpt_path={run}/checkpoints/last.ckpt", "run_dir=on", "trainer.max_steps=3"]
    changes = ["model.encoder.dropout=0.4", "optimizer.weight_decay=0.0"]
    console(main, tmp_path, *options, *changes, *again)
    assert load_checkpoint(tmp_path / "on" / "checkpoints" / "last.ckpt")["global_step"] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["model=checkpoint"], "model=checkpoint: expected a checkpoint, got null; set init_from="),
        (["START"], "another size in this model, such as model."),
        (["START"], "model=checkpoint takes the model of the checkpoint"),
        (["init_from=FOLDER"], "it is a folder, give a file, such as FOLDER/checkpoints/best.ckpt"),
    ],
)
def test_what_cannot_start_is_said(
    options, message, start, trained, data_overrides, console, tmp_path, capsys
):
    given = [text.replace("START", start).replace("FOLDER", str(trained)) for text in options]
    with pytest.raises(SystemExit):
        console(main, tmp_path, *data_overrides, *FEW, *given)
    assert message.replace("FOLDER", str(trained)) in capsys.readouterr().err


def test_a_class_that_is_not_trusted(start, trained, data_overrides, console, tmp_path, capsys):
    path = tmp_path / "own.ckpt"
    checkpoint = torch.load(trained / "checkpoints" / "best.ckpt", weights_only=True)
    encoder = checkpoint["recognizer"]["model"]["encoder"]
    encoder["_target_"] = "tests.cli.eightfold.EightfoldEncoder"
    torch.save(checkpoint, path)
    options = [*data_overrides, *FEW, f"init_from={path}", "model=checkpoint"]
    with pytest.raises(SystemExit):
        console(main, tmp_path, *options)
    assert capsys.readouterr().err.endswith("add 'trusted_packages=[tests]'\n")
    console(main, tmp_path, *options, "trusted_packages=[tests]")
    assert "last.ckpt --trust-package tests FILE.wav" in capsys.readouterr().out
