# SPDX-License-Identifier: Apache-2.0
"""Tux Paint's spoken descriptions of its stamps: recordings in nine languages, from Debian."""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import soundfile

from transducer_toolkit.data.audio import SAMPLE_RATE, audio_duration_s, read_audio
from transducer_toolkit.data.corpora.prepared import PreparedCorpus, write_sets
from transducer_toolkit.data.corpora.split import split_of
from transducer_toolkit.data.manifest import Utterance

__all__ = ["TuxPaintCorpus", "spoken_text"]

logger = logging.getLogger(__name__)

STAMPS_DIR = "/usr/share/tuxpaint/stamps"
DEBIAN_PACKAGE = "tuxpaint-stamps-default"
LANGUAGES = ("be", "bg", "ca", "da", "el", "es", "fr", "ro", "ru")
# Faster than speech: the text was changed after the recording.
MAX_CHARACTERS_PER_S = 25.0
# Part of the cache key: increase it when the same files give other audio or other manifests.
RECIPE_VERSION = 1

# Digits, currencies and remarks can be read out in more than one way, or not at all.
_NOT_READ_OUT = re.compile(r"[\d()$€£¥%&/=+*]")
_APOSTROPHES = re.compile(r"(?<=\w)[’'](?=\w)")


def spoken_text(transcript: str) -> str | None:
    """Return the spoken words of a description.

    Args:
        transcript: text of a stamp.

    Returns:
        Lower-case words without punctuation; None if they can be read in several ways.

    Example:
        >>> spoken_text("Un maïs-grain, l’épi."), spoken_text("1 euro (1 €)")
        ("un maïs grain l'épi", None)
    """
    if _NOT_READ_OUT.search(transcript):
        return None
    text = _APOSTROPHES.sub("\0", unicodedata.normalize("NFC", transcript.lower()))
    words = "".join(c if c.isalpha() or c == "\0" else " " for c in text).split()
    return " ".join(words).replace("\0", "'") or None


class TuxPaintCorpus(PreparedCorpus):
    """Some 6,000 descriptions of pictures, a word to a sentence each, in nine languages.

    All languages share one set of symbols and one training set; each has a test set. A hash of
    language and text assigns a recording to a set, and a recording of several stamps is used once,
    so no text of ``val`` and the test sets occurs in training. The recordings are converted to
    16 kHz FLAC in the cache (0.2 GB).

    Args:
        languages: which languages, as in the names of the files.
        stamps_dir: the stamps; None is where Debian installs them.
        cache_dir: folder for prepared corpora; None is the user's cache folder.

    Raises:
        ValueError: no languages.
        FileNotFoundError: the Debian package is not installed.

    Example:
        >>> corpus = TuxPaintCorpus(languages=["fr", "ru"])
        >>> corpus.prepare()  # doctest: +SKIP
        >>> read_manifest(corpus.manifests().test["fr"])[0].text  # doctest: +SKIP
        'un toucan'
    """

    name = "tuxpaint"

    def __init__(
        self,
        *,
        languages: Sequence[str] = LANGUAGES,
        stamps_dir: str | os.PathLike[str] | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(cache_dir=cache_dir)
        if not languages:
            raise ValueError("languages must name at least one language, got none")
        self.languages = sorted(languages)
        self.stamps_dir = Path(STAMPS_DIR if stamps_dir is None else stamps_dir)

    def key(self) -> list[Any]:
        """Return the version of the recipe, the languages, and the recordings' names and sizes."""
        if not self.stamps_dir.is_dir():
            raise FileNotFoundError(
                f"no Tux Paint stamps at {self.stamps_dir}: apt-get install {DEBIAN_PACKAGE} "
                "(Debian, Ubuntu)"
            )
        files = sorted(
            (str(path.relative_to(self.stamps_dir)), path.stat().st_size)
            for path in itertools.chain(
                self.stamps_dir.rglob("*.ogg"), self.stamps_dir.rglob("*.txt")
            )
        )
        return [RECIPE_VERSION, self.languages, files]

    def make(self, folder: Path) -> None:
        """Convert the recordings and write the manifests, in a few minutes."""
        train: list[Utterance] = []
        val: list[Utterance] = []
        test: dict[str, list[Utterance]] = defaultdict(list)
        too_fast = 0
        for language, source, text in self._recordings():
            if len(text) > MAX_CHARACTERS_PER_S * audio_duration_s(source):
                too_fast += 1
                continue
            id_ = str(source.relative_to(self.stamps_dir).with_suffix("")).replace(os.sep, "-")
            audio = folder / "audio" / f"{id_}.flac"
            audio.parent.mkdir(exist_ok=True)
            waveform = read_audio(source)
            soundfile.write(audio, waveform.clamp(-1.0, 1.0).numpy(), SAMPLE_RATE)
            name = split_of(f"{language} {text}")
            rows = test[language] if name == "test" else val if name == "val" else train
            rows.append(
                Utterance(
                    id=id_,
                    audio=str(audio),
                    duration_s=len(waveform) / SAMPLE_RATE,
                    text=text,
                    speaker=language,
                    extra={"language": language},
                )
            )
        if too_fast:
            logger.info(
                "%d recordings left out: above %g characters a second",
                too_fast,
                MAX_CHARACTERS_PER_S,
            )
        write_sets(folder, train=train, val=val, test=test)

    def _recordings(self) -> Iterator[tuple[str, Path, str]]:
        """Language, file and text of each different recording whose text is known."""
        seen: set[bytes] = set()
        pattern = re.compile(rf"(.+?)(?:_desc)?_({'|'.join(map(re.escape, self.languages))})")
        for path in sorted(self.stamps_dir.rglob("*.ogg")):
            match = pattern.fullmatch(path.stem)
            if match is None:
                continue
            stem, language = match.groups()
            transcript = _transcripts(path.with_name(f"{stem}.txt")).get(language, "")
            text = spoken_text(transcript)
            digest = hashlib.blake2b(path.read_bytes()).digest()
            if text is not None and digest not in seen:
                seen.add(digest)
                yield language, path, text


def _transcripts(path: Path) -> dict[str, str]:
    """Return texts by language from lines ``LANGUAGE.utf8=TEXT``, which follow the English one."""
    if not path.is_file():
        return {}
    rows = (line.partition(".utf8=") for line in path.read_text(encoding="utf-8").splitlines()[1:])
    return {language: text for language, separator, text in rows if separator}
