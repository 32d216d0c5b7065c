# SPDX-License-Identifier: Apache-2.0
"""Checks of weights that come from a file, before a model takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from transducer_toolkit.ops.native import SUPPORTED_DTYPES


class _WithoutInitialization(TorchFunctionMode):
    """Skips random initialization: on the meta device it imports torch's compiler, for a second."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        is_random = getattr(function, "__name__", "") in ("normal_", "uniform_")
        if is_random or getattr(function, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


@contextmanager
def shapes_only() -> Iterator[None]:
    """Makes the modules of a block without memory for their weights (on torch's meta device)."""
    with torch.device("meta"), _WithoutInitialization():
        yield


def check_weight(value: Tensor, what: str) -> None:
    """Raise a ValueError for a weight that a model could not take without loss, and for NaN.

    Args:
        value: the weight.
        what: its name and file, for the message.
    """
    is_dense = value.layout == torch.strided and not (value.is_nested or value.is_quantized)
    if not is_dense or value.is_complex() or value.device.type != "cpu":
        raise ValueError(
            f"{what} must be a dense tensor of real numbers, got {value.dtype}, {value.layout}, on "
            f"device {value.device.type}"
        )
    if value.is_floating_point() and value.dtype not in SUPPORTED_DTYPES:
        raise ValueError(f"{what} must be of one of {SUPPORTED_DTYPES}, got {value.dtype}")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise ValueError(f"{what} has {value.numel()} numbers, and its file holds fewer")
    # An infinite weight may be intended: a bias of -inf masks a symbol.
    if value.is_floating_point() and bool(value.isnan().any()):
        raise ValueError(f"{what} holds NaN")


def check_kind(value: Tensor, expected: Tensor, what: str) -> None:
    """Raise a ValueError for integers in the place of real numbers, which torch would convert.

    Args:
        value: weight of a file.
        expected: the same weight of the model.
        what: its name and file, for the message.
    """
    if value.is_floating_point() != expected.is_floating_point():
        raise ValueError(f"{what} is of {value.dtype}, and the model asks for {expected.dtype}")


def check_sizes(config: Any, weights: Mapping[str, Tensor]) -> None:
    """Raise a ValueError for sizes in a config that its weights cannot have.

    Making a million layers, or one of a billion outputs, would take hours and all memory before the
    weights turn out not to fit.

    Args:
        config: config of a model in plain values. Names of numbers of layers contain "layers",
            those of widths "size" or "dim".
        weights: the weights of the file.
    """
    _check_sizes("", config, len(weights), sum(value.numel() for value in weights.values()))


def _check_sizes(name: str, value: Any, num_weights: int, num_numbers: int) -> None:
    if isinstance(value, Mapping):
        for key, part in value.items():
            _check_sizes(str(key), part, num_weights, num_numbers)
    elif isinstance(value, list | tuple):
        for part in value:
            _check_sizes(name, part, num_weights, num_numbers)
    elif isinstance(value, int):
        if "layers" in name and value > num_weights:
            raise ValueError(f"{name}={value}, and {num_weights} weights")
        if ("size" in name or "dim" in name) and value > num_numbers:
            raise ValueError(f"{name}={value}, and weights of {num_numbers} numbers")
