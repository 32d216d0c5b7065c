# SPDX-License-Identifier: Apache-2.0
"""The language model that a transducer has learned from the texts of its training."""

from __future__ import annotations

import torch
from torch import Tensor

from transducer_toolkit.decoding.search import check_model
from transducer_toolkit.modules.joiner import Joiner
from transducer_toolkit.modules.predictor import Predictor

__all__ = ["InternalLanguageModel"]


class InternalLanguageModel:
    """The internal language model of a transducer, to be subtracted from its scores.

    It is the joiner without the encoder: exact for a HAT model, an estimate for others. Give it a
    negative weight in a :class:`WeightedSum`, next to a language model of the texts to recognize.

    Args:
        predictor: predictor of the model, in eval mode.
        joiner: joiner of the model, in eval mode.

    Raises:
        TypeError: if the joiner has no method ``internal_lm``.

    Source:
        E. Variani et al., "Hybrid Autoregressive Transducer (HAT)", 2020; Z. Meng et al.,
        "Internal Language Model Estimation for Domain-Adaptive End-to-End Speech Recognition",
        2021.
    """

    def __init__(self, predictor: Predictor, joiner: Joiner) -> None:
        if not hasattr(joiner, "internal_lm"):
            raise TypeError(
                f"joiner: expected one with the method internal_lm, got {type(joiner).__name__}"
            )
        check_model(predictor, joiner)
        self.predictor, self.joiner = predictor, joiner

    def initial_state(self, batch_size: int, device: torch.device | str = "cpu") -> Tensor:
        """Returns the state of the predictor."""
        return self.predictor.initial_state(batch_size, device)

    def step(self, tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the log-probabilities (N, V) of the next label, 0 for blank, and the state."""
        predictor_out, state = self.predictor.step(tokens, state)
        blank = self.predictor.blank
        scores = self.joiner.internal_lm(predictor_out, blank=blank)
        is_blank = torch.arange(scores.size(-1), device=scores.device) == blank
        return scores.masked_fill(is_blank, 0), state
