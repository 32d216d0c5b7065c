# SPDX-License-Identifier: Apache-2.0
"""How many kernels and copies a step launches on CUDA, which a host must keep up with."""

import pytest
import torch

from tests.losses.coarse_case import Case
from tests.pretend_cuda import CUDA, gradients, pretend_cuda, to_cuda
from transducer_toolkit import fused_joiner_loss
from transducer_toolkit.ops import fused_joiner, joint_tiles


def launches(case, *, is_coarse):
    """Those of forward and backward with as many tiles as a batch of 726,474 cells on an H100."""
    with pretend_cuda() as traffic:
        case.shape.to(CUDA)
        there = [to_cuda(tensor) for tensor in (*case.inputs, case.targets)]
        fused_joiner_loss(*there, *case.shape.lengths, 0, shape=case.shape)
        run = gradients(
            fused_joiner.operator,
            traffic,
            keep_logits=is_coarse,
            with_uses=True,
            is_coarse=is_coarse,
        )
        ones = to_cuda(torch.ones(len(case.targets)))
        traffic.launches.clear()
        run(ones, 4)
        return list(traffic.launches)


@pytest.fixture
def case_of(monkeypatch):
    def make(scale):
        frames = [40 - index % 2 for index in range(8)]
        case = Case(frames, range(4, 12), scale=scale, vocab_size=50, width=52)
        share = case.shape.num_cells / 726_474 * (2 * 52 + 50) / (2 * 512 + 500)
        for name in ("TILE_BYTES", "TILE_BYTES_BESIDE_KEPT"):
            size = getattr(joint_tiles, name)["cuda"]
            monkeypatch.setitem(getattr(joint_tiles, name), "cuda", int(size * share))
        monkeypatch.setattr(joint_tiles, "KEPT_LOGITS_BYTES", {})
        return case

    return make


@pytest.mark.usefixtures("coarse_pass")
@pytest.mark.parametrize(("scale", "limit"), [(1.0, 170), (12.0, 137)], ids=["initial", "peaky"])
def test_coarse_pass(case_of, scale, limit):
    """Torch operators for each row made it 415 and 451.

    More than half of the cells of this initial lattice matter, so backward has seven tiles.
    """
    found = launches(case_of(scale), is_coarse=True)
    assert len(found) <= limit
    for name in ("row_weights", "kept_rows", "replace_scores"):
        assert name in found
    assert not any("index" in name or "segment" in name or "repeat" in name for name in found)


@pytest.mark.parametrize(("scale", "limit"), [(1.0, 140), (12.0, 85)], ids=["initial", "peaky"])
def test_plain_path(case_of, scale, limit):
    assert len(launches(case_of(scale), is_coarse=False)) <= limit


def test_the_double_counts():
    with pretend_cuda() as traffic:
        there = to_cuda(torch.arange(6.0))
        for run, count in (
            (lambda: there.view(2, 3)[1], 0),
            (lambda: torch.empty(3, device=CUDA), 0),
            (lambda: there.new_empty(3), 0),
            (lambda: there + 1, 1),
            (lambda: there.mul_(1), 1),
            (lambda: there[there.long()], 2),
            (lambda: int(there[0]), 1),
            (lambda: there.masked_fill(there > 2, 0.0), 3),
            (lambda: torch.zeros(3, device=CUDA), 1),
        ):
            traffic.launches.clear()
            run()
            assert len(traffic.launches) == count, traffic.launches
