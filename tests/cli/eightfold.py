# SPDX-License-Identifier: Apache-2.0
"""An encoder of a user's own: pairs of feature frames are averaged before a 4x encoder."""

import torch

from transducer_toolkit.modules import ConvLstmEncoder


class EightfoldEncoder(ConvLstmEncoder):
    def forward(self, features, feature_lengths):
        features = torch.nn.functional.pad(features, (0, 0, 0, features.size(1) % 2))
        pairs = features.unflatten(1, (-1, 2)).mean(2)
        return super().forward(pairs, (feature_lengths + 1) // 2)

    def num_output_frames(self, num_frames):
        # Called with feature frames by everyone else, with pairs of them by forward.
        return -(-num_frames // 8)

    def front_end(self, features, feature_lengths):
        hidden, _ = super().front_end(features, feature_lengths)
        return hidden, -(-feature_lengths // 4)
