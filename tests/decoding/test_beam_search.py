# SPDX-License-Identifier: Apache-2.0
import itertools
import math
import random

import numpy as np
import pytest
import torch

from tests.decoding.models import ENCODER_DIM, random_model
from transducer_toolkit.decoding import (
    TOPOLOGIES,
    BeamHypothesis,
    BeamSearch,
    GreedySearch,
    Hypothesis,
    ModifiedBeamSearch,
    NonFiniteScoresError,
)
from transducer_toolkit.losses.reference import reference_duration_loss, reference_loss
from transducer_toolkit.modules import Joiner, StatelessPredictor
from transducer_toolkit.ops.topology import Topology, get_topology

NAMES = [*TOPOLOGIES, "tdt-0-1-2", "tdt-1-3", "tdt-0-20", "tdt-0-1-2-3-4", "multi_blank-2-4",
         "multi_blank-2"]  # fmt: skip


class BigramModel:
    """A language model by chance: log-probabilities of the next symbol given the last one."""

    def __init__(self, vocab_size, seed):
        generator = torch.Generator().manual_seed(seed)
        logits = 2 * torch.randn(vocab_size, vocab_size, generator=generator)
        self.table = logits.double().log_softmax(-1)

    def initial_state(self, batch_size, device="cpu"):
        return torch.full((batch_size, 1), -1, device=device)

    def step(self, tokens, state):
        return self.table[tokens], tokens.unsqueeze(1)


class EndingModel(BigramModel):
    """One that also scores the end of the utterance."""

    def __init__(self, vocab_size, seed):
        super().__init__(vocab_size, seed)
        self.ends = self.table.roll(1, 0)[0]

    def final(self, state):
        return self.ends[state[:, 0]]


def beam_reference(search, encoder_out):
    """One utterance, one cell a call; token tuples with their scores, the best first."""
    predictor, joiner, lm, topology = search.predictor, search.joiner, search.lm, search.topology
    blank, beam, window = predictor.blank, search.beam, search.score_window
    num_frames = len(encoder_out)
    constrained = topology.label_takes_blank
    limit = search.max_symbols_per_frame if topology.label_durations[0] == 0 else 1
    label_durations = (0,) if constrained else topology.label_durations
    states = {}

    def state_of(tokens):
        if tokens not in states:
            token = torch.tensor([tokens[-1] if tokens else blank])
            before = state_of(tokens[:-1]) if tokens else (None, None)
            states[tokens] = tuple(
                model and model.step(token, old[1] if tokens else model.initial_state(1))
                for model, old in zip((predictor, lm), before, strict=True)
            )
        return states[tokens]

    def arcs(tokens, frame):
        """Symbol, duration and score of each arc; blank is None."""
        (out, _), of_lm = state_of(tokens)
        logits = joiner.step(encoder_out[frame], out[0])
        symbols, durations = logits.tensor_split([len(logits) - topology.num_durations])
        symbols = symbols.log_softmax(-1).tolist()
        durations = dict(
            zip(label_durations, durations.log_softmax(-1).tolist(), strict=True)
            if topology.predicts_durations
            else ()
        )
        big = dict(zip(topology.blank_durations[1:], range(1, 99), strict=False))
        for move in topology.blank_durations:
            if topology.predicts_durations:
                yield None, move, symbols[blank] + durations[move]
            else:
                yield None, move, symbols[-big[move] if move in big else blank]
        labels = {
            symbol: symbols[symbol] + (search.lm_weight * float(of_lm[0][0, symbol]) if lm else 0)
            for symbol in range(predictor.vocab_size)
            if symbol != blank
        }
        for symbol in sorted(labels, key=labels.get, reverse=True)[:beam]:
            for move in label_durations:
                yield symbol, move, labels[symbol] + durations.get(move, 0.0)

    def add(total, score):
        return float(np.logaddexp(total, score))

    # frame -> tokens -> scores of all paths and of those that may end here
    waiting = {0: {(): (0.0, 0.0)}}
    for frame in range(num_frames):
        level = {tokens: scores[0] for tokens, scores in waiting.pop(frame, {}).items()}
        best = max((s[0] for hyps in waiting.values() for s in hyps.values()), default=-math.inf)
        if not level:
            continue
        found = []
        for num_labels in range(limit + 1):
            by_blank, by_label = [], []
            for tokens, score in level.items():
                for symbol, move, added in arcs(tokens, frame):
                    if symbol is None:
                        by_blank.append((score + added, frame + move, tokens))
                    elif num_labels < limit:
                        by_label.append((score + added, frame + move, (*tokens, symbol)))
            best = max([best] + [score for score, *_ in by_blank])
            several = len(topology.blank_durations) > 1
            found += [(*h, h[0]) for h in by_blank if not several or h[0] > best - window]
            best = max([best] + [score for score, *_ in by_label])
            by_label = sorted((h for h in by_label if h[0] > best - window), reverse=True)
            level = {}
            for move in label_durations:
                for score, place, tokens in [h for h in by_label if h[1] == frame + move][:beam]:
                    if move == 0:
                        level[tokens] = score
                    else:
                        end = score if topology.ends_with_label else -math.inf
                        found.append((score, place, tokens, end))
        for score, place, tokens, end in found:
            old = waiting.setdefault(place, {}).get(tokens, (-math.inf, -math.inf))
            waiting[place][tokens] = add(old[0], score), add(old[1], end)
        for place, hyps in waiting.items():
            kept = sorted(hyps.items(), key=lambda item: item[1][0], reverse=True)[:beam]
            waiting[place] = dict(kept)
        best = max(s[0] for hyps in waiting.values() for s in hyps.values())
        for hyps in waiting.values():
            for tokens in [y for y, s in hyps.items() if s[0] <= best - window]:
                del hyps[tokens]
    ended = {y: s[1] for y, s in waiting.get(num_frames, {}).items() if s[1] > -math.inf}
    if not ended:
        for hyps in waiting.values():
            for tokens, scores in hyps.items():
                ended[tokens] = add(ended.get(tokens, -math.inf), scores[0])
    if hasattr(lm, "final"):
        for tokens in ended:
            ended[tokens] += search.lm_weight * float(lm.final(state_of(tokens)[1][1]))
    norm = (lambda tokens: len(tokens) + 1) if search.length_normalized else lambda tokens: 1
    ranked = sorted(ended.items(), key=lambda item: item[1] / norm(item[0]), reverse=True)
    return ranked[:beam]


def random_search(seed, max_frames=7):
    """A search of random options, of any topology, and a batch for it."""
    topology = NAMES[seed % len(NAMES)]
    predictor, joiner, encoder_out, lengths = random_model(
        seed, max_frames=max_frames, num_extra=get_topology(topology).num_extra
    )
    lm = BigramModel if seed % 2 else EndingModel
    search = BeamSearch(
        predictor,
        joiner,
        beam=1 + seed % 5,
        score_window=(None, 3.0, 8.0)[seed % 3],
        max_symbols_per_frame=1 + seed % 4,
        topology=topology,
        length_normalized=seed % 3 > 0,
        lm=lm(predictor.vocab_size, seed) if seed % 11 < 4 else None,
    )
    return search, encoder_out, lengths


def test_equals_the_reference_on_400_models():
    num_hypotheses = 0
    for seed in range(400):
        search, encoder_out, lengths = random_search(seed)
        found = search.nbest(encoder_out, lengths)
        for row, length in enumerate(lengths.tolist()):
            with torch.inference_mode():
                expected = beam_reference(search, encoder_out[row, :length])
            assert [tuple(h.tokens) for h in found[row]] == [tokens for tokens, _ in expected]
            scores = [score for _, score in expected]
            assert [h.score for h in found[row]] == pytest.approx(scores, abs=1e-9)
            num_hypotheses += sum(len(h.tokens) > 0 for h in found[row])
    assert num_hypotheses > 1500


@pytest.mark.parametrize("topology", [*NAMES, "forced_blanks"])
@pytest.mark.parametrize("seed", range(3))
def test_a_beam_of_all_sequences_gives_the_likelihoods_of_the_loss(topology, seed, monkeypatch):
    torch.manual_seed(seed)
    # The table can also express this one: a blank follows every label, and ends the path.
    forced_blanks = Topology("forced_blanks", label_takes_blank=True, ends_with_label=False)
    monkeypatch.setitem(TOPOLOGIES, forced_blanks.name, forced_blanks)
    row = get_topology(topology)
    vocab_size, num_frames, limit = 3, 3, 3
    blank = 0 if row.num_big_blanks else 1  # as the reference of that loss
    predictor = StatelessPredictor(vocab_size, 6, blank=blank).double()
    joiner = Joiner(ENCODER_DIM, 6, 8, vocab_size, num_extra=row.num_extra).double()
    encoder_out = 2 * torch.randn(1, num_frames, ENCODER_DIM, dtype=torch.float64)
    labels = [symbol for symbol in range(vocab_size) if symbol != blank]
    sequences = [
        tokens
        for num_tokens in range(limit + 1)
        for tokens in itertools.product(labels, repeat=num_tokens)
        if row.is_feasible(num_frames, num_tokens)
    ]
    lm = EndingModel(vocab_size, seed)
    searches = [
        BeamSearch(
            predictor, joiner, beam=1100, score_window=None, max_symbols_per_frame=limit,
            topology=topology, lm=lm, lm_weight=weight,
        )
        for weight in (0.0, 0.7)
    ]  # fmt: skip
    found, fused = (search.nbest(encoder_out, torch.tensor([num_frames]))[0] for search in searches)
    scores = {tuple(h.tokens): h.score for h in found}
    assert len(scores) == len(found) and set(scores) >= set(sequences)
    with_lm = {tuple(h.tokens): h.score for h in fused}
    for tokens in sequences:
        targets = torch.tensor([tokens], dtype=torch.int64)
        batch = targets, torch.tensor([num_frames]), torch.tensor([len(tokens)]), blank
        with torch.no_grad():
            logits = joiner.padded(encoder_out, predictor(targets))
            if row.predicts_durations:
                loss = reference_duration_loss(logits, *batch, durations=row.label_durations)
            elif row.num_big_blanks:
                big = row.blank_durations[1:]
                loss = reference_duration_loss(logits, *batch, big_blank_durations=big)
            else:
                loss = reference_loss(logits, *batch, topology=topology)
        assert scores[tokens] == pytest.approx(-float(loss), abs=1e-10)
        before = [blank, *tokens]
        of_lm = sum(float(lm.table[a, b]) for a, b in zip(before, tokens, strict=False))
        of_lm += float(lm.ends[before[-1]])
        assert with_lm[tokens] == pytest.approx(0.7 * of_lm - float(loss), abs=1e-10)
    assert [h.score for h in found] == sorted(scores.values(), reverse=True)


@pytest.mark.parametrize("seed", range(33))
def test_neither_batch_nor_chunks_change_the_result(seed):
    search, encoder_out, lengths = random_search(seed, max_frames=30)
    whole = search.nbest(encoder_out, lengths)
    for row, length in enumerate(lengths.tolist()):
        (alone,) = search.nbest(encoder_out[row : row + 1, :length], lengths[row : row + 1])
        assert alone == whole[row]
        scores = [h.score for h in whole[row]]
        assert [h.score for h in alone] == pytest.approx(scores, abs=1e-9)
    choose = random.Random(seed)
    state, done = search.initial_state(len(lengths)), torch.zeros_like(lengths)
    joined = [Hypothesis([], [], []) for _ in lengths]
    while bool((done < lengths).any()):
        width = choose.choice([1, 2, 7, 9])
        sizes = torch.tensor([choose.randint(0, width) for _ in lengths])
        sizes = torch.minimum(sizes, lengths - done)
        chunk = torch.full((len(lengths), width, ENCODER_DIM), math.nan, dtype=torch.float64)
        for row, size in enumerate(sizes.tolist()):
            chunk[row, :size] = encoder_out[row, done[row] : done[row] + size]
        added, state = search.advance(chunk, sizes, state)
        search.finish(state)  # changes nothing
        done = done + sizes
        for hypothesis, part in zip(joined, added, strict=True):
            hypothesis.tokens.extend(part.tokens)
            hypothesis.frames.extend(part.frames)
            hypothesis.log_probs.extend(part.log_probs)
    rest = search.finish(state)
    for hypothesis, part, (best, *_) in zip(joined, rest, whole, strict=True):
        assert hypothesis.tokens + part.tokens == best.tokens
        assert hypothesis.frames + part.frames == best.frames
        assert hypothesis.log_probs + part.log_probs == pytest.approx(best.log_probs, abs=1e-9)
        assert part.score == pytest.approx(best.score, abs=1e-9)


@pytest.mark.parametrize("seed", range(30))
def test_a_beam_of_one_is_the_greedy_search_where_labels_move_on(seed):
    predictor, joiner, encoder_out, lengths = random_model(seed, max_frames=20)
    greedy = GreedySearch(predictor, joiner, topology="modified")(encoder_out, lengths)
    search = BeamSearch(predictor, joiner, beam=1, topology="modified")
    for (one,), other in zip(search.nbest(encoder_out, lengths), greedy, strict=True):
        assert (one.tokens, one.frames) == (other.tokens, other.frames)
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-5)


@pytest.mark.parametrize("seed", range(22))
def test_frames_and_confidences_are_those_of_a_path(seed):
    search, encoder_out, lengths = random_search(seed, max_frames=12)
    topology = search.topology
    for row, hypotheses in enumerate(search.nbest(encoder_out, lengths)):
        assert 1 <= len(hypotheses) <= search.beam
        assert len({tuple(h.tokens) for h in hypotheses}) == len(hypotheses)
        for hypothesis in hypotheses:
            frames, num_tokens = hypothesis.frames, len(hypothesis.tokens)
            assert frames == sorted(frames) and len(frames) == num_tokens
            assert all(0 <= frame < lengths[row] for frame in frames)
            here = max((frames.count(frame) for frame in frames), default=0)
            limit = search.max_symbols_per_frame
            assert here <= (limit if topology.labels_share_frames else 1)
            if num_tokens == 0:
                continue
            with torch.no_grad():
                out = search.predictor(torch.tensor([hypothesis.tokens], dtype=torch.int64))
                cells = search.joiner.step(encoder_out[row, frames], out[0, :-1])
                symbols = cells[:, : cells.size(1) - topology.num_durations].log_softmax(-1)
            expected = symbols[range(num_tokens), hypothesis.tokens].tolist()
            assert hypothesis.log_probs == pytest.approx(expected, abs=1e-9)


def test_the_language_model_decides_where_the_sound_does_not():
    predictor, joiner = StatelessPredictor(4, 2), Joiner(3, 2, 5, 4)
    with torch.no_grad():
        joiner.output.weight.zero_()
        joiner.output.bias.copy_(torch.tensor([-9.0, 0.2, 0.1, 0.0]))
    lm = BigramModel(4, 0)
    lm.table = torch.full((4, 4), -9.0, dtype=torch.float64)
    lm.table[0, 2] = lm.table[2, 3] = lm.table[3, 2] = -0.1  # 2 3 2 3 ...
    frames, lengths = torch.zeros(1, 4, 3), torch.tensor([4])

    def tokens(**options):
        return ModifiedBeamSearch(predictor, joiner, **options)(frames, lengths)[0].tokens

    assert tokens() == [1, 1, 1, 1]
    assert tokens(lm=lm) == [2, 3, 2, 3]
    assert tokens(lm=lm, lm_weight=0.0) == [1, 1, 1, 1]


def test_an_utterance_without_frames_has_one_empty_hypothesis():
    predictor, joiner = StatelessPredictor(4, 2), Joiner(ENCODER_DIM, 2, 5, 4)
    found = ModifiedBeamSearch(predictor, joiner).nbest(
        torch.zeros(2, 3, ENCODER_DIM), torch.tensor([0, 3])
    )
    assert found[0] == [BeamHypothesis([], [])] and found[0][0].score == 0.0
    assert len(found[1]) == 4
    assert ModifiedBeamSearch(predictor, joiner).nbest(torch.zeros(0, 3, 8), torch.zeros(0)) == []


def test_impossible_blanks_still_give_an_answer():
    predictor, joiner = StatelessPredictor(4, 2), Joiner(ENCODER_DIM, 2, 5, 4)
    with torch.no_grad():
        joiner.output.bias[0] = -math.inf
    frames = torch.zeros(1, 3, ENCODER_DIM)
    search = BeamSearch(predictor, joiner, max_symbols_per_frame=2)
    (found,) = search.nbest(frames, torch.tensor([3]))
    assert [h.score for h in found] == [-math.inf]
    state = search.initial_state(1)
    tokens = []
    for frame in frames.unbind(1):
        (added,), state = search.advance(frame[:, None], torch.tensor([1]), state)
        tokens += added.tokens
    assert tokens + search.finish(state)[0].tokens == found[0].tokens


def test_durations_that_do_not_fill_the_frames_still_give_an_answer():
    topology = "tdt-2-4"
    predictor, joiner = StatelessPredictor(4, 2), Joiner(ENCODER_DIM, 2, 5, 4, num_extra=2)
    search = BeamSearch(predictor, joiner, topology=topology, score_window=None)
    (exact,), (past,) = (
        search.nbest(torch.zeros(1, t, ENCODER_DIM), torch.tensor([t])) for t in (2, 3)
    )
    assert [h.tokens for h in exact] == [[]]
    assert len(past) == 4 and past[0].score > past[-1].score > -math.inf


def test_bad_arguments_are_named():
    predictor, joiner = StatelessPredictor(5, 16), Joiner(8, 16, 32, 5)
    with pytest.raises(ValueError, match="beam: expected at least 1, got 0"):
        BeamSearch(predictor, joiner, beam=0)
    with pytest.raises(ValueError, match="beam: expected at most 1048576, got"):
        BeamSearch(predictor, joiner, beam=2**63)
    for options, message in (
        ({"beam": 2.0}, "beam: expected an int, got float"),
        ({"length_normalized": "no"}, "length_normalized: expected a bool, got str"),
        ({"score_window": "4"}, "score_window: expected a number, got str"),
        ({"max_symbols_per_frame": None}, "max_symbols_per_frame: expected an int, got NoneType"),
        ({"lm": 3}, "lm: expected a LanguageModel or None, got int"),
        ({"lm_weight": "0.3"}, "lm_weight: expected a number, got str"),
    ):
        with pytest.raises(TypeError, match=message):
            BeamSearch(predictor, joiner, **options)
    with pytest.raises(ValueError, match="lm_weight: expected a finite number, got nan"):
        BeamSearch(predictor, joiner, lm_weight=math.nan)
    for window in (0, -3.0, math.nan):
        with pytest.raises(ValueError, match="score_window: expected more than 0, or None, got"):
            BeamSearch(predictor, joiner, score_window=window)
    with pytest.raises(ValueError, match="max_symbols_per_frame: expected at least 1, got 0"):
        BeamSearch(predictor, joiner, max_symbols_per_frame=0)
    with pytest.raises(ValueError, match="'tdt-1-3' needs a joiner with 2 logits of durations"):
        BeamSearch(predictor, joiner, topology="tdt-1-3")
    with pytest.raises(ValueError, match="topology: expected one of"):
        BeamSearch(predictor, joiner, topology="linear")
    with pytest.raises(ValueError, match=r"encoder_lengths: expected shape \(2,\)"):
        BeamSearch(predictor, joiner)(torch.zeros(2, 3, 8), torch.tensor([3]))


def test_states_are_named():
    search = BeamSearch(StatelessPredictor(5, 16), Joiner(8, 16, 32, 5))
    frames, lengths = torch.zeros(2, 3, 8), torch.tensor([3, 3])
    with pytest.raises(TypeError, match="state: expected a BeamState, got NoneType"):
        search.advance(frames, lengths, None)
    with pytest.raises(ValueError, match=r"state: expected 2 utterances.* got 3"):
        search.advance(frames, lengths, search.initial_state(3))
    with pytest.raises(ValueError, match="batch_size: expected at least 0, got -1"):
        search.initial_state(-1)
    assert search.finish(search.initial_state(1)) == [BeamHypothesis([], [])]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["step", "final"])
def test_bad_scores_of_a_language_model_name_their_utterances(value, where):
    class Bad(EndingModel):
        def step(self, tokens, state):
            log_probs, state = super().step(tokens, state)
            return log_probs + (value if where == "step" else 0.0), state

        def final(self, state):
            return super().final(state) + (value if where == "final" else 0.0)

    predictor, joiner, *_ = random_model(0, max_frames=3)
    search = BeamSearch(predictor, joiner, lm=Bad(predictor.vocab_size, 0))
    frames = torch.zeros(2, 3, ENCODER_DIM, dtype=torch.float64)
    with pytest.raises(NonFiniteScoresError) as error:
        search(frames, torch.tensor([3, 2]))
    assert error.value.utterances == [0, 1]


def test_the_former_name_searches_the_topology_modified():
    predictor, joiner, encoder_out, lengths = random_model(4, max_frames=9)
    former = ModifiedBeamSearch(predictor, joiner, beam=3)
    assert former.nbest(encoder_out, lengths) == BeamSearch(
        predictor, joiner, beam=3, topology="modified"
    ).nbest(encoder_out, lengths)
    assert ModifiedBeamSearch(predictor, joiner, topology="regular").topology.name == "regular"
    with pytest.raises(TypeError, match="length_normalised: renamed, use length_normalized"):
        ModifiedBeamSearch(predictor, joiner, length_normalised=True)
