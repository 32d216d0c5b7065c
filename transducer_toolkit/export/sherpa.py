# SPDX-License-Identifier: Apache-2.0
"""Export of a trained recognizer for sherpa-onnx."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from transducer_toolkit.data.features import Fbank
from transducer_toolkit.data.tokenizer import BLANK_SYMBOL, save_symbols
from transducer_toolkit.export.graphs import (
    EncoderGraph,
    JoinerGraph,
    PredictorGraph,
    joiner_parts,
    random_features,
)
from transducer_toolkit.export.hotwords import checked_hotwords, write_hotwords
from transducer_toolkit.export.nemo import nemo_graphs
from transducer_toolkit.export.onnx_files import Graph, quantize, write_graph
from transducer_toolkit.export.streaming_graphs import StreamingGraph, streaming_graph
from transducer_toolkit.inference.recognizer import Recognizer
from transducer_toolkit.modules.emformer import EmformerEncoder
from transducer_toolkit.modules.predictor import StatelessPredictor
from transducer_toolkit.ops.checks import check_choice
from transducer_toolkit.ops.topology import get_topology

SUBSAMPLING_FACTOR = 4  # sherpa-onnx multiplies frames of icefall's models by it to get timestamps
TYPES = ("icefall", "nemo")


def export_for_sherpa(
    recognizer: Recognizer,
    folder: str | os.PathLike[str],
    *,
    model_type: str | None = None,
    streaming: bool = False,
    chunk_frames: int = 4,
    int8: bool = False,
    hotwords: Sequence[str] = (),
) -> list[Path]:
    """Write ``encoder.onnx``, ``decoder.onnx`` (the predictor), ``joiner.onnx``, ``tokens.txt``.

    sherpa-onnx has an interface for icefall's models and one for NeMo's; the page "Export" compares
    them. The graphs contain everything after the client's features, normalization included.
    onnxruntime runs each file, and the result is compared with torch's.

    Args:
        recognizer: a recognizer on the CPU.
        folder: output folder; files of the same names are replaced.
        model_type: "icefall", "nemo", or None for that of :func:`default_type`.
        streaming: export for sherpa's OnlineRecognizer instead of its OfflineRecognizer.
        chunk_frames: encoder frames per call of a streaming ConvLstmEncoder.
        int8: also write ``encoder.int8.onnx``, ``decoder.int8.onnx`` and ``joiner.int8.onnx``.
        hotwords: lines for ``hotwords.txt``: a phrase, then possibly its score as ``:2.5``.

    Returns:
        The files written.

    Raises:
        TypeError: if `recognizer` is another object, such as a model.
        ValueError: if sherpa-onnx does not support the model in this interface, or the model has no
            symbols for a hotword.
        RuntimeError: if the results of an exported graph differ from the model's.

    Example:
        >>> recognizer = Recognizer.from_checkpoint("best.ckpt")  # doctest: +SKIP
        >>> export_for_sherpa(recognizer, "exported", int8=True)  # doctest: +SKIP
    """
    if not isinstance(recognizer, Recognizer):
        raise TypeError(
            f"recognizer: expected a Recognizer, got {type(recognizer).__name__}; use "
            "Recognizer.from_checkpoint, or torch.onnx.export for a model that is not the toolkit's"
        )
    folder = Path(folder)
    model_type = default_type(recognizer, streaming=streaming) if model_type is None else model_type
    check_choice(model_type, "model_type", TYPES)
    if chunk_frames < 1:
        raise ValueError(f"chunk_frames must be at least 1, got {chunk_frames}")
    if isinstance(recognizer.model.encoder, EmformerEncoder) and not streaming:
        raise ValueError(
            "an EmformerEncoder is exported with streaming=True (--streaming) only: the number of "
            "its segments would be frozen otherwise"
        )
    hotword_lines = checked_hotwords(hotwords, recognizer.tokenizer)
    if model_type == "icefall":
        graphs = _icefall_graphs(recognizer, streaming, chunk_frames)
        first, last = BLANK_SYMBOL, None
    elif streaming:
        raise ValueError(
            "model_type='nemo' is not for streaming=True: sherpa-onnx streams NeMo's own encoders "
            "only; use model_type='icefall' (--type icefall)"
        )
    else:
        graphs = nemo_graphs(recognizer)
        first, last = None, BLANK_SYMBOL

    folder.mkdir(parents=True, exist_ok=True)
    files = [write_graph(graph, folder) for graph in graphs]
    if int8:
        files += [quantize(path) for path in files]
    labels = [
        symbol
        for id_, symbol in enumerate(recognizer.tokenizer.symbols)
        if id_ != recognizer.tokenizer.blank
    ]
    symbols = [symbol for symbol in (first, *labels, last) if symbol is not None]
    save_symbols(symbols, folder / "tokens.txt")
    files.append(folder / "tokens.txt")
    return files + write_hotwords(hotword_lines, recognizer.tokenizer, folder)


def default_type(recognizer: Recognizer, *, streaming: bool = False) -> str:
    """Return "icefall" where that interface gives the model's own text, otherwise "nemo".

    It does for a stateless predictor and at most one symbol a frame. Streaming has no choice.
    """
    topology = get_topology(recognizer.topology)
    one_symbol = recognizer.max_symbols_per_frame == 1 or not topology.labels_share_frames
    is_icefall = (
        one_symbol
        and topology.num_extra == 0
        and isinstance(recognizer.model.predictor, StatelessPredictor)
        and recognizer.model.blank == 0
        and recognizer.model.encoder.subsampling_factor == SUBSAMPLING_FACTOR
    )
    return "icefall" if streaming or is_icefall else "nemo"


def _icefall_graphs(recognizer: Recognizer, streaming: bool, chunk_frames: int) -> list[Graph]:
    model = recognizer.model
    if not isinstance(recognizer.fbank, Fbank):
        raise ValueError(
            f"the encoder reads features of {recognizer.fbank.kind}, and sherpa-onnx computes "
            "those of the toolkit; use the model with transducer-transcribe, or "
            "write a Parakeet model for transformers with --type transformers"
        )
    advice = (
        "use the model with transducer-transcribe"
        if streaming
        else "use model_type='nemo' (--type nemo)"
    )
    if get_topology(recognizer.topology).num_extra:
        raise ValueError(
            "topology must be one without durations, because sherpa-onnx advances one frame per "
            f"blank of an icefall model, got {recognizer.topology!r}; {advice}"
        )
    predictor = model.predictor
    if not isinstance(predictor, StatelessPredictor):
        raise ValueError(
            f"predictor must be a StatelessPredictor, got {type(predictor).__name__}: sherpa-onnx "
            "calls the predictor of an icefall model with the last symbols and keeps no state of "
            f"it; {advice}, or train with model=conv_lstm_stateless"
        )
    if model.blank != 0:
        raise ValueError(f"blank must be 0, as in icefall's models, got {model.blank}; {advice}")
    if model.encoder.subsampling_factor != SUBSAMPLING_FACTOR:
        raise ValueError(
            f"the encoder's subsampling must be {SUBSAMPLING_FACTOR}, as in icefall's models, got "
            f"{model.encoder.subsampling_factor}; {advice}"
        )
    encoder_projection, predictor_projection, _ = joiner_parts(model.joiner)
    joiner_dim = predictor_projection.out_features
    batch = {0: "N"}
    if streaming:
        encoder = _streaming_encoder(
            streaming_graph(model.encoder, encoder_projection, chunk_frames)
        )
    else:
        encoder = _offline_encoder(EncoderGraph(model.encoder, encoder_projection))
    return [
        encoder,
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


def _offline_encoder(graph: EncoderGraph) -> Graph:
    # Lengths of the utterances of a batch, in feature frames.
    batches = ((96, 75), (61,), (9, 200, 37), (1, 3))
    return Graph(
        "encoder",
        graph,
        [
            (
                random_features(len(lengths), max(lengths), graph.encoder.num_features),
                torch.tensor(lengths),
            )
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
            examples.append(
                (random_features(batch_size, num_frames, graph.encoder.num_features), *states)
            )
            states = graph(*examples[-1])[1:]
    return Graph(
        "encoder",
        graph,
        examples,
        inputs={"x": {0: "N"}, "h": {1: "N"}, "c": {1: "N"}},
        outputs={"encoder_out": {0: "N"}, "next_h": {1: "N"}, "next_c": {1: "N"}},
        metadata=graph.metadata,
    )


def _contexts(context_size: int, vocab_size: int, batch_size: int) -> Tensor:
    """Return random contexts; the first row is the context at the start of an utterance."""
    contexts = torch.randint(vocab_size, (batch_size, context_size))
    contexts[0] = -1
    contexts[0, -1] = 0
    return contexts
