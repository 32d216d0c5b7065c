# SPDX-License-Identifier: Apache-2.0
"""Joiner and loss under DistributedDataParallel: two processes give one process's gradient."""

import pytest
import torch
from torch import multiprocessing
from torch.nn.parallel import DistributedDataParallel

from transducer_toolkit import Joiner, LatticeShape, fused_joiner_loss, transducer_loss

FRAMES, SYMBOLS = [6, 4, 5, 2], [3, 1, 0, 2]


class JoinerAndLoss(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.joiner = Joiner(5, 6, 8, 11).double()

    def forward(self, encoder_out, predictor_out, targets, shape, mode):
        joiner = self.joiner
        if mode == "fused":
            return fused_joiner_loss(
                joiner.encoder_projection(encoder_out),
                joiner.predictor_projection(predictor_out),
                joiner.output.weight,
                joiner.output.bias,
                targets,
                shape.logit_lengths,
                shape.target_lengths,
                blank=0,
                reduction="sum",
                dropped_mass=0.0,
            )
        logits = self.joiner(encoder_out, predictor_out, shape)
        lengths = shape.logit_lengths, shape.target_lengths
        return transducer_loss(
            logits, targets, *lengths, blank=0, reduction="sum", inplace=mode == "inplace"
        )


def part(start, stop):
    torch.manual_seed(2)
    encoder_out = torch.randn(4, 6, 5, dtype=torch.float64)
    predictor_out = torch.randn(4, 4, 6, dtype=torch.float64)
    targets = torch.randint(1, 11, (4, 3))
    shape = LatticeShape.from_lengths(FRAMES[start:stop], SYMBOLS[start:stop])
    return encoder_out[start:stop], predictor_out[start:stop], targets[start:stop], shape


def worker(rank, folder, mode):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    module = DistributedDataParallel(JoinerAndLoss())
    module(*part(2 * rank, 2 * rank + 2), mode).backward()
    if rank == 0:
        grads = [parameter.grad for parameter in module.parameters()]
        torch.save(grads, f"{folder}/grads.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("mode", ["packed", "inplace", "fused"])
def test_two_processes_equal_one(tmp_path, mode):
    multiprocessing.spawn(worker, (str(tmp_path), mode), nprocs=2)
    module = JoinerAndLoss()
    (module(*part(0, 4), mode) / 2).backward()  # DDP averages over ranks
    grads = torch.load(tmp_path / "grads.pt")
    for parameter, grad in zip(module.parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=0, atol=1e-12)
