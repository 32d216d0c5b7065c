# SPDX-License-Identifier: Apache-2.0
"""Random models to decode with."""

import random

import torch

from transducer_toolkit.modules import AdditiveJoiner, Joiner, LstmPredictor, StatelessPredictor

ENCODER_DIM = 8


def random_model(seed, *, max_frames, max_vocab_size=9, num_extra=0):
    """Predictor, joiner, a padded batch of encoder frames, its lengths; all of it by chance.

    float64: no two symbols of a cell tie, whatever the order of the sums.
    """
    choose = random.Random(seed)
    torch.manual_seed(seed)
    vocab_size = choose.randint(2, max_vocab_size)
    blank = choose.randrange(vocab_size)
    make = choose.choice([StatelessPredictor, LstmPredictor])
    predictor = make(vocab_size, choose.randint(2, 8), blank=blank).double().eval()
    if choose.random() < 0.8 or num_extra:
        dim = choose.randint(2, 12)
        joiner = Joiner(
            ENCODER_DIM, predictor.output_dim, dim, vocab_size, num_extra=num_extra
        ).double()
        output = joiner.output
    else:
        joiner = AdditiveJoiner(ENCODER_DIM, predictor.output_dim, vocab_size).double()
        output = joiner.am
    with torch.no_grad():
        output.weight *= choose.choice([1.0, 4.0, 16.0])
        output.bias[blank] += choose.choice([-1.0, 0.0, 1.0, 3.0])
    lengths = [choose.randint(0, max_frames) for _ in range(choose.randint(1, 4))]
    encoder_out = torch.randn(len(lengths), max(lengths) + choose.randint(0, 3), ENCODER_DIM)
    return predictor, joiner, 2 * encoder_out.double(), torch.tensor(lengths)
