# SPDX-License-Identifier: Apache-2.0
"""Joiner and loss under DistributedDataParallel: two processes give one process's gradient."""

import pytest
import torch
from torch import multiprocessing
from torch.nn.parallel import DistributedDataParallel

from transducer_toolkit import Joiner, LatticeShape, fused_joiner_loss, transducer_loss
from transducer_toolkit.ops import coarse_to_fine

FRAMES, SYMBOLS = [6, 4, 5, 2], [3, 1, 0, 2]
MODES = ("packed", "inplace", "fused")


def run_two(worker, *arguments):
    """Runs two processes, forks of one that has imported PyTorch once for all tests."""
    multiprocessing.set_forkserver_preload([__name__])
    multiprocessing.start_processes(worker, arguments, nprocs=2, start_method="forkserver")


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


class CoarseJoinerAndLoss(torch.nn.Module):
    """A float32 joiner, whose loss computes cells in two precisions."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.joiner = Joiner(16, 16, 32, 37)
        with torch.no_grad():
            self.joiner.output.weight.mul_(12)  # few paths count, so that some cells do not

    def forward(self, encoder_out, predictor_out, targets, shape):
        joiner = self.joiner
        losses, parts = fused_joiner_loss(
            joiner.encoder_projection(encoder_out),
            joiner.predictor_projection(predictor_out),
            joiner.output.weight,
            joiner.output.bias,
            targets,
            shape.logit_lengths,
            shape.target_lengths,
            blank=0,
            reduction="sum",
            return_parts=True,
        )
        assert 0 < parts.selected < 1
        return losses


def coarse_part(start, stop):
    torch.manual_seed(2)
    sides = torch.randn(4, 60, 16), torch.randn(4, 21, 16)
    targets = torch.randint(1, 37, (4, 20))
    shape = LatticeShape.from_lengths([60, 45, 50, 37][start:stop], [20, 12, 0, 14][start:stop])
    return *(part[start:stop] for part in (*sides, targets)), shape


def coarse_worker(rank, folder):
    coarse_to_fine.pays = lambda *_: True  # in this process, for every size
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    module = DistributedDataParallel(CoarseJoinerAndLoss())
    module(*coarse_part(2 * rank, 2 * rank + 2)).backward()
    torch.save([parameter.grad for parameter in module.parameters()], f"{folder}/grads_{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("coarse_pass")
def test_two_processes_with_a_coarse_pass_equal_one(tmp_path):
    """An utterance is selected by its own budget, so its gradient is the same in any batch."""
    run_two(coarse_worker, str(tmp_path))
    module = CoarseJoinerAndLoss()
    (module(*coarse_part(0, 4)) / 2).backward()  # DDP averages over ranks
    of_ranks = [torch.load(tmp_path / f"grads_{rank}.pt") for rank in range(2)]
    for parameter, *grads in zip(module.parameters(), *of_ranks, strict=True):
        assert torch.equal(*grads)
        assert (grads[0] - parameter.grad).norm() <= 1e-5 * parameter.grad.norm()


def part(start, stop):
    torch.manual_seed(2)
    encoder_out = torch.randn(4, 6, 5, dtype=torch.float64)
    predictor_out = torch.randn(4, 4, 6, dtype=torch.float64)
    targets = torch.randint(1, 11, (4, 3))
    shape = LatticeShape.from_lengths(FRAMES[start:stop], SYMBOLS[start:stop])
    return encoder_out[start:stop], predictor_out[start:stop], targets[start:stop], shape


def worker(rank, folder):
    """Writes the gradients of a process pair, of each mode."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    for mode in MODES:
        module = DistributedDataParallel(JoinerAndLoss())
        module(*part(2 * rank, 2 * rank + 2), mode).backward()
        if rank == 0:
            grads = [parameter.grad for parameter in module.parameters()]
            torch.save(grads, f"{folder}/{mode}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("ddp")
    run_two(worker, str(made))
    return made


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_equal_one(folder, mode):
    module = JoinerAndLoss()
    (module(*part(0, 4), mode) / 2).backward()  # DDP averages over ranks
    grads = torch.load(folder / f"{mode}.pt")
    for parameter, grad in zip(module.parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=0, atol=1e-12)
