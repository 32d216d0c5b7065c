# SPDX-License-Identifier: Apache-2.0
"""ONNX files: written from torch modules, compared with them, quantised."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from transducer_toolkit._version import __version__

OPSET_VERSION = 17
# Of a value beside what torch computes, relative to 1 or to the largest value: float32 rounding
# through the layers stays below it by far, a constant frozen into the graph does not.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Graph:
    """A torch module and how it becomes an ONNX file.

    Attributes:
        name: of the file, without suffix.
        module: called with tensors, returns a tensor or a tuple of tensors.
        examples: arguments; the first is traced, all are compared. They should differ in all
            sizes that may differ.
        inputs: for each input its name, and a name for each axis of varying size.
        outputs: likewise.
        metadata: what the client reads from the file.
    """

    name: str
    module: nn.Module
    examples: Sequence[tuple[Tensor, ...]]
    inputs: Mapping[str, Mapping[int, str]]
    outputs: Mapping[str, Mapping[int, str]]
    metadata: Mapping[str, str | int]


def write_graph(graph: Graph, folder: Path) -> Path:
    """Write a module as an ONNX file that onnxruntime is seen to run with the same result.

    Args:
        graph: what to write; its module is put into eval mode.
        folder: where ``NAME.onnx`` goes.

    Returns:
        The file.

    Raises:
        RuntimeError: if the file does not compute what the module computes.
    """
    import onnx

    path = folder / f"{graph.name}.onnx"
    axes = {**graph.inputs, **graph.outputs}
    with warnings.catch_warnings(), mock.patch.object(Tensor, "unflatten", _unflatten):
        # That another exporter is the default, that sizes may freeze: _compare() sees to it.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            graph.module.eval(),
            tuple(graph.examples[0]),
            str(path),
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_axes={name: dict(varying) for name, varying in axes.items()},
            opset_version=OPSET_VERSION,
            dynamo=False,
        )
    model = onnx.load(path)
    metadata = {**graph.metadata, "model_author": "transducer_toolkit", "version": __version__}
    onnx.helper.set_model_props(model, {key: str(value) for key, value in metadata.items()})
    onnx.save(model, path)
    try:
        _compare(graph, path)
    except RuntimeError:
        path.unlink()
        raise
    return path


def _unflatten(x: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    """``Tensor.unflatten``, which freezes the other sizes when traced; attention layers use it."""
    dim %= x.dim()
    return x.reshape(*x.shape[:dim], *sizes, *x.shape[dim + 1 :])


@torch.no_grad()
def _compare(graph: Graph, path: Path) -> None:
    """Run the file and its module on the same arguments; raise a RuntimeError if they differ."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # what goes wrong is raised
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    for example in graph.examples:
        expected = graph.module(*example)
        expected = expected if isinstance(expected, tuple) else (expected,)
        shapes = [tuple(value.shape) for value in example]
        feed = {name: x.numpy() for name, x in zip(graph.inputs, example, strict=True)}
        try:
            results = session.run(None, feed)
        except Exception as error:  # onnxruntime's exceptions have no common base
            raise RuntimeError(f"{path.name} does not run on input of {shapes}: {error}") from error
        for name, result, tensor in zip(graph.outputs, results, expected, strict=True):
            if result.shape != tuple(tensor.shape):
                raise RuntimeError(
                    f"{path.name} gives {name} of {result.shape} for input of {shapes}, torch "
                    f"{tuple(tensor.shape)}: the export froze a size"
                )
            difference = np.abs(result - tensor.numpy()).max(initial=0.0)
            scale = float(tensor.abs().max()) if tensor.numel() else 0.0
            if not difference <= TOLERANCE * max(1.0, scale):
                raise RuntimeError(
                    f"{path.name} gives another {name} than torch for input of {shapes}: "
                    f"the largest difference is {difference:.1e}"
                )


def quantize(path: Path) -> Path:
    """Write ``NAME.int8.onnx`` beside ``NAME.onnx``: weights of matrix products and LSTMs in int8.

    Activations are quantised as they come, so no calibration is needed; convolutions and
    embeddings stay as they are, they are small.

    Args:
        path: a file of :func:`write_graph`.

    Returns:
        The new file.
    """
    from onnxruntime.quantization import QuantType, quant_pre_process, quantize_dynamic

    quantized = path.with_suffix(".int8.onnx")
    quant_pre_process(path, quantized, skip_symbolic_shape=True)
    quantize_dynamic(
        quantized,
        quantized,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["MatMul", "Gemm", "LSTM"],
    )
    return quantized
