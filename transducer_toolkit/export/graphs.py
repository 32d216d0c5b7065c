# SPDX-License-Identifier: Apache-2.0
"""The three graphs of a transducer in sherpa-onnx's interface for icefall's models."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from transducer_toolkit.modules.encoder import Encoder
from transducer_toolkit.modules.joiner import AdditiveJoiner, Joiner
from transducer_toolkit.modules.predictor import StatelessPredictor
from transducer_toolkit.ops.join import apply_activation


def joiner_parts(
    joiner: Joiner | AdditiveJoiner,
) -> tuple[nn.Linear, nn.Linear, Callable[[Tensor], Tensor]]:
    """Return the projections of encoder and predictor, and the function applied to their sum.

    Raises:
        ValueError: if the joiner computes another formula.
    """
    if isinstance(joiner, AdditiveJoiner):
        return joiner.am, joiner.lm, lambda total: total + 0.0  # a graph must compute something
    # A subclass that changes the formula overrides forward, too: Joiner makes sure of it.
    if not isinstance(joiner, Joiner) or type(joiner).forward is not Joiner.forward:
        raise ValueError(
            "joiner must be a Joiner or an AdditiveJoiner with unmodified forward, got "
            f"{type(joiner).__name__}; use the model with transducer-transcribe"
        )
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


def random_features(batch_size: int, num_frames: int, num_features: int) -> Tensor:
    """Return features with about the mean and spread of the log energies of speech."""
    return 3.0 * torch.randn(batch_size, num_frames, num_features) - 8.0
