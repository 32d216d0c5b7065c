# SPDX-License-Identifier: Apache-2.0
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn

from transducer_toolkit.training.best_checkpoint import BestCheckpoint


@pytest.mark.parametrize("monitor", ["val/loss", "val/wer"])
def test_only_checkpoints_are_copied(monitor, tmp_path):
    """A hostile checkpoint may name any file as one of the best of its training."""
    folder, secret = tmp_path / "checkpoints", tmp_path / "secret.txt"
    secret.write_text("a secret\n")
    callback = BestCheckpoint(str(folder), monitor="val/loss")
    trainer = SimpleNamespace(
        state=SimpleNamespace(fn=TrainerFn.FITTING), ckpt_path=str(tmp_path / "hostile.ckpt")
    )
    state = {"monitor": monitor, "best_k_models": {str(secret): torch.tensor(1.0)}}
    with pytest.raises(ValueError, match=r"secret\.txt is not a checkpoint of transducer-train"):
        callback.on_load_checkpoint(trainer, None, {"callbacks": {"BestCheckpoint{}": state}})
    assert not folder.exists() or not any(folder.iterdir())
    torch.save(
        {"callbacks": {"BestCheckpoint{}": state | {"current_score": torch.tensor(1.0)}}}, secret
    )
    callback.on_load_checkpoint(trainer, None, {"callbacks": {"BestCheckpoint{}": state}})
    assert len([*folder.iterdir()]) == 1
