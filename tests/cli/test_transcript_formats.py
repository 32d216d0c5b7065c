# SPDX-License-Identifier: Apache-2.0
import json

from transducer_toolkit.cli.transcript_formats import to_ctm, to_json, to_srt, to_text
from transducer_toolkit.inference.long_audio import Transcription
from transducer_toolkit.inference.words import RecognizedWord


def transcription(*words):
    words = [RecognizedWord(text, start, end, 0.875) for text, start, end in words]
    return Transcription(" ".join(word.word for word in words), words, 4000.0)


SHORT = transcription(("grün", 0.2, 0.48), ("ist", 3661.0, 3661.04))


def test_text_json_and_ctm():
    assert to_text("a b.wav", SHORT) == "a b.wav\tgrün ist\n"
    assert to_ctm("a b.wav", SHORT) == (
        "a_b.wav 1 0.200 0.280 grün 0.8750\na_b.wav 1 3661.000 0.040 ist 0.8750\n"
    )
    line = to_json("a.wav", SHORT)
    assert line.endswith("}\n") and "grün" in line
    row = json.loads(line)
    assert (row["audio"], row["duration_s"], row["text"]) == ("a.wav", 4000.0, "grün ist")
    assert row["words"][0] == {"word": "grün", "start_s": 0.2, "end_s": 0.48, "confidence": 0.875}


def test_a_pause_ends_a_caption_which_is_shown_for_a_second():
    assert to_srt("a.wav", SHORT) == (
        "1\n00:00:00,200 --> 00:00:01,200\ngrün\n\n2\n01:01:01,000 --> 01:01:02,000\nist\n\n"
    )


def test_captions_are_short_and_do_not_overlap():
    words = [("seventeen", 0.25 * k, 0.25 * k + 0.3) for k in range(100)]
    blocks = to_srt("a.wav", transcription(*words)).strip().split("\n\n")
    assert [block.split("\n")[0] for block in blocks] == [str(1 + k) for k in range(len(blocks))]
    times, num_words = [], 0
    for block in blocks:
        _, span, *lines = block.split("\n")
        assert 1 <= len(lines) <= 2 and all(len(line) <= 42 for line in lines)
        num_words += sum(len(line.split()) for line in lines)
        times += span.split(" --> ")
    assert num_words == 100
    assert times == sorted(times)


def without_spaces(text, frame_s=0.4):
    words = [
        RecognizedWord(character, k * frame_s, k * frame_s + 0.04, 0.5, spaced=k == 0)
        for k, character in enumerate(text)
    ]
    return Transcription(text, words, 100.0)


def captions(found):
    """Start, end (seconds) and lines of each caption."""
    for block in to_srt("a.wav", found).strip().split("\n\n"):
        _, span, *lines = block.split("\n")
        times = []
        for stamp in span.split(" --> "):
            hours, minutes, seconds = stamp.replace(",", ".").split(":")
            times.append(3600 * int(hours) + 60 * int(minutes) + float(seconds))
        yield (*times, lines)


def test_captions_of_scripts_without_spaces_are_short():
    text = "".join(chr(0x4E00 + k) for k in range(200))
    found = list(captions(without_spaces(text, frame_s=0.1)))
    assert "".join("".join(lines) for _, _, lines in found) == text
    for start_s, end_s, lines in found:
        assert end_s - start_s <= 6.0 and len(lines) <= 2
        assert all(len(line) <= 21 for line in lines)  # as wide as 42 Latin letters
    slow = list(captions(without_spaces(text, frame_s=0.9)))
    assert "".join("".join(lines) for _, _, lines in slow) == text and len(slow) > 20


def test_ctm_of_scripts_without_spaces_has_short_entries():
    lines = to_ctm("a.wav", without_spaces("今天好")).splitlines()
    assert [line.split()[2:5] for line in lines] == [
        ["0.000", "0.040", "今"],
        ["0.400", "0.040", "天"],
        ["0.800", "0.040", "好"],
    ]


def test_a_word_longer_than_a_line_is_broken():
    (caption,) = captions(transcription(("x" * 60, 0.0, 1.0)))
    assert caption[2] == ["x" * 42, "x" * 18]
    # A piece of several words stays one field of CTM.
    assert to_ctm("a.wav", transcription(("of the", 0.0, 1.0))).split()[4] == "of_the"


def test_the_channel_is_written():
    words = [RecognizedWord("one", 0.0, 0.2, 1.0)]
    assert to_ctm("a.wav", Transcription("one", words, 1.0, 1)).startswith("a.wav 2 0.000")
    assert json.loads(to_json("a.wav", Transcription("one", words, 1.0, 1)))["channel"] == 1
    assert json.loads(to_json("a.wav", SHORT))["channel"] == "mix"


def test_nothing_recognized():
    nothing = transcription()
    assert to_text("a.wav", nothing) == "a.wav\t\n"
    assert to_ctm("a.wav", nothing) == to_srt("a.wav", nothing) == ""
    assert json.loads(to_json("a.wav", nothing))["words"] == []
