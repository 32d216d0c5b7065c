# SPDX-License-Identifier: Apache-2.0
"""Training in Lightning's terms; imported only by those who train (it needs lightning)."""
