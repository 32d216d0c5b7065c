# SPDX-License-Identifier: Apache-2.0
"""Writes torch modules as ONNX files, checks the files and quantizes them."""

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
# Bound on the difference from torch's result, relative to 1 or to the largest value. Rounding in
# float32 stays far below it; a constant that the export froze into the graph does not.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Graph:
    """A torch module with the names and examples for its ONNX file.

    Attributes:
        name: name of the file, without suffix.
        module: called with tensors, returns a tensor or a tuple of tensors.
        examples: tuples of arguments. The first is traced, all are compared; they should differ in
            all sizes that may differ.
        inputs: names of the inputs, each with the names of its axes of varying size.
        outputs: names of the outputs, each with the names of its axes of varying size.
        metadata: entries that the client reads from the file.
    """

    name: str
    module: nn.Module
    examples: Sequence[tuple[Tensor, ...]]
    inputs: Mapping[str, Mapping[int, str]]
    outputs: Mapping[str, Mapping[int, str]]
    metadata: Mapping[str, str | int]


def write_graph(graph: Graph, folder: Path) -> Path:
    """Write a module as an ONNX file, run it with onnxruntime and compare the results.

    Args:
        graph: the graph to write; its module is put into eval mode.
        folder: folder of the new file ``NAME.onnx``.

    Returns:
        The file.

    Raises:
        RuntimeError: if the results of the file differ from the module's.
    """
    import onnx

    path = folder / f"{graph.name}.onnx"
    axes = {**graph.inputs, **graph.outputs}
    with warnings.catch_warnings(), mock.patch.object(Tensor, "unflatten", _unflatten):
        # Warnings about the default exporter and about frozen sizes; _compare() finds frozen sizes.
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
    """Replace ``Tensor.unflatten``, which attention layers use: traced, it freezes other sizes."""
    dim %= x.dim()
    return x.reshape(*x.shape[:dim], *sizes, *x.shape[dim + 1 :])


@torch.no_grad()
def _compare(graph: Graph, path: Path) -> None:
    """Run the file and its module on the same arguments; raise a RuntimeError if they differ."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # errors are raised anyway
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

    Activations are quantized dynamically, so no calibration is needed. Convolutions and embeddings
    are small and are not quantized.

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
