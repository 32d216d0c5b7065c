# SPDX-License-Identifier: Apache-2.0
"""Tensors that say they are on a CUDA device, to see what Python code would make a real one do.

Inside of :func:`pretend_cuda`, :func:`to_cuda` gives tensors whose device is ``cuda:0`` and whose
memory is the CPU's; torch's operators compute with that, the stages are the emulated ones. What
would copy between the host and the device, or wait for the device, is written down, and is an error
while a graph is being captured, as it is on a GPU. Autograd's engine does not know such devices:
:func:`gradients` calls an operator's backward itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from tests.backends import emulated_module
from transducer_toolkit.ops import native
from transducer_toolkit.ops.registration import Operator

CUDA = torch.device("cuda", 0)
BOOL, IS_CUDA = torch.bool, Tensor.is_cuda.__get__  # type: ignore[attr-defined]
aten = torch.ops.aten
# Their result, or its size, is a matter of values: a device must have finished before.
WAITING = {"item", "tolist", "__int__", "__float__", "__bool__", "__index__", "equal", "nonzero"}
WAITING |= {"masked_select", "argwhere", "unique", "is_nonzero"}
ALLOCATIONS = ("aten::empty", "aten::new_empty")
SIZED_BY_VALUES = {aten._local_scalar_dense, aten.repeat_interleave, aten.nonzero}


@dataclass
class Traffic:
    """What passed between host and device."""

    events: list[str] = field(default_factory=list)
    is_capturing: bool = False
    calls: dict[str, tuple[Any, ...]] = field(default_factory=dict)  # of our operators, by name
    operators: list[str] = field(default_factory=list)  # of torch that launch a kernel or a copy
    first_grid: int = 0

    @property
    def num_launches(self) -> int:
        """One for each of these operators, and the kernels of the stages; since the start."""
        return len(self.operators) + emulated_module().num_grids() - self.first_grid

    def add(self, event: str) -> None:
        if self.is_capturing:
            raise RuntimeError(f"operation not permitted when stream is capturing: {event}")
        self.events.append(event)

    @contextmanager
    def capture(self) -> Iterator[None]:
        self.is_capturing = True
        try:
            yield
        finally:
            self.is_capturing = False


_traffic = Traffic()


class PretendTensor(Tensor):
    """A tensor of the CPU, `host`, that says it is on CUDA."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> PretendTensor:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, host.shape, strides=host.stride(), dtype=host.dtype, device=CUDA
        )
        made.host = host
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        note_traffic(func, args, kwargs)
        if not is_view(func) and not func.name().startswith(ALLOCATIONS):
            _traffic.operators.append(func.name())
        target = kwargs.get("device")
        inner = {name: value for name, value in kwargs.items() if name != "device"}
        args, inner = tree_map(unwrap, (args, inner))
        if target is not None and func.overloadpacket is not aten._to_copy:
            inner["device"] = "cpu"  # a new tensor
        if func.name() == "aten::mm.dtype":  # the CPU has no such product
            return PretendTensor(torch.mm(*(factor.to(args[2]) for factor in args[:2])))
        out = func(*args, **inner)
        if target is not None and torch.device(target).type == "cpu":
            return out
        return tree_map(lambda x: PretendTensor(x) if isinstance(x, Tensor) else x, out)


def is_view(func: Any) -> bool:
    """Whether the result of an operator is memory of its arguments, and nothing is written."""
    aliases = [value.alias_info for value in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def unwrap(value: Any) -> Any:
    return value.host if isinstance(value, PretendTensor) else value


def note_traffic(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Adds what this operator would make a device do."""
    packet, name = func.overloadpacket, func.name()
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    of_host = [leaf for leaf in leaves if not isinstance(leaf, PretendTensor)]
    target = kwargs.get("device")
    if packet is aten._to_copy and target is not None and torch.device(target).type == "cpu":
        _traffic.add(f"device to host: {name}")
    elif packet is aten.copy_ and of_host:
        _traffic.add(f"copy between host and device: {name}")
    elif packet in SIZED_BY_VALUES and kwargs.get("output_size") is None:
        _traffic.add(f"waits: {name}")
    elif packet in (aten.index, aten.index_put, aten.index_put_) and any(
        leaf.dtype == torch.bool for leaf in tree_leaves(args[1]) if isinstance(leaf, Tensor)
    ):
        _traffic.add(f"waits: {name} with a mask")
    elif any(leaf.dim() > 0 for leaf in of_host):
        raise RuntimeError(f"expected all tensors to be on the same device: {name}")
    elif of_host and packet is aten.where:  # other operators take a number of the CPU along
        _traffic.add(f"host to device: {name}")


class _OnCuda(TorchFunctionMode):
    """New tensors on CUDA, and addresses."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        ours = OPDEFS.get(getattr(func, "_qualified_op_name", ""))
        if ours is not None and any(isinstance(leaf, PretendTensor) for leaf in args):
            _traffic.calls[name] = args
            with self:  # its Python is what we want to see
                return ours._init_fn(*args)
        if name == "data_ptr" and isinstance(args[0], PretendTensor):
            return args[0].host.data_ptr()
        if name == "pin_memory":
            return args[0]
        if name == "__get__" and isinstance(args[0], PretendTensor) and func == IS_CUDA:
            return True
        if isinstance(args[0] if args else None, PretendTensor):
            host = args[0].host
            if name in WAITING:
                _traffic.add(f"waits: {name}")
                found = func(*tree_map(unwrap, args), **kwargs)
                return PretendTensor(found) if isinstance(found, Tensor) else found
            if name in ("contiguous", "__invert__"):  # would ask for a device before dispatch
                if name != "contiguous" or not host.is_contiguous():
                    _traffic.operators.append(name)
                return PretendTensor(getattr(host, name)())
            if name == "copy_" and isinstance(args[1], PretendTensor):
                host.copy_(args[1].host)
                _traffic.operators.append(name)
                return args[0]
            if name == "__getitem__":
                index = tree_map(unwrap, args[1])
                masks = [x for x in tree_leaves(index) if isinstance(x, Tensor) and x.dtype == BOOL]
                if masks:
                    _traffic.add("waits: a mask")
                if any(isinstance(x, Tensor) for x in tree_leaves(index)):
                    _traffic.operators.append("index")
                return PretendTensor(host[index])
            if name == "__setitem__" and isinstance(args[1], (slice, tuple)):  # as above
                host[args[1]] = unwrap(args[2])
                _traffic.operators.append(name)
                return None
        if name == "to":
            target = kwargs.get("device", args[1] if len(args) > 1 else None)
            if isinstance(target, (str, torch.device)) and torch.device(target).type == "cuda":
                rest = args[1:] if "device" in kwargs else args[2:]
                kwargs.pop("device", None)
                if isinstance(args[0], PretendTensor):
                    return args[0].to(*rest, **kwargs) if rest or kwargs else args[0]
                kwargs.pop("non_blocking", None)
                _traffic.add("host to device")
                _traffic.operators.append("copy to the device")
                return PretendTensor(args[0].to(*rest, **kwargs).clone())
        made_on = kwargs.get("device")
        is_new = not any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs)))
        if is_new and made_on is not None and torch.device(made_on).type == "cuda":
            if name == "tensor":
                _traffic.add("host to device: torch.tensor")
            if not name.startswith("empty"):
                _traffic.operators.append(name)
            return PretendTensor(func(*args, **{**kwargs, "device": "cpu"}))
        return func(*args, **kwargs)


@contextmanager
def pretend_cuda() -> Iterator[Traffic]:
    """Inside, there is a CUDA device; what reaches it is written down."""
    _traffic.events.clear()
    _traffic.calls.clear()
    _traffic.operators.clear()
    module = emulated_module()
    _traffic.first_grid = module.num_grids()
    module.set_order(module.Order.forward, 0)
    names = {
        name: getattr(native.extension, name) for name in dir(native.extension) if name[:2] != "__"
    }
    torch_cuda = {
        "device": lambda device: nullcontext(),
        "current_stream": lambda device=None: SimpleNamespace(cuda_stream=0),
        "is_current_stream_capturing": lambda: _traffic.is_capturing,
        "get_device_properties": lambda device=None: SimpleNamespace(
            total_memory=80 * 2**30, major=9
        ),
    }
    with (
        mock.patch.object(native, "extension", SimpleNamespace(**{**names, "cuda": module.cuda})),
        mock.patch.multiple(torch.cuda, **torch_cuda),
        _OnCuda(),
    ):
        yield _traffic


def to_cuda(tensor: Tensor) -> PretendTensor:
    """The tensor on the device; not counted."""
    return PretendTensor(tensor.detach().clone())


def to_host(tensor: Tensor) -> Tensor:
    """Back again; not counted."""
    assert isinstance(tensor, PretendTensor)
    return tensor.host


def gradients(
    operator: Operator[Any, Any, Any, Any], traffic: Traffic, **plan: Any
) -> Callable[..., tuple[Tensor, tuple[Any, ...]]]:
    """run(grad, number) -> outputs and gradients of the operator, with the arguments it had last.

    `plan` replaces parts of the operator's plan.
    """

    def run(loss_grad: Tensor, num_wanted: int) -> tuple[Tensor, tuple[Any, ...]]:
        inputs, options, last_plan, _ = operator.split(traffic.calls[operator.name])
        new_plan = last_plan._replace(**plan)
        arguments = operator.flat(inputs, options, new_plan)
        outputs = operator.run(*arguments)
        context = SimpleNamespace(
            needs_input_grad=(True,) * num_wanted + (False,) * (len(arguments) - num_wanted),
            set_materialize_grads=lambda value: None,
        )
        context.save_for_backward = lambda *tensors: setattr(context, "saved_tensors", tensors)
        operator.setup_context(context, arguments, outputs)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        others = [None] * (len(outputs) - 1)
        return outputs[0], operator.differentiate(context, loss_grad, *others)

    return run
