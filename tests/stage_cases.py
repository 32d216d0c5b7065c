# SPDX-License-Identifier: Apache-2.0
"""Random input for single stages, in every layout, and their output from any backend."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tests import stage_calls as stages
from tests.stage_calls import lattice_batch
from transducer_toolkit.ops.lattice import CellScores, LatticeBatch, RowTile

LAYOUTS = ("packed", "padded", "padded_begins", "band", "band_begins", "packed_band")


@dataclass
class Case:
    """A batch of lattices: arguments of LatticeBatch."""

    logit_lengths: Tensor
    target_lengths: Tensor
    targets: Tensor
    max_frames: int
    padded: bool
    band_start: Tensor | None = None
    band_width: int = 0
    begins: Tensor | None = None

    def batch(self, device: torch.device | str = "cpu") -> LatticeBatch:
        fields = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }
        return lattice_batch(**fields, device=torch.device(device))


def make_case(
    layout: str,
    frames: tuple[int, ...] = (9, 1, 6, 7),
    symbols: tuple[int, ...] = (4, 0, 5, 2),
    vocab_size: int = 7,
    band_width: int = 3,
) -> Case:
    """Random labels (blank is 0), and for band layouts climbing bands that leave paths.

    With "begins" the given lengths count from a random first frame and symbol.
    """
    num_frames, num_targets = torch.tensor(frames), torch.tensor(symbols)
    begins = None
    if layout.endswith("_begins"):
        begins = torch.stack([torch.randint(0, 3, (len(frames),)) for _ in range(2)], 1)
    first_symbol, first_frame = (0, 0) if begins is None else (begins[:, 0], begins[:, 1])
    max_frames = int((num_frames + first_frame).max())
    max_targets = int((num_targets + first_symbol).max())
    case = Case(
        num_frames,
        num_targets,
        torch.randint(1, vocab_size, (len(frames), max_targets)),
        max_frames,
        padded=not layout.startswith("packed"),
        begins=begins,
    )
    if "band" not in layout:
        return case
    width = min(band_width, max_targets + 1)
    band_start = torch.zeros(len(frames), max_frames, dtype=torch.int64)
    for b, (count, labels) in enumerate(zip(frames, symbols, strict=True)):
        skip_symbols, skip_frames = (0, 0) if begins is None else begins[b].tolist()
        start, last = 0, max(0, labels + 1 - width)
        for t in range(count):
            needed = last - (width - 1) * max(0, count - 1 - t)
            if t > 0:
                start = min(last, start + int(torch.randint(0, 2, ())))
            start = max(start, needed)
            band_start[b, t + skip_frames] = start + skip_symbols
    return replace(case, band_start=band_start, band_width=width)


def cell_rows(batch: LatticeBatch) -> Tensor:
    """(rows,) bool: which rows are cells and not padding."""
    scores = CellScores.zeros(batch, torch.device("cpu"))
    scores.label.fill_(5.0)
    logits = torch.zeros(batch.num_rows, 2, dtype=torch.float64)
    stages.cell_scores(logits, batch, batch.all_rows(), scores, blank=0, from_log_softmax=True)
    return scores.label != 5.0


def misaligned(tensor: Tensor, elements: int) -> Tensor:
    """A contiguous copy whose address is that many elements past a 16-byte boundary.

    It ends where its memory ends, so that a sanitizer sees a read past it.
    """
    memory = tensor.new_empty(tensor.numel() + elements)
    assert memory.data_ptr() % 16 == 0
    return memory[elements:].view(tensor.shape).copy_(tensor)


def score(
    logits: Tensor, batch: LatticeBatch, tile: RowTile, **options: object
) -> tuple[Tensor, Tensor, Tensor]:
    """Stage 1: normalizer, blank score and label score; what is not written is 7."""
    out = CellScores.zeros(batch, logits.device)
    for tensor in (out.normalizer, out.blank, out.label):
        tensor.fill_(7.0)
    stages.cell_scores(logits, batch, tile, out, **{"blank": 0, **options})
    return out.normalizer, out.blank, out.label


def random_scores(batch: LatticeBatch, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Blank and label log-probabilities for stage 2, -inf here and there."""
    blank, label = (
        -scale * torch.rand(batch.num_rows, dtype=torch.float64).mul(4).exp() for _ in range(2)
    )
    label[torch.rand(batch.num_rows) < 0.03] = -torch.inf
    return blank, label


def kept_rows(
    uses: tuple[Tensor, Tensor],
    batch: LatticeBatch,
    dropped_mass: float,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """The kept rows alone, and their numbers."""
    kept = stages.kept_rows(
        *(tensor.to(device) for tensor in uses), batch, dropped_mass=dropped_mass
    )
    return kept.rows[: int(kept.total)], kept.counts


def random_uses(batch: LatticeBatch) -> tuple[Tensor, Tensor]:
    """Posteriors over many powers of ten, some of them zero, some rows NaN."""
    exponents = -12 * torch.rand(batch.num_rows, dtype=torch.float64) ** 2
    total = torch.pow(10.0, exponents)
    total[torch.rand(batch.num_rows) < 0.1] = 0
    share = torch.rand(batch.num_rows, dtype=torch.float64)
    return total * share, total * (1 - share)


def run_lattice(
    scores: tuple[Tensor, Tensor],
    batch: LatticeBatch,
    device: torch.device | str,
    **options: object,
) -> tuple[Tensor, Tensor, Tensor]:
    """Stage 2: loss and uses."""
    options = {"delay_penalty": 0.0, "fastemit_lambda": 0.0, "with_uses": True, **options}
    return stages.lattice(*(tensor.to(device) for tensor in scores), batch, **options)
