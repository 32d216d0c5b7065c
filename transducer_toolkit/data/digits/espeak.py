# SPDX-License-Identifier: Apache-2.0
"""espeak-ng through ctypes: text to waveform with word start times."""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

__all__ = ["EspeakSynthesizer", "Speech"]

# Constants of espeak-ng's speak_lib.h.
_AUDIO_OUTPUT_SYNCHRONOUS = 2
_INITIALIZE_DONT_EXIT = 0x8000
_CHARS_UTF8 = 1
_PHONEMES = 0x100
_NOISE_SEED = 1
_POS_CHARACTER = 1
_EVENT_LIST_TERMINATED = 0
_EVENT_WORD = 1
_PARAMETER = {"rate_wpm": 1, "pitch": 3, "pitch_range": 4, "word_gap_10ms": 7}
_LIMITS = {
    "rate_wpm": (80, 450),
    "pitch": (0, 99),
    "pitch_range": (0, 100),
    "word_gap_10ms": (0, 500),
}


class _EventId(ctypes.Union):
    _fields_ = (("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8))


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _EventId),
    )


_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)


@dataclass(frozen=True)
class Speech:
    """A synthetic utterance.

    Attributes:
        samples: float32 ``(num_samples,)`` in [-1, 1].
        sample_rate: Hz.
        word_starts_s: start of each word, seconds.
    """

    samples: np.ndarray
    sample_rate: int
    word_starts_s: list[float]


class EspeakSynthesizer:
    """The espeak-ng engine of a process; make only one per process.

    The engine keeps global state between calls. A new process that makes the same calls in the same
    order repeats the results exactly; no other process does.

    Raises:
        ImportError: espeakng-loader is not installed.
        RuntimeError: the engine does not start.

    Example:
        >>> speech = EspeakSynthesizer().synthesize("three seven", voice="en-us+f1", rate_wpm=150,
        ...     pitch=50, pitch_range=50, word_gap_10ms=0)  # doctest: +SKIP
        >>> len(speech.word_starts_s)  # doctest: +SKIP
        2
    """

    def __init__(self) -> None:
        import espeakng_loader  # optional: the extra `demo`

        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        self._folder = tempfile.TemporaryDirectory(prefix="espeak-ng-")
        data_path = Path(self._folder.name)
        self._variants = _copy_data(Path(espeakng_loader.get_data_path()), data_path)
        self._library.espeak_Initialize.argtypes = (
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_char_p,
            ctypes.c_int,
        )
        rate = self._library.espeak_Initialize(
            _AUDIO_OUTPUT_SYNCHRONOUS, 0, os.fsencode(data_path), _INITIALIZE_DONT_EXIT
        )
        if rate <= 0:
            raise RuntimeError(f"espeak_Initialize failed with {rate}")
        self.sample_rate = rate
        # Noise and breath start from the time of day otherwise.
        self._library.espeak_ng_SetRandSeed.argtypes = (ctypes.c_long,)
        self._library.espeak_ng_SetRandSeed(_NOISE_SEED)
        self._chunks: list[np.ndarray] = []
        self._word_starts_s: list[float] = []
        self._callback = _Callback(self._receive)  # must outlive the engine's use of it
        self._library.espeak_SetSynthCallback(self._callback)
        self._voice: str | None = None

    def definition(self, variant: str) -> str:
        """Return the definition of a variant, such as "f1"."""
        return (self._variants / variant).read_text(encoding="utf-8", errors="replace")

    def define(self, variant: str, definition: str) -> None:
        """Add a variant for this engine alone."""
        (self._variants / variant).write_text(definition, encoding="utf-8")
        self._voice = None  # the name may have had another definition

    def synthesize(
        self,
        text: str,
        *,
        voice: str,
        rate_wpm: int,
        pitch: int,
        pitch_range: int,
        word_gap_10ms: int,
    ) -> Speech:
        """Speak ``text``.

        Args:
            text: what to say; a comma makes a pause, and ``[[tj'u:]]`` are phonemes.
            voice: accent and variant, e.g. "en-us+f1".
            rate_wpm: words per minute, 80 to 450.
            pitch: 0 to 99, 50 being the voice's own.
            pitch_range: 0 (monotone) to 100, 50 being the voice's own.
            word_gap_10ms: extra pause between words, units of 10 ms (at the default rate).

        Returns:
            The speech at the engine's own sample rate.

        Raises:
            ValueError: unknown voice, or an option out of range.
            RuntimeError: the engine reports an error.
        """
        options = {
            "rate_wpm": rate_wpm,
            "pitch": pitch,
            "pitch_range": pitch_range,
            "word_gap_10ms": word_gap_10ms,
        }
        for name, value in options.items():
            low, high = _LIMITS[name]
            if not low <= value <= high:
                raise ValueError(f"{name} must lie in [{low}, {high}], got {value}")
        if voice != self._voice:
            variant = voice.partition("+")[2]
            # The engine ignores an unknown variant without an error.
            known = not variant or (self._variants / variant).is_file()
            if not known or self._library.espeak_SetVoiceByName(voice.encode()) != 0:
                raise ValueError(f"espeak-ng has no voice {voice!r}")
            self._voice = voice
        for name, value in options.items():
            self._check(
                self._library.espeak_SetParameter(_PARAMETER[name], value, 0), f"setting {name}"
            )
        self._chunks.clear()
        self._word_starts_s.clear()
        encoded = text.encode()
        self._check(
            self._library.espeak_Synth(
                encoded,
                ctypes.c_size_t(len(encoded) + 1),
                ctypes.c_uint(0),
                _POS_CHARACTER,
                ctypes.c_uint(0),
                ctypes.c_uint(_CHARS_UTF8 | _PHONEMES),
                None,
                None,
            ),
            f"synthesizing {text!r}",
        )
        self._check(self._library.espeak_Synchronize(), "synchronising")
        pcm = np.concatenate(self._chunks) if self._chunks else np.zeros(0, dtype=np.int16)
        return Speech(pcm.astype(np.float32) / 32768, self.sample_rate, list(self._word_starts_s))

    def _receive(self, pcm, num_samples: int, events) -> int:
        if pcm and num_samples > 0:
            self._chunks.append(np.ctypeslib.as_array(pcm, shape=(num_samples,)).copy())
        position = 0
        while events[position].type != _EVENT_LIST_TERMINATED:
            if events[position].type == _EVENT_WORD:
                self._word_starts_s.append(events[position].audio_position / 1000)
            position += 1
        return 0

    @staticmethod
    def _check(code: int, action: str) -> None:
        if code != 0:
            raise RuntimeError(f"espeak-ng returned {code} when {action}")


def _copy_data(source: Path, target: Path) -> Path:
    """Make a data folder with links to all files of ``source`` but the variants, which are copied.

    Returns:
        The folder of the variants.
    """
    for path in source.iterdir():
        if path.name != "voices":
            (target / path.name).symlink_to(path)
    variants = target / "voices" / "!v"
    shutil.copytree(source / "voices" / "!v", variants)
    return variants
