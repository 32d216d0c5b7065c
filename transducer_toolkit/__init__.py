# SPDX-License-Identifier: Apache-2.0
"""RNN-Transducer losses and the joiners, models and training around them.

Importing this package needs torch only; ``transducer_toolkit.data``, ``.training`` and ``.cli``
need the extra ``transducer_toolkit[train]``.
"""

from transducer_toolkit._version import __version__
from transducer_toolkit.lattice import LatticeShape
from transducer_toolkit.losses import (
    FusedJoinerLoss,
    TransducerLoss,
    fused_joiner_loss,
    transducer_loss,
)
from transducer_toolkit.modules.joiner import Joiner
from transducer_toolkit.modules.joint import join, joiner_logits
from transducer_toolkit.native import build_info

__all__ = [
    "FusedJoinerLoss",
    "Joiner",
    "LatticeShape",
    "TransducerLoss",
    "__version__",
    "build_info",
    "fused_joiner_loss",
    "join",
    "joiner_logits",
    "transducer_loss",
]
