# SPDX-License-Identifier: Apache-2.0
"""The voice prompts of the Asterisk telephone exchange, recordings of a human from Debian."""

from __future__ import annotations

import gzip
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transducer_toolkit.data.audio import audio_duration_s
from transducer_toolkit.data.corpora.prepared import PreparedCorpus, write_sets
from transducer_toolkit.data.corpora.split import split_of
from transducer_toolkit.data.manifest import Utterance

__all__ = ["AsteriskCorpus", "spoken_text"]

SOUNDS_DIR = "/usr/share/asterisk/sounds/en_US_f_Allison"
TRANSCRIPTS = "/usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
DEBIAN_PACKAGES = "asterisk-core-sounds-en-wav asterisk-core-sounds-en"
SPEAKER = "allison"
# Part of the cache key: increase it when the same files give other manifests.
RECIPE_VERSION = 1

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_SPELLED = {str(digit): word for digit, word in enumerate(_DIGITS)} | {"*": "star", "#": "pound"}
# Sounds instead of words, remarks, and what can be read out in more than one way (500, 28.8, URLs).
_NOT_READ_OUT = re.compile(r"[\[<(]|\d\d|\d\.\d|\.\d|www\.")


def spoken_text(transcript: str) -> str | None:
    """Return the spoken words of a transcript of the package.

    Args:
        transcript: as in ``core-sounds-en.txt``.

    Returns:
        Lower-case words without punctuation, with digits and key names spelled out; None for a
        sound, or for a transcript that can be read in several ways.

    Example:
        >>> spoken_text("Press 1 or * to exit, it's free..."), spoken_text("[ascending tones]")
        ("press one or star to exit it's free", None)
    """
    transcript = re.sub(r"\s\[.\]$", "", transcript)  # "dash [-]" names the character
    if _NOT_READ_OUT.search(transcript):
        return None
    spelled = re.sub(r"[0-9*#]", lambda symbol: f" {_SPELLED[symbol[0]]} ", transcript.lower())
    return " ".join(re.sub(r"[^a-z' ]", " ", spelled).split()) or None


class AsteriskCorpus(PreparedCorpus):
    """Some 530 prompts by one speaker, 20 minutes at 8 kHz, with their transcripts.

    A hash of its text assigns a prompt to a set, so no text of ``val`` and ``test`` occurs in
    training. Prompts of one word (numbers, letters, months) are all in training, because a word
    that training lacks cannot be recognized. The manifests refer to the installed files.

    Args:
        sounds_dir: the recordings; None is where Debian installs them.
        transcripts: lines ``name: text``, ``;`` starting a comment, perhaps compressed by gzip;
            None is Debian's.
        cache_dir: folder for prepared corpora; None is the user's cache folder.

    Raises:
        FileNotFoundError: the Debian packages are not installed.

    Example:
        >>> corpus = AsteriskCorpus()
        >>> corpus.prepare()  # doctest: +SKIP
        >>> read_manifest(corpus.manifests().train)[0].text  # doctest: +SKIP
        'activated'
    """

    name = "asterisk"

    def __init__(
        self,
        *,
        sounds_dir: str | os.PathLike[str] | None = None,
        transcripts: str | os.PathLike[str] | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(cache_dir=cache_dir)
        self.sounds_dir = Path(SOUNDS_DIR if sounds_dir is None else sounds_dir)
        self.transcripts = Path(TRANSCRIPTS if transcripts is None else transcripts)

    def key(self) -> list[Any]:
        """Return the version of the recipe, the recordings' folder and their transcripts."""
        return [RECIPE_VERSION, str(self.sounds_dir.absolute()), self._read_transcripts()]

    def make(self, folder: Path) -> None:
        """Write the manifests, in a second."""
        sets: dict[str, list[Utterance]] = {"train": [], "val": [], "test": []}
        for utterance in self._utterances():
            isolated = " " not in utterance.text
            name = "train" if isolated else split_of(utterance.text, test=0.15)
            sets[name].append(utterance)
        write_sets(folder, train=sets["train"], val=sets["val"], test={"test": sets["test"]})

    def _read_transcripts(self) -> str:
        if not (self.transcripts.is_file() and self.sounds_dir.is_dir()):
            raise FileNotFoundError(
                f"the Asterisk prompts are not at {self.sounds_dir}, {self.transcripts}: "
                f"apt-get install {DEBIAN_PACKAGES} (Debian, Ubuntu)"
            )
        data = self.transcripts.read_bytes()
        if self.transcripts.suffix == ".gz":
            data = gzip.decompress(data)
        return data.decode()

    def _utterances(self) -> Iterator[Utterance]:
        for line in self._read_transcripts().splitlines():
            name, colon, transcript = line.partition(": ")
            text = spoken_text(transcript) if colon and not line.startswith(";") else None
            audio = self.sounds_dir / f"{name}.wav"
            if text is None or not audio.is_file():
                continue
            duration_s = audio_duration_s(audio)
            yield Utterance(
                id=name, audio=str(audio), duration_s=duration_s, text=text, speaker=SPEAKER
            )
