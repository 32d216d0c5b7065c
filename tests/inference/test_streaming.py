# SPDX-License-Identifier: Apache-2.0
"""Text while the speaker speaks equals the text of the whole."""

import io
import random
from functools import partial

import pytest
import sentencepiece
import torch

from transducer_toolkit.data.features import Fbank
from transducer_toolkit.data.sentencepiece_tokenizer import SentencePieceTokenizer
from transducer_toolkit.data.tokenizer import CharTokenizer
from transducer_toolkit.decoding import BeamSearch, Fusion, Hypothesis
from transducer_toolkit.inference.recognizer import Recognizer
from transducer_toolkit.inference.streaming import StreamingRecognizer
from transducer_toolkit.modules import (
    ConvLstmEncoder,
    EmformerEncoder,
    Joiner,
    LstmPredictor,
    StatelessPredictor,
    Transducer,
)
from transducer_toolkit.modules.encoder import Encoder

SYMBOLS = ["<blk>", "\u2581", "a", "b", "c"]


def random_recognizer(encoder, predictor=StatelessPredictor, **options):
    """A model of random weights that emits many symbols."""
    if isinstance(encoder, (ConvLstmEncoder, EmformerEncoder)) and (
        encoder.normalizer.mode == "global"
    ):
        encoder.normalizer.set_statistics(torch.full((80,), -8.0), torch.full((80,), 3.0))
    model = Transducer(
        encoder,
        predictor(len(SYMBOLS), embedding_dim=16),
        Joiner(encoder.output_dim, predictor(5, 16).output_dim, 16, len(SYMBOLS)),
    )
    with torch.no_grad():
        for weight in model.joiner.parameters():
            weight.mul_(4.0)
        model.joiner.output.bias[0] -= 4.0
    return Recognizer(model, CharTokenizer(SYMBOLS), Fbank(), **options)


ENCODERS = {
    "lstm": lambda: ConvLstmEncoder(conv_channels=2, hidden_dim=16, normalization="global"),
    "emformer": lambda: EmformerEncoder(
        conv_channels=2, dim=16, num_heads=2, ffn_dim=32, num_layers=2
    ),
}


@pytest.mark.parametrize("predictor", [StatelessPredictor, LstmPredictor])
@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize(
    ("topology", "fusion"),
    [
        ("regular", None),
        ("modified", None),
        ("regular", Fusion(hotwords=["ab c", "cab"], hotwords_score=2.0, internal_lm="model")),
    ],
)
@pytest.mark.parametrize("beam", [None, 3])
def test_pieces_give_what_the_whole_gives(name, predictor, topology, fusion, beam):
    limit = 3 if topology == "regular" else 1
    recognizer = random_recognizer(
        ENCODERS[name](),
        predictor,
        fusion=fusion,
        max_symbols_per_frame=limit,
        topology=topology,
        search=beam and partial(BeamSearch, beam=beam, max_symbols_per_frame=limit),
    )
    stream, choices = StreamingRecognizer(recognizer), random.Random(0)
    num_tokens = 0
    for num_samples in (100, 250, 2000, 16000, 40000):  # one after the other, without a new start
        loudness = torch.rand(num_samples // 1600 + 1).repeat_interleave(1600)[:num_samples]
        waveform = 0.3 * loudness * torch.randn(num_samples)
        text, tokens, frames, position = "", [], [], 0
        while position < num_samples:
            size = choices.choice([0, 1, 160, 999, 5000])
            text += stream.accept(waveform[position : position + size])
            tokens, frames = tokens + stream.added.tokens, frames + stream.added.frames
            position += size
        text += stream.finish()
        tokens, frames = tokens + stream.added.tokens, frames + stream.added.frames
        if num_samples < 200:  # too short for a frame
            assert (text, tokens) == ("", [])
            continue
        (whole,) = recognizer.recognize([waveform])
        assert (tokens, frames) == (whole.tokens, whole.frames)
        assert text == recognizer.tokenizer.decode(whole.tokens)
        num_tokens += len(tokens)
    assert num_tokens > (15 if fusion is None else 5)


def test_new_text_brings_its_space():
    """A word's space comes with the word, however late."""
    recognizer = random_recognizer(ENCODERS["lstm"]())
    stream = StreamingRecognizer(recognizer)
    found = iter([[2], [1], [], [1, 3], [3, 1, 1], [4]])

    def advance(encoder_out, lengths, state):
        from transducer_toolkit.decoding import Hypothesis

        return [Hypothesis(next(found), [])], state

    stream._search.advance = advance
    texts = [stream.accept(torch.zeros(1600)) for _ in range(6)]
    assert texts == ["a", "", "", " b", "b", " c"]


@pytest.mark.parametrize(
    "tokenizer",
    [
        SentencePieceTokenizer.from_texts(["one two", "two ones"], vocab_size=12),
        SentencePieceTokenizer.from_texts(["one two"] * 3, vocab_size=9, model_type="unigram"),
        CharTokenizer.from_texts(["ab c"], unknown=True),
    ],
    ids=["bpe", "unigram", "characters"],
)
def test_text_that_was_shown_stays(tokenizer):
    """Blanks, unknown symbols and spaces at any place included."""
    recognizer = random_recognizer(ENCODERS["lstm"]())
    recognizer.tokenizer = tokenizer
    choices = random.Random(0)
    for _ in range(50):
        tokens = [choices.randrange(tokenizer.vocab_size) for _ in range(40)]
        stream, shown = StreamingRecognizer(recognizer), ""
        found = iter(tokens)
        stream._search.advance = lambda *_, found=found: ([Hypothesis([next(found)], [0])], None)
        for count in range(1, len(tokens) + 1):
            shown += stream.accept(torch.zeros(1600))
            assert shown == tokenizer.decode(tokens[:count])


@pytest.mark.parametrize(("name", "latency_s"), [("lstm", 0.0475), ("emformer", 0.2075)])
def test_latency(name, latency_s):
    """Of an impulse: after so many seconds its encoder frame is known, at the latest."""
    recognizer = random_recognizer(ENCODERS[name]())
    stream = StreamingRecognizer(recognizer)
    assert stream.latency_s == pytest.approx(latency_s)
    state, fbank, known, waited = recognizer.model.encoder.initial_state(), stream._fbank, 0, []
    for milliseconds in range(1, 1500):
        out, state = recognizer.model.encoder.stream(fbank.accept(torch.zeros(16)), state)
        # From the start of each new frame.
        waited += [milliseconds - 40 * frame for frame in range(known, known + len(out))]
        known += len(out)
    assert max(waited) == pytest.approx(1000 * latency_s, abs=1.0)


def test_text_of_a_beam_search_comes_before_the_end():
    torch.manual_seed(0)
    recognizer = random_recognizer(ENCODERS["lstm"](), search=BeamSearch)
    with torch.no_grad():
        recognizer.model.joiner.output.bias[0] -= 2.0
    loudness = torch.rand(50).repeat_interleave(1600)
    stream = StreamingRecognizer(recognizer)
    pieces = (0.3 * loudness * torch.randn(80000)).split(1600)
    texts = [stream.accept(piece) for piece in pieces]
    assert sum(map(len, texts)) > len(stream.finish())


def test_a_search_that_does_not_stream_is_refused():
    def search(predictor, joiner, topology):
        return lambda encoder_out, lengths: []

    recognizer = random_recognizer(ENCODERS["lstm"](), search=search)
    with pytest.raises(ValueError, match="function does not stream: it needs all frames"):
        StreamingRecognizer(recognizer)


def test_what_does_not_stream_is_refused():
    class Offline(Encoder):
        output_dim = 8

        def forward(self, features, feature_lengths):
            raise NotImplementedError

        def num_output_frames(self, num_frames):
            return num_frames

    with pytest.raises(ValueError, match="Offline does not stream"):
        StreamingRecognizer(random_recognizer(Offline()))
    centered = ConvLstmEncoder(conv_channels=2, hidden_dim=8)
    with pytest.raises(ValueError, match="normalization='global', got 'utterance'"):
        StreamingRecognizer(random_recognizer(centered))


def test_bytes_of_a_character_arrive_as_the_character():
    """The bytes of a character may arrive in several pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["ab ba"] * 9),
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
    tokenizer = SentencePieceTokenizer(model.getvalue())
    encoder = ENCODERS["lstm"]()
    encoder.normalizer.set_statistics(torch.full((80,), -8.0), torch.full((80,), 3.0))
    model = Transducer(
        encoder,
        StatelessPredictor(tokenizer.vocab_size, embedding_dim=16),
        Joiner(encoder.output_dim, 16, 16, tokenizer.vocab_size),
    )
    text = "aä三 三三 b\U0001f642a " * 6
    tokens = tokenizer.encode(text)

    class Scripted:
        """Emits the tokens of a text, one a frame."""

        def initial_state(self, batch_size, device):
            return 0

        def advance(self, encoder_out, lengths, position):
            added = tokens[position : position + encoder_out.shape[1]]
            return [Hypothesis(added, list(range(len(added))))], position + len(added)

        def finish(self, position):
            return [Hypothesis([], [])]

    stream = StreamingRecognizer(Recognizer(model, tokenizer, Fbank()))
    stream._search, stream._search_state = Scripted(), 0
    choose, pieces = random.Random(0), []
    for part in torch.zeros(640 * (len(tokens) + 4)).split(641):
        pieces += map(stream.accept, part.split(choose.randint(1, 641)))
    pieces.append(stream.finish())
    assert "".join(pieces) == text.strip()
    assert all(len(piece) <= 2 for piece in pieces)  # nothing waits longer than it must
