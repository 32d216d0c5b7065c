# SPDX-License-Identifier: Apache-2.0
"""AdamW whose learning rate falls from the last layer of the encoder to the first."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from transducer_toolkit.ops.checks import check_number

ENCODER = "model.encoder."
_LAYER = re.compile(r"\.layers\.(\d+)\.")


def layer_decay_adamw(module: nn.Module, *, lr: float, decay: float, **options: Any) -> Any:
    """Make an AdamW with ``lr * decay ** k`` for the layer with k layers after it.

    The last layer has ``k = 1``. What lies outside of the encoder has the full learning rate, and
    all weights of the encoder outside of its layers, such as the first convolutions, that of a
    layer before the first. Frozen weights are left out.

    Args:
        module: a :class:`~transducer_toolkit.training.lightning_module.TransducerModule`.
        lr: learning rate outside of the encoder.
        decay: factor from a layer to the one before it, in (0, 1].
        options: of ``torch.optim.AdamW``.

    Raises:
        TypeError: ``decay`` is no number.
        ValueError: ``decay`` is out of range, or the encoder has no layers.
    """
    check_number(decay, "decay")
    if not 0 < decay <= 1:
        raise ValueError(f"decay: expected a number in (0, 1], got {decay}")
    depths = layer_depths(name for name, _ in module.named_parameters())
    deepest = max(depths.values())
    groups: dict[int, list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(deepest - depths[name], []).append(parameter)
    return torch.optim.AdamW(
        [{"params": params, "lr": lr * decay**k} for k, params in sorted(groups.items())],
        lr=lr,
        **options,
    )


# configure_optimizers passes the module, and not its parameters, whose names are needed here.
layer_decay_adamw.takes_module = True  # type: ignore[attr-defined]


def layer_depths(names: Iterable[str]) -> dict[str, int]:
    """Return the depth of each parameter: layer n of the encoder has n + 1.

    Raises:
        ValueError: the encoder has no layers.

    Example:
        >>> layer_depths(["model.encoder.conv.weight", "model.encoder.layers.0.weight", "joiner"])
        {'model.encoder.conv.weight': 0, 'model.encoder.layers.0.weight': 1, 'joiner': 2}
    """
    depths = {}
    for name in names:
        found = _LAYER.search(name) if name.startswith(ENCODER) else None
        depths[name] = 0 if found is None else int(found[1]) + 1
    deepest = max(depths.values(), default=0)
    if deepest == 0:
        raise ValueError(
            "optimizer: layer-wise decay needs an encoder with layers, got one without; set "
            "optimizer=adamw"
        )
    return {
        name: depth if name.startswith(ENCODER) else deepest + 1 for name, depth in depths.items()
    }
