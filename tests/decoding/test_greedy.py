# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from transducer_toolkit.decoding import Hypothesis, greedy_search
from transducer_toolkit.modules import Joiner, LstmPredictor, StatelessPredictor

VOCAB_SIZE, ENCODER_DIM = 6, 8


def greedy_reference(predictor, joiner, encoder_out, max_symbols_per_frame):
    """One utterance, one cell a call, straight from the definition."""
    tokens, frames = [], []
    state = predictor.initial_state(1)
    out, state = predictor.step(torch.tensor([predictor.blank]), state)
    for frame in range(len(encoder_out)):
        for _ in range(max_symbols_per_frame):
            symbol = int(joiner.step(encoder_out[frame : frame + 1], out).argmax())
            if symbol == predictor.blank:
                break
            tokens.append(symbol)
            frames.append(frame)
            out, state = predictor.step(torch.tensor([symbol]), state)
    return Hypothesis(tokens, frames)


@pytest.mark.parametrize("max_symbols_per_frame", [1, 2, 5])
@pytest.mark.parametrize("blank_bias", [-1.0, 0.0, 1.0, 3.0, 50.0])
@pytest.mark.parametrize("predictor_class", [StatelessPredictor, LstmPredictor])
def test_batch_equals_reference(predictor_class, blank_bias, max_symbols_per_frame):
    torch.manual_seed(int(10 * blank_bias) + max_symbols_per_frame)
    predictor = predictor_class(VOCAB_SIZE, 12, blank=2).eval()
    joiner = Joiner(ENCODER_DIM, predictor.output_dim, 16, VOCAB_SIZE)
    with torch.no_grad():
        joiner.output.weight *= 4
        joiner.output.bias[2] += blank_bias
    lengths = [1, 40, 7, 8, 9, 23]
    encoder_out = 2 * torch.randn(len(lengths), max(lengths), ENCODER_DIM)
    found = greedy_search(
        predictor,
        joiner,
        encoder_out,
        torch.tensor(lengths),
        max_symbols_per_frame=max_symbols_per_frame,
    )
    with torch.no_grad():
        expected = [
            greedy_reference(predictor, joiner, encoder_out[row, :length], max_symbols_per_frame)
            for row, length in enumerate(lengths)
        ]
    assert found == expected
    if blank_bias == 0.0:
        assert sum(len(h.tokens) for h in found) > 0
    if blank_bias == 50.0:
        assert all(not h.tokens for h in found)


def test_bad_arguments_are_named():
    predictor, joiner = StatelessPredictor(5, 16), Joiner(8, 16, 32, 5)
    with pytest.raises(ValueError, match="max_symbols_per_frame must be at least 1, got 0"):
        greedy_search(
            predictor, joiner, torch.zeros(1, 3, 8), torch.tensor([3]), max_symbols_per_frame=0
        )
    with pytest.raises(ValueError, match=r"encoder_lengths must have shape \(2,\)"):
        greedy_search(predictor, joiner, torch.zeros(2, 3, 8), torch.tensor([3]))
