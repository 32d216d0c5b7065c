# SPDX-License-Identifier: Apache-2.0
"""What a lost process is called; tests/cli/test_ddp.py kills one."""

import logging
from types import SimpleNamespace

import pytest

from transducer_toolkit.training.callbacks.lost_process import NameLostProcess

GLOO = (
    "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer "
    "[127.0.0.1]:7013\nException raised from ..."
)


@pytest.mark.parametrize(
    ("error", "world_size", "is_named"),
    [
        (RuntimeError(GLOO), 2, True),
        (RuntimeError("NCCL communicator was aborted on rank 1."), 2, True),
        (RuntimeError(GLOO), 1, False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), 2, False),
        (ValueError("socket"), 2, False),
        (KeyboardInterrupt(), 2, False),
    ],
)
def test_only_a_lost_process_is_named(caplog, error, world_size, is_named):
    trainer = SimpleNamespace(world_size=world_size, global_rank=1)
    with caplog.at_level(logging.ERROR):
        NameLostProcess().on_exception(trainer, None, error)
    assert bool(caplog.messages) == is_named
    if is_named:
        assert "process 1 of 2: another process of this training has ended" in caplog.text
        assert "raised from" not in caplog.text
