# SPDX-License-Identifier: Apache-2.0
"""The three graphs of a transducer in sherpa-onnx's interface."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from transducer_toolkit.modules.encoder import Encoder
from transducer_toolkit.modules.joiner import AdditiveJoiner, Joiner
from transducer_toolkit.modules.predictor import Predictor, StatelessPredictor
from transducer_toolkit.ops.join import apply_activation


def joiner_parts(
    joiner: Joiner | AdditiveJoiner,
) -> tuple[nn.Linear, nn.Linear, Callable[[Tensor], Tensor]]:
    """Return the projections of encoder and predictor, and the function applied to their sum.

    Raises:
        ValueError: the joiner has logits of durations or big blanks.
    """
    if getattr(joiner, "num_extra", 0):
        raise ValueError(
            "a model with durations (TDT, multi-blank) cannot be exported: sherpa-onnx's interface "
            "for stateless predictors has no durations; train with loss=fused to export"
        )
    if isinstance(joiner, AdditiveJoiner):
        return joiner.am, joiner.lm, lambda total: total + 0.0  # a graph must compute something
    return (
        joiner.encoder_projection,
        joiner.predictor_projection,
        lambda total: joiner.normalized(joiner.output(apply_activation(total, joiner.activation))),
    )


class EncoderGraph(nn.Module):
    """Encoder and its projection: ``x (N, T, F), x_lens (N,) -> (N, T', J), (N,)``."""

    def __init__(self, encoder: Encoder, projection: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.projection = projection

    def forward(self, x: Tensor, x_lens: Tensor) -> tuple[Tensor, Tensor]:
        encoder_out, encoder_out_lens = self.encoder(x, x_lens)
        return self.projection(encoder_out), encoder_out_lens


class PredictorGraph(nn.Module):
    """Stateless predictor and its projection, sherpa's decoder: ``y (N, context) -> (N, J)``.

    A negative id, which sherpa-onnx passes before the first symbol, means no symbol.
    """

    def __init__(self, predictor: StatelessPredictor, projection: nn.Module) -> None:
        super().__init__()
        self.predictor = predictor
        self.projection = projection

    def forward(self, y: Tensor) -> Tensor:
        predictor_out, _ = self.predictor.step(y[:, -1], torch.cat((y[:, :1], y[:, :-1]), dim=1))
        return self.projection(predictor_out)


class JoinerGraph(nn.Module):
    """The joiner after its projections: ``(N, J), (N, J) -> (N, V)``."""

    def __init__(self, joiner: Joiner | AdditiveJoiner) -> None:
        super().__init__()
        self.joiner = joiner
        *_, self.finish = joiner_parts(joiner)

    def forward(self, encoder_out: Tensor, decoder_out: Tensor) -> Tensor:
        return self.finish(encoder_out + decoder_out)


def stateless_predictor(predictor: Predictor) -> StatelessPredictor:
    """Return the predictor if sherpa-onnx supports it.

    Raises:
        ValueError: if it is not stateless.
    """
    if not isinstance(predictor, StatelessPredictor):
        raise ValueError(
            f"predictor must be a StatelessPredictor, got {type(predictor).__name__}: sherpa-onnx "
            "calls the predictor with the last symbols and keeps no state of it; train with "
            "model=conv_lstm_stateless"
        )
    return predictor
