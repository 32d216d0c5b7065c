# SPDX-License-Identifier: Apache-2.0
"""Losses with the names, signatures and defaults of other projects."""
