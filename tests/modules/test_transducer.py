# SPDX-License-Identifier: Apache-2.0
from functools import partial

import torch

from transducer_toolkit import LatticeShape
from transducer_toolkit.modules import ConvLstmEncoder, Joiner, StatelessPredictor, Transducer


def test_build_fits_the_parts_together():
    model = Transducer.build(
        ConvLstmEncoder(hidden_dim=24, conv_channels=2),
        partial(StatelessPredictor, embedding_dim=20),
        partial(Joiner, joiner_dim=16),
        vocab_size=9,
        blank=2,
    )
    assert (model.vocab_size, model.blank) == (9, 2)
    features, targets = torch.randn(2, 40, 80), torch.tensor([[3, 4, 5], [6, -1, -1]])
    encoder_out, lengths, predictor_out = model(features, torch.tensor([40, 21]), targets)
    shape = LatticeShape.from_lengths(lengths, [3, 1])
    assert lengths.tolist() == [10, 6]
    assert model.joiner(encoder_out, predictor_out, shape).shape == (10 * 4 + 6 * 2, 9)
