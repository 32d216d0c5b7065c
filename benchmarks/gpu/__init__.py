# SPDX-License-Identifier: Apache-2.0
"""Scripts for a machine with a GPU: docs/cuda.md."""
