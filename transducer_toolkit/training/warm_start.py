# SPDX-License-Identifier: Apache-2.0
"""Starts a training with the weights of another one, which may have other symbols."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from transducer_toolkit.inference.recognizer import (
    CHECKPOINT_KEY,
    load_checkpoint,
    recipe_normalization,
    recipe_topology,
)
from transducer_toolkit.modules.weight_checks import check_kind
from transducer_toolkit.ops.topology import get_topology
from transducer_toolkit.training.lightning_module import TransducerModule

logger = logging.getLogger(__name__)


def start_from(module: TransducerModule, path: str) -> None:
    """Loads weights from a checkpoint of another training, of any loss.

    A weight is copied if the checkpoint has one of its name. A weight with one
    row for each symbol, such as the output layer or the embedding, is copied row by row: the row of
    a symbol comes from the row of the same symbol in the checkpoint. Rows of symbols that the
    checkpoint does not have keep their random values.

    Args:
        module: the module whose model, loss stage and CTC layer get the weights.
        path: a checkpoint of ``transducer-train``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not such a checkpoint, no weight matches, or a weight has another size.
    """
    checkpoint = load_checkpoint(path)
    own, other = module.state_dict(), checkpoint["state_dict"]
    before = list(checkpoint[CHECKPOINT_KEY]["symbols"])
    now = list(module.tokenizer.symbols)
    axes = _symbol_axes(module)
    fitting: dict[str, Tensor] = {}
    differing: list[str] = []
    for name, value in other.items():
        if name not in own:
            continue
        check_kind(value, own[name], f"init_from: {path}: its weight {name}")
        axis = axes.get(name)
        if axis is not None and (before != now or own[name].shape != value.shape):
            rows = _copy_rows(own[name], value, axis, before, now)
            if rows is not None:
                fitting[name] = rows
            else:
                differing.append(name)
        elif own[name].shape == value.shape:
            fitting[name] = value
        else:
            differing.append(name)
    if differing:
        name = differing[0]
        raise ValueError(
            f"init_from: {len(differing)} weights of {path} have another size in this model, such "
            f"as {name}: {tuple(other[name].shape)} there, {tuple(own[name].shape)} here; "
            "model=checkpoint takes the model of the checkpoint, or give the options of model that "
            "it was trained with"
        )
    if not fitting:
        raise ValueError(
            f"init_from: no weight of {path} has the name and size of a weight of this model"
        )
    module.load_state_dict(fitting, strict=False)
    logger.info("%d of %d weights taken over from %s", len(fitting), len(own), path)
    for what, names in (
        ("not in the checkpoint", sorted(own.keys() - fitting.keys())),
        ("in the checkpoint, but not used", sorted(other.keys() - fitting.keys())),
    ):
        if names:
            logger.warning("%s: %s", what, ", ".join(names))
    _report_symbols(before, now, path)
    if module.loss is not None:
        recipe = checkpoint[CHECKPOINT_KEY]
        try:
            _report_durations(recipe_topology(recipe), module.loss.topology, path)
        except ValueError as error:
            raise ValueError(f"init_from: {path}: {error}") from error
        _report_normalization(recipe_normalization(recipe), module.loss.normalization, path)


def _symbol_axes(module: TransducerModule) -> dict[str, int]:
    """Returns the axis of the symbols for each weight that has one.

    The sizes alone do not tell: a layer may be as wide as the vocabulary. A model with one more
    symbol shows which sizes change.
    """
    axes: dict[str, int] = {}
    size = module.tokenizer.vocab_size
    # The layers of the loss stage and of CTC are linear ones with an output for each symbol.
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and layer.out_features == size:
            axes |= {f"{name}.{weight}": 0 for weight, _ in layer.named_parameters()}
    if module.recipe is None:
        return axes
    axes = {name: axis for name, axis in axes.items() if not name.startswith("model.")}
    config: dict[str, Any] = {**module.recipe["model"], "vocab_size": size + 1}
    with torch.random.fork_rng(devices=[]):
        larger: Mapping[str, Tensor] = instantiate(config, _convert_="all").state_dict()
    for name, value in module.model.state_dict().items():
        if name in larger and larger[name].ndim == value.ndim:
            sizes = zip(value.shape, larger[name].shape, strict=True)
            changed = [axis for axis, (one, two) in enumerate(sizes) if one != two]
            if len(changed) == 1:
                axes[f"model.{name}"] = changed[0]
    return axes


def _copy_rows(
    own: Tensor, other: Tensor, axis: int, before: Sequence[str], now: Sequence[str]
) -> Tensor | None:
    """Returns ``own`` with the rows of common symbols from ``other``; None if it does not fit."""
    sizes = list(own.shape)
    if other.ndim != own.ndim:
        return None
    # Rows behind those of the symbols: of durations or big blanks.
    extra, other_extra = sizes[axis] - len(now), other.size(axis) - len(before)
    sizes[axis] = other.size(axis)
    if list(other.shape) != sizes or min(extra, other_extra) < 0:
        return None
    position = {symbol: index for index, symbol in enumerate(before)}
    common = [index for index, symbol in enumerate(now) if symbol in position]
    rows = other.index_select(axis, torch.tensor([position[now[index]] for index in common]))
    copied = own.clone().index_copy_(
        axis, torch.tensor(common, device=own.device), rows.to(own.device, own.dtype)
    )
    if extra == other_extra:
        copied.narrow(axis, len(now), extra).copy_(other.narrow(axis, len(before), extra))
    return copied


def _report_symbols(before: Sequence[str], now: Sequence[str], path: str) -> None:
    """Logs which symbols the new training starts without weights, and which it gives up."""
    new = [symbol for symbol in now if symbol not in set(before)]
    lost = [symbol for symbol in before if symbol not in set(now)]
    if new:
        logger.warning("new symbols, which start with random weights: %s", " ".join(new))
    if lost:
        logger.warning(
            "symbols that the model of %s can write and this model cannot, because the training "
            "texts lack them: %s; data/tokenizer=checkpoint keeps them",
            path,
            " ".join(lost),
        )


def _report_durations(before: str, now: str, path: str) -> None:
    """Logs that durations or big blanks of the checkpoint are not those of the new training."""
    num_before, num_now = get_topology(before).num_extra, get_topology(now).num_extra
    if before == now or num_before == 0:
        return
    same = "keep their weights under another meaning"
    logger.warning(
        "the model of %s was trained with the topology %s, and this training uses %s: its outputs "
        "for durations or big blanks %s; loss=%s loss.topology=%s keeps them",
        path,
        before,
        now,
        same if num_before == num_now else "are lost" if num_now == 0 else "start anew",
        "fused_tdt" if get_topology(before).num_durations else "multi_blank",
        before,
    )


def _report_normalization(before: str, now: str, path: str) -> None:
    """Logs that the logits of the checkpoint become probabilities in another way here."""
    if before != now:
        logger.warning(
            "the model of %s was trained with normalization=%s, and this training uses %s; "
            "loss.normalization=%s keeps it",
            path,
            before,
            now,
            before,
        )
