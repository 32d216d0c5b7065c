# SPDX-License-Identifier: Apache-2.0
"""RNN-Transducer losses and the joiners, models and training around them.

Importing this package needs torch only, and imports it with the first name that is used.
``transducer_toolkit.data``, ``.training`` and ``.cli`` need the extra
``transducer_toolkit[train]``.
"""

import importlib
from typing import TYPE_CHECKING, Any

from transducer_toolkit._version import __version__

if TYPE_CHECKING:
    from transducer_toolkit.losses import (
        FusedJoinerLoss,
        MultiBlankLoss,
        TDTLoss,
        TransducerLoss,
        do_rnnt_pruning,
        fused_joiner_loss,
        get_rnnt_logprobs,
        get_rnnt_logprobs_joint,
        get_rnnt_logprobs_pruned,
        get_rnnt_logprobs_smoothed,
        get_rnnt_prune_ranges,
        joint_mutual_information_recursion,
        multi_blank_loss,
        mutual_information_recursion,
        rnnt_loss,
        rnnt_loss_pruned,
        rnnt_loss_simple,
        rnnt_loss_smoothed,
        tdt_loss,
        transducer_loss,
    )
    from transducer_toolkit.modules.joiner import Joiner
    from transducer_toolkit.ops.join import join, joiner_logits
    from transducer_toolkit.ops.lattice import LatticeShape
    from transducer_toolkit.ops.native import build_info

__all__ = [
    "FusedJoinerLoss",
    "Joiner",
    "LatticeShape",
    "MultiBlankLoss",
    "TDTLoss",
    "TransducerLoss",
    "__version__",
    "build_info",
    "do_rnnt_pruning",
    "fused_joiner_loss",
    "get_rnnt_logprobs",
    "get_rnnt_logprobs_joint",
    "get_rnnt_logprobs_pruned",
    "get_rnnt_logprobs_smoothed",
    "get_rnnt_prune_ranges",
    "join",
    "joiner_logits",
    "joint_mutual_information_recursion",
    "multi_blank_loss",
    "mutual_information_recursion",
    "rnnt_loss",
    "rnnt_loss_pruned",
    "rnnt_loss_simple",
    "rnnt_loss_smoothed",
    "tdt_loss",
    "transducer_loss",
]

# Modules that define the names above, and the subpackages that are attributes of this package.
_HOMES = ("losses", "modules.joiner", "ops.join", "ops.lattice", "ops.native")
_SUBPACKAGES = ("losses", "modules", "ops")


def __getattr__(name: str) -> Any:
    """Import a public name on its first use: the commands start without torch, which is slow."""
    if name in _SUBPACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in __all__:
        for home in _HOMES:
            module = importlib.import_module(f"{__name__}.{home}")
            if hasattr(module, name):
                globals()[name] = getattr(module, name)
                return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBPACKAGES})
