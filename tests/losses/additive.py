# SPDX-License-Identifier: Apache-2.0
"""Random ragged batches of encoder and predictor scores for the k2-compatible losses."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from transducer_toolkit.losses.reference import reference_loss


@dataclass
class AdditiveBatch:
    lm: Tensor  # (B, S + 1, V)
    am: Tensor  # (B, T, V)
    symbols: Tensor  # (B, S), 10**8 in the padding
    boundary: Tensor  # (B, 4)
    blank: int = 0

    @property
    def inputs(self) -> tuple[Tensor, Tensor]:
        return self.lm, self.am

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, int]:
        return self.lm, self.am, self.symbols, self.blank

    def cut(self, b: int) -> tuple[Tensor, Tensor, Tensor]:
        """lm (U_b + 1, V), am (T_b, V) and symbols (U_b,) of one utterance, without padding."""
        s_begin, t_begin, s_end, t_end = self.boundary[b].tolist()
        return (
            self.lm[b, s_begin : s_end + 1],
            self.am[b, t_begin:t_end],
            self.symbols[b, s_begin:s_end],
        )

    def expected(
        self,
        rnnt_type: str,
        *,
        lm_only_scale: float = 0.0,
        am_only_scale: float = 0.0,
        delay_penalty: float = 0.0,
        enumerate_paths: bool = False,
    ) -> Tensor:
        """Losses (B,) from the definition, by logits of all cells and the reference lattice."""
        parts = [self.cut(b) for b in range(len(self.symbols))]
        # Not softmax().mean().log(): that is log(0) where a symbol is 745 nats below another.
        contexts = torch.cat([lm.log_softmax(-1) for lm, _, _ in parts])
        unigram = contexts.logsumexp(0) - math.log(len(contexts))
        losses = []
        for b, (lm, am, symbols) in enumerate(parts):
            log_probs = (1 - lm_only_scale - am_only_scale) * (am[:, None] + lm).log_softmax(-1)
            if lm_only_scale:
                log_probs = log_probs + lm_only_scale * lm.log_softmax(-1)
            if am_only_scale:
                log_probs = log_probs + am_only_scale * (am + unigram).log_softmax(-1)[:, None]
            loss = reference_loss(
                log_probs[None],
                symbols[None],
                torch.tensor([len(am)]),
                torch.tensor([len(symbols)]),
                self.blank,
                from_log_softmax=True,
                topology=rnnt_type,
                delay_penalty=delay_penalty,
                enumerate_paths=enumerate_paths,
            )
            # The penalty counts frames of the tensor, (t_end - 1) / 2 - t; the reference those of
            # the utterance: half of t_begin a symbol.
            t_begin = int(self.boundary[b, 1])
            losses.append(loss + delay_penalty * len(symbols) * t_begin / 2)
        return torch.stack(losses)


def additive_batch(
    rows: list[tuple[int, int, int, int]],
    vocab_size: int = 6,
    *,
    dtype: torch.dtype = torch.float64,
    scale: float = 1.0,
    blank: int = 0,
    padding: float = float("nan"),
    extra: int = 1,
) -> AdditiveBatch:
    """Boundary rows -> tensors `extra` longer than needed, with garbage in the padding."""
    boundary = torch.tensor(rows)
    num_symbols, num_frames = (int(boundary[:, i].max()) + extra for i in (2, 3))
    lm = scale * torch.randn(len(rows), num_symbols + 1, vocab_size, dtype=dtype)
    am = scale * torch.randn(len(rows), num_frames, vocab_size, dtype=dtype)
    symbols = torch.randint(0, vocab_size, (len(rows), num_symbols))
    for b, (s_begin, t_begin, s_end, t_end) in enumerate(rows):
        for tensor, begin, end in ((lm, s_begin, s_end + 1), (am, t_begin, t_end)):
            tensor[b, :begin] = padding
            tensor[b, end:] = padding
        symbols[b, :s_begin] = -1
        symbols[b, s_end:] = 10**8
    return AdditiveBatch(lm.requires_grad_(), am.requires_grad_(), symbols, boundary, blank)


def boundary_row(frames: int, symbols: int, t_begin: int = 0, s_begin: int = 0) -> tuple:
    return s_begin, t_begin, s_begin + symbols, t_begin + frames
