# SPDX-License-Identifier: Apache-2.0
"""The interface of a search, its result, and functions that the searches share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from transducer_toolkit.ops.checks import INDEX_DTYPES, check_dtype, check_tensor
from transducer_toolkit.ops.native import SUPPORTED_DTYPES
from transducer_toolkit.ops.topology import Topology


@dataclass(frozen=True)
class Hypothesis:
    """The symbols that a search found in one utterance, or in one chunk of it.

    Attributes:
        tokens: symbol ids, without blanks.
        frames: the encoder frame that emitted each token.
        log_probs: the log-probability in nats of each token in its lattice cell. Its exponential
            is the confidence of the token. Comparisons ignore it, because float rounding differs
            between batches.
    """

    tokens: list[int]
    frames: list[int]
    log_probs: list[float] = field(default_factory=list, compare=False)


class Search(Protocol):
    """Interface of a search, which holds the predictor and the joiner of a model."""

    def __call__(self, encoder_out: Tensor, encoder_lengths: Tensor) -> list[Hypothesis]:
        """Decodes a batch.

        Args:
            encoder_out: (B, T, E) float.
            encoder_lengths: (B,) int32 or int64, number of encoder frames, on any device.

        Returns:
            The best hypothesis of each utterance.
        """


class StreamingSearch(Search, Protocol):
    """Interface of a search that also decodes utterances in chunks.

    The tokens that :meth:`advance` and :meth:`finish` return, one after the other, are the
    hypothesis of the whole utterance, however it is divided. A state is not modified.
    """

    def initial_state(self, batch_size: int, device: torch.device | str = "cpu") -> Any:
        """Returns the state before the first frame."""

    def advance(
        self, encoder_out: Tensor, encoder_lengths: Tensor, state: Any
    ) -> tuple[list[Hypothesis], Any]:
        """Decodes the next chunk of each utterance.

        Args:
            encoder_out: (B, T_chunk, E) float.
            encoder_lengths: (B,) int32 or int64, number of frames of each utterance in this chunk,
                on any device; 0 for an utterance without frames.
            state: the state returned by :meth:`initial_state` or by the previous call.

        Returns:
            The tokens that are now certain, with frames counted from the start of the utterance,
            and the state after the chunk.
        """

    def finish(self, state: Any) -> Sequence[Hypothesis]:
        """Ends the utterances; returns their remaining tokens."""


class NonFiniteScoresError(ValueError):
    """Raised if logits are NaN or +inf, or if all logits of a cell are -inf.

    Args:
        utterances: indices of the affected utterances in the batch.
        names: names of all utterances of the batch for the message, or None.

    Attributes:
        utterances: indices of the affected utterances in the batch.
    """

    def __init__(self, utterances: Sequence[int], *, names: Sequence[str] | None = None) -> None:
        self.utterances = list(utterances)
        places = ", ".join(
            f"encoder_out[{b}]" if names is None else names[b] for b in self.utterances[:5]
        )
        more = len(self.utterances) - 5
        super().__init__(
            f"{places}{f' and {more} more' if more > 0 else ''}: the scores of the symbols are NaN "
            "or infinite; check the audio of the utterance and the weights of the model"
        )


def refuse_non_finite(is_bad: Tensor) -> None:
    """Raises a NonFiniteScoresError if an entry of ``is_bad`` (B,) is true."""
    if bool(is_bad.any()):
        raise NonFiniteScoresError(is_bad.nonzero().flatten().tolist())


def check_model(predictor: object, joiner: object) -> None:
    """Checks that a predictor and a joiner have the methods that a search calls.

    Raises:
        TypeError: if one of them lacks a method or an attribute.
        ValueError: if they have different vocabulary sizes.
    """
    for name, module, needed in (
        ("predictor", predictor, ("blank", "vocab_size", "initial_state", "step")),
        ("joiner", joiner, ("project_encoder", "step_projected")),
    ):
        if not all(hasattr(module, attribute) for attribute in needed):
            raise TypeError(
                f"{name}: expected a {name.capitalize()} of transducer_toolkit.modules, or an "
                f"object with {', '.join(needed)}; got {type(module).__name__}"
            )
    sizes = [getattr(module, "vocab_size", None) for module in (predictor, joiner)]
    if None not in sizes and sizes[0] != sizes[1]:
        raise ValueError(
            f"predictor, joiner: expected the same vocab_size, got {sizes[0]} and {sizes[1]}"
        )


def check_extra(joiner: object, topology: Topology) -> None:
    """Raises a ValueError unless the joiner has the logits of durations that a topology needs."""
    found = getattr(joiner, "num_extra", 0)
    if found != topology.num_extra:
        raise ValueError(
            f"topology: {topology.name!r} needs a joiner with {topology.num_extra} logits of "
            f"durations or big blanks, got one with {found}"
        )


def check_encoder_out(encoder_out: Tensor, joiner: object) -> None:
    """Checks that ``encoder_out`` (B, T, E) matches the joiner in width, dtype and device.

    It checks nothing if the joiner has no attribute ``encoder_dim``, as a user's joiner may.

    Raises:
        TypeError: if the dtype does not match.
        ValueError: if the width or the device does not match.
    """
    width = getattr(joiner, "encoder_dim", None)
    if width is None:
        return
    if encoder_out.size(2) != width:
        raise ValueError(
            f"encoder_out: expected shape (B, T, {width}), E from the joiner, "
            f"got {tuple(encoder_out.shape)}"
        )
    weight = next(joiner.parameters())  # type: ignore[attr-defined]
    if encoder_out.device != weight.device:
        raise ValueError(
            f"encoder_out: expected device {weight.device}, that of the joiner, "
            f"got {encoder_out.device}"
        )
    if encoder_out.dtype != weight.dtype and not torch.is_autocast_enabled(weight.device.type):
        raise TypeError(
            f"encoder_out: expected dtype {weight.dtype}, that of the joiner, "
            f"got {encoder_out.dtype}"
        )


def check_encoder_lengths(encoder_out: Tensor, encoder_lengths: Tensor) -> None:
    """Checks that ``encoder_lengths`` (B,) matches ``encoder_out`` (B, T, E).

    Raises:
        TypeError: if one of them is not a dense tensor, or has the wrong dtype.
        ValueError: if the shapes do not match, or a length is not in [0, T].
    """
    check_tensor(encoder_out, "encoder_out")
    check_tensor(encoder_lengths, "encoder_lengths")
    check_dtype(encoder_out, "encoder_out", SUPPORTED_DTYPES)
    if encoder_out.dim() != 3:
        raise ValueError(f"encoder_out: expected shape (B, T, E), got {tuple(encoder_out.shape)}")
    batch_size, max_frames, _ = encoder_out.shape
    if encoder_lengths.shape != (batch_size,):
        raise ValueError(
            f"encoder_lengths: expected shape ({batch_size},), got {tuple(encoder_lengths.shape)}"
        )
    if batch_size == 0:
        return
    check_dtype(encoder_lengths, "encoder_lengths", INDEX_DTYPES)
    if encoder_lengths.device.type == "meta":
        raise ValueError("encoder_lengths: expected a tensor with data, got one on device meta")
    shortest, longest = (int(bound) for bound in encoder_lengths.aminmax())
    if not 0 <= shortest <= longest <= max_frames:
        raise ValueError(
            f"encoder_lengths: expected values in [0, {max_frames}], got values from {shortest} "
            f"to {longest}"
        )


def check_state(state: object, kind: type, batch_size: int) -> None:
    """Checks the state of a search between two chunks.

    Raises:
        TypeError: if it is not of this kind.
        ValueError: if it has another number of utterances.
    """
    if not isinstance(state, kind):
        raise TypeError(f"state: expected a {kind.__name__}, got {type(state).__name__}")
    num_utterances = len(state.num_frames)  # type: ignore[attr-defined]
    if num_utterances != batch_size:
        raise ValueError(
            f"state: expected {batch_size} utterances, the batch size of encoder_out, "
            f"got {num_utterances}"
        )


def step_where(
    emits: Tensor,
    step: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    tokens: Tensor,
    out: Tensor,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """Steps a predictor or language model in the rows that emit a token.

    Args:
        emits: (N,) bool, whether each row emits a token.
        step: the ``step`` method of the predictor or language model.
        tokens: (N,) int64, the emitted tokens; any valid id in rows that emit none.
        out: (N, ...) previous output.
        state: (N, ...) previous state.

    Returns:
        The output and the state. Rows that emit no token keep the previous ones.
    """

    def select(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(emits.view(-1, *[1] * (new.dim() - 1)), new, old)

    next_out, next_state = step(tokens, state)
    return select(next_out, out), select(next_state, state)


def collect_hypotheses(
    steps: Sequence[tuple[Tensor, Tensor, Tensor]], num_hypotheses: int, blank: int
) -> list[Hypothesis]:
    """Collects the tokens that the steps of a search emitted into one hypothesis for each row.

    Args:
        steps: tokens, frames and log-probabilities of each step, all (N,). The token is blank in
            rows that emit none.
        num_hypotheses: N.
        blank: id of blank.

    Returns:
        N hypotheses.

    Example:
        >>> step = torch.tensor([0, 3]), torch.tensor([5, 5]), torch.tensor([0.0, -0.5])
        >>> collect_hypotheses([step], 2, blank=0)[1]
        Hypothesis(tokens=[3], frames=[5], log_probs=[-0.5])
    """
    hypotheses = [Hypothesis([], [], []) for _ in range(num_hypotheses)]
    if steps:
        # (N, num_steps) each, so that nonzero() below goes through a row in the order of emission.
        tokens, frames, log_probs = (
            torch.stack(column, dim=1).cpu() for column in zip(*steps, strict=True)
        )
        emitted = tokens != blank
        columns = (emitted.nonzero()[:, 0], tokens[emitted], frames[emitted], log_probs[emitted])
        for row, token, frame, log_prob in zip(*(c.tolist() for c in columns), strict=True):
            hypotheses[row].tokens.append(token)
            hypotheses[row].frames.append(frame)
            hypotheses[row].log_probs.append(log_prob)
    return hypotheses
