# SPDX-License-Identifier: Apache-2.0
"""Encoders: features to encoder frames."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from transducer_toolkit.modules.encoder_frontend import (
    ConvSubsampling,
    FeatureNormalizer,
    NumFrames,
    frame_mask,
)
from transducer_toolkit.ops.checks import INDEX_DTYPES, check_at_least, check_probability


class Encoder(nn.Module, ABC):
    """The interface of an encoder: batches of features to batches of encoder frames.

    The content of padded frames never affects the result.

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
            feature_lengths: (B,) int64, in feature frames; best on the CPU, where the lengths of
                the result are needed too.

        Returns:
            ``encoder_out`` (B, T, E), unspecified but finite at padded frames, and
            ``encoder_lengths`` (B,) int64 on the device of ``feature_lengths``.

        Raises:
            ValueError: if a shape does not fit, or a length on the CPU is outside [1, T_in].
        """

    @abstractmethod
    def num_output_frames(self, num_frames: NumFrames) -> NumFrames:
        """Return the number of encoder frames of ``num_frames`` feature frames, int or tensor."""

    def make_features(self) -> Any:
        """Return what computes the features of this encoder; None for those of the toolkit.

        An encoder with features of its own returns an object with the interface of
        :class:`~transducer_toolkit.data.features.Fbank`.
        """
        return None

    @property
    def subsampling_factor(self) -> int:
        """Feature frames per encoder frame: frame t begins at feature frame t times this factor.

        Example:
            >>> ConvLstmEncoder(hidden_dim=16).subsampling_factor
            4
        """
        num_frames = 1 << 20  # so long that frames lost at the edges do not change the quotient
        return round(num_frames / self.num_output_frames(num_frames))

    def check_output(
        self,
        feature_lengths: Tensor,
        encoder_out: Tensor,
        encoder_lengths: Tensor,
        names: Sequence[str] | None = None,
    ) -> None:
        """Raise an error if :meth:`forward` does not do what the other methods say.

        Training, evaluation and recognizers call it on every batch.

        Args:
            feature_lengths: (B,), as given to :meth:`forward`; not compared on a GPU.
            encoder_out: first result of :meth:`forward`.
            encoder_lengths: second result of :meth:`forward`.
            names: names of the utterances for messages; their indices by default.

        Raises:
            TypeError: if a result is no tensor, or the lengths are no integers.
            ValueError: if a shape or a length is not that of the interface.
        """
        kind = type(self).__name__
        for name, tensor in (("encoder_out", encoder_out), ("encoder_lengths", encoder_lengths)):
            if not isinstance(tensor, Tensor):
                raise TypeError(
                    f"{kind}.forward: expected a tensor {name}, got {type(tensor).__name__}"
                )
        if encoder_lengths.dtype not in INDEX_DTYPES:
            raise TypeError(
                f"{kind}.forward: expected encoder_lengths of dtype int64, "
                f"got {encoder_lengths.dtype}"
            )
        batch_size = len(feature_lengths)
        if encoder_lengths.shape != (batch_size,):
            raise ValueError(
                f"{kind}.forward: expected encoder_lengths of shape ({batch_size},), "
                f"got {tuple(encoder_lengths.shape)}"
            )
        if (
            encoder_out.dim() != 3
            or encoder_out.size(0) != batch_size
            or encoder_out.size(2) != self.output_dim
        ):
            raise ValueError(
                f"{kind}.forward: expected encoder_out of shape ({batch_size}, T, "
                f"{self.output_dim}), output_dim last, got {tuple(encoder_out.shape)}"
            )
        if feature_lengths.device.type != "cpu":  # reading it would synchronize
            return
        lengths = zip(feature_lengths.tolist(), encoder_lengths.tolist(), strict=True)
        for index, (num_frames, length) in enumerate(lengths):
            expected = self.num_output_frames(num_frames)
            name = f"utterance {index}" if names is None else f"utterance {names[index]!r}"
            if length != expected:
                raise ValueError(
                    f"{name}: {kind}.forward makes {length} encoder frames of {num_frames} feature "
                    f"frames, and num_output_frames({num_frames}) is {expected}: batches, lattices "
                    "and times follow num_output_frames, so the two must agree"
                )
            if length > encoder_out.size(1):
                raise ValueError(
                    f"{name}: {kind}.forward returns the length {length}, and encoder_out has "
                    f"{encoder_out.size(1)} frames"
                )

    def check_input(self, features: Tensor, feature_lengths: Tensor) -> None:
        """Raise the ``ValueError`` that :meth:`forward` promises."""
        if torch.jit.is_tracing():  # an export: sizes and lengths have no values
            return
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
        if feature_lengths.device.type == "cpu":  # reading them from a GPU would synchronize
            for index, length in enumerate(feature_lengths.tolist()):
                if not 1 <= length <= max_frames:
                    raise ValueError(
                        f"feature_lengths[{index}] must be in [1, {max_frames}], got {length}"
                    )


def try_encoder(encoder: Encoder, features: Any) -> None:
    """Raise an error if an encoder cannot encode a second of noise.

    A config from a file may have values that fail only here, such as sizes that do not match or a
    NaN.

    Args:
        encoder: the encoder; it is in eval mode afterwards.
        features: computes the features of a waveform, as
            :class:`~transducer_toolkit.data.features.Fbank` does.

    Raises:
        ValueError: the features or the results are not finite, or not of the shapes that the
            encoder says.
        Exception: any error that a layer raises.
    """
    noise = torch.rand(features.sample_rate, generator=torch.Generator().manual_seed(0)) - 0.5
    frames = features(noise)
    if not bool(frames.isfinite().all()):
        raise ValueError("the features of noise are NaN or infinite")
    weight = next(encoder.parameters(), frames)
    lengths = torch.tensor([len(frames)])
    with torch.no_grad():
        out, out_lengths = encoder.eval()(frames[None].to(weight.device), lengths)
    encoder.check_output(lengths, out, out_lengths)
    if bool(out.isnan().any()):
        raise ValueError("the encoded frames of noise are NaN")


class FrontEndEncoder(Encoder):
    """An encoder of the common front end, with layers of its own after it.

    The front end normalizes the features and subsamples them by convolutions. A subclass calls
    :meth:`front_end` and passes the frames through :attr:`dropout` and its layers.

    Args:
        num_features: feature bins, F.
        conv_channels: channels of the convolutions.
        output_dim: width of the subsampled frames and of the encoder frames, E.
        dropout: probability of zeroing a unit.
        normalization: ``"utterance"``, ``"speech"`` or ``"global"``, see
            :class:`~transducer_toolkit.modules.encoder_frontend.FeatureNormalizer`.
        subsampling_factor: feature frames per encoder frame, a power of 2.

    Attributes:
        normalizer: centers the features.
        subsampling: the convolutions, and a projection to ``output_dim``.
        dropout: applied to the subsampled frames.
    """

    def __init__(
        self,
        *,
        num_features: int,
        conv_channels: int,
        output_dim: int,
        dropout: float,
        normalization: str,
        subsampling_factor: int = 4,
    ) -> None:
        super().__init__()
        check_at_least(1, num_features=num_features, conv_channels=conv_channels)
        check_probability(dropout, "dropout")
        self.num_features = num_features
        self.output_dim = output_dim
        self.normalizer = FeatureNormalizer(num_features, normalization)
        self.subsampling = ConvSubsampling(
            num_features, channels=conv_channels, output_dim=output_dim, factor=subsampling_factor
        )
        self.dropout = nn.Dropout(dropout)

    def front_end(self, features: Tensor, feature_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Check, normalize and subsample a padded batch.

        Args:
            features: (B, T_in, F) float32; padded frames may hold anything.
            feature_lengths: (B,) int64, in feature frames.

        Returns:
            (B, T, E) frames, unspecified but finite at padded frames, and their (B,) lengths.

        Raises:
            ValueError: as :meth:`forward` does.
        """
        self.check_input(features, feature_lengths)
        mask = frame_mask(feature_lengths, features.size(1), features.device)
        hidden = self.subsampling(self.normalizer(features, mask), feature_lengths)
        return hidden, self.num_output_frames(feature_lengths)

    def num_output_frames(self, num_frames: NumFrames) -> NumFrames:
        return self.subsampling.num_output_frames(num_frames)


@dataclass(frozen=True)
class EncoderState:
    """The state of an encoder within one utterance; its size does not grow.

    Attributes:
        features: (n, F), the feature frames that later encoder frames depend on.
        num_seen: number of these frames that were encoded already, 0 or the subsampling factor.
        layers: state of the layers after the subsampling.
    """

    features: Tensor
    num_seen: int
    layers: Any


class StreamingEncoder(FrontEndEncoder):
    """An encoder whose layers see little or nothing of the future.

    :meth:`stream` takes the features of one utterance in pieces of any size. It returns the encoder
    frames of :meth:`forward`, up to rounding, as soon as the features that they depend on are
    known.

    Args: those of :class:`FrontEndEncoder`, which a subclass passes to ``super().__init__``.
    """

    @property
    @abstractmethod
    def latency_frames(self) -> int:
        """Bound on the encoder frames from the start of a frame to the last input it depends on."""

    @abstractmethod
    def initial_layers(self) -> Any:
        """Return the state of the layers before the first frame."""

    @abstractmethod
    def stream_layers(self, hidden: Tensor, layers: Any, *, final: bool) -> tuple[Tensor, Any]:
        """Run the layers on (1, n, D), n >= 0, new subsampled frames of one utterance.

        Returns:
            The (1, T, E) frames that are known now, T >= 0, and the next state of the layers.
        """

    def initial_state(self) -> EncoderState:
        """Return the state before the first features of an utterance.

        Raises:
            ValueError: if the encoder subtracts the mean of the whole utterance.
        """
        if self.normalizer.mode != "global":
            raise ValueError(
                "streaming needs an encoder with normalization='global', got "
                f"{self.normalizer.mode!r}: the mean of an utterance is known at its end only; "
                "train with model.encoder.normalization=global"
            )
        weight = self.subsampling.projection.weight
        features = torch.empty(0, self.num_features, device=weight.device)
        return EncoderState(features, 0, self.initial_layers())

    @torch.inference_mode()
    def stream(
        self, features: Tensor, state: EncoderState, *, final: bool = False
    ) -> tuple[Tensor, EncoderState]:
        """Encode the next features of one utterance.

        Args:
            features: (n, F) float32, any n >= 0.
            state: from :meth:`initial_state` or the previous call; it is not changed.
            final: whether the utterance ends here.

        Returns:
            ``encoder_out`` (T, E), the frames that are now known, T >= 0, and the next state. All
            frames of an utterance together are those of :meth:`forward`.

        Raises:
            ValueError: if features is not (n, F).

        Example:
            >>> encoder = ConvLstmEncoder(hidden_dim=16, normalization="global").eval()
            >>> encoder.normalizer.set_statistics(torch.zeros(80), torch.ones(80))
            >>> first, state = encoder.stream(torch.randn(10, 80), encoder.initial_state())
            >>> last, _ = encoder.stream(torch.randn(3, 80), state, final=True)
            >>> first.shape, last.shape
            (torch.Size([2, 16]), torch.Size([2, 16]))
        """
        if features.dim() != 2 or features.size(1) != self.num_features:
            raise ValueError(
                f"features must have shape (n, {self.num_features}), got {tuple(features.shape)}"
            )
        known = torch.cat([state.features, features.to(state.features.device)])
        hidden = self._subsample(known, state.num_seen, final=final)
        encoder_out, layers = self.stream_layers(hidden, state.layers, final=final)
        # With the factor f, encoder frame k depends on features from f(k - 1) + 1 on: keep the
        # last f of those that were encoded.
        factor = self.subsampling.factor
        num_encoded = state.num_seen + factor * hidden.size(1)
        num_seen = min(num_encoded, factor)
        features_ahead = known[max(0, num_encoded - factor) :].clone()
        return encoder_out[0], EncoderState(features_ahead, num_seen, layers)

    def _subsample(self, features: Tensor, num_seen: int, *, final: bool) -> Tensor:
        """Normalize and subsample the features of complete encoder frames: (n, F) -> (1, T, D)."""
        factor = self.subsampling.factor
        num_frames = len(features)
        if not final:
            num_frames -= num_frames % factor
        if num_frames <= num_seen:
            return self.subsampling.projection.weight.new_empty(
                1, 0, self.subsampling.projection.out_features
            )
        mask = torch.ones(1, num_frames, dtype=torch.bool, device=features.device)
        normalized = self.normalizer(features[None, :num_frames], mask)
        hidden = self.subsampling(normalized, torch.tensor([num_frames]))
        # The frame of the features that were kept is wrong here, because the convolutions saw
        # zeros before it, and an earlier call returned it.
        return hidden[:, num_seen // factor :]


class ConvLstmEncoder(StreamingEncoder):
    """Normalization, subsampling convolutions and a stack of LSTM layers.

    The LSTM runs forward in time only: with ``normalization="global"`` the encoder streams, and a
    frame depends on no feature frame after its own (40 ms with ``subsampling_factor=4``).

    Args:
        num_features: feature bins, F.
        conv_channels: channels of the convolutions.
        hidden_dim: width of each LSTM layer, and of the encoder frames, E.
        num_layers: number of LSTM layers.
        dropout: probability of zeroing a unit before, between and after the LSTM layers.
        normalization: ``"utterance"``, ``"speech"`` or ``"global"``, see
            :class:`~transducer_toolkit.modules.encoder_frontend.FeatureNormalizer`.
        subsampling_factor: feature frames per encoder frame, a power of 2.

    Raises:
        ValueError: if a size is below 1, ``dropout`` is not in [0, 1], or ``subsampling_factor`` is
            no power of 2.
        TypeError: if one is no number.

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
        subsampling_factor: int = 4,
    ) -> None:
        check_at_least(1, hidden_dim=hidden_dim, num_layers=num_layers)
        super().__init__(
            num_features=num_features,
            conv_channels=conv_channels,
            output_dim=hidden_dim,
            dropout=dropout,
            normalization=normalization,
            subsampling_factor=subsampling_factor,
        )
        self.lstm = nn.LSTM(
            hidden_dim,
            hidden_dim,
            num_layers,
            batch_first=True,
            dropout=dropout if num_layers > 1 else 0.0,
        )
        # At initialization the LSTM's outputs are much smaller than the predictor's, and the model
        # would first learn to ignore the audio: the norm brings both to the same scale.
        self.norm = nn.LayerNorm(hidden_dim)

    def forward(self, features: Tensor, feature_lengths: Tensor) -> tuple[Tensor, Tensor]:
        hidden, encoder_lengths = self.front_end(features, feature_lengths)
        hidden, _ = self.lstm(self.dropout(hidden))  # causal: padding at the end cannot leak
        return self.dropout(self.norm(hidden)), encoder_lengths

    @property
    def latency_frames(self) -> int:
        return 1

    def initial_layers(self) -> tuple[Tensor, Tensor]:
        """Hidden and cell state of the LSTM layers, each (num_layers, 1, E)."""
        weight = self.subsampling.projection.weight
        hidden, cell = weight.new_zeros(2, self.lstm.num_layers, 1, self.output_dim)
        return hidden, cell

    def stream_layers(
        self, hidden: Tensor, layers: tuple[Tensor, Tensor], *, final: bool
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        if hidden.size(1) == 0:
            return hidden, layers
        hidden, layers = self.lstm(hidden, layers)
        return self.norm(hidden), layers
