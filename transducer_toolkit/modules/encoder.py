# SPDX-License-Identifier: Apache-2.0
"""Encoders: features to encoder frames."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from transducer_toolkit.modules.encoder_frontend import (
    ConvSubsampling,
    FeatureNormalizer,
    NumFrames,
    frame_mask,
    subsampled_length,
)


class Encoder(nn.Module, ABC):
    """What every encoder offers: lengths in, lengths out, padding never leaks.

    Attributes:
        num_features: feature bins expected, F.
        output_dim: width of the encoder frames, E.
    """

    num_features: int
    output_dim: int

    @abstractmethod
    def forward(self, features: Tensor, feature_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encode a padded batch.

        Args:
            features: (B, T_in, F) float32; padded frames may hold anything.
            feature_lengths: (B,) int64, in feature frames; best on the CPU, where the result's
                lengths are needed too.

        Returns:
            ``encoder_out`` (B, T, E), unspecified but finite at padded frames, and
            ``encoder_lengths`` (B,) int64 on the device of ``feature_lengths``.

        Raises:
            ValueError: if a shape does not fit, or a length on the CPU is outside [1, T_in].
        """

    @abstractmethod
    def num_output_frames(self, num_frames: NumFrames) -> NumFrames:
        """Number of encoder frames of ``num_frames`` feature frames, an int or a tensor."""

    @property
    def subsampling_factor(self) -> int:
        """Feature frames per encoder frame: frame t stands for those from t times this on.

        Example:
            >>> ConvLstmEncoder(hidden_dim=16).subsampling_factor
            4
        """
        num_frames = 1 << 20  # long enough that what is lost at the edges does not matter
        return round(num_frames / self.num_output_frames(num_frames))

    def check_input(self, features: Tensor, feature_lengths: Tensor) -> None:
        """Raise the ``ValueError`` that :meth:`forward` promises."""
        if features.dim() != 3 or features.size(2) != self.num_features:
            raise ValueError(
                f"features must have shape (B, T_in, {self.num_features}), "
                f"got {tuple(features.shape)}"
            )
        batch_size, max_frames = features.shape[:2]
        if feature_lengths.shape != (batch_size,):
            raise ValueError(
                f"feature_lengths must have shape ({batch_size},), "
                f"got {tuple(feature_lengths.shape)}"
            )
        if feature_lengths.device.type == "cpu":  # elsewhere looking at them would synchronise
            for index, length in enumerate(feature_lengths.tolist()):
                if not 1 <= length <= max_frames:
                    raise ValueError(
                        f"feature_lengths[{index}] must be in [1, {max_frames}], got {length}"
                    )


class ConvLstmEncoder(Encoder):
    """Normalisation, two 2-D convolutions (4x subsampling) and a stack of LSTM layers.

    The LSTM runs forward in time only: with ``normalization="global"`` an encoder frame depends
    on no audio more than two frames of 40 ms ahead.

    Args:
        num_features: feature bins, F.
        conv_channels: channels of the convolutions.
        hidden_dim: width of each LSTM layer, and of the encoder frames, E.
        num_layers: number of LSTM layers.
        dropout: probability of zeroing a unit before, between and after the LSTM layers.
        normalization: ``"utterance"`` or ``"global"``, see
            :class:`~transducer_toolkit.modules.encoder_frontend.FeatureNormalizer`.

    Example:
        >>> import torch
        >>> encoder = ConvLstmEncoder(hidden_dim=64)
        >>> encoder_out, encoder_lengths = encoder(torch.randn(2, 50, 80), torch.tensor([50, 31]))
        >>> encoder_out.shape, encoder_lengths
        (torch.Size([2, 13, 64]), tensor([13,  8]))
    """

    def __init__(
        self,
        *,
        num_features: int = 80,
        conv_channels: int = 32,
        hidden_dim: int = 192,
        num_layers: int = 2,
        dropout: float = 0.1,
        normalization: str = "utterance",
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.output_dim = hidden_dim
        self.normalizer = FeatureNormalizer(num_features, normalization)
        self.subsampling = ConvSubsampling(
            num_features, channels=conv_channels, output_dim=hidden_dim
        )
        self.dropout = nn.Dropout(dropout)
        self.lstm = nn.LSTM(
            hidden_dim,
            hidden_dim,
            num_layers,
            batch_first=True,
            dropout=dropout if num_layers > 1 else 0.0,
        )
        # An untrained LSTM whispers beside the predictor, and the model would first learn to do
        # without audio: bring both to the same scale.
        self.norm = nn.LayerNorm(hidden_dim)

    def forward(self, features: Tensor, feature_lengths: Tensor) -> tuple[Tensor, Tensor]:
        self.check_input(features, feature_lengths)
        mask = frame_mask(feature_lengths, features.size(1), features.device)
        hidden = self.subsampling(self.normalizer(features, mask), feature_lengths)
        hidden, _ = self.lstm(self.dropout(hidden))  # causal: padding at the end cannot leak
        return self.dropout(self.norm(hidden)), self.num_output_frames(feature_lengths)

    def num_output_frames(self, num_frames: NumFrames) -> NumFrames:
        return subsampled_length(num_frames)
