# SPDX-License-Identifier: Apache-2.0
"""Searches, alignments and posteriors of transducers whose arcs advance several frames."""

import math
import random

import pytest
import torch

from tests.decoding.models import ENCODER_DIM
from transducer_toolkit import LatticeShape, multi_blank_loss, tdt_loss
from transducer_toolkit.decoding import (
    BeamSearch,
    GreedySearch,
    Hypothesis,
    NonFiniteScoresError,
    align,
    lattice_posteriors,
    narrow_lattice,
)
from transducer_toolkit.losses.reference import duration_paths
from transducer_toolkit.modules import Joiner, StatelessPredictor
from transducer_toolkit.ops.topology import get_topology

NAMES = ["tdt-0-1-2-4", "tdt-1-3", "tdt-0-20", "multi_blank-4-2"]


def random_model(name, seed, max_frames=30):
    """A model of 5 symbols that emits often, and a batch of its encoder's output."""
    torch.manual_seed(seed)
    topology = get_topology(name)
    predictor = StatelessPredictor(5, 8).double().eval()
    joiner = Joiner(ENCODER_DIM, 8, 16, 5, num_extra=topology.num_extra).double().eval()
    with torch.no_grad():
        joiner.output.weight.mul_(6.0)
    lengths = torch.randint(1, max_frames + 1, (1 + seed % 4,))
    encoder_out = torch.randn(len(lengths), int(lengths.max()), ENCODER_DIM, dtype=torch.float64)
    return predictor, joiner, encoder_out, lengths


@torch.inference_mode()
def greedy_reference(predictor, joiner, encoder_out, topology, limit):
    """One utterance, one cell a call, straight from the definition; also the visited cells."""
    found, visited = Hypothesis([], [], []), 0
    state = predictor.initial_state(1)
    out, state = predictor.step(torch.tensor([predictor.blank]), state)
    frame = here = 0
    while frame < len(encoder_out):
        visited += 1
        logits = joiner.step(encoder_out[frame : frame + 1], out)[0]
        symbols, durations = logits.tensor_split([len(logits) - topology.num_durations])
        log_probs = symbols.log_softmax(-1)
        symbol = int(log_probs.argmax())
        is_label = 0 < symbol < predictor.vocab_size
        if topology.predicts_durations:
            move = topology.label_durations[int(durations.argmax())]
            move = move if is_label else max(1, move)
        elif is_label:
            move = 0
        else:  # blank 0 advances one frame; the last symbol is big blank 0
            big = topology.blank_durations[1:]
            move = 1 if symbol == 0 else big[len(symbols) - 1 - symbol]
        if is_label:
            found.tokens.append(symbol)
            found.frames.append(frame)
            found.log_probs.append(float(log_probs[symbol]))
            out, state = predictor.step(torch.tensor([symbol]), state)
            here += 1
            if move == 0 and here >= limit:
                move = 1
        if move:
            here = 0
        frame += move
    return found, visited


@pytest.mark.parametrize("name", NAMES)
def test_greedy_equals_the_reference(name):
    topology = get_topology(name)
    num_tokens = num_visited = num_frames = 0
    for seed in range(60):
        predictor, joiner, encoder_out, lengths = random_model(name, seed)
        limit = 1 + seed % 4
        search = GreedySearch(predictor, joiner, max_symbols_per_frame=limit, topology=name)
        found = search(encoder_out, lengths)
        for one, frames, length in zip(found, encoder_out, lengths.tolist(), strict=True):
            expected, visited = greedy_reference(
                predictor, joiner, frames[:length], topology, limit
            )
            assert one == expected
            assert one.log_probs == pytest.approx(expected.log_probs, abs=1e-5)
            num_tokens += len(one.tokens)
            num_visited += visited
            num_frames += length
    assert num_tokens > 200
    if "0-20" not in name:
        assert num_visited != num_frames + num_tokens  # durations matter


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(10))
def test_chunks_equal_the_whole(name, seed):
    predictor, joiner, encoder_out, lengths = random_model(name, seed, max_frames=60)
    search = GreedySearch(predictor, joiner, topology=name)
    whole = search(encoder_out, lengths)
    choose = random.Random(seed)
    state = search.initial_state(len(lengths))
    done = torch.zeros_like(lengths)
    joined = [Hypothesis([], [], []) for _ in lengths]
    while bool((done < lengths).any()):
        width = choose.choice([1, 2, 7, 9])
        sizes = torch.tensor([choose.randint(0, width) for _ in lengths])
        sizes = torch.minimum(sizes, lengths - done)
        chunk = torch.full((len(lengths), width, ENCODER_DIM), math.nan, dtype=torch.float64)
        for row, size in enumerate(sizes.tolist()):
            chunk[row, :size] = encoder_out[row, done[row] : done[row] + size]
        added, state = search.advance(chunk, sizes, state)
        done = done + sizes
        for hypothesis, part in zip(joined, added, strict=True):
            hypothesis.tokens.extend(part.tokens)
            hypothesis.frames.extend(part.frames)
    assert joined == whole


def test_bad_scores_are_named():
    predictor, joiner, encoder_out, lengths = random_model("tdt-0-1-2-4", 3)
    with torch.no_grad():
        joiner.output.bias[-4:] = math.nan
    with pytest.raises(NonFiniteScoresError):
        GreedySearch(predictor, joiner, topology="tdt-0-1-2-4")(encoder_out, lengths)


def test_the_joiner_has_to_fit():
    predictor, joiner, *_ = random_model("tdt-0-1-2-4", 3)
    with pytest.raises(ValueError, match=r"'regular' needs a joiner with 0 logits .* one with 4"):
        GreedySearch(predictor, joiner)
    with pytest.raises(ValueError, match=r"'regular' needs a joiner with 0 logits .* one with 4"):
        BeamSearch(predictor, joiner)


@pytest.mark.parametrize("name", NAMES)
def test_alignment_and_posteriors_equal_all_paths(name):
    topology = get_topology(name)
    blank = 0
    shape = LatticeShape.from_lengths([6, 4, 5], [2, 1, 0])
    if "0-20" in name:  # labels of 0 frames, and no blank fits
        with pytest.raises(ValueError, match="utterance 0"):
            lattice_posteriors(
                torch.zeros(shape.num_cells, 7), torch.ones(3, 2).long(), shape, 0, topology=name
            )
        return
    num_symbols = 5 + topology.num_big_blanks
    targets = torch.tensor([[2, 1], [3, -1], [-1, -1]])
    logits = 2 * torch.randn(shape.num_cells, 5 + topology.num_extra, dtype=torch.float64)
    paths = align(logits, targets, shape, blank, topology=name)
    posteriors = lattice_posteriors(logits, targets, shape, blank, topology=name)
    padded = shape.unpack(logits)
    lengths = shape.logit_lengths, shape.target_lengths
    durations = topology.label_durations if topology.predicts_durations else (4, 2)
    loss = (tdt_loss if topology.predicts_durations else multi_blank_loss)(
        logits, targets, *lengths, blank, durations, reduction="none"
    )
    torch.testing.assert_close(posteriors.log_likelihood, -loss)
    for b, (num_frames, num_targets) in enumerate(zip(*(x.tolist() for x in lengths), strict=True)):
        cells = padded[b, :num_frames, : num_targets + 1]
        tokens = cells[..., :num_symbols].log_softmax(-1)
        of_duration = cells[..., num_symbols:].log_softmax(-1)
        scores, visits, labels = [], [], []
        for path in duration_paths(num_frames, num_targets, topology):
            total = 0.0
            for kind, t, u, k in path:
                frames = getattr(topology, f"{kind}_durations")[k]
                if kind == "label":
                    symbol = int(targets[b, u])
                else:
                    symbol = 0 if topology.predicts_durations or k == 0 else num_symbols - k
                total += float(tokens[t, u, symbol])
                if topology.predicts_durations:
                    total += float(of_duration[t, u, durations.index(frames)])
            scores.append(total)
            visits.append([(t, u) for _, t, u, _ in path])
            labels.append([t for kind, t, _, _ in path if kind == "label"])
        best = max(range(len(scores)), key=scores.__getitem__)
        assert paths[b].log_prob == pytest.approx(scores[best], abs=1e-9)
        assert paths[b].frames == labels[best]
        weights = torch.tensor(scores, dtype=torch.float64).softmax(0).tolist()
        occupancy = torch.zeros(num_frames, num_targets + 1, dtype=torch.float64)
        of_labels = torch.zeros(num_frames, num_targets, dtype=torch.float64)
        for weight, cells_of_path, frames_of_path in zip(weights, visits, labels, strict=True):
            for t, u in cells_of_path:
                occupancy[t, u] += weight
            for u, t in enumerate(frames_of_path):
                of_labels[t, u] += weight
        inside = slice(0, num_frames), slice(0, num_targets + 1)
        torch.testing.assert_close(posteriors.occupancy[b][inside], occupancy)
        found = posteriors.labels[b][:num_frames, :num_targets]
        torch.testing.assert_close(found, of_labels)


@pytest.mark.parametrize("name", ["tdt-0-1-2-4", "multi_blank-4-2"])
def test_the_narrow_lattice_has_the_same_alignment(name):
    predictor, joiner, encoder_out, _ = random_model(name, 0)
    topology = get_topology(name)
    targets = torch.tensor([[2, 1, 4]])
    encoder_out = encoder_out[:1]
    predictor_out = predictor(targets)
    shape = LatticeShape.from_lengths([encoder_out.size(1)], [3])
    logits = joiner(encoder_out, predictor_out, shape).detach()
    narrow = narrow_lattice(
        joiner, encoder_out, predictor_out, targets, 0, vocab_size=5,
        num_durations=topology.num_durations,
    )  # fmt: skip
    assert narrow.logits.size(1) == 3 + topology.num_extra
    (expected,) = align(logits, targets, shape, 0, topology=name)
    (actual,) = align(narrow.logits.detach(), *narrow.arguments()[1:], topology=name)
    assert actual.frames == expected.frames
    assert actual.log_prob == pytest.approx(expected.log_prob, rel=1e-5)
