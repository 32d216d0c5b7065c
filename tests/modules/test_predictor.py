# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from transducer_toolkit.modules import LstmPredictor, StatelessPredictor

VOCAB_SIZE = 11
KINDS = {
    "stateless_1": lambda blank: StatelessPredictor(VOCAB_SIZE, 12, context_size=1, blank=blank),
    "stateless_2": lambda blank: StatelessPredictor(VOCAB_SIZE, 12, context_size=2, blank=blank),
    "stateless_4": lambda blank: StatelessPredictor(VOCAB_SIZE, 12, context_size=4, blank=blank),
    "lstm": lambda blank: LstmPredictor(VOCAB_SIZE, 6, 12, blank=blank),
    "lstm_2": lambda blank: LstmPredictor(VOCAB_SIZE, 6, 12, num_layers=2, blank=blank),
}


@pytest.fixture(params=KINDS)
def kind(request):
    torch.manual_seed(0)
    return KINDS[request.param]


@pytest.mark.parametrize("blank", [0, 3, VOCAB_SIZE - 1])
def test_forward_equals_steps(kind, blank):
    predictor = kind(blank).eval()
    targets = torch.randint(0, VOCAB_SIZE, (3, 7))
    whole = predictor(targets)
    assert whole.shape == (3, 8, predictor.output_dim)
    state = predictor.initial_state(3)
    for column in range(8):
        tokens = targets[:, column - 1] if column else torch.full((3,), blank)
        out, state = predictor.step(tokens, state)
        torch.testing.assert_close(out, whole[:, column])


def test_state_is_indexed_by_hypothesis(kind):
    predictor = kind(0).eval()
    _, state = predictor.step(torch.tensor([0, 0, 0]), predictor.initial_state(3))
    _, state = predictor.step(torch.tensor([4, 5, 6]), state)
    order = torch.tensor([2, 0])
    expected, _ = predictor.step(torch.tensor([7, 7, 7]), state)
    reordered, _ = predictor.step(torch.tensor([7, 7]), state[order])
    torch.testing.assert_close(reordered, expected[order])


@pytest.mark.parametrize("padding", [-1, 10**8, -(2**40)])
def test_padding_never_reaches_earlier_columns(kind, padding):
    predictor = kind(0).eval()
    targets = torch.randint(1, VOCAB_SIZE, (2, 6))
    padded = targets.clone()
    padded[1, 3:] = padding
    whole, with_padding = predictor(targets), predictor(padded)
    torch.testing.assert_close(with_padding[0], whole[0])
    torch.testing.assert_close(with_padding[1, :4], whole[1, :4])
    assert with_padding.isfinite().all()


def test_empty_targets_and_int32(kind):
    predictor = kind(0).eval()
    assert predictor(torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 1, predictor.output_dim)
    targets = torch.tensor([[3, 4]])
    torch.testing.assert_close(predictor(targets.int()), predictor(targets))


def test_stateless_context_is_that_of_sherpa_onnx():
    """It starts decoding with the context [-1, blank], a negative id being a zero embedding."""
    predictor = StatelessPredictor(VOCAB_SIZE, 12, context_size=2, blank=0)
    _, state = predictor.step(torch.tensor([0]), predictor.initial_state(1))
    assert state.tolist() == [[-1, 0]]
    expected = (predictor.embedding.weight[0] * predictor.context_weight[1]).relu()
    torch.testing.assert_close(predictor(torch.zeros(1, 0, dtype=torch.int64))[0, 0], expected)


def test_stateless_forgets_beyond_its_context():
    predictor = StatelessPredictor(VOCAB_SIZE, 12, context_size=2)
    one, other = predictor(torch.tensor([[1, 2, 3]])), predictor(torch.tensor([[9, 2, 3]]))
    torch.testing.assert_close(one[:, 3], other[:, 3])
    assert not torch.allclose(one[:, 2], other[:, 2])


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="context_size: expected at least 1, got 0"):
        StatelessPredictor(VOCAB_SIZE, context_size=0)
    with pytest.raises(TypeError, match="embedding_dim: expected an int, got float"):
        StatelessPredictor(VOCAB_SIZE, embedding_dim=1.5)
    with pytest.raises(ValueError, match="num_layers: expected at least 1, got 0"):
        LstmPredictor(VOCAB_SIZE, num_layers=0)
    with pytest.raises(ValueError, match=r"dropout: expected a number in \[0, 1\], got nan"):
        LstmPredictor(VOCAB_SIZE, dropout=float("nan"))
    with pytest.raises(ValueError, match=r"blank must be in \[0, 11\), got 11"):
        LstmPredictor(VOCAB_SIZE, blank=11)
