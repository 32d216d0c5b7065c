# SPDX-License-Identifier: Apache-2.0
"""The functions of ``tf_fast_rnnt`` for TensorFlow 2, with its names and arguments.

Replace ``import tf_fast_rnnt`` by ``from transducer_toolkit.compat import tensorflow as
tf_fast_rnnt``. The functions run on the CPU, too, and the boundary is optional.

They take TensorFlow tensors, variables and NumPy arrays, and return TensorFlow tensors. The losses
of this package compute values and gradients. PyTorch and TensorFlow share the memory of the tensors
by DLPack. Numbers such as ``termination_symbol``, ``s_range`` and ``delay_penalty`` may be scalar
tensors.

In a ``tf.function``, the functions run as ``tf.py_function``, which has two consequences: XLA
cannot compile them (``jit_compile=False``), and an error is a ``tf.errors.InvalidArgumentError``
with the message of the ``ValueError`` or ``TypeError`` in it. Backward computes the loss again, so
that nothing of PyTorch has to be kept between forward and backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import dlpack

from transducer_toolkit import losses
from transducer_toolkit.ops.checks import check_flag, check_reduction
from transducer_toolkit.ops.topology import get_topology
from transducer_toolkit.optional import import_tensorflow

if TYPE_CHECKING:
    import tensorflow as tf

    LossAndGrads = tuple[tf.Tensor, tuple[tf.Tensor, tf.Tensor]]

_DTYPES = ("float16", "bfloat16", "float32", "float64", "int32", "int64")
_DIFFERENTIABLE = ("lm", "am", "logits", "px", "py")
_TENSORS = (*_DIFFERENTIABLE, "symbols", "ranges", "boundary", "px_grad", "py_grad")
_NUMBERS = ("termination_symbol", "s_range", "lm_only_scale", "am_only_scale", "delay_penalty")
_ALIGNMENT_BYTES = 64  # TensorFlow aborts the process on tensors that are aligned to less


def rnnt_loss_simple(
    lm: tf.Tensor,
    am: tf.Tensor,
    symbols: tf.Tensor,
    termination_symbol: int,
    boundary: tf.Tensor | None = None,
    rnnt_type: str = "regular",
    delay_penalty: float = 0.0,
    reduction: str = "mean",
    return_grad: bool = False,
) -> tf.Tensor | LossAndGrads:
    """Computes :func:`transducer_toolkit.rnnt_loss_simple`, which describes the arguments."""
    return _loss(
        losses.rnnt_loss_simple,
        lm=lm,
        am=am,
        symbols=symbols,
        termination_symbol=termination_symbol,
        boundary=boundary,
        rnnt_type=rnnt_type,
        delay_penalty=delay_penalty,
        reduction=reduction,
        return_grad=return_grad,
    )


def rnnt_loss_smoothed(
    lm: tf.Tensor,
    am: tf.Tensor,
    symbols: tf.Tensor,
    termination_symbol: int,
    lm_only_scale: float = 0.1,
    am_only_scale: float = 0.1,
    boundary: tf.Tensor | None = None,
    rnnt_type: str = "regular",
    delay_penalty: float = 0.0,
    reduction: str = "mean",
    return_grad: bool = False,
) -> tf.Tensor | LossAndGrads:
    """Computes :func:`transducer_toolkit.rnnt_loss_smoothed`, which describes the arguments."""
    return _loss(
        losses.rnnt_loss_smoothed,
        lm=lm,
        am=am,
        symbols=symbols,
        termination_symbol=termination_symbol,
        lm_only_scale=lm_only_scale,
        am_only_scale=am_only_scale,
        boundary=boundary,
        rnnt_type=rnnt_type,
        delay_penalty=delay_penalty,
        reduction=reduction,
        return_grad=return_grad,
    )


def rnnt_loss(
    logits: tf.Tensor,
    symbols: tf.Tensor,
    termination_symbol: int,
    boundary: tf.Tensor | None = None,
    rnnt_type: str = "regular",
    delay_penalty: float = 0.0,
    reduction: str = "mean",
    return_grad: bool = False,
) -> tf.Tensor | LossAndGrads:
    """Computes :func:`transducer_toolkit.rnnt_loss`, which describes the arguments."""
    return _loss(
        losses.rnnt_loss,
        logits=logits,
        symbols=symbols,
        termination_symbol=termination_symbol,
        boundary=boundary,
        rnnt_type=rnnt_type,
        delay_penalty=delay_penalty,
        reduction=reduction,
        return_grad=return_grad,
    )


def rnnt_loss_pruned(
    logits: tf.Tensor,
    symbols: tf.Tensor,
    ranges: tf.Tensor,
    termination_symbol: int,
    boundary: tf.Tensor | None = None,
    rnnt_type: str = "regular",
    delay_penalty: float = 0.0,
    reduction: str = "mean",
    training: bool = False,
) -> tf.Tensor:
    """Computes :func:`transducer_toolkit.rnnt_loss_pruned`, which describes the arguments.

    ``training`` has no effect: tf_fast_rnnt has gradients with ``training=True`` only, and here
    there always are gradients.
    """
    check_flag(training, "training")
    return _loss(
        losses.rnnt_loss_pruned,
        logits=logits,
        symbols=symbols,
        ranges=ranges,
        termination_symbol=termination_symbol,
        boundary=boundary,
        rnnt_type=rnnt_type,
        delay_penalty=delay_penalty,
        reduction=reduction,
        return_grad=False,
    )


def get_rnnt_prune_ranges(
    px_grad: tf.Tensor, py_grad: tf.Tensor, boundary: tf.Tensor | None, s_range: int
) -> tf.Tensor:
    """Computes :func:`transducer_toolkit.get_rnnt_prune_ranges`, which describes the arguments.

    The ranges are int32, as in tf_fast_rnnt.
    """
    (ranges,) = _run(
        _int32_ranges,
        _range_outputs,
        px_grad=px_grad,
        py_grad=py_grad,
        boundary=boundary,
        s_range=s_range,
    )
    return ranges


def do_rnnt_pruning(am: tf.Tensor, lm: tf.Tensor, ranges: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Computes :func:`transducer_toolkit.do_rnnt_pruning`, which describes the arguments."""
    am_pruned, lm_pruned = _run(
        losses.do_rnnt_pruning, _pruning_outputs, am=am, lm=lm, ranges=ranges
    )
    return am_pruned, lm_pruned


def get_rnnt_logprobs(
    lm: tf.Tensor,
    am: tf.Tensor,
    symbols: tf.Tensor,
    termination_symbol: int,
    rnnt_type: str = "regular",
    boundary: tf.Tensor | None = None,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Computes :func:`transducer_toolkit.get_rnnt_logprobs`, which describes the arguments."""
    px, py = _run(
        losses.get_rnnt_logprobs,
        _score_outputs,
        lm=lm,
        am=am,
        symbols=symbols,
        termination_symbol=termination_symbol,
        rnnt_type=rnnt_type,
        boundary=boundary,
    )
    return px, py


def get_rnnt_logprobs_smoothed(
    lm: tf.Tensor,
    am: tf.Tensor,
    symbols: tf.Tensor,
    termination_symbol: int,
    lm_only_scale: float = 0.1,
    am_only_scale: float = 0.1,
    boundary: tf.Tensor | None = None,
    rnnt_type: str = "regular",
) -> tuple[tf.Tensor, tf.Tensor]:
    """Computes :func:`transducer_toolkit.get_rnnt_logprobs_smoothed`; see there."""
    px, py = _run(
        losses.get_rnnt_logprobs_smoothed,
        _score_outputs,
        lm=lm,
        am=am,
        symbols=symbols,
        termination_symbol=termination_symbol,
        lm_only_scale=lm_only_scale,
        am_only_scale=am_only_scale,
        boundary=boundary,
        rnnt_type=rnnt_type,
    )
    return px, py


def get_rnnt_logprobs_joint(
    logits: tf.Tensor,
    symbols: tf.Tensor,
    termination_symbol: int,
    boundary: tf.Tensor | None = None,
    rnnt_type: str = "regular",
) -> tuple[tf.Tensor, tf.Tensor]:
    """Computes :func:`transducer_toolkit.get_rnnt_logprobs_joint`; see there."""
    px, py = _run(
        losses.get_rnnt_logprobs_joint,
        _score_outputs,
        logits=logits,
        symbols=symbols,
        termination_symbol=termination_symbol,
        boundary=boundary,
        rnnt_type=rnnt_type,
    )
    return px, py


def get_rnnt_logprobs_pruned(
    logits: tf.Tensor,
    symbols: tf.Tensor,
    ranges: tf.Tensor,
    termination_symbol: int,
    boundary: tf.Tensor | None = None,
    rnnt_type: str = "regular",
) -> tuple[tf.Tensor, tf.Tensor]:
    """Computes ``get_rnnt_logprobs_pruned`` of ``transducer_toolkit.losses``; see there."""
    px, py = _run(
        losses.get_rnnt_logprobs_pruned,
        _score_outputs,
        logits=logits,
        symbols=symbols,
        ranges=ranges,
        termination_symbol=termination_symbol,
        boundary=boundary,
        rnnt_type=rnnt_type,
    )
    return px, py


def mutual_information_recursion(
    px: tf.Tensor,
    py: tf.Tensor,
    boundary: tf.Tensor | None = None,
    calc_gradients: bool = False,
    *,
    return_grad: bool = False,
) -> tf.Tensor | LossAndGrads:
    """Computes :func:`transducer_toolkit.mutual_information_recursion`; see there.

    ``calc_gradients`` and ``return_grad`` are two names of the same option in tf_fast_rnnt.
    """
    check_flag(calc_gradients, "calc_gradients")
    check_flag(return_grad, "return_grad")
    outputs = _run(
        losses.mutual_information_recursion,
        _recursion_outputs,
        px=px,
        py=py,
        boundary=boundary,
        return_grad=calc_gradients or return_grad,
    )
    return _with_posteriors(outputs)


# --- outputs in a graph ---------------------------------------------------------------------------


class _Output(NamedTuple):
    """The properties of an output that a graph needs before it is computed."""

    dtype: Any
    shape: tuple[int | None, ...]
    has_gradient: bool = True


def _axis(tensor: tf.Tensor, axis: int) -> int | None:
    """Returns the size of an axis, or None if the graph does not know it."""
    shape = tensor.shape
    return shape[axis] if shape.rank is not None and axis < shape.rank else None


def _score_outputs(
    tensors: dict[str, tf.Tensor], options: dict[str, Any], has_gradient: bool = True
) -> list[_Output]:
    """Returns those of px (B, S, T + 1) or (B, S, T) and py (B, S + 1, T)."""
    topology = get_topology(options["rnnt_type"], "rnnt_type", k2=True)
    values = tensors["am"] if "am" in tensors else tensors["logits"]
    dtype = "float64" if values.dtype.name == "float64" else "float32"
    num_utterances, num_symbols = _axis(tensors["symbols"], 0), _axis(tensors["symbols"], 1)
    num_frames = _axis(values, 1)
    num_columns = None if num_symbols is None else num_symbols + 1
    frames_of_px = num_frames
    if num_frames is not None and topology.labels_share_frames:
        frames_of_px = num_frames + 1
    return [
        _Output(dtype, (num_utterances, num_symbols, frames_of_px), has_gradient),
        _Output(dtype, (num_utterances, num_columns, num_frames), has_gradient),
    ]


def _loss_outputs(tensors: dict[str, tf.Tensor], options: dict[str, Any]) -> list[_Output]:
    check_reduction(options["reduction"])
    check_flag(options["return_grad"], "return_grad")
    posteriors = _score_outputs(tensors, options, has_gradient=False)
    shape = posteriors[0].shape[:1] if options["reduction"] == "none" else ()
    loss = _Output(posteriors[0].dtype, shape)
    return [loss, *posteriors] if options["return_grad"] else [loss]


def _recursion_outputs(tensors: dict[str, tf.Tensor], options: dict[str, Any]) -> list[_Output]:
    px, py = tensors["px"], tensors["py"]
    scores = _Output(px.dtype, (_axis(px, 0),))
    posteriors = [
        _Output(px.dtype, tuple(_axis(scores, axis) for axis in range(3)), has_gradient=False)
        for scores in (px, py)
    ]
    return [scores, *posteriors] if options["return_grad"] else [scores]


def _range_outputs(tensors: dict[str, tf.Tensor], options: dict[str, Any]) -> list[_Output]:
    # s_range may be raised or lowered to fit the batch.
    shape = (_axis(tensors["py_grad"], 0), _axis(tensors["py_grad"], 2), None)
    return [_Output("int32", shape, has_gradient=False)]


def _pruning_outputs(tensors: dict[str, tf.Tensor], options: dict[str, Any]) -> list[_Output]:
    band = tuple(_axis(tensors["ranges"], axis) for axis in range(3))
    return [_Output(tensors[name].dtype, (*band, _axis(tensors[name], 2))) for name in ("am", "lm")]


# --- calls ----------------------------------------------------------------------------------------


def _loss(function: Callable[..., Any], **arguments: Any) -> tf.Tensor | LossAndGrads:
    return _with_posteriors(_run(function, _loss_outputs, **arguments))


def _with_posteriors(outputs: list[tf.Tensor]) -> tf.Tensor | LossAndGrads:
    first, *posteriors = outputs
    return (first, tuple(posteriors)) if posteriors else first


def _int32_ranges(**arguments: Any) -> Tensor:
    return losses.get_rnnt_prune_ranges(**arguments).int()


def _run(
    function: Callable[..., Any],
    outputs_of: Callable[[dict[str, tf.Tensor], dict[str, Any]], list[_Output]],
    **arguments: Any,
) -> list[tf.Tensor]:
    """Calls a function of this package on TensorFlow tensors, with gradients.

    Args:
        function: of torch tensors; its arguments have the names of `arguments`.
        outputs_of: returns the outputs' dtypes and shapes, and refuses bad options.
        arguments: tensors of TensorFlow and options.

    Returns:
        The tensors that the function returns, without their nesting.
    """
    tf = _tensorflow()
    # AutoGraph need not rewrite what has no control flow on tensors.
    return tf.autograph.experimental.do_not_convert(_run_as_written)(
        tf, function, outputs_of, arguments
    )


@functools.cache  # which AutoGraph leaves alone; it would try to rewrite the import
def _tensorflow() -> Any:
    return import_tensorflow("transducer_toolkit.compat.tensorflow")


def _run_as_written(
    tf: Any,
    function: Callable[..., Any],
    outputs_of: Callable[[dict[str, tf.Tensor], dict[str, Any]], list[_Output]],
    arguments: dict[str, Any],
) -> list[tf.Tensor]:
    tensors, options = {}, {}
    for name, value in arguments.items():
        if name in _TENSORS and not (name == "boundary" and value is None):
            tensors[name] = _as_tensor(tf, name, value)
        elif name in _NUMBERS and tf.is_tensor(value):
            tensors[name] = _as_tensor(tf, name, value)
            if tensors[name].shape.rank not in (0, None):
                raise TypeError(f"{name}: expected a number, got shape {tuple(value.shape)}")
        else:
            options[name] = value.item() if isinstance(value, np.generic) else value
    expected = outputs_of(tensors, options)
    call = _TorchCall(tf, function, list(tensors), options)
    wanted = [name for name in _DIFFERENTIABLE if name in tensors]

    def forward(*values: tf.Tensor) -> list[tf.Tensor]:
        return _in_python(tf, call.forward, values, expected)

    def with_gradient(*values: tf.Tensor) -> tuple[list[tf.Tensor], Callable[..., Any]]:
        outputs = forward(*values)

        def gradient(*upstream: tf.Tensor | None) -> list[tf.Tensor | None]:
            pairs = zip(upstream, outputs, strict=True)
            given = [tf.zeros_like(o) if u is None else tf.convert_to_tensor(u) for u, o in pairs]
            gradients = dict(zip(wanted, backward(*values, *given), strict=True))
            return [gradients.get(name) for name in tensors]

        return outputs, gradient

    @tf.custom_gradient
    def backward(*values: tf.Tensor) -> tuple[list[tf.Tensor], Callable[..., Any]]:
        shapes = [_Output(tensors[name].dtype, tensors[name].shape) for name in wanted]
        return _in_python(tf, call.backward, values, shapes), _refuse_second_derivative

    outputs = (tf.custom_gradient(with_gradient) if wanted else forward)(*tensors.values())
    return [
        output if about.has_gradient else tf.stop_gradient(output)
        for output, about in zip(outputs, expected, strict=True)
    ]


def _refuse_second_derivative(*upstream: tf.Tensor) -> None:
    raise RuntimeError(
        "transducer_toolkit.compat.tensorflow: expected a first derivative, got a second one, "
        "which the losses do not have; take gradients of gradients without the loss"
    )


def _as_tensor(tf: Any, name: str, value: Any) -> tf.Tensor:
    wanted = f"{name}: expected a TensorFlow tensor or a NumPy array"
    if isinstance(value, Tensor):
        raise TypeError(f"{wanted}, got a torch.Tensor, which transducer_toolkit.losses takes")
    try:
        tensor = tf.convert_to_tensor(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{wanted}, got {type(value).__name__} ({error})") from error
    if not hasattr(tensor, "dtype") or not isinstance(tensor, tf.Tensor):
        raise TypeError(f"{wanted}, got {type(value).__name__}")
    if tensor.dtype.name not in _DTYPES:  # TensorFlow aborts the process on DLPack of strings
        raise TypeError(f"{name}: expected dtype {', '.join(_DTYPES)}, got {tensor.dtype.name}")
    return tensor


def _in_python(
    tf: Any,
    function: Callable[..., list[tf.Tensor]],
    values: Sequence[tf.Tensor],
    expected: list[_Output],
) -> list[tf.Tensor]:
    """Calls a function of eager tensors now, or whenever the graph runs."""
    if tf.executing_eagerly():
        return function(*values)
    outputs = tf.py_function(function, values, [output.dtype for output in expected])
    for output, about in zip(outputs, expected, strict=True):
        output.set_shape(about.shape)
    return list(outputs)


class _TorchCall:
    """A call of a function of this package, on eager tensors of TensorFlow."""

    def __init__(
        self, tf: Any, function: Callable[..., Any], names: list[str], options: dict[str, Any]
    ) -> None:
        self.dlpack, self.function = tf.experimental.dlpack, function
        self.names, self.options = names, options

    def forward(self, *values: tf.Tensor) -> list[tf.Tensor]:
        tensors = self._to_torch(values)
        with torch.no_grad():
            return self._to_tensorflow(self._call(tensors), tensors)

    def backward(self, *values: tf.Tensor) -> list[tf.Tensor]:
        """Returns the gradients of the differentiable tensors.

        Args:
            values: the tensors, and the gradients of the outputs.
        """
        tensors = self._to_torch(values)
        num_inputs = len(self.names)
        inputs, upstream = tensors[:num_inputs], tensors[num_inputs:]
        named = dict(zip(self.names, inputs, strict=True))
        wanted = [named[name].requires_grad_() for name in _DIFFERENTIABLE if name in named]
        with torch.enable_grad():
            outputs = self._call(inputs)
        pairs = [
            (output, gradient)
            for output, gradient in zip(outputs, upstream, strict=True)
            if output.requires_grad
        ]
        gradients = torch.autograd.grad(
            [output for output, _ in pairs],
            wanted,
            [gradient for _, gradient in pairs],
            materialize_grads=True,
        )
        return self._to_tensorflow(gradients, tensors)

    def _call(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        arguments: dict[str, Any] = dict(zip(self.names, inputs, strict=True))
        device = next(arguments[n].device for n in (*_DIFFERENTIABLE, "px_grad") if n in arguments)
        for name, tensor in arguments.items():
            if name in _NUMBERS:
                arguments[name] = tensor.item()
            elif name != "boundary":  # TensorFlow keeps many integers of a GPU on the CPU
                arguments[name] = tensor.to(device)
        return _flat(self.function(**arguments, **self.options))

    def _to_torch(self, values: Sequence[tf.Tensor]) -> list[Tensor]:
        return [dlpack.from_dlpack(self.dlpack.to_dlpack(value)) for value in values]

    def _to_tensorflow(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]
    ) -> list[tf.Tensor]:
        """Hands outputs over, those as copies whose memory TensorFlow may not have or write to."""
        taken = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        results = []
        for output in outputs:
            output = output.detach()
            is_taken = output.untyped_storage().data_ptr() in taken
            if is_taken or not output.is_contiguous() or output.data_ptr() % _ALIGNMENT_BYTES:
                output = output.clone(memory_format=torch.contiguous_format)
            taken.add(output.untyped_storage().data_ptr())
            if output.is_cuda:  # TensorFlow does not wait for the stream of PyTorch
                torch.cuda.current_stream(output.device).synchronize()
            results.append(self.dlpack.from_dlpack(dlpack.to_dlpack(output)))
        return results


def _flat(result: Any) -> list[Tensor]:
    """Returns the tensors of nested tuples."""
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result for tensor in _flat(part)]
