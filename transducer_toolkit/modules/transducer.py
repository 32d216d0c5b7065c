# SPDX-License-Identifier: Apache-2.0
"""The transducer: encoder, predictor and joiner, without a loss."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from transducer_toolkit.modules.encoder import Encoder
from transducer_toolkit.modules.joiner import Joiner
from transducer_toolkit.modules.predictor import Predictor


class Transducer(nn.Module):
    """Encoder, predictor and joiner of one model.

    Args:
        encoder: converts features to encoder frames.
        predictor: converts the previous symbols to one vector.
        joiner: converts a frame and a vector to logits.

    Example:
        >>> import torch
        >>> from transducer_toolkit.modules import ConvLstmEncoder, Joiner, StatelessPredictor
        >>> model = Transducer(
        ...     ConvLstmEncoder(hidden_dim=64),
        ...     StatelessPredictor(12, embedding_dim=32),
        ...     Joiner(64, 32, 48, 12),
        ... )
        >>> features, feature_lengths = torch.randn(1, 20, 80), torch.tensor([20])
        >>> encoder_out, lengths, predictor_out = model(features, feature_lengths, torch.ones(1, 3))
        >>> encoder_out.shape, lengths, predictor_out.shape
        (torch.Size([1, 5, 64]), tensor([5]), torch.Size([1, 4, 32]))
    """

    def __init__(self, encoder: Encoder, predictor: Predictor, joiner: Joiner) -> None:
        super().__init__()
        self.encoder = encoder
        self.predictor = predictor
        self.joiner = joiner

    @classmethod
    def build(
        cls,
        encoder: Encoder,
        predictor: Callable[..., Predictor],
        joiner: Callable[..., Joiner],
        *,
        vocab_size: int,
        blank: int,
    ) -> Transducer:
        """Build a transducer from an encoder, and functions that make predictor and joiner.

        Args:
            encoder: the encoder.
            predictor: called with ``vocab_size`` and ``blank``.
            joiner: called with ``encoder_dim``, ``predictor_dim`` and ``vocab_size``.
            vocab_size: number of symbols with blank, V.
            blank: id of blank.

        Example:
            >>> from functools import partial
            >>> from transducer_toolkit.modules import ConvLstmEncoder, Joiner, StatelessPredictor
            >>> model = Transducer.build(
            ...     ConvLstmEncoder(hidden_dim=64),
            ...     partial(StatelessPredictor, embedding_dim=32),
            ...     partial(Joiner, joiner_dim=48),
            ...     vocab_size=12,
            ...     blank=0,
            ... )
        """
        built_predictor = predictor(vocab_size=vocab_size, blank=blank)
        built_joiner = joiner(
            encoder_dim=encoder.output_dim,
            predictor_dim=built_predictor.output_dim,
            vocab_size=vocab_size,
        )
        return cls(encoder, built_predictor, built_joiner)

    @property
    def vocab_size(self) -> int:
        """Number of symbols with blank, V."""
        return self.predictor.vocab_size

    @property
    def blank(self) -> int:
        """Id of blank."""
        return self.predictor.blank

    def forward(
        self, features: Tensor, feature_lengths: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run encoder and predictor; a loss stage runs the joiner.

        Args:
            features: (B, T_in, F) float32.
            feature_lengths: (B,) int64, in feature frames, best on the CPU.
            targets: (B, U) integer ids; padding may hold any value.

        Returns:
            ``encoder_out`` (B, T, E), ``encoder_lengths`` (B,) and ``predictor_out`` (B, U + 1, P).
        """
        encoder_out, encoder_lengths = self.encoder(features, feature_lengths)
        return encoder_out, encoder_lengths, self.predictor(targets)
