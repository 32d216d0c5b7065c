# SPDX-License-Identifier: Apache-2.0
"""Transducer losses. Pure functions first; a module form of each beside it."""

from transducer_toolkit.losses.packed import TransducerLoss, transducer_loss

__all__ = ["TransducerLoss", "transducer_loss"]
