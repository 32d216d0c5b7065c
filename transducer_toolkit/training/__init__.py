# SPDX-License-Identifier: Apache-2.0
"""Training with Lightning. Only the training code imports it, because it needs ``lightning``."""
