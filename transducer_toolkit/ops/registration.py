# SPDX-License-Identifier: Apache-2.0
"""Registers an operator and its derivative with torch.library.

A torch.library operator takes tensors and plain values, each by position. Here an operator is
described by three classes whose fields are those arguments, in their order:

    Inputs   a NamedTuple of Tensor and Tensor | None
    Options  a frozen dataclass of int, float, bool, str and bool | None
    Plan     a NamedTuple of int and bool: sizes, and which outputs are wanted

and by one that names the outputs, a NamedTuple of Tensor. The schema is generated from the fields.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import typing
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

_LIBRARY = "transducer_toolkit"
_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "int",
    float: "float",
    int | None: "int?",
    bool: "bool",
    bool | None: "bool?",
    str: "str",
}
InputsT = TypeVar("InputsT", bound=tuple[Any, ...])
OptionsT = TypeVar("OptionsT")
PlanT = TypeVar("PlanT", bound=tuple[Any, ...])
OutputsT = TypeVar("OutputsT", bound=tuple[Any, ...])


class NoPlan(NamedTuple):
    """The plan of an operator that needs none."""


class Backward(NamedTuple):
    """The arguments of an operator's backward.

    Attributes:
        inputs: the Inputs. Tensors that are not saved have no elements.
        outputs: the Outputs. Tensors that are not saved have no elements.
        grads: gradients of the differentiated outputs, by name; no elements where an output was
            not used.
        options: the Options.
        plan: the Plan.
        wanted: names of the inputs whose gradient is wanted.
    """

    inputs: Any
    outputs: Any
    grads: dict[str, Tensor]
    options: Any
    plan: Any
    wanted: frozenset[str]


class Derivative(NamedTuple):
    """How the gradients of an operator are computed.

    Attributes:
        backward: returns the gradients of the wanted inputs, by name. Each has the shape and dtype
            of its input.
        of: names of the inputs that may have a gradient.
        through: names of the outputs that a gradient comes from; the others are constants.
        unsaved: names of inputs and outputs that backward does not need.
        shapes: for an input that is not saved, the output that has its shape.
    """

    backward: Callable[[Backward], dict[str, Tensor]]
    of: tuple[str, ...]
    through: tuple[str, ...]
    unsaved: tuple[str, ...] = ()
    shapes: Mapping[str, str] = MappingProxyType({})


class Operator(Generic[InputsT, OptionsT, PlanT, OutputsT]):
    """An operator ``torch.ops.transducer_toolkit.NAME`` with a first derivative.

    Calling it runs ``forward(inputs, options, plan)`` under autograd, torch.compile and graph
    capture. ``NAME_backward`` is the operator that computes the gradients.

    Args:
        name: of the operator.
        types: Inputs, Options, Plan and Outputs.
        forward: computes the outputs.
        fake: returns empty outputs of the right shape and dtype, without reading values.
        derivative: how gradients are computed.
        functions: the public functions that use it, for the error about second derivatives.
    """

    def __init__(
        self,
        name: str,
        types: tuple[type[InputsT], type[OptionsT], type[PlanT], type[OutputsT]],
        *,
        forward: Callable[[InputsT, OptionsT, PlanT], OutputsT],
        fake: Callable[[InputsT, OptionsT, PlanT], OutputsT],
        derivative: Derivative,
        functions: str,
    ) -> None:
        self.inputs_type, self.options_type, self.plan_type, self.outputs_type = types
        self.forward, self.fake, self.backward = forward, fake, derivative.backward
        self._fields = [_fields(type_) for type_ in types]
        self._option_names = tuple(self._fields[1])
        # Options check their values, each time that they are made; typed, because 1 == True.
        self._make_options = functools.lru_cache(maxsize=64, typed=True)(self.options_type)
        # Where the arguments of the operator that are inputs, options and plan end.
        self._ends = tuple(itertools.accumulate(len(fields) for fields in self._fields[:3]))
        inputs, _, _, outputs = (tuple(fields) for fields in self._fields)
        self._differentiable, self._differentiated = derivative.of, derivative.through
        self._unsaved, self._gradient_shapes = frozenset(derivative.unsaved), derivative.shapes
        self._functions = functions
        assert set(derivative.of) <= set(inputs) and set(derivative.through) <= set(outputs)
        assert self._unsaved <= {*inputs, *outputs}
        assert set(derivative.of) & self._unsaved == set(self._gradient_shapes)
        self._wanted_places = tuple(inputs.index(name) for name in derivative.of)
        self._register(f"{_LIBRARY}::{name}")
        self.name, self.run = name, getattr(torch.ops.transducer_toolkit, name)
        self._run_backward = getattr(torch.ops.transducer_toolkit, f"{name}_backward")

    def __call__(self, inputs: InputsT, options: OptionsT, plan: PlanT) -> OutputsT:
        return self._outputs(self.run(*self.flat(inputs, options, plan)))

    def flat(self, inputs: InputsT, options: OptionsT, plan: PlanT) -> list[Any]:
        """Returns the arguments of the operator, in its order."""
        return [*inputs, *(getattr(options, name) for name in self._option_names), *plan]

    def split(self, values: Sequence[Any]) -> tuple[InputsT, OptionsT, PlanT, Sequence[Any]]:
        """Returns inputs, options and plan from the arguments of an operator, and the rest."""
        end_inputs, end_options, end_plan = self._ends
        return (
            self.inputs_type(*values[:end_inputs]),
            self._make_options(*values[end_inputs:end_options]),
            self.plan_type(*values[end_options:end_plan]),
            values[end_plan:],
        )

    # --- the two operators ------------------------------------------------------------------------

    def _register(self, name: str) -> None:
        inputs, options, plan, outputs = self._fields
        arguments = [_arguments(inputs), _arguments(options), _sizes(plan)]
        saved = {f"saved_{output}": type_ for output, type_ in outputs.items()}
        grads = {f"grad_{output}": Tensor for output in self._differentiated}
        gradients = _results(len(self._differentiable))
        for_backward = [*arguments, _arguments(saved), _arguments(grads), "bool[] wanted"]
        for operator, schema, run, fake, differentiate, setup_context in (
            (
                name,
                f"({', '.join(filter(None, arguments))}) -> {_results(len(outputs))}",
                self._forward_of_values,
                self._fake_of_values,
                self.differentiate,
                self.setup_context,
            ),
            (
                f"{name}_backward",
                f"({', '.join(filter(None, for_backward))}) -> {gradients}",
                self._backward_of_values,
                self._fake_backward_of_values,
                self._refuse_second_derivative,
                None,
            ),
        ):
            torch.library.custom_op(operator, run, mutates_args=(), schema=schema)
            torch.library.register_fake(operator, fake)
            torch.library.register_autograd(operator, differentiate, setup_context=setup_context)

    def _outputs(self, result: Any) -> OutputsT:
        parts = (result,) if isinstance(result, Tensor) else result
        return self.outputs_type(*parts)

    def _forward_of_values(self, *values: Any) -> Any:
        return _unpacked(self.forward(*self.split(values)[:3]))

    def _fake_of_values(self, *values: Any) -> Any:
        return _unpacked(self.fake(*self.split(values)[:3]))

    def _backward_of_values(self, *values: Any) -> Any:
        inputs, options, plan, rest = self.split(values)
        num_outputs = len(self._fields[3])
        *grads, wanted = rest[num_outputs:]
        names = frozenset(
            name for name, is_wanted in zip(self._differentiable, wanted, strict=True) if is_wanted
        )
        found = self.backward(
            Backward(
                inputs,
                self.outputs_type(*rest[:num_outputs]),
                dict(zip(self._differentiated, grads, strict=True)),
                options,
                plan,
                names,
            )
        )
        return _unpacked(
            [
                found[name] if name in names else rest[0].new_empty(0)
                for name in self._differentiable
            ]
        )

    def _fake_backward_of_values(self, *values: Any) -> Any:
        inputs, _, _, rest = self.split(values)
        outputs = self.outputs_type(*rest[: len(self._fields[3])])
        grads = []
        for name, is_wanted in zip(self._differentiable, rest[-1], strict=True):
            of = getattr(inputs, name)
            if not is_wanted:
                grads.append(rest[0].new_empty(0))
            elif name in self._gradient_shapes:
                like = getattr(outputs, self._gradient_shapes[name])
                grads.append(torch.empty_like(like, dtype=of.dtype))
            else:
                grads.append(torch.empty_like(of))
        return _unpacked(grads)

    # --- autograd ---------------------------------------------------------------------------------

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Saves what backward needs."""
        tensors, options, plan, _ = self.split(inputs)
        outputs = self._outputs(output)
        saved = []
        for fields, part in ((self._fields[0], tensors), (self._fields[3], outputs)):
            for name, tensor in zip(fields, part, strict=True):
                drops = tensor is not None and name in self._unsaved
                saved.append(tensor.new_empty(0) if drops else tensor)
        ctx.save_for_backward(*saved)
        ctx.options, ctx.plan = options, plan
        ctx.set_materialize_grads(False)

    def differentiate(self, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of all arguments of the operator, None where there is none."""
        num_inputs, num_outputs = len(self._fields[0]), len(self._fields[3])
        result: list[Tensor | None] = [None] * sum(len(fields) for fields in self._fields[:3])
        outputs = tuple(self._fields[3])
        given = [grads[outputs.index(name)] for name in self._differentiated]
        if all(grad is None for grad in given):
            return tuple(result)
        saved = ctx.saved_tensors  # once: checkpointing unpacks at every look
        inputs, kept = saved[:num_inputs], saved[num_inputs : num_inputs + num_outputs]
        wanted = [bool(ctx.needs_input_grad[place]) for place in self._wanted_places]
        grads_or_empty = (kept[0].new_empty(0) if grad is None else grad for grad in given)
        found = self._run_backward(
            *self.flat(inputs, ctx.options, ctx.plan), *kept, *grads_or_empty, wanted
        )
        found = (found,) if isinstance(found, Tensor) else found
        for place, grad, is_wanted in zip(self._wanted_places, found, wanted, strict=True):
            result[place] = grad if is_wanted else None
        return tuple(result)

    def _refuse_second_derivative(self, ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            f"{self._functions}: the gradient of the gradient (create_graph=True) is not "
            "implemented"
        )


def _fields(type_: type) -> dict[str, Any]:
    hints = typing.get_type_hints(type_)
    if dataclasses.is_dataclass(type_):
        return {field.name: hints[field.name] for field in dataclasses.fields(type_)}
    return {name: hints[name] for name in type_._fields}  # type: ignore[attr-defined]


def _arguments(fields: dict[str, Any]) -> str:
    return ", ".join(f"{_SCHEMA_TYPES[type_]} {name}" for name, type_ in fields.items())


def _sizes(fields: dict[str, Any]) -> str:
    """Arguments whose integers may be symbolic when torch.compile traces dynamic shapes."""
    return _arguments(fields).replace("int ", "SymInt ")


def _results(count: int) -> str:
    return "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"


def _unpacked(tensors: Sequence[Tensor]) -> Any:
    """A single tensor by itself: an operator of one result does not return a tuple."""
    tensors = tuple(tensors)
    return tensors[0] if len(tensors) == 1 else tensors
