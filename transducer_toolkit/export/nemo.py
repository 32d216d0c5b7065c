# SPDX-License-Identifier: Apache-2.0
"""A transducer in the interface that sherpa-onnx has for NeMo's models.

Differences from its interface for icefall's models (``icefall.py``):

- The predictor has a state of two float tensors, zero at first.
- Blank is the last symbol. ``vocab_size`` does not count it.
- A frame may emit up to :data:`MAX_SYMBOLS` symbols. With durations (``url`` of the metadata
  contains "tdt") it may emit up to :data:`MAX_SYMBOLS_OF_TDT`, and the index of the largest
  duration logit is the number of frames that the client advances.
- The client computes features with the mel scale of librosa, see ``client_mel.py``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from transducer_toolkit.data.features import Fbank
from transducer_toolkit.export.client_mel import NUM_CLIENT_FILTERS, FromClientMel
from transducer_toolkit.export.graphs import joiner_parts, random_features
from transducer_toolkit.export.onnx_files import Graph
from transducer_toolkit.inference.recognizer import Recognizer
from transducer_toolkit.modules.encoder import Encoder
from transducer_toolkit.modules.joiner import AdditiveJoiner, Joiner
from transducer_toolkit.modules.predictor import LstmPredictor, Predictor, StatelessPredictor
from transducer_toolkit.ops.topology import Topology, get_topology

MAX_SYMBOLS, MAX_SYMBOLS_OF_TDT = 10, 5  # of the client
# How far the logits of durations that the model does not have lie below the others.
FAR_BELOW = 20.0


def client_max_symbols(recognizer: Recognizer) -> int:
    """Return how many symbols the client emits on a frame at most."""
    if _moves_after_each_symbol(recognizer):
        return 1
    is_regular = get_topology(recognizer.topology).num_extra == 0
    return MAX_SYMBOLS if is_regular else MAX_SYMBOLS_OF_TDT


def nemo_graphs(recognizer: Recognizer) -> list[Graph]:
    """Return the graphs of encoder, predictor ("decoder") and joiner.

    Raises:
        ValueError: if sherpa-onnx does not support the model.
    """
    model, topology = recognizer.model, get_topology(recognizer.topology)
    if not isinstance(recognizer.fbank, Fbank):
        raise ValueError(
            f"the encoder reads features of {recognizer.fbank.kind}, which cannot be computed from "
            "those of sherpa-onnx; use the model with transducer-transcribe, or "
            "write a Parakeet model for transformers with --type transformers"
        )
    order = torch.tensor([*(k for k in range(model.vocab_size) if k != model.blank), model.blank])
    predictor = _predictor_graph(model.predictor, order)
    one_symbol = _moves_after_each_symbol(recognizer)
    joiner = NemoJoinerGraph(model.joiner, topology, order, one_symbol=one_symbol)
    has_durations = one_symbol or topology.num_extra > 0
    encoder_projection, predictor_projection, _ = joiner_parts(model.joiner)
    predictor.projection = predictor_projection
    joiner_dim = predictor_projection.out_features
    states = [torch.zeros(predictor.num_layers, n, predictor.state_size) for n in (2, 1, 3)]
    targets = [order.argmax().expand(2, 1), torch.tensor([[0]]), torch.arange(3)[:, None]]
    of_states = {"states": {1: "N"}, "cells": {1: "N"}}
    return [
        Graph(
            "encoder",
            NemoEncoderGraph(model.encoder, encoder_projection, FromClientMel(recognizer.fbank)),
            [
                (
                    random_features(len(lengths), max(lengths), NUM_CLIENT_FILTERS).mT,
                    torch.tensor(lengths),
                )
                # Lengths of the utterances of a batch, in feature frames.
                for lengths in ((96, 75), (61,), (9, 200, 37), (1, 3))
            ],
            inputs={"audio_signal": {0: "N", 2: "T"}, "length": {0: "N"}},
            outputs={"outputs": {0: "N", 2: "T_out"}, "encoded_lengths": {0: "N"}},
            metadata={
                "model_type": "EncDecRNNTBPEModel",
                "url": "tdt" if has_durations else "transducer",
                "vocab_size": model.vocab_size - 1,
                "subsampling_factor": model.encoder.subsampling_factor,
                "normalize_type": "NA",
                "feat_dim": NUM_CLIENT_FILTERS,
                "pred_rnn_layers": predictor.num_layers,
                "pred_hidden": predictor.state_size,
            },
        ),
        Graph(
            "decoder",
            predictor,
            [
                (ids.int(), torch.ones(len(ids), dtype=torch.int32), state, state)
                for ids, state in zip(targets, states, strict=True)
            ],
            inputs={"targets": {0: "N"}, "target_length": {0: "N"}, **of_states},
            outputs={"outputs": {0: "N"}, "prednet_lengths": {0: "N"}}
            | {f"next_{name}": axes for name, axes in of_states.items()},
            metadata={},
        ),
        Graph(
            "joiner",
            joiner,
            [(torch.randn(n, joiner_dim, 1), torch.randn(n, joiner_dim, 1)) for n in (2, 1, 5)],
            inputs={"encoder_outputs": {0: "N"}, "decoder_outputs": {0: "N"}},
            outputs={"logits": {0: "N"}},
            metadata={},
        ),
    ]


def _moves_after_each_symbol(recognizer: Recognizer) -> bool:
    topology = get_topology(recognizer.topology)
    one_symbol = recognizer.max_symbols_per_frame == 1 or not topology.labels_share_frames
    return one_symbol and topology.num_extra == 0


class NemoEncoderGraph(nn.Module):
    """Encoder and its projection: ``audio_signal (N, F, T), length (N,) -> (N, J, T'), (N,)``."""

    def __init__(self, encoder: Encoder, projection: nn.Module, features: nn.Module) -> None:
        super().__init__()
        self.encoder, self.projection, self.features = encoder, projection, features

    def forward(self, audio_signal: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        encoder_out, lengths = self.encoder(self.features(audio_signal), length)
        return self.projection(encoder_out).transpose(1, 2), lengths


class NemoPredictorGraph(nn.Module):
    """Predictor and its projection: one symbol and two states to an output and the next states.

    ``targets (N, 1), target_length (N,), states (L, N, H), cells (L, N, H)`` to
    ``(N, J, 1), (N,), (L, N, H), (L, N, H)``.

    Attributes:
        num_layers: L.
        state_size: H.
        projection: the joiner's projection of the predictor.
    """

    order: Tensor
    projection: nn.Module

    def __init__(
        self, predictor: Predictor, order: Tensor, *, num_layers: int, state_size: int
    ) -> None:
        super().__init__()
        self.predictor = predictor
        self.register_buffer("order", order)  # id of the client -> id of the model
        self.num_layers, self.state_size = num_layers, state_size

    def forward(
        self, targets: Tensor, target_length: Tensor, states: Tensor, cells: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tokens = self.order[targets[:, 0].long()]
        out, states, cells = self.step(tokens, states, cells)
        return self.projection(out).unsqueeze(2), target_length + 0, states, cells

    def step(self, tokens: Tensor, states: Tensor, cells: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # (L, N, H) twice -> (N, 2, L, H)
        state = torch.stack((states, cells)).permute(2, 0, 1, 3)
        out, state = self.predictor.step(tokens, state)
        states, cells = state.permute(1, 2, 0, 3).unbind(0)
        return out, states, cells


class NemoStatelessGraph(NemoPredictorGraph):
    """A stateless predictor. The states contain its context, as ids plus 1; 0 is no symbol."""

    def step(self, tokens: Tensor, states: Tensor, cells: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out, context = self.predictor.step(tokens, states[0].round().long() - 1)
        return out, (context + 1).to(states.dtype).unsqueeze(0), cells + 0.0


def _predictor_graph(predictor: Predictor, order: Tensor) -> NemoPredictorGraph:
    if isinstance(predictor, StatelessPredictor):
        size = predictor.context_size
        return NemoStatelessGraph(predictor, order, num_layers=1, state_size=size)
    if isinstance(predictor, LstmPredictor):
        layers, size = predictor.lstm.num_layers, predictor.lstm.hidden_size
        return NemoPredictorGraph(predictor, order, num_layers=layers, state_size=size)
    raise ValueError(
        "predictor: expected a StatelessPredictor or an LstmPredictor, whose states sherpa-onnx "
        f"keeps, got {type(predictor).__name__}; use the model with transducer-transcribe"
    )


class NemoJoinerGraph(nn.Module):
    """The joiner after its projections: ``(N, J, 1), (N, J, 1) -> (N, 1, 1, V + D)``.

    D is 0 for models with several symbols a frame, and otherwise the largest number of frames that
    an arc advances, plus 1.
    """

    order: Tensor
    finish: Callable[[Tensor], Tensor]

    def __init__(
        self,
        joiner: Joiner | AdditiveJoiner,
        topology: Topology,
        order: Tensor,
        *,
        one_symbol: bool,
    ) -> None:
        super().__init__()
        self.joiner = joiner
        *_, self.finish = joiner_parts(joiner)
        self.register_buffer("order", order)
        self.topology, self.one_symbol = topology, one_symbol

    def forward(self, encoder_outputs: Tensor, decoder_outputs: Tensor) -> Tensor:
        total = (encoder_outputs + decoder_outputs).transpose(1, 2).unsqueeze(1)  # (N, 1, 1, J)
        vocab_size = self.order.size(0)
        logits = self.finish(total)
        symbols, extra = logits[..., :vocab_size][..., self.order], logits[..., vocab_size:]
        if self.one_symbol:  # 1 frame, always
            one = torch.tensor([-FAR_BELOW, 0.0])
            return torch.cat((symbols, symbols[..., :1] * 0.0 + one), -1)
        if self.topology.predicts_durations:
            durations = self.topology.label_durations
            return torch.cat((symbols, _by_frames(extra, durations)), -1)
        if self.topology.num_big_blanks:
            return self._of_blanks(symbols, extra)
        return symbols

    def _of_blanks(self, symbols: Tensor, extra: Tensor) -> Tensor:
        """Turn the choice among several blanks into that of one blank and of its frames."""
        labels = symbols[..., :-1]
        blanks = torch.cat((symbols[..., -1:], extra.flip(-1)), -1)
        best = blanks.amax(-1, keepdim=True)
        frames = _by_frames(blanks, self.topology.blank_durations)
        # A label does not advance: 0 frames.
        is_label = labels.amax(-1, keepdim=True) > best
        none = torch.where(is_label, frames.amax(-1, keepdim=True) + 1.0, frames[..., :1])
        return torch.cat((labels, best, none, frames[..., 1:]), -1)


def _by_frames(logits: Tensor, durations: tuple[int, ...]) -> Tensor:
    """Return the logits of 0, 1, 2, ... frames; those that are not durations lie far below."""
    absent = logits.amin(-1, keepdim=True) - FAR_BELOW
    place = {frames: k for k, frames in enumerate(durations)}
    index = [place.get(frames, len(durations)) for frames in range(max(durations) + 1)]
    return torch.cat((logits, absent), -1)[..., torch.tensor(index)]
