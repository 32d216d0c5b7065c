# SPDX-License-Identifier: Apache-2.0
"""Export of trained models for other runtimes."""

from transducer_toolkit.export.sherpa import export_for_sherpa

__all__ = ["export_for_sherpa"]
