# SPDX-License-Identifier: Apache-2.0
"""The toolkit's log-mel features from those that sherpa-onnx computes for NeMo's models.

For these models the client computes log energies of triangular filters on Slaney's mel scale, from
0 to 7600 Hz, of the power spectrum that :class:`~transducer_toolkit.data.features.Fbank` takes. The
exported file says how many filters. With many narrow filters, sums of their
energies come close to the energies of other filters:

    log(sum_j A[j, k] * exp(client[j]))  with A >= 0 that minimizes |C A - W|

for the client's filters C and the wanted filters W, both (bins of the spectrum, filters).

Differences remain. The triangles are not the same near their corners; the client does not subtract
the mean of a frame; and its logarithm has a floor, which narrow filters reach earlier. An energy at
the floor counts as zero here.

Source: ``PostInit`` of sherpa-onnx's ``offline-recognizer-transducer-nemo-impl.h``, and
``InitLibrosaMelBanks`` of kaldi-native-fbank's ``mel-computations.cc``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from transducer_toolkit.data.features import HIGHEST_HZ, SAMPLE_RATE, Fbank

# The largest number for which each filter contains a bin of the spectrum, which the client demands.
NUM_CLIENT_FILTERS = 188
FFT_LENGTH = 512
FLOOR = torch.finfo(torch.float32).eps  # of an energy
LINEAR_HZ_PER_MEL, LINEAR_MELS = 200 / 3, 15.0  # Slaney's scale is linear up to 1000 Hz,
MELS_PER_E_FOLD = 27 / math.log(6.4)  # logarithmic above
NUM_UPDATES = 1000


def client_filters(num_filters: int = NUM_CLIENT_FILTERS) -> Tensor:
    """Return the client's filters, float64 ``(FFT_LENGTH // 2 + 1, num_filters)``."""
    first_hz = LINEAR_HZ_PER_MEL * LINEAR_MELS
    highest = LINEAR_MELS + MELS_PER_E_FOLD * math.log(HIGHEST_HZ / first_hz)
    mel = torch.linspace(0.0, highest, num_filters + 2, dtype=torch.float64)
    above = first_hz * ((mel - LINEAR_MELS) / MELS_PER_E_FOLD).exp()
    edges = torch.where(mel < LINEAR_MELS, mel * LINEAR_HZ_PER_MEL, above)
    left, center, right = edges[:-2], edges[1:-1], edges[2:]
    hz = torch.arange(FFT_LENGTH // 2 + 1, dtype=torch.float64)[:, None] * SAMPLE_RATE / FFT_LENGTH
    rising, falling = (hz - left) / (center - left), (right - hz) / (right - center)
    return torch.minimum(rising, falling).clamp_min(0.0) * 2 / (right - left)  # of equal area


def non_negative_weights(filters: Tensor, wanted: Tensor) -> Tensor:
    """Return A >= 0 that minimizes ``|filters @ A - wanted|``, all of them non-negative.

    Args:
        filters: (bins, J).
        wanted: (bins, K).

    Returns:
        (J, K).

    Source: the multiplicative updates of Lee and Seung, "Algorithms for Non-negative Matrix
    Factorization" (2001), with one factor fixed.
    """
    height = filters.amax(0, keepdim=True)
    scaled = filters / height  # filters of equal height, for the updates to converge
    target, gram = scaled.T @ wanted, scaled.T @ scaled
    weights = torch.ones_like(target)
    for _ in range(NUM_UPDATES):
        weights = weights * target / (gram @ weights).clamp_min(1e-30)
    return weights / height.T


class FromClientMel(nn.Module):
    """Computes the features of an :class:`Fbank` from the client's: ``(N, J, T) -> (N, T, F)``.

    Args:
        fbank: the features wanted.
    """

    weights: Tensor  # (F, J, 1)

    def __init__(self, fbank: Fbank) -> None:
        super().__init__()
        weights = non_negative_weights(client_filters(), fbank.mel_weights.double())
        self.register_buffer("weights", weights.float().T.unsqueeze(2))

    def forward(self, client: Tensor) -> Tensor:
        energies = client.exp()
        # The rounding of log and exp is far below the factor of 1 + 1e-4.
        energies = torch.where(energies > FLOOR * (1 + 1e-4), energies, 0.0)
        # A convolution, because matrix products may be quantized, which is too coarse for energies.
        wanted = nn.functional.conv1d(energies, self.weights)
        return wanted.clamp_min(FLOOR).log().transpose(1, 2)
