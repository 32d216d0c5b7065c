# SPDX-License-Identifier: Apache-2.0
"""The fused loss for the transducer models of ESPnet 2.

:func:`use_fused_loss` changes an ``ESPnetASRTransducerModel``, or an ``ESPnetASRModel`` with a
transducer decoder, so that it computes its loss without the logits of its joint network. ESPnet
imports its loss from ``warprnnt_pytorch``, which PyPI does not have:
``transducer_toolkit.compat.warprnnt_pytorch`` replaces it.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from transducer_toolkit.compat.common import JointInputs, activation_of, joint_summands
from transducer_toolkit.compat.warprnnt_pytorch import RNNTLoss
from transducer_toolkit.losses.fused_joiner import FusedJoinerLoss
from transducer_toolkit.modules.joiner import is_plain_linear
from transducer_toolkit.optional import import_espnet


def use_fused_loss(
    model: nn.Module, *, dropped_mass: float = 1e-7, precision: str = "auto"
) -> None:
    """Makes a transducer of ESPnet compute its loss without the logits of its joint network.

    ``model.criterion_transducer`` becomes a
    :class:`~transducer_toolkit.compat.warprnnt_pytorch.RNNTLoss` with the same options. In a
    training step and in validation, ``model.joint_network`` returns its summands instead of logits;
    searches get logits as before. Weights stay as they are.

    Args:
        model: an ``ESPnetASRTransducerModel``, or an ``ESPnetASRModel`` with a transducer decoder.
        dropped_mass: as in :func:`~transducer_toolkit.fused_joiner_loss`.
        precision: as in :func:`~transducer_toolkit.fused_joiner_loss`.

    Raises:
        ImportError: ESPnet is not installed.
        TypeError: the model has no ``espnet2.asr_transducer.joint_network.JointNetwork``.
        ValueError: the model uses k2's pruned loss, an activation that the fused loss lacks, or an
            output layer that is not a plain ``nn.Linear``.

    Example:
        >>> model = ASRTransducerTask.build_model(arguments)  # doctest: +SKIP
        >>> use_fused_loss(model)  # doctest: +SKIP
    """
    espnet = import_espnet("asr_transducer.joint_network", "use_fused_loss")
    joint: Any = getattr(model, "joint_network", None)
    if type(joint) not in (espnet.JointNetwork, _joint_class()):
        raise TypeError(
            "model.joint_network: expected espnet2.asr_transducer.joint_network.JointNetwork, got "
            f"{type(joint).__name__}"
        )
    if getattr(model, "use_k2_pruned_loss", False):
        raise ValueError(
            "use_k2_pruned_loss: expected false, got true; the fused loss replaces the loss on all "
            "logits"
        )
    if not is_plain_linear(joint.lin_out):
        raise ValueError(
            f"joint_network.lin_out: expected a plain torch.nn.Linear, got "
            f"{type(joint.lin_out).__name__}"
        )
    activation = activation_of(joint.joint_activation, "joint_activation_type")
    criterion: Any = getattr(model, "criterion_transducer", None)
    names = "blank", "fastemit_lambda", "big_blank_durations", "sigma"
    # ESPnetASRTransducerModel makes its criterion in the first step
    source = model if criterion is None else criterion
    options = {name: getattr(source, name) for name in names if hasattr(source, name)}
    if isinstance(criterion, RNNTLoss):
        options |= criterion.options
    loss = RNNTLoss(**{**options, "reduction": "mean"})
    loss.fused_options = {"dropped_mass": dropped_mass, "precision": precision}
    FusedJoinerLoss(loss.blank, **loss.fused_options)  # raises errors for options
    model.criterion_transducer = loss
    joint.fused_activation = activation
    joint.__class__ = _joint_class()


@functools.cache
def _joint_class() -> Any:
    """Makes the class; ESPnet takes long to import."""
    espnet = import_espnet("asr_transducer.joint_network", "use_fused_loss")

    class FusedJointNetwork(espnet.JointNetwork):  # type: ignore[misc, name-defined]
        """ESPnet's ``JointNetwork``, which returns the inputs of the fused loss."""

        fused_activation: str

        def forward(self, enc_out: Tensor, dec_out: Tensor, no_projection: bool = False) -> Any:
            summands = None if no_projection else joint_summands(enc_out, dec_out)
            if summands is None:
                return super().forward(enc_out, dec_out, no_projection)
            enc, pred = self.lin_enc(summands[0]), self.lin_dec(summands[1])
            head = self.lin_out
            return JointInputs(enc, pred, self.fused_activation, head.weight, head.bias)

    FusedJointNetwork.__qualname__ = "FusedJointNetwork"  # pickle and copy ask this module for it
    return FusedJointNetwork


def __getattr__(name: str) -> Any:
    if name == "FusedJointNetwork":
        return _joint_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
