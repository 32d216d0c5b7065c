# SPDX-License-Identifier: Apache-2.0
"""Transducer losses. Pure functions first; a module form of each beside it."""

from transducer_toolkit.losses.fused_joiner import FusedJoinerLoss, fused_joiner_loss
from transducer_toolkit.losses.packed import TransducerLoss, transducer_loss

__all__ = ["FusedJoinerLoss", "TransducerLoss", "fused_joiner_loss", "transducer_loss"]
