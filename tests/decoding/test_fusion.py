# SPDX-License-Identifier: Apache-2.0
"""Language models in the searches: greedy rules, sums, internal models, and their options."""

import math
import pickle
import random
from functools import partial

import pytest
import torch

from recipes.digits.fusion import arpa
from tests.decoding.models import ENCODER_DIM, random_model
from transducer_toolkit.data.tokenizer import CharTokenizer
from transducer_toolkit.decoding import (
    Fusion,
    GreedySearch,
    HotwordModel,
    Hypothesis,
    InternalLanguageModel,
    ModifiedBeamSearch,
    NgramModel,
    WeightedSum,
)
from transducer_toolkit.decoding.fusion import fused
from transducer_toolkit.modules import AdditiveJoiner, Joiner, LstmPredictor, StatelessPredictor
from transducer_toolkit.ops.topology import get_topology


class Bonus:
    """A bonus by chance for each symbol after the last one; its state is float64."""

    def __init__(self, vocab_size, seed, scale=2.0):
        generator = torch.Generator().manual_seed(seed)
        self.table = scale * torch.randn(vocab_size, vocab_size, generator=generator).double()

    def initial_state(self, batch_size, device="cpu"):
        return torch.full((batch_size, 2, 1), 0.1, dtype=torch.float64, device=device)

    def step(self, tokens, state):
        return self.table[tokens], state + tokens.view(-1, 1, 1)

    def final(self, state):
        return state[:, 0, 0]


def greedy_reference(search, encoder_out):
    """One utterance, one cell a call; labels as the docstring of GreedySearch says."""
    predictor, joiner, lm, blank = (
        search.predictor,
        search.joiner,
        search.lm,
        search.predictor.blank,
    )
    found = Hypothesis([], [], [])
    start = torch.tensor([blank])
    out, state = predictor.step(start, predictor.initial_state(1))
    scores, lm_state = lm.step(start, lm.initial_state(1))
    num_overruled = 0
    for frame in range(len(encoder_out)):
        may_overrule = True
        for _ in range(search.max_symbols_per_frame):
            log_probs = joiner.step(encoder_out[frame : frame + 1], out)[0].log_softmax(-1)
            own = symbol = int(log_probs.argmax())
            sums = log_probs + search.lm_weight * scores[0]
            sums[blank] = -math.inf
            label = int(sums.argmax())
            if may_overrule and (own != blank or sums[label] > log_probs[blank]):
                symbol = label
            may_overrule = may_overrule and symbol == own
            num_overruled += symbol != own
            if symbol == blank:
                break
            found.tokens.append(symbol)
            found.frames.append(frame)
            found.log_probs.append(float(log_probs[symbol]))
            token = torch.tensor([symbol])
            out, state = predictor.step(token, state)
            scores, lm_state = lm.step(token, lm_state)
    return found, num_overruled


def test_greedy_search_equals_the_reference_on_200_models():
    total = 0
    for seed in range(200):
        predictor, joiner, encoder_out, lengths = random_model(seed, max_frames=12)
        if predictor.vocab_size < 3:
            continue
        search = GreedySearch(
            predictor,
            joiner,
            max_symbols_per_frame=1 + seed % 4,
            lm=Bonus(predictor.vocab_size, seed),
            lm_weight=0.5,
        )
        found = search(encoder_out, lengths)
        for row, length in enumerate(lengths.tolist()):
            with torch.inference_mode():
                expected, num_overruled = greedy_reference(search, encoder_out[row, :length])
            assert found[row] == expected
            assert found[row].log_probs == pytest.approx(expected.log_probs, abs=1e-5)
            total += num_overruled
    assert total > 300


@pytest.mark.parametrize("topology", ["regular", "modified", "tdt-0-1-2", "multi_blank-2-4"])
def test_chunks_equal_the_whole(topology):
    torch.manual_seed(1)
    num_extra = get_topology(topology).num_extra
    predictor = LstmPredictor(6, 8).double().eval()
    joiner = Joiner(ENCODER_DIM, predictor.output_dim, 8, 6, num_extra=num_extra).double()
    encoder_out = 3 * torch.randn(2, 40, ENCODER_DIM).double()
    search = GreedySearch(predictor, joiner, topology=topology, lm=Bonus(6, 1), lm_weight=1.0)
    whole = search(encoder_out, torch.tensor([40, 23]))
    plain = GreedySearch(predictor, joiner, topology=topology)(encoder_out, torch.tensor([40, 23]))
    assert whole != plain
    for width in (1, 3, 16):
        state, joined = search.initial_state(2), [[], []]
        for first in range(0, 40, width):
            chunk = encoder_out[:, first : first + width]
            sizes = (torch.tensor([40, 23]) - first).clamp(0, chunk.size(1))
            added, state = search.advance(chunk, sizes, state)
            for tokens, part in zip(joined, added, strict=True):
                tokens += part.tokens
        assert joined == [hypothesis.tokens for hypothesis in whole]


def test_a_bonus_cannot_flood_a_frame():
    predictor, joiner = StatelessPredictor(5, 4), Joiner(4, 4, 8, 5)
    with torch.no_grad():
        joiner.output.bias.copy_(torch.tensor([9.0, 0, 0, 0, 0]))  # the model hears nothing
        joiner.output.weight.zero_()

    class Flood(Bonus):
        def step(self, tokens, state):
            return torch.full((len(tokens), 5), 50.0), state

    search = GreedySearch(predictor, joiner, lm=Flood(5, 0), lm_weight=1.0)
    (found,) = search(torch.randn(1, 6, 4), torch.tensor([6]))
    assert found.frames == list(range(6))


def test_a_state_of_a_search_without_the_language_model_is_refused():
    predictor, joiner, encoder_out, lengths = random_model(3, max_frames=5)
    search = GreedySearch(predictor, joiner, lm=Bonus(predictor.vocab_size, 0))
    state = GreedySearch(predictor, joiner).initial_state(len(lengths))
    with pytest.raises(ValueError, match="state: expected one of a search with the same language"):
        search.advance(encoder_out, lengths, state)


def test_the_beam_search_adds_final_scores():
    for seed in range(40):
        predictor, joiner, encoder_out, lengths = random_model(seed, max_frames=6)
        lm = Bonus(predictor.vocab_size, seed)
        without = Bonus(predictor.vocab_size, seed)
        without.final = lambda state: torch.zeros(len(state))
        options = {"beam": 20, "length_normalized": False, "lm_weight": 0.7}
        found = ModifiedBeamSearch(predictor, joiner, lm=lm, **options)
        found = found.nbest(encoder_out, lengths)
        plain = ModifiedBeamSearch(predictor, joiner, lm=without, **options)
        plain = plain.nbest(encoder_out, lengths)
        for new, old in zip(found, plain, strict=True):
            scores = {
                tuple(h.tokens): h.score + 0.7 * (0.1 + predictor.blank + sum(h.tokens))
                for h in old
            }
            assert {tuple(h.tokens): pytest.approx(h.score) for h in new} == scores
            assert [h.score for h in new] == sorted((h.score for h in new), reverse=True)


def test_a_weighted_sum_is_the_sum_of_its_parts():
    tokenizer = CharTokenizer.from_texts(["abcd e"])
    size = tokenizer.vocab_size
    predictor = LstmPredictor(size, 5).eval()
    internal = InternalLanguageModel(predictor, Joiner(4, predictor.output_dim, 8, size))
    words = HotwordModel(["ab c", "d"], tokenizer, score=1)
    parts = [(Bonus(size, 1), 0.3), (internal, -0.2), (words, 1.5)]
    lm = WeightedSum([(WeightedSum(parts[:2]), 1.0), parts[2]])
    states = [part.initial_state(4) for part, _ in parts]
    state = lm.initial_state(4)
    for _ in range(6):
        tokens = torch.randint(0, size, (4,))
        stepped = [part.step(tokens, one) for (part, _), one in zip(parts, states, strict=True)]
        states = [after for _, after in stepped]
        row, state = lm.step(tokens, state)
        expected = sum(
            weight * scores for (_, weight), (scores, _) in zip(parts, stepped, strict=True)
        )
        assert torch.allclose(row, expected, atol=1e-5)
        # A search reorders hypotheses.
        order = torch.randperm(4)
        states, state = [one[order] for one in states], state[order]
    final = 0.3 * parts[0][0].final(states[0]) + 1.5 * words.final(states[2])
    assert torch.allclose(lm.final(state), final.float(), atol=1e-5)
    row, state = lm.step(torch.zeros(0, dtype=torch.int64), lm.initial_state(0))
    assert row.shape == (0, size)


def test_wrong_parts():
    with pytest.raises(ValueError, match="parts: expected at least one language model"):
        WeightedSum([])
    with pytest.raises(TypeError, match=r"parts\[0\]: expected a LanguageModel, got None"):
        WeightedSum([(None, 1.0)])
    with pytest.raises(TypeError, match=r"parts\[0\]: expected a LanguageModel or None, got str"):
        WeightedSum([("lm.arpa", 1.0)])
    with pytest.raises(ValueError, match=r"parts\[0\]_weight: expected a finite number, got nan"):
        WeightedSum([(Bonus(3, 0), math.nan)])
    with pytest.raises(TypeError, match="joiner: expected one with the method internal_lm"):

        class Other:
            def step(self, *args):
                raise NotImplementedError

        InternalLanguageModel(StatelessPredictor(4, 4), Other())


@pytest.mark.parametrize("blank", [0, 4])
def test_internal_models_are_the_joiner_without_the_encoder(blank):
    predictor = StatelessPredictor(5, 6, blank=blank)
    tokens = torch.tensor([blank, 2])
    for joiner in (
        Joiner(4, 6, 8, 5),
        Joiner(4, 6, 8, 5, num_extra=2),
        Joiner(4, 6, 8, 5, normalization="hat", blank=blank),
        AdditiveJoiner(4, 6, 5),
    ):
        lm = InternalLanguageModel(predictor, joiner)
        with torch.no_grad():
            scores, _ = lm.step(tokens, lm.initial_state(2))
            out, _ = predictor.step(tokens, predictor.initial_state(2))
            logits = joiner.step(torch.zeros(2, 4), out)[:, :5]
        labels = [symbol for symbol in range(5) if symbol != blank]
        expected = logits[:, labels].log_softmax(-1)
        assert torch.allclose(scores[:, labels], expected, atol=1e-5)
        assert scores[:, blank].tolist() == [0, 0]


@pytest.fixture
def tokenizer():
    return CharTokenizer.from_texts(["one two three"])


@pytest.fixture
def files(tmp_path, tokenizer):
    choose = random.Random(2)
    texts = [" ".join(choose.choices(["one", "two", "three"], k=3)) for _ in range(50)]
    symbols = [[tokenizer.symbols[token] for token in tokenizer.encode(text)] for text in texts]
    (tmp_path / "words.arpa").write_text(arpa([text.split() for text in texts], order=2))
    (tmp_path / "symbols.arpa").write_text(arpa(symbols, order=2))
    (tmp_path / "names.txt").write_text("two one\t2\n")
    return tmp_path


def test_fusion_reads_files_and_adds_the_parts(files, tokenizer):
    size = tokenizer.vocab_size
    predictor, joiner = StatelessPredictor(size, 6), Joiner(4, 6, 8, size)
    names = files / "names.txt"
    fusion = Fusion(
        lm=files / "words.arpa",
        lm_weight=0.5,
        internal_lm="model",
        hotwords=str(names),
        hotwords_score=0.1,
    )
    lm = fusion.load(tokenizer)(predictor, joiner)
    expected = WeightedSum(
        [
            (NgramModel(files / "words.arpa", tokenizer), 0.5),
            (InternalLanguageModel(predictor, joiner), -0.2),
            (HotwordModel([("two one", 2.0)], tokenizer, score=0.1), 1.0),
        ]
    )
    found_state, state = lm.initial_state(1), expected.initial_state(1)
    for token in [0, *tokenizer.encode("two one three")]:
        found, found_state = lm.step(torch.tensor([token]), found_state)
        row, state = expected.step(torch.tensor([token]), state)
        assert torch.allclose(found, row, atol=1e-5)
    assert torch.allclose(lm.final(found_state), expected.final(state))

    low_order = Fusion(internal_lm=files / "symbols.arpa", internal_lm_weight=0.3).load(tokenizer)
    (part, weight), = low_order(predictor, joiner).parts  # fmt: skip
    assert isinstance(part, NgramModel) and weight == -0.3
    search = fused(partial(ModifiedBeamSearch, beam=2), fusion.load(tokenizer))
    made = pickle.loads(pickle.dumps(search))(predictor, joiner, topology="modified")
    assert made.lm_weight == 1.0 and len(made.lm.parts) == 3


def test_no_parts_leave_a_search_alone(tokenizer):
    assert Fusion().load(tokenizer)(None, None) is None
    made = []
    fused(lambda *args, **options: made.append((args, options)), Fusion().load(tokenizer))(
        1, 2, topology="regular"
    )
    assert made == [((1, 2), {"topology": "regular"})]
    assert Fusion(lm=Bonus(3, 0), lm_weight=0).load(tokenizer)(None, None) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lm_weight": 0.1}, "lm_weight: expected lm, too, to which it belongs"),
        ({"internal_lm_weight": 0.1}, "internal_lm_weight: expected internal_lm, too"),
        ({"hotwords_score": 0.1}, "hotwords_score: expected hotwords, too"),
        ({"hotwords_case": "as_is"}, "hotwords_case: expected hotwords, too"),
        ({"hotwords": ["one"], "hotwords_score": -1}, "hotwords_score: expected a finite number"),
        ({"hotwords": ["one"], "hotwords_case": "any"}, "hotwords_case: expected one of"),
        ({"lm": "x", "lm_weight": math.inf}, "lm_weight: expected a finite number, got inf"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        Fusion(**options)


def test_wrong_parts_of_a_fusion(files, tokenizer):
    with pytest.raises(FileNotFoundError, match=r"no ARPA file at missing\.arpa"):
        Fusion(lm="missing.arpa").load(tokenizer)
    with pytest.raises(FileNotFoundError, match="no hotword file at one two"):
        Fusion(hotwords="one two").load(tokenizer)
    with pytest.raises(TypeError, match="internal_lm: expected a LanguageModel or None, got int"):
        Fusion(internal_lm=3).load(tokenizer)
    lm_of = Fusion(hotwords=["one"]).load(tokenizer)
    with pytest.raises(ValueError, match=r"search: it has an lm already; .*Fusion\(lm="):
        fused(partial(ModifiedBeamSearch, lm=Bonus(3, 0)), lm_of)(None, None)
