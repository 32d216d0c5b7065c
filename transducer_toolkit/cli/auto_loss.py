# SPDX-License-Identifier: Apache-2.0
"""Gives a loss the topology and the normalization of the checkpoint that a training starts from."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from omegaconf import DictConfig, OmegaConf

from transducer_toolkit.cli.component_arguments import argument_names
from transducer_toolkit.cli.hydra_help import CONFIGS
from transducer_toolkit.inference.recognizer import (
    CHECKPOINT_KEY,
    load_recipe,
    recipe_normalization,
    recipe_topology,
)
from transducer_toolkit.ops.topology import get_topology

logger = logging.getLogger(__name__)
AUTO = "auto"


def settle(cfg: DictConfig, ckpt_path: str | None, checkpoint: Mapping[str, Any]) -> None:
    """Replace "auto" in the options of the loss.

    Args:
        cfg: the composed config; ``cfg.loss`` changes.
        ckpt_path: path of the checkpoint that the training resumes from; None for a new training,
            which follows the checkpoint of ``init_from``, if it has one.
        checkpoint: content of ``ckpt_path``.

    Raises:
        FileNotFoundError: there is no checkpoint at ``init_from``.
        ValueError: ``init_from`` is no checkpoint, or its topology is unknown.
    """
    wanted = [name for name in ("topology", "normalization") if cfg.loss.get(name) == AUTO]
    if not wanted:
        return
    recipe: Any = {}
    if ckpt_path is not None:
        recipe = checkpoint.get(CHECKPOINT_KEY) or {}
    elif cfg.init_from is not None:
        recipe = load_recipe(cfg.init_from)
    found = {"topology": recipe_topology(recipe), "normalization": recipe_normalization(recipe)}
    try:
        arcs = get_topology(found["topology"])
    except ValueError as error:
        where = f"init_from: {cfg.init_from}" if ckpt_path is None else f"ckpt_path: {ckpt_path}"
        raise ValueError(f"{where}: {error}") from error
    if "topology" in wanted and arcs.num_extra:
        option = "tdt" if arcs.num_durations else "multi_blank"
        options: Any = OmegaConf.load(str(files(CONFIGS) / "loss" / f"{option}.yaml"))
        taken = {"sigma", "omega"} & {*options} & {*argument_names(cfg.loss["_target_"])}
        cfg.loss = OmegaConf.merge({name: options[name] for name in taken}, cfg.loss)
    for name in wanted:
        cfg.loss[name] = found[name]
    if recipe:
        said = ", ".join(f"loss.{name}={found[name]}" for name in wanted)
        logger.info("%s, as in the checkpoint", said)
