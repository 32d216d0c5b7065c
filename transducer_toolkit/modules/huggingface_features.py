# SPDX-License-Identifier: Apache-2.0
"""The features of Hugging Face's encoders, 10 ms a frame."""

from __future__ import annotations

import bisect
import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from transducer_toolkit.modules.huggingface_files import read_json
from transducer_toolkit.ops.checks import one_line
from transducer_toolkit.optional import import_transformers

__all__ = ["HuggingFaceFeatures"]

# Those of transducer_toolkit.data; a test compares them.
SAMPLE_RATE = 16000
FRAME_SAMPLES = 160
# Feature extractors that compute log-mel features, and one that passes on waveforms.
PARAKEET, NEMOTRON = "ParakeetFeatureExtractor", "NemotronAsrStreamingFeatureExtractor"
WHISPER, SEAMLESS = "WhisperFeatureExtractor", "SeamlessM4TFeatureExtractor"
WAVEFORM = "Wav2Vec2FeatureExtractor"
KINDS = (PARAKEET, NEMOTRON, WHISPER, SEAMLESS, WAVEFORM)
# Bounds of the options: numbers, and the size of the mel filters.
MAX_NUMBER, MAX_FILTERS = 10**6, 2**24
_FILES = ("preprocessor_config.json", "processor_config.json")


class HuggingFaceFeatures:
    """Computes the features of one waveform with a feature extractor of transformers.

    It has the interface of :class:`~transducer_toolkit.data.features.Fbank`, with a frame every
    10 ms. A frame of ``Wav2Vec2FeatureExtractor`` is 160 samples; the last one is filled up with
    zeros.

    Args:
        kind: class of the feature extractor, one of :data:`KINDS`.
        options: its options, as in ``preprocessor_config.json``.

    Raises:
        ImportError: transformers is not installed.
        ValueError: the class is unknown, or another sample rate or frame shift.
    """

    sample_rate = SAMPLE_RATE

    def __init__(self, kind: str, options: Mapping[str, Any] | None = None) -> None:
        if kind not in KINDS:
            raise ValueError(f"features: expected one of {', '.join(KINDS)}, got {kind!r}")
        transformers = import_transformers("HuggingFaceFeatures")
        self.kind, self.options = kind, dict(options or {})
        _check_sizes(self.options)
        self._extractor = getattr(transformers, kind)(**self.options)
        rate = self._extractor.sampling_rate
        shift = getattr(self._extractor, "hop_length", FRAME_SAMPLES)
        if (rate, shift) != (SAMPLE_RATE, FRAME_SAMPLES):
            raise ValueError(
                f"features: expected {SAMPLE_RATE} Hz and a frame every {FRAME_SAMPLES} samples, "
                f"got {rate} Hz and {shift} samples"
            )

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> HuggingFaceFeatures:
        """Read the feature extractor of a model folder.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is of a class that is not supported.
        """
        for name in _FILES:
            config = read_json(folder, name, required=False)
            if config is None:
                continue
            config = config.get("feature_extractor", config)
            if not isinstance(config, dict):
                raise ValueError(
                    f"{os.fspath(folder)}/{name}: feature_extractor: expected an object"
                )
            kind = config.pop("feature_extractor_type", None)
            if kind is None:
                continue
            for ignored in ("processor_class", "image_processor_type", "auto_map"):
                config.pop(ignored, None)
            try:
                features = cls(kind, config)
                noise = torch.rand(SAMPLE_RATE, generator=torch.Generator().manual_seed(0)) - 0.5
                if not bool(features(noise).isfinite().all()):
                    raise ValueError("the features of noise are not finite")
            except ImportError:
                raise
            except Exception as error:  # a wrong option can raise any error
                raise ValueError(f"{os.fspath(folder)}/{name}: {one_line(error)}") from error
            return features
        raise FileNotFoundError(
            f"no {' or '.join(_FILES)} with a feature extractor in {os.fspath(folder)}; "
            "save_pretrained of the model's processor or feature extractor writes it"
        )

    @property
    def is_waveform(self) -> bool:
        """Whether frames are samples, and not a spectrum."""
        return self.kind == WAVEFORM

    @property
    def num_mel_bins(self) -> int:
        """Width of a frame, F."""
        return FRAME_SAMPLES if self.kind == WAVEFORM else self._extractor.feature_size

    def num_frames(self, num_samples: int) -> int:
        """Return T_in of a 16 kHz waveform, 0 if it is too short."""
        if self.kind == WAVEFORM:
            return 0 if num_samples < FRAME_SAMPLES else -(-num_samples // FRAME_SAMPLES)
        if self.kind == SEAMLESS:  # whole windows of 25 ms, in pairs
            length = max(0, 1 + (num_samples - 400) // FRAME_SAMPLES)
            return length - length % 2
        length = num_samples // FRAME_SAMPLES
        return length if length > 1 else 0  # the variance of a single frame is undefined

    def __call__(self, waveform: Tensor) -> Tensor:
        """Compute the features of one waveform.

        Args:
            waveform: float32 ``(num_samples,)``, 16 kHz, in [-1, 1].

        Returns:
            float32 ``(T_in, num_mel_bins)`` with ``T_in = num_frames(num_samples)``.

        Raises:
            ValueError: not one-dimensional, or too short.
            TypeError: not float32.
        """
        if waveform.dim() != 1:
            raise ValueError(f"waveform must be (num_samples,), got {tuple(waveform.shape)}")
        if waveform.dtype != torch.float32:
            raise TypeError(f"waveform must be float32, got {waveform.dtype}")
        num_frames = self.num_frames(len(waveform))
        if num_frames == 0:
            least = bisect.bisect_left(range(SAMPLE_RATE), 1, key=self.num_frames)
            raise ValueError(
                f"waveform must have at least {least} samples for {self.kind}, got {len(waveform)}"
            )
        found = self._extractor(
            waveform.numpy(), sampling_rate=SAMPLE_RATE, return_tensors="pt", **self._call_options()
        )
        if self.kind == WAVEFORM:
            samples = found["input_values"][0]
            padding = num_frames * FRAME_SAMPLES - len(samples)
            return torch.nn.functional.pad(samples, (0, padding)).view(num_frames, FRAME_SAMPLES)
        features = found["input_features"][0]
        if self.kind == WHISPER:
            features = features.T  # (F, T) -> (T, F)
        # SeamlessM4T stacks pairs of frames: (T / 2, 2 F) -> (T, F)
        return features.reshape(-1, self.num_mel_bins)[:num_frames].contiguous()

    def _call_options(self) -> dict[str, Any]:
        if self.kind == WHISPER:  # not cut at 30 seconds; the encoder fills up what is missing
            return {"padding": "longest", "truncation": False}
        return {}


def _check_sizes(options: Mapping[str, Any]) -> None:
    """Raise a ValueError for numbers with which making the features would fill the memory."""
    for name, value in options.items():
        if isinstance(value, int) and abs(value) > MAX_NUMBER:
            raise ValueError(f"features: {name}: expected at most {MAX_NUMBER}, got {value}")
    sizes = [options.get(name, 1) for name in ("feature_size", "num_mel_bins", "n_fft")]
    num_filters = math.prod(size for size in sizes if isinstance(size, int))
    if num_filters > MAX_FILTERS:
        raise ValueError(
            f"features: expected mel filters of at most {MAX_FILTERS} numbers, got {num_filters}"
        )
