# SPDX-License-Identifier: Apache-2.0
"""Transcriptions as text, JSON lines, SRT subtitles and NIST's CTM."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transducer_toolkit.inference.long_audio import Transcription
    from transducer_toolkit.inference.words import RecognizedWord

CAPTION_LINE_LENGTH = 42  # Latin letters, or half as many Chinese characters
CAPTION_LINES = 2
CAPTION_S = 6.0  # maximum duration of a caption
CAPTION_PAUSE_S = 1.0  # a pause of this length ends a caption
CAPTION_SHOWN_S = 1.0  # minimum duration, unless the next caption begins earlier


def to_text(path: str, found: Transcription) -> str:
    """Return one line: path, a tab, the text."""
    return f"{path}\t{found.text}\n"


def to_json(path: str, found: Transcription) -> str:
    """Return one line: a JSON object with path, duration, text, and words with their times."""
    value: dict[str, Any] = {
        "audio": path,
        "channel": found.channel,
        "duration_s": round(found.duration_s, 3),
        "text": found.text,
        "words": [
            {
                "word": word.word,
                "start_s": round(word.start_s, 3),
                "end_s": round(word.end_s, 3),
                "confidence": round(word.confidence, 4),
            }
            for word in found.words
        ],
    }
    return dump_json(value) + "\n"


def dump_json(value: Any, indent: int | None = None) -> str:
    """Return a value as JSON, in which a name that is not UTF-8 has escapes.

    Example:
        >>> import os
        >>> print(dump_json({"audio": os.fsdecode(b"\\xe9t\\xc3\\xa9.wav")}))
        {"audio": "\\udce9té.wav"}
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode()


def to_ctm(path: str, found: Transcription) -> str:
    """Return one line per word, ``path channel start duration word confidence``, in seconds.

    Channels count from 1. White space in the path and in a word is replaced.

    Example:
        >>> from transducer_toolkit.inference.long_audio import Transcription
        >>> from transducer_toolkit.inference.words import RecognizedWord
        >>> words = [RecognizedWord("three", 0.2, 0.48, 0.9)]
        >>> to_ctm("my talk.wav", Transcription("three", words, 1.0))
        'my_talk.wav 1 0.200 0.280 three 0.9000\\n'
    """
    name = re.sub(r"\s", "_", path)
    channel = found.channel + 1 if isinstance(found.channel, int) else 1
    return "".join(
        f"{name} {channel} {word.start_s:.3f} {word.end_s - word.start_s:.3f} "
        f"{'_'.join(word.word.split())} {word.confidence:.4f}\n"
        for word in found.words
    )


def to_srt(path: str, found: Transcription) -> str:
    """Return numbered captions of at most two lines and six seconds; a pause ends a caption."""
    captions = _captions(found.words)
    blocks = []
    for number, words in enumerate(captions, start=1):
        start_s = words[0].start_s
        end_s = max(words[-1].end_s, start_s + CAPTION_SHOWN_S)
        if number < len(captions):
            end_s = min(end_s, captions[number][0].start_s)
        text = "\n".join(_lines(words))
        blocks.append(f"{number}\n{_timestamp(start_s)} --> {_timestamp(end_s)}\n{text}\n\n")
    return "".join(blocks)


FORMATS = {"text": to_text, "json": to_json, "srt": to_srt, "ctm": to_ctm}
SUFFIXES = {"text": ".txt", "json": ".json", "srt": ".srt", "ctm": ".ctm"}


def _captions(words: Sequence[RecognizedWord]) -> list[list[RecognizedWord]]:
    captions: list[list[RecognizedWord]] = []
    for word in words:
        if captions:
            longer = [*captions[-1], word]
            if (
                word.start_s - captions[-1][-1].end_s < CAPTION_PAUSE_S
                and word.end_s - longer[0].start_s <= CAPTION_S
                and len(_lines(longer)) <= CAPTION_LINES
            ):
                captions[-1] = longer
                continue
        captions.append([word])
    return captions


def _lines(words: Sequence[RecognizedWord]) -> list[str]:
    """Break words into lines; a word that is longer than a line is broken too."""
    lines = [""]
    for word in words:
        gap = " " if word.spaced and lines[-1] else ""
        if lines[-1] and _width(lines[-1] + gap + word.word) > CAPTION_LINE_LENGTH:
            lines.append("")
            gap = ""
        lines[-1] += gap
        for character in word.word:
            if _width(lines[-1] + character) > CAPTION_LINE_LENGTH:
                lines.append("")
            lines[-1] += character
    return lines


def _width(text: str) -> int:
    """Columns of a text on the screen: Chinese and Japanese characters take two.

    Example:
        >>> _width("ab"), _width("今天"), _width("ที่")
        (2, 4, 1)
    """
    width = 0
    for character in text:
        if unicodedata.category(character)[0] != "M":
            width += 2 if unicodedata.east_asian_width(character) in "WF" else 1
    return width


def _timestamp(time_s: float) -> str:
    """Hours, minutes, seconds and milliseconds.

    Example:
        >>> _timestamp(3723.0456)
        '01:02:03,046'
    """
    milliseconds = round(1000 * time_s)
    seconds, milliseconds = divmod(milliseconds, 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02d}:{minutes:02d}:{seconds:02d},{milliseconds:03d}"
