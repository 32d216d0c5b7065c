# SPDX-License-Identifier: Apache-2.0
"""Data in its order: manifest, audio, augmentation, features, targets, batches, data module."""
