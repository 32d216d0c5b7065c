# SPDX-License-Identifier: Apache-2.0
"""A loss stage of your own: the exact loss and a penalty of confident cells."""

from transducer_toolkit.ops.checks import check_not_negative
from transducer_toolkit.training.stages import LossInput, PackedLoss, StageOutput


class ConfidencePenaltyLoss(PackedLoss):
    """``loss_b - weight * sum_t mean_u entropy(t, u)``, entropy of the softmax of a cell in nats.

    Args:
        weight: of the entropy, at least 0.
        **options: as of :class:`~transducer_toolkit.training.stages.PackedLoss`, blank among them;
            without durations.

    Source:
        G. Pereyra et al., "Regularizing Neural Networks by Penalizing Confident Output
        Distributions", 2017.
    """

    def __init__(self, *, weight: float = 0.1, **options) -> None:
        super().__init__(**options)
        check_not_negative("weight", weight)
        self.weight = weight

    def forward(self, batch: LossInput) -> StageOutput:
        shape = batch.shape
        logits = batch.joiner(batch.encoder_out, batch.predictor_out, shape)  # (cells, V)
        losses, metrics = super().forward(batch._replace(joiner=lambda *_: logits))
        log_probs = logits.log_softmax(-1, dtype=losses.dtype)
        entropy = -(log_probs.exp() * log_probs).sum(-1)  # (cells,)
        num_columns = (shape.target_lengths + 1).to(losses)
        of_utterances = shape.unpack(entropy, fill=0.0).sum((1, 2)) / num_columns  # (B,)
        metrics = metrics | {"entropy": entropy.detach().mean()}
        return StageOutput(losses - self.weight * of_utterances, metrics)
