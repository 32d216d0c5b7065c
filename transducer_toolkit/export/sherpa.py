# SPDX-License-Identifier: Apache-2.0
"""Export of a trained recognizer for sherpa-onnx."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from transducer_toolkit.data.features import Fbank
from transducer_toolkit.export.graphs import (
    EncoderGraph,
    JoinerGraph,
    PredictorGraph,
    joiner_parts,
    stateless_predictor,
)
from transducer_toolkit.export.onnx_files import Graph, quantize, write_graph
from transducer_toolkit.export.streaming_graphs import StreamingGraph, streaming_graph
from transducer_toolkit.inference.recognizer import Recognizer
from transducer_toolkit.modules.emformer import EmformerEncoder
from transducer_toolkit.modules.encoder import Encoder
from transducer_toolkit.ops.topology import get_topology

SUBSAMPLING_FACTOR = 4  # sherpa-onnx multiplies frames by it to get timestamps


def export_for_sherpa(
    recognizer: Recognizer,
    folder: str | os.PathLike[str],
    *,
    streaming: bool = False,
    chunk_frames: int = 4,
    int8: bool = False,
) -> list[Path]:
    """Write ``encoder.onnx``, ``decoder.onnx`` (the predictor), ``joiner.onnx``, ``tokens.txt``.

    sherpa-onnx computes the same features as ``recognizer.fbank``; the graphs contain everything
    after them, normalization included. onnxruntime runs each file, and the result is compared with
    torch's. The client's greedy search emits at most one symbol per frame.

    Args:
        recognizer: a recognizer on the CPU.
        folder: output folder; files of the same names are replaced.
        streaming: export for sherpa's OnlineRecognizer instead of its OfflineRecognizer.
        chunk_frames: encoder frames per call of a streaming ConvLstmEncoder.
        int8: also write ``encoder.int8.onnx``, ``decoder.int8.onnx`` and ``joiner.int8.onnx``.

    Returns:
        The files written.

    Raises:
        ValueError: if sherpa-onnx does not support the model: other features, a topology with
            durations, a predictor with state, a blank that is not 0, a subsampling factor other
            than 4, or an encoder that does not stream.
        RuntimeError: if the results of an exported graph differ from the model's.

    Example:
        >>> recognizer = Recognizer.from_checkpoint("best.ckpt")  # doctest: +SKIP
        >>> export_for_sherpa(recognizer, "exported", int8=True)  # doctest: +SKIP
    """
    model, folder = recognizer.model, Path(folder)
    if not isinstance(recognizer.fbank, Fbank):
        raise ValueError(
            f"the encoder reads features of {recognizer.fbank.kind}, and sherpa-onnx computes "
            "those of the toolkit; use the model with transducer-transcribe"
        )
    if get_topology(recognizer.topology).num_extra:
        raise ValueError(
            "topology must be one without durations, because sherpa-onnx advances one frame per "
            f"blank, got {recognizer.topology!r}; use the model with transducer-transcribe"
        )
    predictor = stateless_predictor(model.predictor)
    if model.blank != 0:
        raise ValueError(f"blank must be 0, as sherpa-onnx has it, got {model.blank}")
    if model.encoder.subsampling_factor != SUBSAMPLING_FACTOR:
        raise ValueError(
            f"the encoder's subsampling must be {SUBSAMPLING_FACTOR}, as sherpa-onnx has it, "
            f"got {model.encoder.subsampling_factor}"
        )
    if isinstance(model.encoder, EmformerEncoder) and not streaming:
        raise ValueError(
            "an EmformerEncoder is exported with streaming=True (--streaming) only: the number of "
            "its segments would be frozen otherwise"
        )
    if chunk_frames < 1:
        raise ValueError(f"chunk_frames must be at least 1, got {chunk_frames}")
    encoder_projection, predictor_projection, _ = joiner_parts(model.joiner)
    joiner_dim = predictor_projection.out_features
    batch = {0: "N"}
    graphs = [
        Graph(
            "decoder",
            PredictorGraph(predictor, predictor_projection),
            [(_contexts(predictor.context_size, model.vocab_size, n),) for n in (2, 1, 5)],
            inputs={"y": batch},
            outputs={"decoder_out": batch},
            metadata={"context_size": predictor.context_size, "vocab_size": model.vocab_size},
        ),
        Graph(
            "joiner",
            JoinerGraph(model.joiner),
            [(torch.randn(n, joiner_dim), torch.randn(n, joiner_dim)) for n in (2, 1, 5)],
            inputs={"encoder_out": batch, "decoder_out": batch},
            outputs={"logit": batch},
            metadata={"joiner_dim": joiner_dim},
        ),
    ]
    if streaming:
        stream = streaming_graph(model.encoder, encoder_projection, chunk_frames)
        graphs.insert(0, _streaming_encoder(stream))
    else:
        graphs.insert(0, _offline_encoder(EncoderGraph(model.encoder, encoder_projection)))

    folder.mkdir(parents=True, exist_ok=True)
    files = [write_graph(graph, folder) for graph in graphs]
    if int8:
        files += [quantize(path) for path in files]
    recognizer.tokenizer.save(folder / "tokens.txt")
    return [*files, folder / "tokens.txt"]


def _offline_encoder(graph: EncoderGraph) -> Graph:
    # Lengths of the utterances of a batch, in feature frames.
    batches = ((96, 75), (61,), (9, 200, 37), (1, 3))
    return Graph(
        "encoder",
        graph,
        [
            (_features(len(lengths), max(lengths), graph.encoder), torch.tensor(lengths))
            for lengths in batches
        ],
        inputs={"x": {0: "N", 1: "T"}, "x_lens": {0: "N"}},
        outputs={"encoder_out": {0: "N", 1: "T_out"}, "encoder_out_lens": {0: "N"}},
        # The client needs one of the types that it knows, unless it is given one on loading.
        metadata={"model_type": "conformer"},
    )


@torch.no_grad()
def _streaming_encoder(graph: StreamingGraph) -> Graph:
    num_frames = int(graph.metadata["T"])
    examples = []
    for batch_size in (2, 1, 3):
        states = graph.initial_states(batch_size)
        for _ in range(3):  # the beginning of a stream and two more chunks
            examples.append((_features(batch_size, num_frames, graph.encoder), *states))
            states = graph(*examples[-1])[1:]
    return Graph(
        "encoder",
        graph,
        examples,
        inputs={"x": {0: "N"}, "h": {1: "N"}, "c": {1: "N"}},
        outputs={"encoder_out": {0: "N"}, "next_h": {1: "N"}, "next_c": {1: "N"}},
        metadata=graph.metadata,
    )


def _features(batch_size: int, num_frames: int, encoder: Encoder) -> Tensor:
    # Log energies of speech have about this mean and spread.
    return 3.0 * torch.randn(batch_size, num_frames, encoder.num_features) - 8.0


def _contexts(context_size: int, vocab_size: int, batch_size: int) -> Tensor:
    """Return random contexts; the first row is the context at the start of an utterance."""
    contexts = torch.randint(vocab_size, (batch_size, context_size))
    contexts[0] = -1
    contexts[0, -1] = 0
    return contexts
