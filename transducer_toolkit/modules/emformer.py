# SPDX-License-Identifier: Apache-2.0
"""A streaming encoder: attention within segments, their past and a short look-ahead."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from transducer_toolkit.modules.encoder import StreamingEncoder
from transducer_toolkit.modules.encoder_frontend import frame_mask
from transducer_toolkit.ops.checks import check_at_least, check_int
from transducer_toolkit.optional import import_torchaudio


class EmformerEncoder(StreamingEncoder):
    """Global normalization, subsampling convolutions and torchaudio's Emformer.

    The frames are divided into segments. A frame attends to its segment, to the ``right_context``
    frames after it and to the ``left_context`` frames before it, and to one summary of each of the
    last ``memory_size`` segments. A segment is encoded as soon as its right context is known;
    :meth:`forward` encodes all segments at once and gives the same frames. Zeros fill the last
    segment of an utterance and its right context.

    Args:
        num_features: feature bins, F.
        conv_channels: channels of the convolutions.
        dim: width of the layers, and of the encoder frames, E.
        num_heads: attention heads; dim is a multiple of it.
        ffn_dim: width of the feed-forward layers.
        num_layers: number of Emformer layers.
        segment_length: encoder frames a segment.
        left_context: encoder frames seen before a segment.
        right_context: encoder frames seen after a segment.
        memory_size: earlier segments seen as summaries; 0 is none.
        dropout: probability of zeroing a unit.
        normalization: ``"global"``; ``"utterance"`` trains a model that cannot stream.
        subsampling_factor: feature frames per encoder frame, a power of 2.

    Raises:
        ValueError: if a size or segment_length is below 1, a context is negative, dropout is not in
            [0, 1], dim is no multiple of num_heads, or subsampling_factor is no power of 2.
        TypeError: if a size is no integer.

    Example:
        >>> encoder = EmformerEncoder(dim=32, num_heads=4, ffn_dim=64, num_layers=1).eval()
        >>> encoder.normalizer.set_statistics(torch.zeros(80), torch.ones(80))
        >>> encoder_out, encoder_lengths = encoder(torch.randn(2, 50, 80), torch.tensor([50, 31]))
        >>> encoder_out.shape, encoder_lengths
        (torch.Size([2, 13, 32]), tensor([13,  8]))

    Source: Y. Shi et al., "Emformer: Efficient Memory Transformer Based Acoustic Model for Low
    Latency Streaming Speech Recognition" (2021).
    """

    def __init__(
        self,
        *,
        num_features: int = 80,
        conv_channels: int = 32,
        dim: int = 192,
        num_heads: int = 4,
        ffn_dim: int = 768,
        num_layers: int = 4,
        segment_length: int = 4,
        left_context: int = 20,
        right_context: int = 1,
        memory_size: int = 0,
        dropout: float = 0.1,
        normalization: str = "global",
        subsampling_factor: int = 4,
    ) -> None:
        models = import_torchaudio("models", "EmformerEncoder")
        check_at_least(1, dim=dim, num_heads=num_heads, ffn_dim=ffn_dim, num_layers=num_layers)
        for name, value in (
            ("segment_length", segment_length),
            ("left_context", left_context),
            ("right_context", right_context),
            ("memory_size", memory_size),
        ):
            check_int(value, name)
        if segment_length < 1 or min(left_context, right_context, memory_size) < 0:
            raise ValueError(
                "segment_length must be at least 1, left_context, right_context and memory_size "
                f"at least 0, got {segment_length}, {left_context}, {right_context}, {memory_size}"
            )
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads={num_heads}, got {dim}")
        super().__init__(
            num_features=num_features,
            conv_channels=conv_channels,
            output_dim=dim,
            dropout=dropout,
            normalization=normalization,
            subsampling_factor=subsampling_factor,
        )
        self.segment_length = segment_length
        self.right_context = right_context
        self.emformer = models.Emformer(
            dim,
            num_heads,
            ffn_dim,
            num_layers,
            segment_length,
            dropout=dropout,
            activation="gelu",
            left_context_length=left_context,
            right_context_length=right_context,
            max_memory_size=memory_size,
            tanh_on_mem=memory_size > 0,
        )

    def forward(self, features: Tensor, feature_lengths: Tensor) -> tuple[Tensor, Tensor]:
        hidden, encoder_lengths = self.front_end(features, feature_lengths)
        # Zeros after the end, as for a single utterance. Emformer's own lengths cannot do this: it
        # masks the padding of a batch, but not that of a single utterance.
        num_frames = hidden.size(1)
        hidden = hidden * frame_mask(encoder_lengths, num_frames, hidden.device).unsqueeze(-1)
        hidden = self._fill_segments(self.dropout(hidden))
        lengths = torch.full(
            (len(hidden),), hidden.size(1) - self.right_context, device=hidden.device
        )
        encoder_out, _ = self.emformer(hidden, lengths)
        return encoder_out[:, :num_frames], encoder_lengths

    @property
    def latency_frames(self) -> int:
        return self.segment_length + self.right_context

    def initial_layers(self) -> tuple[Tensor, list[list[Tensor]] | None]:
        """Return no waiting frames, and None as the state of the layers."""
        return self.subsampling.projection.weight.new_empty(1, 0, self.output_dim), None

    def stream_layers(
        self, hidden: Tensor, layers: tuple[Tensor, list[list[Tensor]] | None], *, final: bool
    ) -> tuple[Tensor, tuple[Tensor, list[list[Tensor]] | None]]:
        waiting, states = layers
        waiting = torch.cat([waiting, hidden], dim=1)
        num_frames = waiting.size(1)
        if final:
            waiting = self._fill_segments(waiting)
        window = self.segment_length + self.right_context
        known = [waiting[:, :0]]
        while waiting.size(1) >= window:
            if states is not None:
                states = [list(state) for state in states]  # infer() writes to the lists
            lengths = torch.tensor([window], device=waiting.device)
            encoder_out, _, states = self.emformer.infer(waiting[:, :window], lengths, states)
            known.append(encoder_out)
            waiting = waiting[:, self.segment_length :]
        # A copy: a view would keep the memory of all earlier frames.
        return torch.cat(known, dim=1)[:, :num_frames], (waiting.clone(), states)

    def _fill_segments(self, hidden: Tensor) -> Tensor:
        """Pad (B, T, D) with zeros to whole segments and one right context."""
        missing = -hidden.size(1) % self.segment_length + self.right_context
        return nn.functional.pad(hidden, (0, 0, 0, missing))
