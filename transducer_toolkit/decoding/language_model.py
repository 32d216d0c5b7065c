# SPDX-License-Identifier: Apache-2.0
"""The interface of language models for the searches, and their weighted sum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from transducer_toolkit.ops.checks import check_number

__all__ = ["LanguageModel", "WeightedSum", "check_lm", "final_scores"]


class LanguageModel(Protocol):
    """Interface of a language model for shallow fusion.

    The state is one tensor whose first axis is the batch. As in
    :class:`~transducer_toolkit.modules.Predictor`, blank is the start symbol.

    A language model may have one more method, ``final(state)``. It returns scores (N,) that the
    beam search adds when the utterance ends, such as the log-probability of the end.
    """

    def initial_state(self, batch_size: int, device: torch.device | str = "cpu") -> Tensor:
        """Returns the state before the start symbol, (N, ...)."""

    def step(self, tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Consumes one symbol of each hypothesis.

        Args:
            tokens: (N,) int64, the newest symbols; blank in the first step.
            state: (N, ...) from :meth:`initial_state` or the previous step.

        Returns:
            The log-probabilities (N, V) of the next symbol in nats, and the next state (N, ...).
            The search ignores the log-probability of blank.
        """


def check_lm(lm: object, weight: object, name: str = "lm") -> None:
    """Checks the arguments ``lm`` and ``lm_weight`` of a search.

    Raises:
        TypeError: if it is neither a language model nor None, or the weight is no number.
        ValueError: if the weight is not finite.
    """
    if lm is not None and not all(hasattr(lm, name) for name in ("initial_state", "step")):
        raise TypeError(f"{name}: expected a LanguageModel or None, got {type(lm).__name__}")
    check_number(weight, f"{name}_weight")
    if not math.isfinite(weight):  # type: ignore[arg-type]
        raise ValueError(f"{name}_weight: expected a finite number, got {weight}")


def final_scores(lm: LanguageModel, state: Tensor) -> Tensor:
    """Returns the scores (N,) that a language model adds at the end; 0 without ``final``."""
    final = getattr(lm, "final", None)
    return state.new_zeros(len(state), dtype=torch.float32) if final is None else final(state)


class WeightedSum:
    """Adds the weighted scores of several language models, as one language model.

    Args:
        parts: language models with their weights, at least one. A negative weight subtracts.

    Raises:
        TypeError: if a part is no language model, or its weight is no number.
        ValueError: if there are no parts, or a weight is not finite.

    Example:
        >>> from transducer_toolkit.data.tokenizer import CharTokenizer
        >>> from transducer_toolkit.decoding import HotwordModel
        >>> tokenizer = CharTokenizer.from_texts(["one two"])
        >>> one, two = (HotwordModel([word], tokenizer, score=1) for word in ("one", "two"))
        >>> lm = WeightedSum([(one, 1), (two, 0.5)])
        >>> scores, state = lm.step(torch.tensor([0]), lm.initial_state(1))
        >>> [round(float(scores[0, tokenizer.encode(letter)[0]]), 1) for letter in "otw"]
        [1.0, 0.5, 0.0]
    """

    def __init__(self, parts: Sequence[tuple[LanguageModel, float]]) -> None:
        self.parts = [(lm, weight) for lm, weight in parts]
        if not self.parts:
            raise ValueError("parts: expected at least one language model, got none")
        for index, (lm, weight) in enumerate(self.parts):
            if lm is None:
                raise TypeError(f"parts[{index}]: expected a LanguageModel, got None")
            check_lm(lm, weight, f"parts[{index}]")
        self._layout: list[tuple[torch.dtype, torch.Size, int]] = []

    @property
    def scores_words(self) -> bool:
        """Whether a part scores words at their ends, which greedy search cannot use."""
        return any(getattr(lm, "scores_words", False) for lm, _ in self.parts)

    def initial_state(self, batch_size: int, device: torch.device | str = "cpu") -> Tensor:
        """Returns the states of the parts as the bytes (N, number of bytes) of one tensor."""
        states = [lm.initial_state(batch_size, device) for lm, _ in self.parts]
        self._layout = [
            (state.dtype, state.shape[1:], state.element_size() * math.prod(state.shape[1:]))
            for state in states
        ]
        return self._joined(states)

    def step(self, tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the weighted sum of the scores (N, V), and the next state."""
        total, states = None, []
        for (lm, weight), part in zip(self.parts, self._divided(state), strict=True):
            scores, after = lm.step(tokens, part)
            total = weight * scores if total is None else total + weight * scores
            states.append(after)
        assert total is not None
        return total, self._joined(states)

    def final(self, state: Tensor) -> Tensor:
        """Returns the weighted sum (N,) of the final scores."""
        states = zip(self.parts, self._divided(state), strict=True)
        finals = [weight * final_scores(lm, part) for (lm, weight), part in states]
        return torch.stack([final.float() for final in finals]).sum(0)

    def _joined(self, states: Sequence[Tensor]) -> Tensor:
        # Bytes, because the states have different dtypes and none may lose digits.
        sizes = [size for _, _, size in self._layout]
        rows = [
            state.contiguous().view(torch.uint8).view(len(state), size)
            if state.numel()
            else torch.zeros(len(state), size, dtype=torch.uint8, device=state.device)
            for state, size in zip(states, sizes, strict=True)
        ]
        return torch.cat(rows, dim=1)

    def _divided(self, state: Tensor) -> list[Tensor]:
        divided = []
        parts = state.split([size for _, _, size in self._layout], dim=1)
        for part, (dtype, shape, _) in zip(parts, self._layout, strict=True):
            # A copy, because a view of another dtype needs an aligned address.
            flat = part.clone(memory_format=torch.contiguous_format).flatten()
            divided.append(flat.view(dtype).view(len(state), *shape))
        return divided
