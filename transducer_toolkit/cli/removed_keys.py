# SPDX-License-Identifier: Apache-2.0
"""Config keys that earlier versions had."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

REMOVED_KEYS = {
    "data.subsampling": "the encoder decides how many feature frames make one encoder frame "
    "(model.encoder.subsampling_factor); remove the key",
}


def refuse_removed_keys(cfg: DictConfig) -> None:
    """Raise a ValueError if a config sets a key that no longer exists.

    Args:
        cfg: the composed config.

    Example:
        >>> refuse_removed_keys(OmegaConf.create({"data": {"subsampling": 8}}))
        Traceback (most recent call last):
        ValueError: data.subsampling is no option any more: the encoder decides how many feature \
frames make one encoder frame (model.encoder.subsampling_factor); remove the key
    """
    for key, reason in REMOVED_KEYS.items():
        if OmegaConf.select(cfg, key) is not None:
            raise ValueError(f"{key} is no option any more: {reason}")
