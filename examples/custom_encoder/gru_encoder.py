# SPDX-License-Identifier: Apache-2.0
"""An encoder of your own: stacked feature frames and a GRU that sees past and future."""

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from transducer_toolkit.modules import Encoder

STACKED = 4  # feature frames of 10 ms in an encoder frame


class GruEncoder(Encoder):
    """Normalization by utterance, four stacked frames, GRU layers in both directions.

    Args:
        num_features: feature bins, F.
        hidden_dim: width of the GRU in each direction; encoder frames are twice as wide.
        num_layers: GRU layers.
    """

    def __init__(
        self, *, num_features: int = 80, hidden_dim: int = 96, num_layers: int = 1
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.output_dim = 2 * hidden_dim
        self.gru = nn.GRU(
            STACKED * num_features, hidden_dim, num_layers, batch_first=True, bidirectional=True
        )

    def forward(self, features: Tensor, feature_lengths: Tensor) -> tuple[Tensor, Tensor]:
        self.check_input(features, feature_lengths)
        lengths = self.num_output_frames(feature_lengths)
        # Zero the padding and take means over real frames only: an utterance must be encoded in a
        # batch as it is alone.
        positions = torch.arange(features.size(1), device=features.device)
        mask = (positions < feature_lengths.to(features.device)[:, None])[:, :, None]
        features = features.masked_fill(~mask, 0.0)
        mean = features.sum(1, keepdim=True) / mask.sum(1, keepdim=True)
        features = (features - mean).masked_fill(~mask, 0.0)
        features = nn.functional.pad(features, (0, 0, 0, -features.size(1) % STACKED))
        stacked = features.unflatten(1, (-1, STACKED)).flatten(2)  # (B, T, 4 * F)
        packed = pack_padded_sequence(
            stacked, lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        encoder_out, _ = pad_packed_sequence(
            self.gru(packed)[0], batch_first=True, total_length=stacked.size(1)
        )
        return encoder_out, lengths

    def num_output_frames(self, num_frames):
        return (num_frames + STACKED - 1) // STACKED
