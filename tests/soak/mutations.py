# SPDX-License-Identifier: Apache-2.0
"""Ways to spoil one argument of a call: its type, dtype, rank, size, strides, device or values."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
)
FLOAT_VALUES = (float("nan"), float("inf"), float("-inf"), 1e30, -1e30, 1e-40, 0.0, 60.0)
INDEX_VALUES = (-(2**63), -(2**31), -2, -1, 0, 1, 2, 5, 10**8, 2**31, 2**62, 2**63 - 1)
SCALARS: dict[str, tuple[Any, ...]] = {
    "int": (-1, 0, 1, 2, 10**9, 2**63, 2**70, 0.5, "0", None, True, float("nan"), np.int64(1)),
    "float": (-1.0, 0.0, 0.5, 3, 1e-30, 1e30, float("nan"), float("inf"), "0.1", None, True, 1j),
    "str": ("", "none", "sum", "modified", "constrained", "relu", "SUM", None, 3, b"sum", ["sum"]),
    "bool": (True, False, None, 0, 1, "yes", 2.5),
    "NoneType": (0, "None", True, 1.5),
}


class Subclass(Tensor):
    """A tensor of a type that torch does not know."""


def _number(random_: random.Random, values: tuple[Any, ...], dtype: torch.dtype) -> Any:
    value = random_.choice(values)
    if dtype.is_floating_point or dtype == torch.bool:
        return value
    limits = torch.iinfo(dtype)
    return min(max(value, limits.min), limits.max)


def _one_value(x: Tensor, random_: random.Random) -> Tensor:
    """One element is another number."""
    x = x.clone()
    values = FLOAT_VALUES if x.is_floating_point() else INDEX_VALUES
    if x.numel():
        x.view(-1)[random_.randrange(x.numel())] = _number(random_, values, x.dtype)
    return x


def _some_values(x: Tensor, random_: random.Random) -> Tensor:
    """About a third of the elements are another number, the same."""
    values = FLOAT_VALUES if x.is_floating_point() else INDEX_VALUES
    mask = torch.rand(x.shape) < 0.3
    return x.masked_fill(mask, _number(random_, values, x.dtype))


def _all_values(x: Tensor, random_: random.Random) -> Tensor:
    values = FLOAT_VALUES if x.is_floating_point() else INDEX_VALUES
    return torch.full_like(x, _number(random_, values, x.dtype))


def _a_bit_more(x: Tensor, random_: random.Random) -> Tensor:
    return x + random_.choice([-1, 1])


def _shuffled(x: Tensor, random_: random.Random) -> Tensor:
    flat = x.flatten()
    return flat[torch.randperm(flat.numel())].view(x.shape)


def _dimension(x: Tensor, random_: random.Random) -> int:
    return random_.randrange(x.dim())


def _shorter(x: Tensor, random_: random.Random) -> Tensor:
    dim = _dimension(x, random_)
    return x.narrow(dim, 0, max(0, x.size(dim) - 1))


def _longer(x: Tensor, random_: random.Random) -> Tensor:
    dim = _dimension(x, random_)
    return torch.cat([x, x.narrow(dim, 0, min(1, x.size(dim)))], dim)


def _empty(x: Tensor, random_: random.Random) -> Tensor:
    return x.narrow(_dimension(x, random_), 0, 0)


def _transposed_storage(x: Tensor, random_: random.Random) -> Tensor:
    order = list(range(x.dim()))
    random_.shuffle(order)
    inverse = [order.index(dim) for dim in range(x.dim())]
    return x.permute(order).contiguous().permute(inverse)


def _every_second(x: Tensor, random_: random.Random) -> Tensor:
    storage = x.new_zeros(2 * x.numel() + 1)
    spread = storage[1:].view(-1, 2)[:, 0] if x.numel() else storage[:0]
    spread.copy_(x.flatten())
    return spread.view(x.shape) if x.numel() else x


def _offset(x: Tensor, random_: random.Random) -> Tensor:
    """Contiguous, but not aligned to anything."""
    storage = x.new_zeros(x.numel() + 1)
    storage[1:] = x.flatten()
    return storage[1:].view(x.shape)


def _expanded(x: Tensor, random_: random.Random) -> Tensor:
    dim = _dimension(x, random_)
    return x.narrow(dim, 0, 1).expand(x.shape) if x.size(dim) else x


TENSOR_MUTATIONS: dict[str, Callable[[Tensor, random.Random], Any]] = {
    "None": lambda x, r: None,
    "a list": lambda x, r: x.tolist(),
    "an array": lambda x, r: x.float().numpy(),
    "a string": lambda x, r: "tensor",
    "an int": lambda x, r: 3,
    "dtype": lambda x, r: x.to(r.choice(DTYPES)),
    "index dtype": lambda x, r: x.to(r.choice([torch.int32, torch.int64])),
    "rank + 1 in front": lambda x, r: x.unsqueeze(0),
    "rank + 1 behind": lambda x, r: x.unsqueeze(-1),
    "rank - 1": lambda x, r: x[0] if x.size(0) else x.flatten(),
    "flat": lambda x, r: x.flatten(),
    "rank 0": lambda x, r: x.new_zeros(()),
    "shorter": _shorter,
    "longer": _longer,
    "empty": _empty,
    "transposed storage": _transposed_storage,
    "every second element": _every_second,
    "storage offset": _offset,
    "expanded": _expanded,
    "negative bit": lambda x, r: torch.complex(x, -x).conj().imag,
    "sparse": lambda x, r: x.to_sparse(),
    "sparse rows": lambda x, r: x.to_sparse_csr() if x.dim() == 2 else x.to_sparse(),
    "nested": lambda x, r: torch.nested.nested_tensor(list(x.unbind(0)) or [x.flatten()]),
    "on no device": lambda x, r: x.to("meta"),
    "a parameter": lambda x, r: nn.Parameter(x, requires_grad=x.is_floating_point()),
    "a subclass": lambda x, r: x.as_subclass(Subclass),
    "not a leaf": lambda x, r: x.clone().requires_grad_(x.is_floating_point()) * 1,
    "one value": _one_value,
    "one value again": _one_value,
    "some values": _some_values,
    "all values": _all_values,
    "plus or minus 1": _a_bit_more,
    "shuffled": _shuffled,
}


HARMLESS = (
    "transposed storage",
    "every second element",
    "storage offset",
    "negative bit",
    "a parameter",
    "a subclass",
    "not a leaf",
)


def is_harmless(how: str) -> bool:
    """Whether a mutation, as :func:`mutate` names it, leaves values and dtype as they were."""
    return how.endswith(HARMLESS)


def mutate(value: Any, random_: random.Random) -> tuple[str, Any]:
    """Spoils a value; says how, and returns what it has become.

    Args:
        value: tensor, list of tensors, number, string, bool or None.
        random_: the same state gives the same result; torch's generator must be seeded too.
    """
    if isinstance(value, Tensor):
        name = random_.choice(list(TENSOR_MUTATIONS))
        try:
            return name, TENSOR_MUTATIONS[name](value, random_)
        except (RuntimeError, IndexError, TypeError, ValueError, OverflowError):
            return "None", None  # cannot be done to this tensor
    if isinstance(value, list) and value and isinstance(value[0], Tensor):
        place = random_.randrange(len(value))
        name, spoilt = mutate(value[place], random_)
        choices = {
            f"[{place}] {name}": [*value[:place], spoilt, *value[place + 1 :]],
            "one less": value[:-1],
            "stacked": torch.stack(value),
        }
        name = random_.choice([*choices, next(iter(choices))])
        return name, choices[name]
    replacement = random_.choice(SCALARS.get(type(value).__name__, SCALARS["NoneType"]))
    return repr(replacement), replacement
