# SPDX-License-Identifier: Apache-2.0
"""Export of trained models for other runtimes."""

from transducer_toolkit.export.sherpa import export_for_sherpa
from transducer_toolkit.export.transformers_folder import export_for_transformers

__all__ = ["export_for_sherpa", "export_for_transformers"]
