# SPDX-License-Identifier: Apache-2.0
"""Test sets from outside espeak-ng: another engine, and recordings of a human."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from transducer_toolkit.data.audio import SAMPLE_RATE, read_audio
from transducer_toolkit.data.digits.recipe import DIGIT_WORDS, draw_words
from transducer_toolkit.data.digits.synthesis import write_utterance
from transducer_toolkit.data.keyed_random import keyed_generator
from transducer_toolkit.data.manifest import Utterance

__all__ = ["AsteriskDigits", "Flite"]

MAX_GAP_S = 0.2
ASTERISK_DIGITS_DIR = "/usr/share/asterisk/sounds/en_US_f_Allison/digits"


class Flite:
    """Digit strings spoken by the flite engine (Debian package ``flite``), four 16 kHz voices.

    Example:
        >>> Flite().fingerprint()  # doctest: +SKIP
        'flite-2.2-current Sep 2018 (http://cmuflite.org)'
    """

    name = "flite"
    debian_package = "flite"
    voices = ("awb", "kal16", "rms", "slt")

    def fingerprint(self) -> str | None:
        """Return a fingerprint of all that determines the audio; None without flite."""
        if shutil.which("flite") is None:
            return None
        # flite prints its version and returns 1.
        answer = subprocess.run(["flite", "--version"], capture_output=True, text=True, check=False)
        return answer.stdout.strip()

    def make(self, folder: Path, num_utterances: int) -> list[Utterance]:
        """Synthesize ``num_utterances`` into ``folder``; voices in turn, tempo at random.

        Raises:
            RuntimeError: flite fails.
        """
        with ThreadPoolExecutor() as pool:
            return list(pool.map(lambda index: self._speak(folder, index), range(num_utterances)))

    def _speak(self, folder: Path, index: int) -> Utterance:
        id_, voice = f"flite-{index:05d}", self.voices[index % len(self.voices)]
        rng = keyed_generator(id_)
        words = draw_words(rng)
        stretch = rng.uniform(0.8, 1.3)
        wav = folder / f"{id_}.wav"
        command = ["flite", "-voice", voice, "--setf", f"duration_stretch={stretch:.3f}"]
        command += ["-t", " ".join(words), "-o", str(wav)]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.returncode != 0 or not wav.is_file():
            raise RuntimeError(f"{' '.join(command)!r} failed: {answer.stderr.strip()}")
        return write_utterance(
            wav,
            read_audio(wav),
            id_=id_,
            text=" ".join(words),
            speaker=voice,
            extra={"duration_stretch": round(stretch, 3)},
        )


class AsteriskDigits:
    """Strings of human digits (Debian package ``asterisk-core-sounds-en-wav``).

    One speaker, one recording a digit, 8 kHz; recordings are joined with gaps of 0 to 0.2 s.

    Args:
        sounds_dir: folder with ``0.wav`` to ``9.wav``; the default is the package's.
    """

    name = "asterisk"
    debian_package = "asterisk-core-sounds-en-wav"

    def __init__(self, *, sounds_dir: str | os.PathLike[str] | None = None) -> None:
        self.sounds_dir = Path(ASTERISK_DIGITS_DIR if sounds_dir is None else sounds_dir)

    def fingerprint(self) -> str | None:
        """Return a fingerprint of the recordings; None if they are not installed."""
        files = self._files()
        if not all(path.is_file() for path in files):
            return None
        return hashlib.blake2b(b"".join(p.read_bytes() for p in files), digest_size=8).hexdigest()

    def make(self, folder: Path, num_utterances: int) -> list[Utterance]:
        """Join recordings to ``num_utterances`` strings in ``folder``."""
        recordings = {
            word: read_audio(path) for word, path in zip(DIGIT_WORDS, self._files(), strict=True)
        }
        return [self._join(folder, index, recordings) for index in range(num_utterances)]

    def _files(self) -> Sequence[Path]:
        return [self.sounds_dir / f"{digit}.wav" for digit in range(len(DIGIT_WORDS))]

    def _join(self, folder: Path, index: int, recordings: dict[str, torch.Tensor]) -> Utterance:
        id_ = f"asterisk-{index:05d}"
        rng = keyed_generator(id_)
        words = draw_words(rng)
        pieces = [recordings[words[0]]]
        for word in words[1:]:
            gap = torch.zeros(round(rng.uniform(0, MAX_GAP_S) * SAMPLE_RATE))
            pieces += [gap, recordings[word]]
        return write_utterance(
            folder / f"{id_}.wav",
            torch.cat(pieces),
            id_=id_,
            text=" ".join(words),
            speaker="allison",
            extra={},
        )
