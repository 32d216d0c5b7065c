# SPDX-License-Identifier: Apache-2.0
"""The features that a NeMo model of the toolkit gets from sherpa-onnx, computed in torch."""

import torch
from torch import Tensor

from transducer_toolkit.data.features import PREEMPHASIS, Fbank
from transducer_toolkit.export.client_mel import FLOOR, FromClientMel, client_filters


class ClientFeatures:
    """Features of an Fbank as the exported graph converts them from the client's."""

    def __init__(self, fbank: Fbank) -> None:
        self.fbank, self.converted = fbank, FromClientMel(fbank)
        self.sample_rate, self.num_mel_bins = fbank.sample_rate, fbank.num_mel_bins

    def num_frames(self, num_samples: int) -> int:
        return self.fbank.num_frames(num_samples)

    def __call__(self, waveform: Tensor) -> Tensor:
        return self.converted(self.client(waveform).T[None])[0]

    def client(self, waveform: Tensor) -> Tensor:
        """The features that the client computes, (T, number of its filters)."""
        reflected = waveform.flip(0)
        samples = torch.cat((reflected[-120:], waveform, reflected))
        frames = samples.unfold(0, 400, 160)[: self.num_frames(len(waveform))]
        previous = torch.cat((frames[:, :1], frames[:, :-1]), 1)
        window = torch.hann_window(400, periodic=False).pow(0.85)
        windowed = (frames - PREEMPHASIS * previous) * window  # the mean is not subtracted
        power = torch.fft.rfft(windowed, n=512).abs().square()
        return (power @ client_filters().float()).clamp_min(FLOOR).log()
