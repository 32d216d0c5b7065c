# SPDX-License-Identifier: Apache-2.0
"""The front end of the encoders: feature normalization, masks and subsampling convolutions."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor, nn

from transducer_toolkit.ops.checks import check_int

NumFrames = TypeVar("NumFrames", int, Tensor)

NORMALIZATIONS = ("utterance", "speech", "global")
# Recordings are silent in pauses, or full of noise. Below this, relative to the loudest bin of the
# utterance, "speech" makes no difference between them.
SPEECH_RANGE_DB = 43.0


def subsampled_length(num_frames: NumFrames, factor: int = 4) -> NumFrames:
    """Return the number of encoder frames of ``num_frames`` feature frames.

    That is ``ceil(num_frames / factor)``: each convolution of stride 2 rounds up.

    Args:
        num_frames: number of feature frames, an int or an integer tensor of any shape.
        factor: feature frames per encoder frame, a power of 2.

    Returns:
        The same type as ``num_frames``.

    Example:
        >>> subsampled_length(9), subsampled_length(9, factor=8)
        (3, 2)
    """
    return (num_frames + factor - 1) // factor


def frame_mask(lengths: Tensor, max_frames: int, device: torch.device) -> Tensor:
    """Return a mask that is True at the real frames of a padded batch.

    Args:
        lengths: (B,) int64, in frames, on the CPU or on ``device``.
        max_frames: padded number of frames, T.
        device: device of the mask.

    Returns:
        (B, T) bool, True where a frame belongs to its utterance.

    Example:
        >>> frame_mask(torch.tensor([1, 3]), 3, torch.device("cpu"))
        tensor([[ True, False, False],
                [ True,  True,  True]])
    """
    frames = torch.arange(max_frames, device=device)
    return frames < lengths.to(device, non_blocking=True).unsqueeze(1)


class FeatureNormalizer(nn.Module):
    """Center log energies by the mean of their utterance or by statistics of the training set.

    ``"utterance"`` subtracts, per bin, the mean over the real frames of the utterance. That removes
    the channel and the level and needs no statistics. ``"speech"`` first raises all values to at
    least 43 dB below the largest one of the utterance, and takes the mean over the frames that have
    a value above this bound. Then neither the length nor the depth of pauses shifts the speech,
    which helps with recordings unlike those of the training. ``"global"`` computes
    ``(x - mean) / std`` with buffers that :meth:`set_statistics` fills and the state dict contains.
    It depends on no future frame, so encoders can stream. In all modes padded frames become zeros.

    Args:
        num_features: feature bins, F.
        mode: ``"utterance"``, ``"speech"`` or ``"global"``.

    Raises:
        ValueError: if ``mode`` is none of them.

    Example:
        >>> normalizer = FeatureNormalizer(2)
        >>> features = torch.tensor([[[1.0, 4.0], [3.0, 8.0], [float("nan"), 0.0]]])
        >>> normalizer(features, torch.tensor([[True, True, False]]))
        tensor([[[-1., -2.],
                 [ 1.,  2.],
                 [ 0.,  0.]]])
    """

    mean: Tensor
    std: Tensor
    has_statistics: Tensor

    def __init__(self, num_features: int, mode: str = "utterance") -> None:
        super().__init__()
        if mode not in NORMALIZATIONS:
            raise ValueError(f"normalization must be one of {NORMALIZATIONS}, got {mode!r}")
        self.mode = mode
        self.num_features = num_features
        self._known_ready = mode != "global"
        if mode == "global":
            self.register_buffer("mean", torch.zeros(num_features))
            self.register_buffer("std", torch.ones(num_features))
            self.register_buffer("has_statistics", torch.tensor(False))

    @property
    def needs_statistics(self) -> bool:
        """Whether :meth:`set_statistics` (or a state dict) has yet to provide mean and std."""
        if not self._known_ready:  # read the buffer, perhaps from a GPU, only until it is True
            self._known_ready = bool(self.has_statistics)
        return not self._known_ready

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Store the global statistics.

        Args:
            mean: (F,) mean of each bin over the training set.
            std: (F,) standard deviation of each bin, positive.

        Raises:
            ValueError: if the mode is not ``"global"``, a shape is not (F,) or a std not positive.
        """
        if self.mode != "global":
            raise ValueError(f"statistics are used with normalization='global', not {self.mode!r}")
        for name, value in (("mean", mean), ("std", std)):
            if value.shape != (self.num_features,):
                raise ValueError(
                    f"{name} must have shape ({self.num_features},), got {tuple(value.shape)}"
                )
        if not bool((std > 0).all()):
            raise ValueError("std must be positive in every bin")
        self.mean.copy_(mean)
        self.std.copy_(std)
        self.has_statistics.fill_(True)

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """Normalize a padded batch.

        Args:
            features: (B, T, F) float; padded frames may hold anything, NaN included.
            mask: (B, T) bool, True at real frames.

        Returns:
            (B, T, F), zero at padded frames.

        Raises:
            RuntimeError: in global mode before the statistics are known.
        """
        mask = mask.unsqueeze(-1)
        if self.mode == "utterance":
            real = torch.where(mask, features, 0.0)  # not a product: 0 * NaN is NaN
            mean = real.sum(1, keepdim=True) / mask.sum(1, keepdim=True)
            return torch.where(mask, real - mean, 0.0)
        if self.mode == "speech":
            real = torch.where(mask, features, -math.inf)
            floor = real.amax((1, 2), keepdim=True) - SPEECH_RANGE_DB * math.log(10) / 10
            speech = real.amax(2, keepdim=True) > floor  # (B, T, 1)
            real = torch.maximum(real, floor)
            mean = torch.where(speech, real, 0.0).sum(1, keepdim=True) / speech.sum(1, keepdim=True)
            return torch.where(mask, real - mean, 0.0)
        if self.needs_statistics:
            raise RuntimeError(
                "normalization='global' has no statistics yet: call "
                "FeatureNormalizer.set_statistics(mean, std), or train with the callback "
                "EstimateFeatureStatistics"
            )
        return torch.where(mask, (features - self.mean) / self.std, 0.0)


class ConvSubsampling(nn.Module):
    """2-D convolutions, each halving time and frequency, and a projection.

    ``(B, T, F) -> (B, ceil(T / factor), output_dim)``. Frames after the end of an utterance are
    zeroed before each convolution, so a batched utterance sees the zeros that it would see alone.

    Encoder frame k depends on the feature frames ``factor * (k - 1) + 1`` to
    ``factor * (k + 1) - 1``.

    Args:
        num_features: feature bins, F.
        channels: channels of all convolutions.
        output_dim: width of the projection.
        factor: feature frames per encoder frame, 2 to the number of convolutions.

    Raises:
        ValueError: if ``factor`` is not a power of 2 from 2 on.

    Example:
        >>> subsampling = ConvSubsampling(80, channels=8, output_dim=16)
        >>> subsampling(torch.zeros(2, 10, 80), torch.tensor([10, 5])).shape
        torch.Size([2, 3, 16])
    """

    def __init__(
        self, num_features: int, *, channels: int, output_dim: int, factor: int = 4
    ) -> None:
        super().__init__()
        check_int(factor, "subsampling_factor")
        if factor < 2 or factor & (factor - 1):
            raise ValueError(
                f"subsampling_factor: expected a power of 2 (2, 4, 8, ...), got {factor}"
            )
        self.factor = factor
        self.num_convolutions = factor.bit_length() - 1
        for number in range(1, self.num_convolutions + 1):
            inputs = 1 if number == 1 else channels
            convolution = nn.Conv2d(inputs, channels, kernel_size=3, stride=2, padding=1)
            # Attributes, not a ModuleList: checkpoints name them conv1, conv2.
            self.add_module(f"conv{number}", convolution)
        bins = subsampled_length(num_features, factor)
        self.projection = nn.Linear(channels * bins, output_dim)
        self.norm = nn.LayerNorm(output_dim)

    def num_output_frames(self, num_frames: NumFrames) -> NumFrames:
        """Return the number of encoder frames of ``num_frames`` feature frames."""
        return subsampled_length(num_frames, self.factor)

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Subsample a padded batch.

        Args:
            features: (B, T, F), zero at padded frames.
            lengths: (B,) int64, real feature frames.

        Returns:
            (B, ceil(T / factor), output_dim); padded frames hold unspecified finite values.
        """
        hidden = features.unsqueeze(1)
        for number in range(1, self.num_convolutions + 1):
            if number > 1:
                lengths = (lengths + 1) // 2
                mask = frame_mask(lengths, hidden.size(2), hidden.device)
                hidden = hidden * mask[:, None, :, None]
            # (B, C, T, F) -> (B, C, ceil(T / 2), ceil(F / 2))
            hidden = self.get_submodule(f"conv{number}")(hidden).relu()
        hidden = hidden.transpose(1, 2).flatten(2)  # (B, T, C, F) -> (B, T, C * F)
        return self.norm(self.projection(hidden))
