# SPDX-License-Identifier: Apache-2.0
import io
import pickle

import pytest
import sentencepiece
import torch

from transducer_toolkit.data.byte_pieces import shown_symbols
from transducer_toolkit.data.sentencepiece_tokenizer import SentencePieceTokenizer
from transducer_toolkit.data.tokenizer_state import tokenizer_from_state
from transducer_toolkit.inference.words import word_spans

TEXTS = ["please enter your number", "enter the number", "please press the key", "l'été ÉTÉ"]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def tokenizer(request):
    return SentencePieceTokenizer.from_texts(TEXTS, vocab_size=24, model_type=request.param)


def test_blank_and_unknown_come_first(tokenizer):
    assert tokenizer.symbols[:2] == ("<blk>", "<unk>")
    assert tokenizer.blank == 0 and tokenizer.vocab_size == len(tokenizer.symbols) == 24
    assert len(tokenizer.encode("please enter")) < len("please enter")


@pytest.mark.parametrize("text", ["", *TEXTS])
def test_round_trip_changes_nothing(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert 0 not in ids and 1 not in ids


def test_white_space_is_normalized_and_blanks_vanish(tokenizer):
    ids = tokenizer.encode("enter  the\n key ")
    assert ids == tokenizer.encode("enter the key")
    with_blanks = [id_ for pair in zip(ids, [0] * len(ids), strict=True) for id_ in pair]
    assert tokenizer.decode(with_blanks) == "enter the key"


def test_what_training_lacks_is_unknown(tokenizer):
    assert tokenizer.decode(tokenizer.encode("the Q key")) == "the ⁇ key"
    assert tokenizer.decode(tokenizer.encode("Qkey keyQ")) == "⁇key key⁇"
    # A transcript that spells the blank has characters, not a blank.
    assert 0 not in tokenizer.encode("<blk>")


def test_words_are_found_in_pieces(tokenizer):
    for text in [*TEXTS, "the penny presser"]:
        spans = word_spans(tokenizer.encode(text), tokenizer)
        assert [span.text for span in spans] == text.split()


@pytest.fixture(scope="module")
def with_bytes():
    """A tokenizer with the letters a and b, and byte pieces for all other characters."""
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
    return SentencePieceTokenizer(model.getvalue())


@pytest.mark.parametrize("text", ["a三b", "三 ab", "ä", "\U0001f642 b\U0001f642a", "aéb é"])
def test_bytes_are_decoded_as_whole_characters(with_bytes, text):
    ids = with_bytes.encode(text)
    assert with_bytes.decode(ids) == text
    for k in range(len(ids)):  # a beginning, as a stream has it, is a beginning of the text
        assert text.startswith(with_bytes.decode(ids[:k]))
        assert "\ufffd" not in with_bytes.decode(ids[k:])
    symbols = [with_bytes.symbols[id_] for id_ in ids]
    assert "".join(shown_symbols(symbols)).replace("\u2581", " ").strip() == text


def test_bytes_that_spell_no_character_are_left_out(with_bytes):
    one, two, three = (with_bytes.symbols.index(f"<0x{x}>") for x in ("E4", "B8", "89"))
    a = with_bytes.symbols.index("a")
    assert with_bytes.decode([a, one, two, a, three, a]) == "aaa"
    assert with_bytes.decode([one, two]) == with_bytes.decode([three, three]) == ""
    assert with_bytes.decode([one, one, two, three]) == "三"
    assert with_bytes.decode([one, 0, two, 0, three]) == "三"  # blanks do not count


def test_the_same_texts_give_the_same_model(tokenizer):
    kinds = [SentencePieceTokenizer.from_texts(iter(TEXTS), vocab_size=24) for _ in range(2)]
    assert kinds[0].state() == kinds[1].state()


def test_state_in_a_file_that_weights_only_reads(tokenizer, tmp_path):
    torch.save({"tokenizer": tokenizer.state()}, tmp_path / "a.pt")
    state = torch.load(tmp_path / "a.pt", weights_only=True)["tokenizer"]
    for other in (tokenizer_from_state(state), pickle.loads(pickle.dumps(tokenizer))):
        assert other.symbols == tokenizer.symbols
        assert other.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


def test_files(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokens.txt")
    lines = (tmp_path / "tokens.txt").read_text(encoding="utf-8").splitlines()
    assert lines[:2] == ["<blk> 0", "<unk> 1"] and len(lines) == 24
    tokenizer.save_model(tmp_path / "bpe.model")
    loaded = SentencePieceTokenizer.load(tmp_path / "bpe.model")
    assert loaded.symbols == tokenizer.symbols


def test_errors(tokenizer, tmp_path):
    for id_ in (-1, 24):
        with pytest.raises(ValueError, match=rf"ids must lie in \[0, 24\), got {id_}"):
            tokenizer.decode([id_])
    for options, message in [
        ({"vocab_size": 5}, r"vocab_size=5 does not suit the texts: Vocabulary size is smaller"),
        ({"vocab_size": 5000}, r"vocab_size=5000 does not suit the texts: Vocabulary size too"),
        ({"vocab_size": 24, "model_type": "word"}, "model_type must be 'bpe' or 'unigram'"),
    ]:
        with pytest.raises(ValueError, match=message):
            SentencePieceTokenizer.from_texts(TEXTS, **options)
    with pytest.raises(ValueError, match="texts must hold at least one that is not empty"):
        SentencePieceTokenizer.from_texts(["", " "], vocab_size=24)
    with pytest.raises(TypeError, match="model must be bytes, got int"):
        SentencePieceTokenizer(10**12)
    with pytest.raises(FileNotFoundError, match="no SentencePiece model at"):
        SentencePieceTokenizer.load(tmp_path / "none.model")
    (tmp_path / "junk.model").touch()
    with pytest.raises(ValueError, match=r"junk\.model: .*; it has no pieces"):
        SentencePieceTokenizer.load(tmp_path / "junk.model")
    (tmp_path / "junk.model").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"junk\.model: model must be a SentencePiece model"):
        SentencePieceTokenizer.load(tmp_path / "junk.model")


def test_a_model_without_the_blank_is_refused():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=24, minloglevel=2
    )
    with pytest.raises(ValueError, match="piece 0 of the model must be '<blk>', got '<unk>'"):
        SentencePieceTokenizer(model.getvalue())
