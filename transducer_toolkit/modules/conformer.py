# SPDX-License-Identifier: Apache-2.0
"""The Conformer encoder, with torchaudio's layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from transducer_toolkit.modules.encoder import FrontEndEncoder
from transducer_toolkit.modules.encoder_frontend import frame_mask
from transducer_toolkit.ops.checks import check_at_least, check_int
from transducer_toolkit.optional import import_torchaudio


class ConformerEncoder(FrontEndEncoder):
    """Normalization, subsampling convolutions and a stack of Conformer layers.

    The layers are those of ``torchaudio.models.Conformer`` with two changes: padded frames are
    zeroed before each depthwise convolution, and a layer norm over the channels of each frame
    replaces batch norm. So an utterance is encoded as it would be alone, in training too, and the
    gradient of a batch is the sum of the gradients of its utterances, for any distribution over
    processes and accumulated batches. Attention spans the whole utterance and knows positions
    through the convolutions only, as torchaudio's does; "Conformer" (Gulati et al., 2020) adds
    relative positions.

    Args:
        num_features: feature bins, F.
        conv_channels: channels of the subsampling convolutions.
        hidden_dim: width of each layer, and of the encoder frames, E; a multiple of ``num_heads``.
        num_layers: number of Conformer layers.
        num_heads: attention heads.
        feedforward_dim: width within the feed-forward modules; None is 4 times ``hidden_dim``.
        kernel_size: frames seen by each depthwise convolution, odd.
        dropout: probability of zeroing a unit before the layers and in each of their modules.
        normalization: ``"utterance"``, ``"speech"`` or ``"global"``, see
            :class:`~transducer_toolkit.modules.encoder_frontend.FeatureNormalizer`.
        subsampling_factor: feature frames per encoder frame, a power of 2.

    Raises:
        ImportError: if torchaudio cannot be imported.
        ValueError: if ``hidden_dim``, ``kernel_size`` or ``subsampling_factor`` is not as described
            above, a size is below 1, or ``dropout`` is not in [0, 1].
        TypeError: if one is no number.

    Example:
        >>> import torch
        >>> encoder = ConformerEncoder(conv_channels=8, hidden_dim=32, num_layers=2)
        >>> encoder_out, encoder_lengths = encoder(torch.randn(2, 50, 80), torch.tensor([50, 31]))
        >>> encoder_out.shape, encoder_lengths
        (torch.Size([2, 13, 32]), tensor([13,  8]))
    """

    def __init__(
        self,
        *,
        num_features: int = 80,
        conv_channels: int = 144,
        hidden_dim: int = 144,
        num_layers: int = 16,
        num_heads: int = 4,
        feedforward_dim: int | None = None,
        kernel_size: int = 31,
        dropout: float = 0.1,
        normalization: str = "utterance",
        subsampling_factor: int = 4,
    ) -> None:
        check_at_least(1, hidden_dim=hidden_dim, num_layers=num_layers, num_heads=num_heads)
        if hidden_dim % num_heads != 0:
            raise ValueError(
                f"hidden_dim must be a multiple of num_heads={num_heads}, got {hidden_dim}"
            )
        check_int(kernel_size, "kernel_size")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        models = import_torchaudio("models", "ConformerEncoder")
        super().__init__(
            num_features=num_features,
            conv_channels=conv_channels,
            output_dim=hidden_dim,
            dropout=dropout,
            normalization=normalization,
            subsampling_factor=subsampling_factor,
        )
        self.layers = models.Conformer(
            hidden_dim,
            num_heads,
            feedforward_dim or 4 * hidden_dim,
            num_layers,
            kernel_size,
            dropout,
        ).conformer_layers
        self._padding = _Padding()
        for layer in self.layers:
            expand, gate, depthwise, _, *rest = layer.conv_module.sequential
            layer.conv_module.sequential = nn.Sequential(
                expand, gate, self._padding, depthwise, _ChannelNorm(hidden_dim), *rest
            )

    def forward(self, features: Tensor, feature_lengths: Tensor) -> tuple[Tensor, Tensor]:
        hidden, encoder_lengths = self.front_end(features, feature_lengths)
        is_padding = ~frame_mask(encoder_lengths, hidden.size(1), hidden.device)
        hidden = self.dropout(hidden).transpose(0, 1)  # (T, B, E), torchaudio's layout
        with self._padding.being(is_padding):
            for layer in self.layers:
                hidden = layer(hidden, is_padding)
        return hidden.transpose(0, 1), encoder_lengths


class _Padding(nn.Module):
    """Zeroes the padded frames of (B, E, T) within torchaudio's layers."""

    def __init__(self) -> None:
        super().__init__()
        self._is_padding: Tensor | None = None

    @contextmanager
    def being(self, is_padding: Tensor) -> Iterator[None]:
        """Return a context in which frames are padded where ``is_padding`` (B, T) is True."""
        self._is_padding = is_padding
        try:
            yield
        finally:
            self._is_padding = None

    def forward(self, hidden: Tensor) -> Tensor:
        assert self._is_padding is not None
        return hidden.masked_fill(self._is_padding.unsqueeze(1), 0.0)


class _ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each frame of (B, E, T)."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden.transpose(1, 2)).transpose(1, 2)
