# SPDX-License-Identifier: Apache-2.0
"""The joiner of a hybrid autoregressive transducer (HAT)."""

import pytest
import torch

from transducer_toolkit import Joiner, LatticeShape
from transducer_toolkit.decoding import BeamSearch, GreedySearch
from transducer_toolkit.losses.reference import hat_log_probs
from transducer_toolkit.modules import StatelessPredictor


@pytest.mark.parametrize("blank", [0, 4])
@pytest.mark.parametrize("num_extra", [0, 3])
def test_a_step_has_log_probabilities(blank, num_extra):
    joiner = Joiner(8, 6, 16, 5, normalization="hat", blank=blank, num_extra=num_extra)
    frames, predictor_out = torch.randn(2, 7, 8), torch.randn(2, 3, 6)
    logits = joiner.padded(frames, predictor_out)
    shape = LatticeShape.from_lengths([7, 7], [2, 2])
    torch.testing.assert_close(joiner(frames, predictor_out, shape), shape.pack(logits))
    step = joiner.step(frames[:, :, None], predictor_out[:, None])
    torch.testing.assert_close(step[..., :5], hat_log_probs(logits[..., :5], blank))
    assert torch.equal(step[..., 5:], logits[..., 5:])
    torch.testing.assert_close(step[..., :5].logsumexp(-1), torch.zeros(2, 7, 3))
    assert "normalization='hat'" in repr(joiner)


def test_internal_language_model():
    joiner = Joiner(8, 6, 16, 5, normalization="hat", blank=2)
    predictor_out = torch.randn(4, 6)
    lm = joiner.internal_lm(predictor_out)
    assert (lm[:, 2] == -torch.inf).all()
    labels = [0, 1, 3, 4]
    of_zeros = joiner.step(torch.zeros(8), predictor_out)
    rest = of_zeros[:, labels] - of_zeros[:, labels].logsumexp(-1, keepdim=True)
    torch.testing.assert_close(lm[:, labels], rest)


@pytest.mark.parametrize("kind", [GreedySearch, BeamSearch])
def test_searches_follow_the_probabilities_of_hat(kind):
    torch.manual_seed(1)
    predictor = StatelessPredictor(5, 6).double().eval()
    joiner = Joiner(8, 6, 16, 5, normalization="hat").double().eval()
    with torch.no_grad():
        joiner.output.weight.mul_(5)
    plain = Joiner(8, 6, 16, 5).double().eval()
    plain.load_state_dict(joiner.state_dict())
    encoder_out, lengths = torch.randn(3, 12, 8).double(), torch.tensor([12, 9, 5])
    found = kind(predictor, joiner, topology="modified")(encoder_out, lengths)
    other = kind(predictor, plain, topology="modified")(encoder_out, lengths)
    assert found != other
    if kind is GreedySearch:  # blank where it is more probable than every label
        frame, out = encoder_out[0, :1], predictor(torch.zeros(1, 0).long())[:, 0]
        log_probs = hat_log_probs(plain.step(frame, out), 0)[0]
        first = found[0].tokens[0] if found[0].frames[:1] == [0] else 0
        assert first == int(log_probs.argmax())


def test_bad_options():
    with pytest.raises(ValueError, match="normalization: expected one of"):
        Joiner(8, 6, 16, 5, normalization="sigmoid")
    with pytest.raises(ValueError, match="num_extra: expected at least 0"):
        Joiner(8, 6, 16, 5, num_extra=-1)
