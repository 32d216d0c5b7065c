# SPDX-License-Identifier: Apache-2.0
"""Compares the options of a resumed training with those of its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from transducer_toolkit.training.lightning_module import TransducerModule

CONFIG_KEY = "training_config"  # entry of a checkpoint
# The parts of a config that decide what is trained. The others are callbacks, loggers and paths.
PARTS = (
    "data",
    "model",
    "loss",
    "ctc",
    "optimizer",
    "scheduler",
    "averaging",
    "adapters",
    "trainer",
    "seed",
    "max_symbols_per_frame",
    "init_from",
)
IGNORED = (
    "data.num_workers",
    "data.pin_memory",
    "trainer.default_root_dir",
    "trainer.enable_progress_bar",
    "trainer.log_every_n_steps",
    "trainer.plugins",
)
OWN_SCHEDULES = "transducer_toolkit.training.schedules."
NOTHING = "nothing"

# Keys of changed options, with the value before and now.
Changes = dict[str, tuple[Any, Any]]


def training_config(cfg: DictConfig) -> dict[str, Any]:
    """Return the parts of a config that decide what is trained, as plain values.

    Example:
        >>> training_config(OmegaConf.create({"seed": 1, "loss": {"topology": "regular"}}))
        {'loss': {'topology': 'regular'}, 'seed': 1}
    """
    parts = {name: cfg[name] for name in PARTS if name in cfg}
    return {
        name: OmegaConf.to_container(part, resolve=True) if OmegaConf.is_config(part) else part
        for name, part in parts.items()
    }


def find_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Changes:
    """Return the options that differ between two configs of :func:`training_config`.

    Example:
        >>> find_changes({"seed": 1, "loss": {"clamp": -1}}, {"seed": 2, "loss": {"clamp": -1}})
        {'seed': (1, 2)}
    """
    old, new = flattened(before), flattened(now)
    return {
        key: (old.get(key, NOTHING), new.get(key, NOTHING))
        for key in dict.fromkeys([*old, *new])
        if old.get(key, NOTHING) != new.get(key, NOTHING) and not key.startswith(IGNORED)
    }


def flattened(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return the values of a nested config by their keys.

    Example:
        >>> flattened({"seed": 1, "loss": {"clamp": -1}})
        {'seed': 1, 'loss.clamp': -1}
    """
    if not isinstance(config, Mapping):
        return {prefix.removesuffix("."): config}
    return {
        key: value
        for name, part in config.items()
        for key, value in flattened(part, f"{prefix}{name}.").items()
    }


def described(changes: Changes) -> str:
    """Return a list of changes as text.

    Example:
        >>> described({"seed": (1, 2), "ctc.weight": (0.0, 0.3)})
        'seed 1 -> 2, ctc.weight 0.0 -> 0.3'
    """
    return ", ".join(f"{key} {before} -> {now}" for key, (before, now) in changes.items())


def check_run_folder(changes: Changes, path: str, run_dir: Path) -> None:
    """Raise an error if ``ckpt_path=auto`` found the run folder of another config.

    Args:
        changes: options that differ from those of the checkpoint.
        path: path of the checkpoint.
        run_dir: folder of this run.

    Raises:
        ValueError: there are changes.
    """
    if changes:
        raise ValueError(
            f"{run_dir} belongs to a training with other options ({described(changes)}); choose "
            "another run folder (name, hydra.run.dir or the variable TRANSDUCER_TOOLKIT_RUN_ID), "
            f"or continue that training with the new options: ckpt_path={path}"
        )


def check_changes(changes: Changes, checkpoint: Mapping[str, Any], path: str) -> None:
    """Raise an error if a training cannot go on with changed options.

    Args:
        changes: options that differ from those of the checkpoint.
        checkpoint: content of the checkpoint.
        path: path of the checkpoint.

    Raises:
        ValueError: the checkpoint has no state of an optimizer; it has the state of another
            optimizer or scheduler; or a scheduler would restore its options from its state.
    """
    if "optimizer_states" not in checkpoint:
        raise ValueError(
            f"ckpt_path: {path} contains no state of an optimizer, so no training can go on from "
            f"it; init_from={path} starts a training with its weights"
        )
    refused = {key: change for key, change in changes.items() if key == "optimizer._target_"}
    if "init_from" in changes and changes["init_from"][1] is not None:
        refused["init_from"] = changes["init_from"]
    schedules = [*changes.get("scheduler._target_", ())]
    config = checkpoint.get(CONFIG_KEY)
    if isinstance(config, Mapping) and not schedules:
        scheduler = config.get("scheduler") or {}
        schedules = [scheduler.get("_target_", NOTHING)]
    if not all(str(name).startswith(OWN_SCHEDULES) for name in schedules):
        restored = [key for key in changes if key.startswith("scheduler")]
        if schedules != [NOTHING] and "optimizer.lr" in changes:
            restored.append("optimizer.lr")
        refused |= {key: changes[key] for key in restored}
    if refused:
        raise ValueError(
            f"ckpt_path: a training cannot go on with these changes, because the checkpoint "
            f"restores the former state: {described(refused)}; give the former values, or start a "
            f"training with the weights: init_from={path}"
        )


def check_symbols(module: TransducerModule, checkpoint: Mapping[str, Any], path: str) -> None:
    """Raise an error if the symbols of a model are not those of the checkpoint.

    Args:
        module: module of the training.
        checkpoint: content of the checkpoint.
        path: path of the checkpoint.

    Raises:
        ValueError: the symbols, or their order, differ.
    """
    from transducer_toolkit.inference.recognizer import CHECKPOINT_KEY

    recipe = checkpoint.get(CHECKPOINT_KEY)
    symbols = recipe.get("symbols") if isinstance(recipe, Mapping) else None
    if isinstance(symbols, Sequence) and list(symbols) != list(module.tokenizer.symbols):
        raise ValueError(
            f"ckpt_path: the training texts give other symbols than {path} has "
            f"({compare_symbols(symbols, module.tokenizer.symbols)}); data/tokenizer=checkpoint "
            f"data.tokenizer.path={path} keeps its symbols, init_from={path} starts a training "
            "with its weights"
        )


def compare_symbols(before: Sequence[str], now: Sequence[str]) -> str:
    """Return a description of the difference between two lists of symbols.

    Example:
        >>> compare_symbols(["<blk>", "a", "b"], ["<blk>", "a", "c", "d"])
        'without b, new: c d'
        >>> compare_symbols(["<blk>", "a", "b"], ["<blk>", "b", "a"])
        'the same in another order'
    """
    lost = [symbol for symbol in before if symbol not in set(now)]
    new = [symbol for symbol in now if symbol not in set(before)]
    parts = [f"without {_shortened(lost)}"] * bool(lost) + [f"new: {_shortened(new)}"] * bool(new)
    return ", ".join(parts) or "the same in another order"


def _shortened(symbols: Sequence[str], limit: int = 20) -> str:
    more = f" and {len(symbols) - limit} more" if len(symbols) > limit else ""
    return " ".join(symbols[:limit]) + more


def check_weights(
    module: TransducerModule, checkpoint: Mapping[str, Any], changes: Changes, path: str
) -> None:
    """Raise an error if the weights of a checkpoint do not fit the model, the loss and CTC.

    Args:
        module: module of the training.
        checkpoint: content of the checkpoint.
        changes: options that differ from those of the checkpoint.
        path: path of the checkpoint.

    Raises:
        ValueError: a weight is missing, superfluous, or of another size.
    """
    own = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    other = {name: tuple(value.shape) for name, value in checkpoint["state_dict"].items()}
    differing = sorted(
        name for name in own.keys() | other.keys() if own.get(name) != other.get(name)
    )
    if differing:
        options = {
            key: change
            for key, change in changes.items()
            if key.startswith(("model", "loss", "ctc", "data"))
        }
        reason = f"changed: {described(options)}; " if options else ""
        name = differing[0]
        raise ValueError(
            f"ckpt_path: the weights of {path} do not fit this training ({reason}"
            f"{len(differing)} weights differ, such as {name}: {other.get(name, NOTHING)} -> "
            f"{own.get(name, NOTHING)}); give the former values, or start a training with the "
            f"weights that fit: init_from={path}"
        )


def check_length(trainer: DictConfig, checkpoint: Mapping[str, Any], path: str) -> None:
    """Raise an error if a checkpoint is behind the end of the training.

    Args:
        trainer: config of the trainer.
        checkpoint: content of the checkpoint.
        path: path of the checkpoint.

    Raises:
        ValueError: the checkpoint has more epochs than ``max_epochs``, or more steps than
            ``max_steps``.
    """
    loop = checkpoint.get("loops", {}).get("fit_loop", {})
    is_over = loop.get("epoch_loop.batch_progress", {}).get("is_last_batch", False)
    trained = {"max_epochs": checkpoint["epoch"] + is_over, "max_steps": checkpoint["global_step"]}
    for name, number in trained.items():
        limit = trainer.get(name)
        if limit is not None and limit != -1 and number > limit:
            raise ValueError(
                f"trainer.{name}={limit}: {path} has trained {number} {name.removeprefix('max_')} "
                "already; give a larger number"
            )
