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


def test_nothing_recognized():
    nothing = transcription()
    assert to_text("a.wav", nothing) == "a.wav\t\n"
    assert to_ctm("a.wav", nothing) == to_srt("a.wav", nothing) == ""
    assert json.loads(to_json("a.wav", nothing))["words"] == []
