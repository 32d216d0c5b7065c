# SPDX-License-Identifier: Apache-2.0
import math
import random

import pytest
import torch

from tests.decoding.models import ENCODER_DIM, random_model
from transducer_toolkit.decoding import (
    TOPOLOGIES,
    BeamSearch,
    GreedySearch,
    Hypothesis,
    NonFiniteScoresError,
    greedy_search,
)
from transducer_toolkit.modules import Joiner, StatelessPredictor


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


def check_same(found, expected):
    assert found == expected
    for one, other in zip(found, expected, strict=True):
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-5)


def test_batch_equals_the_reference_on_500_models():
    num_tokens = 0
    for seed in range(500):
        predictor, joiner, encoder_out, lengths = random_model(seed, max_frames=12)
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
    predictor, joiner, encoder_out, lengths = random_model(seed, max_frames=30)
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
    predictor, joiner, encoder_out, lengths = random_model(3, max_frames=30)
    search = GreedySearch(predictor, joiner)
    state = search.initial_state(len(lengths))
    first, _ = search.advance(encoder_out, lengths, state)
    again, _ = search.advance(encoder_out, lengths, state)
    assert first == again and any(h.tokens for h in first)


@pytest.mark.parametrize(
    "topology", [name for name, row in TOPOLOGIES.items() if not row.labels_share_frames]
)
def test_in_topologies_where_a_label_moves_on_a_frame_emits_one_at_most(topology):
    predictor, joiner, encoder_out, lengths = random_model(3, max_frames=30)
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
    with pytest.raises(ValueError, match="max_symbols_per_frame: expected at least 1, got 0"):
        greedy_search(predictor, joiner, frames, lengths, max_symbols_per_frame=0)
    with pytest.raises(ValueError, match=r"encoder_lengths: expected shape \(2,\)"):
        greedy_search(predictor, joiner, torch.zeros(2, 3, 8), lengths)
    with pytest.raises(ValueError, match=r"expected values in \[0, 3\], got values from 4 to 4"):
        greedy_search(predictor, joiner, frames, torch.tensor([4]))
    with pytest.raises(ValueError, match=r"encoder_out: expected shape \(B, T, E\), got \(3, 8\)"):
        greedy_search(predictor, joiner, frames[0], lengths)
    with pytest.raises(ValueError, match="topology: expected one of"):
        GreedySearch(predictor, joiner, topology="linear")


@pytest.mark.parametrize("make", [GreedySearch, BeamSearch])
def test_types_widths_and_vocabularies_are_named(make):
    predictor, joiner = StatelessPredictor(5, 16), Joiner(8, 16, 32, 5)
    frames, lengths = torch.zeros(1, 3, 8), torch.tensor([3])
    with pytest.raises(TypeError, match=r"predictor: expected a Predictor of .* got int"):
        make(3, joiner)
    with pytest.raises(TypeError, match=r"joiner: expected a Joiner of .* got NoneType"):
        make(predictor, None)
    with_step = torch.nn.Module()
    with_step.step = joiner.step
    with pytest.raises(TypeError, match="an object with project_encoder, step_projected; got"):
        make(predictor, with_step)
    with pytest.raises(ValueError, match="the same vocab_size, got 5 and 6"):
        make(predictor, Joiner(8, 16, 32, 6))
    search = make(predictor, joiner)
    for encoder_out, encoder_lengths, error, message in (
        ([[1.0]], lengths, TypeError, "encoder_out: expected a torch.Tensor, got list"),
        (frames, [3], TypeError, "encoder_lengths: expected a torch.Tensor, got list"),
        (frames.long(), lengths, TypeError, "encoder_out: expected dtype"),
        (frames, lengths.float(), TypeError, "encoder_lengths: expected dtype int32, int64"),
        (frames, lengths.to("meta"), ValueError, "encoder_lengths: expected a tensor with data"),
        (frames[:, :, :7], lengths, ValueError, r"expected shape \(B, T, 8\), E from the joiner"),
        (
            frames.double(),
            lengths,
            TypeError,
            "expected dtype torch.float32, that of the joiner, got torch.float64",
        ),
        (
            frames.to("meta"),
            lengths,
            ValueError,
            "expected device cpu, that of the joiner, got meta",
        ),
    ):
        with pytest.raises(error, match=message):
            search(encoder_out, encoder_lengths)


def test_states_are_named():
    search = GreedySearch(StatelessPredictor(5, 16), Joiner(8, 16, 32, 5))
    frames, lengths = torch.zeros(2, 3, 8), torch.tensor([3, 3])
    with pytest.raises(TypeError, match="state: expected a GreedyState, got NoneType"):
        search.advance(frames, lengths, None)
    with pytest.raises(ValueError, match=r"state: expected 2 utterances.* got 3"):
        search.advance(frames, lengths, search.initial_state(3))
    with pytest.raises(ValueError, match="batch_size: expected at least 0, got -1"):
        search.initial_state(-1)
    with pytest.raises(TypeError, match="max_symbols_per_frame: expected an int, got float"):
        GreedySearch(search.predictor, search.joiner, max_symbols_per_frame=2.0)


@pytest.mark.parametrize("make", [GreedySearch, BeamSearch])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_that_are_not_finite_name_their_utterances(make, value):
    """Not the first symbol of the vocabulary, nor nothing."""
    predictor, joiner = StatelessPredictor(5, 16), Joiner(8, 16, 32, 5, activation="identity")
    search = make(predictor, joiner)
    frames, lengths = torch.randn(3, 20, 8), torch.tensor([20, 20, 3])
    frames[1, 17, 0] = value
    frames[2, 3:] = value  # padding
    with pytest.raises(NonFiniteScoresError, match=r"encoder_out\[1\]: the scores") as error:
        search(frames, lengths)
    assert error.value.utterances == [1]
    assert len(search(frames[[0, 2]], lengths[[0, 2]])) == 2
    with torch.no_grad():
        joiner.output.bias.fill_(-math.inf)
    with pytest.raises(NonFiniteScoresError) as error:
        search(frames, lengths)
    assert error.value.utterances == [0, 1, 2]
