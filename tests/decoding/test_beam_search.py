# SPDX-License-Identifier: Apache-2.0
import itertools
import math

import numpy as np
import pytest
import torch

from tests.decoding.models import ENCODER_DIM, random_model
from transducer_toolkit.decoding import (
    TOPOLOGIES,
    BeamHypothesis,
    GreedySearch,
    ModifiedBeamSearch,
)
from transducer_toolkit.losses.reference import reference_loss
from transducer_toolkit.modules import Joiner, StatelessPredictor


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


def beam_reference(search, encoder_out):
    """One utterance, one hypothesis and frame a call; scores of token tuples, the best first."""
    predictor, joiner, lm = search.predictor, search.joiner, search.lm
    blank = predictor.blank

    def start():
        token = torch.tensor([blank])
        return predictor.step(token, predictor.initial_state(1)), (
            lm.step(token, lm.initial_state(1)) if lm else None
        )

    def follow(states, token):
        (_, state), lm_part = states
        token = torch.tensor([token])
        return predictor.step(token, state), lm.step(token, lm_part[1]) if lm else None

    def log_probs_of(states, frame):
        return joiner.step(encoder_out[frame : frame + 1], states[0][0])[0].log_softmax(-1).tolist()

    beam = {(): (0.0, start())}  # tokens -> score, states
    for frame in range(len(encoder_out)):
        candidates = {}
        labels_allowed = search.topology.name != "one_sym_per_frame" or frame + 1 < len(encoder_out)
        for tokens, (score, states) in beam.items():
            log_probs = log_probs_of(states, frame)
            candidates.setdefault(tokens, []).append(score + log_probs[blank])
            for symbol in range(len(log_probs)) if labels_allowed else ():
                if symbol == blank:
                    continue
                grown, value = (*tokens, symbol), score + log_probs[symbol]
                if lm:
                    value += search.lm_weight * float(states[1][0][0, symbol])
                if search.topology.name == "constrained" and grown in beam:
                    value += log_probs_of(beam[grown][1], frame)[blank]
                candidates.setdefault(grown, []).append(value)
        totals = {tokens: float(np.logaddexp.reduce(v)) for tokens, v in candidates.items()}
        kept = sorted(totals, key=totals.get, reverse=True)[: search.beam]
        grown_beam = {}
        for tokens in kept:
            score = totals[tokens]
            if tokens in beam:
                grown_beam[tokens] = score, beam[tokens][1]
                continue
            states = follow(beam[tokens[:-1]][1], tokens[-1])
            if search.topology.name == "constrained":
                score += log_probs_of(states, frame)[blank]
            grown_beam[tokens] = score, states
        beam = grown_beam
    norm = (lambda tokens: len(tokens) + 1) if search.length_normalized else lambda tokens: 1
    scores = {tokens: score for tokens, (score, _) in beam.items()}
    return sorted(scores.items(), key=lambda item: item[1] / norm(item[0]), reverse=True)


def test_equals_the_reference_on_500_models():
    num_hypotheses = 0
    for seed in range(500):
        predictor, joiner, encoder_out, lengths = random_model(seed, max_frames=7)
        search = ModifiedBeamSearch(
            predictor,
            joiner,
            beam=1 + seed % 5,
            topology=tuple(TOPOLOGIES)[seed % 4],
            length_normalized=seed % 3 > 0,
            lm=BigramModel(predictor.vocab_size, seed) if seed % 7 < 3 else None,
        )
        found = search.nbest(encoder_out, lengths)
        for row, length in enumerate(lengths.tolist()):
            with torch.inference_mode():
                expected = beam_reference(search, encoder_out[row, :length])
            assert [tuple(h.tokens) for h in found[row]] == [tokens for tokens, _ in expected]
            scores = [score for _, score in expected]
            assert [h.score for h in found[row]] == pytest.approx(scores, abs=1e-9)
            num_hypotheses += sum(len(h.tokens) > 0 for h in found[row])
    assert num_hypotheses > 2000


@pytest.mark.parametrize("topology", ["modified", "constrained", "one_sym_per_frame"])
@pytest.mark.parametrize("seed", range(3))
def test_a_beam_of_all_sequences_gives_the_likelihoods_of_the_loss(topology, seed):
    torch.manual_seed(seed)
    vocab_size, blank, num_frames = 3, 1, 4
    predictor = StatelessPredictor(vocab_size, 6, blank=blank).double()
    joiner = Joiner(ENCODER_DIM, 6, 8, vocab_size).double()
    encoder_out = 2 * torch.randn(1, num_frames, ENCODER_DIM, dtype=torch.float64)
    labels = [symbol for symbol in range(vocab_size) if symbol != blank]
    sequences = [
        tokens
        for num_tokens in range(num_frames + (topology != "one_sym_per_frame"))
        for tokens in itertools.product(labels, repeat=num_tokens)
    ]
    search = ModifiedBeamSearch(predictor, joiner, beam=40, topology=topology)
    (found,) = search.nbest(encoder_out, torch.tensor([num_frames]))
    assert sorted(tuple(h.tokens) for h in found) == sorted(sequences)
    for hypothesis in found:
        targets = torch.tensor([hypothesis.tokens], dtype=torch.int64)
        with torch.no_grad():
            loss = reference_loss(
                joiner.padded(encoder_out, predictor(targets)),
                targets,
                torch.tensor([num_frames]),
                torch.tensor([len(hypothesis.tokens)]),
                blank,
                topology=topology,
            )
        assert hypothesis.score == pytest.approx(-float(loss), abs=1e-10)
    ranking = [h.score / (len(h.tokens) + 1) for h in found]
    assert ranking == sorted(ranking, reverse=True)


@pytest.mark.parametrize("seed", range(30))
def test_a_beam_of_one_is_the_greedy_search(seed):
    predictor, joiner, encoder_out, lengths = random_model(seed, max_frames=20)
    greedy = GreedySearch(predictor, joiner, max_symbols_per_frame=1)(encoder_out, lengths)
    (found,) = zip(
        *ModifiedBeamSearch(predictor, joiner, beam=1).nbest(encoder_out, lengths), strict=True
    )
    for one, other in zip(found, greedy, strict=True):
        assert (one.tokens, one.frames) == (other.tokens, other.frames)
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-5)


@pytest.mark.parametrize("seed", range(10))
def test_frames_and_confidences_are_those_of_a_path(seed):
    predictor, joiner, encoder_out, lengths = random_model(seed, max_frames=12)
    for row, hypotheses in enumerate(
        ModifiedBeamSearch(predictor, joiner).nbest(encoder_out, lengths)
    ):
        assert 1 <= len(hypotheses) <= 4
        assert len({tuple(h.tokens) for h in hypotheses}) == len(hypotheses)
        for hypothesis in hypotheses:
            frames, num_tokens = hypothesis.frames, len(hypothesis.tokens)
            assert frames == sorted(set(frames)) and len(frames) == num_tokens
            assert all(0 <= frame < lengths[row] for frame in frames)
            with torch.no_grad():
                out = predictor(torch.tensor([hypothesis.tokens], dtype=torch.int64))
                cells = joiner.step(encoder_out[row, frames], out[0, :-1]).log_softmax(-1)
            expected = cells[range(num_tokens), hypothesis.tokens].tolist()
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
    search = ModifiedBeamSearch(predictor, joiner, topology="one_sym_per_frame")
    (found,) = search.nbest(torch.zeros(1, 3, ENCODER_DIM), torch.tensor([3]))
    assert [h.score for h in found] == [-math.inf]


def test_bad_arguments_are_named():
    predictor, joiner = StatelessPredictor(5, 16), Joiner(8, 16, 32, 5)
    with pytest.raises(ValueError, match="beam: expected at least 1, got 0"):
        ModifiedBeamSearch(predictor, joiner, beam=0)
    with pytest.raises(ValueError, match="beam: expected at most 1048576, got"):
        ModifiedBeamSearch(predictor, joiner, beam=2**63)
    for options, message in (
        ({"beam": 2.0}, "beam: expected an int, got float"),
        ({"length_normalized": "no"}, "length_normalized: expected a bool, got str"),
        ({"length_normalised": True}, "length_normalised: renamed, use length_normalized"),
        ({"lm": 3}, "lm: expected a LanguageModel or None, got int"),
        ({"lm_weight": "0.3"}, "lm_weight: expected a number, got str"),
    ):
        with pytest.raises(TypeError, match=message):
            ModifiedBeamSearch(predictor, joiner, **options)
    with pytest.raises(ValueError, match="lm_weight: expected a finite number, got nan"):
        ModifiedBeamSearch(predictor, joiner, lm_weight=math.nan)
    with pytest.raises(ValueError, match="topology: expected one of"):
        ModifiedBeamSearch(predictor, joiner, topology="linear")
    with pytest.raises(ValueError, match=r"encoder_lengths: expected shape \(2,\)"):
        ModifiedBeamSearch(predictor, joiner)(torch.zeros(2, 3, 8), torch.tensor([3]))
