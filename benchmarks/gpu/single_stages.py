# SPDX-License-Identifier: Apache-2.0
"""The native stages one by one, on the sizes of a workload."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.workloads import Workload
from transducer_toolkit.ops import stages
from transducer_toolkit.ops.lattice import CellScores, LatticeBatch, Lengths, RowTile
from transducer_toolkit.ops.options import LossOptions

TILE_ROWS = 22_000  # about what a tile of the fused step has on a GPU at V = 500, D = 512


class SingleStages:
    """Calls each stage on packed logits; stage 1 must come before stage 2, and that before 3.

    Args:
        workload: the batch, and the device.
        dtype: of logits, encoder and predictor.
    """

    def __init__(self, workload: Workload, dtype: torch.dtype) -> None:
        shape, device = workload.shape, torch.device(workload.device)
        self.batch = LatticeBatch(
            Lengths(*shape.lengths),
            workload.targets(),
            max_frames=shape.max_frames,
            padded=False,
        )
        self.logits = workload.logits().to(dtype)
        self.grad = torch.empty_like(self.logits)
        self.scores = CellScores.zeros(self.batch, device)
        self.loss_grad = torch.ones(shape.num_utterances, dtype=torch.float64, device=device)
        self.options = LossOptions(blank=0)
        self.uses: tuple[Tensor, Tensor] | None = None
        enc, pred, _, _ = (tensor.to(dtype) for tensor in workload.joiner_inputs())
        self.joint = stages.Joint(enc, pred, "tanh")
        self.tile = RowTile(0, min(TILE_ROWS, self.batch.num_rows))
        self.hidden = torch.zeros(self.tile.size, enc.size(-1), dtype=dtype, device=device)
        self.joint_grads = torch.zeros_like(enc).float(), torch.zeros_like(pred).float()

    def join_forward(self) -> None:
        stages.join_forward(self.joint, self.batch, self.tile, self.hidden)

    def cell_scores(self) -> None:
        tile = self.batch.all_rows()
        stages.cell_scores(self.logits, self.batch, tile, self.options, self.scores)

    def lattice(self, exact: bool = False) -> None:
        _, *uses = stages.lattice(
            self.scores, self.batch, self.options, with_uses=True, exact=exact
        )
        self.uses = uses[0], uses[1]

    def kept_rows(self) -> None:
        assert self.uses is not None
        stages.kept_rows(*self.uses, self.batch, dropped_mass=1e-7)

    def logits_grad(self) -> None:
        assert self.uses is not None
        posteriors = stages.Posteriors(self.scores.normalizer, *self.uses, self.loss_grad)
        tile = self.batch.all_rows()
        stages.logits_grad(self.logits, self.batch, tile, self.options, posteriors, self.grad)

    def join_backward(self) -> None:
        # The hidden layer stands for its gradient: any of that size.
        stages.join_backward(
            self.joint, self.batch, self.tile, self.hidden, self.hidden, self.joint_grads
        )
