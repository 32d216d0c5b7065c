# SPDX-License-Identifier: Apache-2.0
"""A LibriSpeech in miniature: the archives' layout, tones for letters."""

import numpy as np
import soundfile

SAMPLE_RATE = 16000
WORDS = ["THE", "BOY", "READ", "A", "LONG", "BOOK", "AT", "HOME", "AND", "IN", "TOWN", "I'LL"]
SUBSETS = {"train-clean-100": (3, 4), "dev-clean": (1, 3), "test-clean": (2, 2)}  # readers, files


def write_librispeech(root):
    """Write ``ROOT/LibriSpeech/SUBSET/READER/CHAPTER/*.flac`` and ``*.trans.txt``."""
    rng = np.random.default_rng(0)
    reader = 19
    for subset, (num_readers, num_files) in SUBSETS.items():
        for _ in range(num_readers):
            reader += 7
            chapter = 1000 + 10 * reader
            folder = root / "LibriSpeech" / subset / str(reader) / str(chapter)
            folder.mkdir(parents=True)
            lines = []
            for number in range(num_files):
                text = " ".join(rng.choice(WORDS, rng.integers(3, 7)))
                id_ = f"{reader}-{chapter}-{number:04d}"
                soundfile.write(folder / f"{id_}.flac", _speak(text, rng), SAMPLE_RATE)
                lines.append(f"{id_} {text}\n")
            (folder / f"{reader}-{chapter}.trans.txt").write_text("".join(lines))


def _speak(text, rng):
    times = np.arange(int(0.08 * SAMPLE_RATE)) / SAMPLE_RATE
    letters = [0.2 * np.sin(2 * np.pi * (200 + 40 * (ord(c) - 32)) * times) for c in text]
    waveform = np.concatenate(letters)
    return waveform + 0.002 * rng.standard_normal(len(waveform))
