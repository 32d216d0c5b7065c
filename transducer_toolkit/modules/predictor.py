# SPDX-License-Identifier: Apache-2.0
"""Predictors: the previous symbols to one vector, for whole target sequences or step by step."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from transducer_toolkit.ops.checks import check_at_least, check_int, check_probability


class Predictor(nn.Module, ABC):
    """The interface of a predictor: all columns of the lattice at once, or one symbol at a time.

    ``forward`` prepends blank, the start symbol, and equals the steps: with
    ``out, state = step(blank, initial_state)`` the column ``u = 0``, and
    ``out, state = step(targets[:, u], state)`` the column ``u + 1``.

    A state is one tensor whose first axis is the batch, so that a search reorders or selects
    hypotheses by indexing it.

    Attributes:
        vocab_size: number of symbols with blank, V.
        output_dim: width of the output, P.
        blank: id of blank.
    """

    vocab_size: int
    output_dim: int
    blank: int

    def __init__(self, vocab_size: int, blank: int) -> None:
        super().__init__()
        check_at_least(1, vocab_size=vocab_size)
        check_int(blank, "blank")
        if not 0 <= blank < vocab_size:
            raise ValueError(f"blank must be in [0, {vocab_size}), got {blank}")
        self.vocab_size = vocab_size
        self.blank = blank

    @abstractmethod
    def forward(self, targets: Tensor) -> Tensor:
        """Return the output for every prefix of every target sequence.

        Args:
            targets: (B, U) int32 or int64. A column depends only on the targets before it. Padding
                may hold any value: an id outside [0, V) means no symbol.

        Returns:
            (B, U + 1, P).
        """

    @abstractmethod
    def initial_state(self, batch_size: int, device: torch.device | str = "cpu") -> Tensor:
        """Return the state before the start symbol, (N, ...)."""

    @abstractmethod
    def step(self, tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Consume one symbol of each hypothesis.

        Args:
            tokens: (N,) int64, the newest symbols; blank in the first step.
            state: (N, ...) from :meth:`initial_state` or the previous step.

        Returns:
            The output (N, P) and the next state (N, ...).
        """

    def prepend_blank(self, targets: Tensor) -> Tensor:
        """Convert (B, U) target ids to (B, U + 1) int64 ids that start with blank."""
        return nn.functional.pad(targets.long(), (1, 0), value=self.blank)

    def embed(self, embedding: nn.Embedding, tokens: Tensor) -> Tensor:
        """Embed ids; an id outside [0, V) becomes the zero vector."""
        known = (tokens >= 0) & (tokens < self.vocab_size)
        return embedding(tokens.where(known, self.blank)) * known.unsqueeze(-1)


class StatelessPredictor(Predictor):
    """A predictor that depends on the last ``context_size`` symbols only.

    ``relu(sum_i w_i * embedding(y_{u-i}))`` with one weight per channel and position, from
    "RNN-Transducer with Stateless Prediction Network" (Ghodsi et al., 2020), in the form that
    icefall made common. It starts from the context ``[-1, ..., -1, blank]``, as sherpa-onnx does.

    Args:
        vocab_size: number of symbols with blank, V.
        embedding_dim: width of embedding and output, P.
        context_size: number of symbols seen, at least 1.
        blank: id of blank.

    Raises:
        ValueError: if a size is below 1 or blank is outside [0, V).
        TypeError: if one is no integer.

    Example:
        >>> predictor = StatelessPredictor(10, embedding_dim=16, context_size=2)
        >>> predictor(torch.tensor([[3, 4, -1]])).shape
        torch.Size([1, 4, 16])
    """

    def __init__(
        self, vocab_size: int, embedding_dim: int = 128, context_size: int = 2, blank: int = 0
    ) -> None:
        super().__init__(vocab_size, blank)
        check_at_least(1, embedding_dim=embedding_dim, context_size=context_size)
        self.output_dim = embedding_dim
        self.context_size = context_size
        self.embedding = nn.Embedding(vocab_size, embedding_dim)
        # Smaller outputs than the encoder's at first, or the model learns the text without audio.
        nn.init.normal_(self.embedding.weight, std=0.3)
        # (context_size, P), oldest symbol first
        self.context_weight = nn.Parameter(torch.rand(context_size, embedding_dim))

    def forward(self, targets: Tensor) -> Tensor:
        tokens = self.prepend_blank(targets)
        # (B, U + 1) -> (B, U + 1, context_size): the last symbols of each column
        context = nn.functional.pad(tokens, (self.context_size - 1, 0), value=-1)
        return self._mix(context.unfold(1, self.context_size, 1))

    def initial_state(self, batch_size: int, device: torch.device | str = "cpu") -> Tensor:
        return torch.full((batch_size, self.context_size), -1, dtype=torch.int64, device=device)

    def step(self, tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        state = torch.cat((state[:, 1:], tokens.unsqueeze(1)), dim=1)
        return self._mix(state), state

    def _mix(self, context: Tensor) -> Tensor:
        """(..., context_size) ids to (..., P)."""
        return (self.embed(self.embedding, context) * self.context_weight).sum(-2).relu()


class LstmPredictor(Predictor):
    """A predictor that depends on all previous symbols: embedding and LSTM layers (Graves, 2012).

    Args:
        vocab_size: number of symbols with blank, V.
        embedding_dim: width of the embedding.
        hidden_dim: width of each LSTM layer, and of the output, P.
        num_layers: number of LSTM layers.
        dropout: probability of zeroing a unit before and after the LSTM layers.
        blank: id of blank.

    Raises:
        ValueError: if a size is below 1, ``dropout`` not in [0, 1], or blank outside [0, V).
        TypeError: if one is no number.

    Example:
        >>> predictor = LstmPredictor(10, embedding_dim=16, hidden_dim=32)
        >>> out, state = predictor.step(torch.tensor([0]), predictor.initial_state(1))
        >>> out.shape
        torch.Size([1, 32])
    """

    def __init__(
        self,
        vocab_size: int,
        embedding_dim: int = 128,
        hidden_dim: int = 128,
        num_layers: int = 1,
        dropout: float = 0.0,
        blank: int = 0,
    ) -> None:
        super().__init__(vocab_size, blank)
        check_at_least(1, embedding_dim=embedding_dim, hidden_dim=hidden_dim, num_layers=num_layers)
        check_probability(dropout, "dropout")
        self.output_dim = hidden_dim
        self.embedding = nn.Embedding(vocab_size, embedding_dim)
        self.dropout = nn.Dropout(dropout)
        self.lstm = nn.LSTM(
            embedding_dim,
            hidden_dim,
            num_layers,
            batch_first=True,
            dropout=dropout if num_layers > 1 else 0.0,
        )

    def forward(self, targets: Tensor) -> Tensor:
        embedded = self.embed(self.embedding, self.prepend_blank(targets))
        hidden, _ = self.lstm(self.dropout(embedded))
        return self.dropout(hidden)

    def initial_state(self, batch_size: int, device: torch.device | str = "cpu") -> Tensor:
        weight = self.embedding.weight
        shape = (batch_size, 2, self.lstm.num_layers, self.lstm.hidden_size)
        return torch.zeros(shape, dtype=weight.dtype, device=device)

    def step(self, tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        # (N, 2, layers, H) -> hidden and cell, each (layers, N, H)
        hidden, cell = state.permute(1, 2, 0, 3).contiguous().unbind(0)
        embedded = self.embed(self.embedding, tokens).unsqueeze(1)
        out, (hidden, cell) = self.lstm(self.dropout(embedded), (hidden, cell))
        state = torch.stack((hidden, cell)).permute(2, 0, 1, 3)
        return self.dropout(out.squeeze(1)), state
