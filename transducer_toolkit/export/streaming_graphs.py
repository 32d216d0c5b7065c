# SPDX-License-Identifier: Apache-2.0
"""Streaming encoders in the interface of sherpa-onnx's streaming client.

The client supports a few encoders; the interface of its "lstm" fits every encoder here. For each
stream it keeps two tensors, ``h (L, 1, H)`` and ``c (L, 1, C)``, zero at first. It concatenates
those of several streams on the second axis, passes a chunk of T feature frames, and advances by
``decode_chunk_len`` frames. Here h and c hold the content of
:class:`~transducer_toolkit.modules.encoder.EncoderState`.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from transducer_toolkit.modules.emformer import EmformerEncoder
from transducer_toolkit.modules.encoder import ConvLstmEncoder, Encoder, StreamingEncoder


def streaming_graph(encoder: Encoder, projection: nn.Module, chunk_frames: int) -> StreamingGraph:
    """Return the graph of an encoder that streams.

    Args:
        encoder: a ConvLstmEncoder or an EmformerEncoder with global normalization.
        projection: module that is applied to the encoder's frames.
        chunk_frames: encoder frames per call of a ConvLstmEncoder; an EmformerEncoder takes one
            segment per call.

    Raises:
        ValueError: for any other encoder.
    """
    if isinstance(encoder, StreamingEncoder):
        encoder.initial_state()  # raises for an encoder that needs the whole utterance
        if isinstance(encoder, ConvLstmEncoder):
            return ConvLstmGraph(encoder, projection, chunk_frames)
        if isinstance(encoder, EmformerEncoder) and not encoder.emformer.use_mem:
            return EmformerGraph(encoder, projection)
    raise ValueError(
        "encoder: a streaming export needs a ConvLstmEncoder, or an EmformerEncoder with "
        f"memory_size=0, got {type(encoder).__name__}"
    )


class StreamingGraph(nn.Module):
    """``x (N, T, F), h (L, N, H), c (L, N, C) -> (N, T', J), h, c``.

    After the layers' own numbers, the first row of c holds the last normalized feature frames, as
    many as one encoder frame takes, and the number of encoder frames so far, up to
    :attr:`max_past`.

    Attributes:
        chunk_frames: encoder frames per call, T'.
        ahead_frames: encoder frames of look-ahead, which T contains too.
        num_layers: L.
        h_size, c_size: numbers that each layer keeps in h and in c.
    """

    chunk_frames: int
    ahead_frames: int
    num_layers: int
    h_size: int
    c_size: int

    def __init__(self, encoder: StreamingEncoder, projection: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.projection = projection
        self.factor = encoder.subsampling_factor
        self.num_context = self.factor * encoder.num_features

    @property
    def metadata(self) -> dict[str, str | int]:
        """The metadata that the client reads."""
        return {
            "model_type": "lstm",
            "num_encoder_layers": self.num_layers,
            "T": self.factor * (self.chunk_frames + self.ahead_frames),
            "decode_chunk_len": self.factor * self.chunk_frames,
            "d_model": self.h_size,
            "rnn_hidden_size": self.c_size + self.num_context + 1,
        }

    def initial_states(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """Return h and c of a stream that has not begun."""
        sizes = self.h_size, self.c_size + self.num_context + 1
        h, c = (torch.zeros(self.num_layers, batch_size, size) for size in sizes)
        return h, c

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        context, num_past = c[0, :, self.c_size : -1], c[0, :, -1:]
        hidden, context = self._subsample(x, context, num_past > 0)
        encoder_out, h, c_layers = self.layers(hidden, h, c[:, :, : self.c_size], num_past)
        num_past = num_past.add(self.chunk_frames).clamp(max=self.max_past)
        rest = torch.cat((context, num_past), dim=1).unsqueeze(0)
        rest = rest.expand(self.num_layers, -1, -1)
        return self.projection(encoder_out), h, torch.cat((c_layers, rest), dim=2)

    @abstractmethod
    def layers(
        self, hidden: Tensor, h: Tensor, c: Tensor, num_past: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(N, T' + ahead, D) frames and the layers' states to (N, T', E) and the next states."""

    @property
    def max_past(self) -> int:
        """The number of past frames, at least 1, above which more make no difference."""
        return 1

    def _subsample(self, x: Tensor, context: Tensor, has_begun: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, T, F) to encoder frames (N, T / factor, D), and the next chunk's context."""
        normalized = self.encoder.normalizer(x, torch.ones_like(x[:, :, 0], dtype=torch.bool))
        context = context.reshape(-1, self.factor, self.encoder.num_features)
        known = torch.cat((context, normalized), dim=1)
        # The first frame belongs to the context and is wrong at the edge: drop it. The first frame
        # of an utterance is computed without a context, because the convolutions' padding differs
        # from the image of zero features.
        hidden = self._convolve(known)[:, 1:]
        first = self._convolve(normalized[:, : self.factor])
        first = torch.where(has_begun.unsqueeze(1), hidden[:, :1], first)
        end = (
            self.factor * self.chunk_frames
        )  # in known: one encoder frame's features before the next chunk
        context = known[:, end : end + self.factor].flatten(1)
        return torch.cat((first, hidden[:, 1:]), dim=1), context

    def _convolve(self, features: Tensor) -> Tensor:
        lengths = torch.ones_like(features[:, 0, 0], dtype=torch.int64) * features.size(1)
        return self.encoder.subsampling(features, lengths)


class ConvLstmGraph(StreamingGraph):
    """The graph of a ConvLstmEncoder; h and c are those of the LSTM."""

    def __init__(self, encoder: ConvLstmEncoder, projection: nn.Module, chunk_frames: int) -> None:
        super().__init__(encoder, projection)
        self.lstm, self.norm = encoder.lstm, encoder.norm
        self.chunk_frames = chunk_frames
        self.ahead_frames = 0
        self.num_layers = encoder.lstm.num_layers
        self.h_size = self.c_size = encoder.output_dim

    def layers(
        self, hidden: Tensor, h: Tensor, c: Tensor, num_past: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        hidden, (h, c) = self.lstm(hidden, (h, c.contiguous()))
        return self.norm(hidden), h, c


class EmformerGraph(StreamingGraph):
    """The graph of an EmformerEncoder; h and c are keys and values of each layer's left context.

    torchaudio's Emformer shortens the left context at the start of an utterance. A graph of fixed
    sizes cannot: here the left context has its full length, and frames before the first are masked.
    """

    def __init__(self, encoder: EmformerEncoder, projection: nn.Module) -> None:
        super().__init__(encoder, projection)
        self.emformer = encoder.emformer
        self.chunk_frames = encoder.segment_length
        self.ahead_frames = encoder.right_context
        self.left_context = encoder.emformer.left_context_length
        self.num_layers = len(encoder.emformer.emformer_layers)
        self.h_size = self.c_size = max(1, self.left_context) * encoder.output_dim

    @property
    def max_past(self) -> int:
        return max(1, self.left_context)

    def layers(
        self, hidden: Tensor, h: Tensor, c: Tensor, num_past: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_kept = max(1, self.left_context)
        missing = torch.arange(num_kept, 0, -1) > num_past.clamp(max=self.left_context)  # (N, kept)
        here = torch.zeros_like(hidden[:, :, 0], dtype=torch.bool)
        masked = torch.cat((missing, here), dim=1)[:, None, None]  # (N, 1, 1, kept + window)
        next_h, next_c = [], []
        for layer, past_keys, past_values in zip(
            self.emformer.emformer_layers, h.unbind(0), c.unbind(0), strict=True
        ):
            attention, heads, dim = layer.attention, layer.attention.num_heads, hidden.size(2)
            normed = layer.layer_norm_input(hidden)
            keys, values = attention.emb_to_key_value(normed).chunk(2, dim=2)
            keys = torch.cat((past_keys.reshape(-1, num_kept, dim), keys), dim=1)
            values = torch.cat((past_values.reshape(-1, num_kept, dim), values), dim=1)
            # (N, frames, D) -> (N, heads, frames, D / heads)
            query, key, value = (
                part.reshape(-1, part.size(1), heads, dim // heads).transpose(1, 2)
                for part in (attention.emb_to_query(normed) * attention.scaling, keys, values)
            )
            scores = (query @ key.transpose(2, 3)).masked_fill(masked, attention.negative_inf)
            attended = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
            hidden = hidden + attention.out_proj(attended)
            hidden = layer.layer_norm_output(hidden + layer.pos_ff(hidden))
            # The right context is encoded again as part of the next segment.
            kept = slice(self.chunk_frames, self.chunk_frames + num_kept)
            next_h.append(keys[:, kept].flatten(1))
            next_c.append(values[:, kept].flatten(1))
        return hidden[:, : self.chunk_frames], torch.stack(next_h), torch.stack(next_c)
