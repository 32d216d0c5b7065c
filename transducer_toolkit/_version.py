# SPDX-License-Identifier: Apache-2.0
"""The one place the version is written; setup, CMake and the native module read it here."""

__version__ = "0.1.0"
