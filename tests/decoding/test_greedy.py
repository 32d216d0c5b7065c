# SPDX-License-Identifier: Apache-2.0
import math
import random

import pytest
import torch

from transducer_toolkit.decoding import GreedySearch, Hypothesis, greedy_search
from transducer_toolkit.modules import AdditiveJoiner, Joiner, LstmPredictor, StatelessPredictor

ENCODER_DIM = 8


def greedy_reference(predictor, joiner, encoder_out, max_symbols_per_frame):
    """One utterance, one cell a call, straight from the definition."""
    found = Hypothesis([], [], [])
    state = predictor.initial_state(1)
    out, state = predictor.step(torch.tensor([predictor.blank]), state)
    for frame in range(len(encoder_out)):
        for _ in range(max_symbols_per_frame):
            log_probs = joiner.step(encoder_out[frame : frame + 1], out)[0].log_softmax(-1)
            symbol = int(log_probs.argmax())
            if symbol == predictor.blank:
                break
            found.tokens.append(symbol)
            found.frames.append(frame)
            found.log_probs.append(float(log_probs[symbol]))
            out, state = predictor.step(torch.tensor([symbol]), state)
    return found


def random_parts(seed, max_frames=30):
    """Predictor, joiner, a padded batch of encoder frames, its lengths; all of it by chance.

    float64: no two symbols of a cell tie, whatever the order of the sums.
    """
    choose = random.Random(seed)
    torch.manual_seed(seed)
    vocab_size = choose.randint(2, 9)
    blank = choose.randrange(vocab_size)
    make = choose.choice([StatelessPredictor, LstmPredictor])
    predictor = make(vocab_size, choose.randint(2, 8), blank=blank).double().eval()
    if choose.random() < 0.8:
        dim = choose.randint(2, 12)
        joiner = Joiner(ENCODER_DIM, predictor.output_dim, dim, vocab_size).double()
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


def check_same(found, expected):
    assert found == expected
    for one, other in zip(found, expected, strict=True):
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-5)


def test_batch_equals_the_reference_on_500_models():
    num_tokens = 0
    for seed in range(500):
        predictor, joiner, encoder_out, lengths = random_parts(seed, max_frames=12)
        limit = 1 + seed % 4
        found = greedy_search(predictor, joiner, encoder_out, lengths, max_symbols_per_frame=limit)
        with torch.inference_mode():
            expected = [
                greedy_reference(predictor, joiner, frames[:length], limit)
                for frames, length in zip(encoder_out, lengths.tolist(), strict=True)
            ]
        check_same(found, expected)
        num_tokens += sum(len(h.tokens) for h in found)
    assert num_tokens > 2000  # the models do emit


@pytest.mark.parametrize("seed", range(40))
def test_chunks_equal_the_whole(seed):
    predictor, joiner, encoder_out, lengths = random_parts(seed)
    search = GreedySearch(predictor, joiner, max_symbols_per_frame=1 + seed % 4)
    whole = search(encoder_out, lengths)

    choose = random.Random(seed)
    state = search.initial_state(len(lengths))
    done = torch.zeros_like(lengths)
    joined = [Hypothesis([], [], []) for _ in range(len(lengths))]
    while bool((done < lengths).any()):
        # Each utterance gets some of its frames, or none of them, at its own pace.
        width = choose.choice([1, 2, 7, 8, 9, 20])
        sizes = torch.tensor([choose.randint(0, width) for _ in lengths])
        sizes = torch.minimum(sizes, lengths - done)
        chunk = torch.full((len(lengths), width, ENCODER_DIM), math.nan, dtype=torch.float64)
        for row, size in enumerate(sizes.tolist()):
            chunk[row, :size] = encoder_out[row, done[row] : done[row] + size]
        added, state = search.advance(chunk, sizes, state)
        done = done + sizes
        assert state.num_frames.tolist() == done.tolist()
        for hypothesis, part in zip(joined, added, strict=True):
            hypothesis.tokens.extend(part.tokens)
            hypothesis.frames.extend(part.frames)
            hypothesis.log_probs.extend(part.log_probs)
    check_same(joined, whole)


def test_a_chunk_leaves_the_state_before_it_as_it_was():
    predictor, joiner, encoder_out, lengths = random_parts(3)
    search = GreedySearch(predictor, joiner)
    state = search.initial_state(len(lengths))
    first, _ = search.advance(encoder_out, lengths, state)
    again, _ = search.advance(encoder_out, lengths, state)
    assert first == again and any(h.tokens for h in first)


@pytest.mark.parametrize("topology", ["modified", "constrained", "one_sym_per_frame"])
def test_in_topologies_where_a_label_moves_on_a_frame_emits_one_at_most(topology):
    predictor, joiner, encoder_out, lengths = random_parts(3)
    found = GreedySearch(predictor, joiner, topology=topology)(encoder_out, lengths)
    assert found == greedy_search(predictor, joiner, encoder_out, lengths, max_symbols_per_frame=1)
    assert found != greedy_search(predictor, joiner, encoder_out, lengths)


def test_sharp_and_half_precision_logits_have_confidences():
    predictor, joiner = StatelessPredictor(4, 2).eval(), Joiner(3, 2, 5, 4)
    with torch.no_grad():
        joiner.output.weight.zero_()
        joiner.output.bias.copy_(torch.tensor([0.0, 500.0, 0.0, -math.inf]))
    search = GreedySearch(predictor.bfloat16(), joiner.bfloat16(), max_symbols_per_frame=2)
    (found,) = search(torch.zeros(1, 2, 3, dtype=torch.bfloat16), torch.tensor([2]))
    assert found == Hypothesis([1, 1, 1, 1], [0, 0, 1, 1])
    assert found.log_probs == [0.0] * 4


def test_bad_arguments_are_named():
    predictor, joiner = StatelessPredictor(5, 16), Joiner(8, 16, 32, 5)
    frames, lengths = torch.zeros(1, 3, 8), torch.tensor([3])
    with pytest.raises(ValueError, match="max_symbols_per_frame must be at least 1, got 0"):
        greedy_search(predictor, joiner, frames, lengths, max_symbols_per_frame=0)
    with pytest.raises(ValueError, match=r"encoder_lengths must have shape \(2,\)"):
        greedy_search(predictor, joiner, torch.zeros(2, 3, 8), lengths)
    with pytest.raises(ValueError, match=r"must lie in \[0, 3\], got values from 4 to 4"):
        greedy_search(predictor, joiner, frames, torch.tensor([4]))
    with pytest.raises(ValueError, match=r"encoder_out must have shape \(B, T, E\), got \(3, 8\)"):
        greedy_search(predictor, joiner, frames[0], lengths)
    with pytest.raises(ValueError, match="topology must be one of regular"):
        GreedySearch(predictor, joiner, topology="linear")
