# SPDX-License-Identifier: Apache-2.0
"""Trained models as files for other runtimes."""

from transducer_toolkit.export.sherpa import export_for_sherpa

__all__ = ["export_for_sherpa"]
