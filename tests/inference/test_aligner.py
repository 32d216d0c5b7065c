# SPDX-License-Identifier: Apache-2.0
import io
from functools import partial

import pytest
import sentencepiece
import torch

from transducer_toolkit import LatticeShape
from transducer_toolkit.data.features import Fbank
from transducer_toolkit.data.sentencepiece_tokenizer import SentencePieceTokenizer
from transducer_toolkit.data.tokenizer import CharTokenizer
from transducer_toolkit.decoding import (
    TOPOLOGIES,
    NonFiniteScoresError,
    align,
    lattice_posteriors,
)
from transducer_toolkit.inference.aligner import align_text
from transducer_toolkit.inference.recognizer import Recognizer
from transducer_toolkit.modules import ConvLstmEncoder, Joiner, StatelessPredictor, Transducer

TEXT = "ab a"
SYMBOLS = ["a", "b", "\u2581", "a"]


@pytest.fixture
def recognizer():
    torch.manual_seed(0)
    tokenizer = CharTokenizer.from_texts(["ab c"])
    model = Transducer.build(
        ConvLstmEncoder(conv_channels=2, hidden_dim=8),
        partial(StatelessPredictor, embedding_dim=4),
        partial(Joiner, joiner_dim=8),
        vocab_size=tokenizer.vocab_size,
        blank=tokenizer.blank,
    )
    return Recognizer(model, tokenizer, Fbank(), topology="modified")


@pytest.fixture
def waveform():
    return torch.rand(8000, generator=torch.Generator().manual_seed(0)) - 0.5


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_times_are_those_of_the_lattice(recognizer, waveform, topology):
    aligned = align_text(recognizer, waveform, TEXT, topology=topology)
    # The same by hand.
    model, features = recognizer.model, Fbank()(waveform)
    targets = torch.tensor([recognizer.tokenizer.encode(TEXT)])
    encoder_out, lengths, predictor_out = model(features[None], torch.tensor([50]), targets)
    assert lengths.tolist() == [13]
    shape = LatticeShape.from_lengths(lengths, [4])
    logits = model.joiner(encoder_out, predictor_out, shape)
    path = align(logits, targets, shape, 0, topology=topology)[0]
    posteriors = lattice_posteriors(logits, targets, shape, 0, topology=topology)

    assert aligned.path.frames == path.frames and aligned.topology == topology
    assert aligned.path.log_prob == pytest.approx(path.log_prob, rel=1e-6)
    assert aligned.log_likelihood == pytest.approx(float(posteriors.log_likelihood[0]), rel=1e-6)
    assert aligned.log_likelihood > path.log_prob
    torch.testing.assert_close(aligned.occupancy, posteriors.occupancy[0])
    assert torch.equal(aligned.features, features)
    assert [token.symbol for token in aligned.tokens] == SYMBOLS
    for u, token in enumerate(aligned.tokens):
        assert token.frame == path.frames[u]
        assert token.time_s == pytest.approx(0.04 * token.frame)
        label = posteriors.labels[0, :, u]  # (T,)
        assert token.posterior == pytest.approx(float(label[token.frame]), rel=1e-5)
        mean_s = sum(0.04 * t * float(label[t]) for t in range(13))
        assert token.expected_time_s == pytest.approx(mean_s, rel=1e-5)
    first, second = aligned.words
    assert (first.word, second.word) == ("ab", "a")
    assert first.start_s == aligned.tokens[0].time_s
    assert first.end_s == pytest.approx(aligned.tokens[1].time_s + 0.04)
    assert second.start_s == aligned.tokens[3].time_s


def test_the_topology_is_the_models_unless_another_is_asked_for(recognizer, waveform):
    assert align_text(recognizer, waveform, TEXT).topology == "modified"
    assert align_text(recognizer, waveform, TEXT, topology="regular").topology == "regular"


def test_an_empty_text_has_no_times(recognizer, waveform):
    aligned = align_text(recognizer, waveform, "")
    assert aligned.tokens == [] and aligned.words == [] and aligned.occupancy.shape == (13, 1)
    assert aligned.log_likelihood == pytest.approx(aligned.path.log_prob, rel=1e-5)


def test_short_audio(recognizer):
    waveform = torch.zeros(500)  # one encoder frame
    aligned = align_text(recognizer, waveform, TEXT, topology="regular")
    assert [token.frame for token in aligned.tokens] == [0, 0, 0, 0]
    message = "1 encoder frames cannot emit 4 symbols in the topology 'modified'"
    with pytest.raises(ValueError, match=message):
        align_text(recognizer, waveform, TEXT)
    with pytest.raises(
        ValueError, match="the audio is too short for the encoder, which needs at least"
    ):
        align_text(recognizer, waveform[:10], TEXT)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_scores_that_are_not_finite_are_an_error(recognizer, waveform, value):
    with torch.no_grad():
        recognizer.model.joiner.output.bias.fill_(value)
    with pytest.raises(NonFiniteScoresError, match=r"'ab a': the scores .* weights of the model"):
        align_text(recognizer, waveform, TEXT)


def test_what_cannot_be_aligned_is_named(recognizer, waveform):
    with pytest.raises(ValueError, match="character 'x' of 'ax' is not among"):
        align_text(recognizer, waveform, "ax")
    with pytest.raises(ValueError, match=r"topology: expected one of .*, got 'ctc'"):
        align_text(recognizer, waveform, TEXT, topology="ctc")
    with pytest.raises(ValueError, match=r"topology: expected one of .*, got 'ctc'"):
        Recognizer(recognizer.model, recognizer.tokenizer, Fbank(), topology="ctc")


def aligner_of(tokenizer):
    torch.manual_seed(0)
    model = Transducer.build(
        ConvLstmEncoder(conv_channels=2, hidden_dim=8),
        partial(StatelessPredictor, embedding_dim=4),
        partial(Joiner, joiner_dim=8),
        vocab_size=tokenizer.vocab_size,
        blank=tokenizer.blank,
    )
    return Recognizer(model, tokenizer, Fbank())


def test_byte_pieces_are_shown_as_characters(waveform):
    texts = ["ab ba"] * 9
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=262,
        model_type="char",
        byte_fallback=True,
        hard_vocab_limit=False,
        pad_id=0,
        pad_piece="<blk>",
        unk_id=1,
        bos_id=-1,
        eos_id=-1,
        minloglevel=2,
    )
    recognizer = aligner_of(SentencePieceTokenizer(model.getvalue()))
    aligned = align_text(recognizer, waveform, "aü a三b")
    assert [word.word for word in aligned.words] == ["aü", "a", "三", "b"]
    assert "".join(token.symbol for token in aligned.tokens) == "\u2581aü\u2581a三b"
    assert len(aligned.tokens) == len(recognizer.tokenizer.encode("aü a三b")) == 10


def test_words_of_scripts_without_spaces_have_sensible_lengths(waveform):
    recognizer = aligner_of(CharTokenizer.from_texts(["今天好 ab"]))
    aligned = align_text(recognizer, waveform, "今天 ab")
    assert [word.word for word in aligned.words] == ["今", "天", "ab"]
    spans = [round((word.end_s - word.start_s) / 0.04) for word in aligned.words]
    assert spans[:2] == [1, 1]  # a symbol takes one frame


@pytest.mark.parametrize("text", ["ab?", "a b ü", "??", "e\u0301"])
def test_characters_that_the_model_lacks_are_refused(waveform, text):
    """Also with <unk>, which would be aligned in their place."""
    for tokenizer in (
        CharTokenizer.from_texts(["ab c"], unknown=True),
        SentencePieceTokenizer.from_texts(["ab c", "c ab"], vocab_size=6),
    ):
        missing = sorted({*text} - {*"ab c"})
        with pytest.raises(ValueError) as raised:
            align_text(aligner_of(tokenizer), waveform, text)
        assert "the model has no symbol for" in str(raised.value) and repr(text) in str(
            raised.value
        )
        assert all(repr(character) in str(raised.value) for character in missing)
