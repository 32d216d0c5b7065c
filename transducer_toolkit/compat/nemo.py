# SPDX-License-Identifier: Apache-2.0
"""The fused loss for the transducer models of NeMo, and a replacement for its ``RNNTLoss``.

:func:`use_fused_loss` changes a model so that its joint network computes the loss without logits.
:class:`RNNTLoss` takes logits and has NeMo's signature; unlike NeMo's, its TDT and multi-blank
losses run on the CPU, too.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from transducer_toolkit.compat.common import (
    JointInputs,
    activation_of,
    check_reduction_name,
    reduce_by_labels,
)
from transducer_toolkit.losses.durations import MultiBlankLoss, TDTLoss
from transducer_toolkit.losses.fused_joiner import FusedJoinerLoss
from transducer_toolkit.losses.packed import TransducerLoss
from transducer_toolkit.modules.joiner import is_plain_linear
from transducer_toolkit.ops.checks import check_probability
from transducer_toolkit.optional import import_nemo

_RNNT = ("fastemit_lambda", "clamp")
_MULTI_BLANK = (*_RNNT, "big_blank_durations", "sigma")
_TDT = (*_RNNT, "durations", "sigma", "omega")
# Name of a loss in NeMo -> its options.
LOSSES = {
    "default": _RNNT,
    "warprnnt": _RNNT,
    "warprnnt_numba": _RNNT,
    "pytorch": _RNNT,
    "multiblank_rnnt": _MULTI_BLANK,
    "multiblank_rnnt_pytorch": _MULTI_BLANK,
    "tdt": _TDT,
    "tdt_pytorch": _TDT,
}
# Class of the loss in NeMo's RNNTLoss -> its name.
_NAMES = {
    "RNNTLossNumba": "warprnnt_numba",
    "RNNTLossPytorch": "pytorch",
    "MultiblankRNNTLossNumba": "multiblank_rnnt",
    "MultiblankRNNTLossPytorch": "multiblank_rnnt_pytorch",
    "TDTLossNumba": "tdt",
    "TDTLossPytorch": "tdt_pytorch",
}
_WHOLE_BATCH = 2**31 - 1


class RNNTLoss(nn.Module):
    """Transducer loss with the signature of ``nemo.collections.asr.losses.rnnt.RNNTLoss``.

    It takes the output of NeMo's joint network, on the CPU and on a GPU. The graph losses of NeMo,
    which need k2, are not supported.

    Args:
        num_classes: index of blank, which follows the labels and the big blanks; durations follow
            it.
        reduction: ``"mean_batch"`` (the mean over utterances), ``"mean_volume"`` (the sum of the
            losses over the number of labels), ``"mean"`` (the mean of the losses per label),
            ``"sum"``, or None: a loss for each utterance.
        loss_name: ``"default"``, ``"warprnnt"``, ``"warprnnt_numba"`` or ``"pytorch"``; ``"tdt"``
            or ``"tdt_pytorch"``; ``"multiblank_rnnt"`` or ``"multiblank_rnnt_pytorch"``.
        loss_kwargs: ``fastemit_lambda`` and ``clamp``; for TDT also ``durations``, ``sigma`` and
            ``omega``, the probability that a call computes the RNN-T loss of the token logits; for
            multi-blank ``big_blank_durations`` and ``sigma``.

    Raises:
        TypeError, ValueError: an unknown name or option, or one with a bad value.

    Example:
        >>> loss = RNNTLoss(3, loss_name="tdt", loss_kwargs={"durations": [0, 1, 2], "sigma": 0.05})
        >>> one = torch.tensor([1])
        >>> loss(torch.zeros(1, 3, 2, 4 + 3), torch.tensor([[0]]), 3 * one, one)
        tensor(4.1557)
    """

    def __init__(
        self,
        num_classes: int,
        reduction: str | None = "mean_batch",
        loss_name: str = "default",
        loss_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if loss_name not in LOSSES:
            raise ValueError(f"loss_name: expected one of {', '.join(LOSSES)}, got {loss_name!r}")
        check_reduction_name(reduction or "none")
        options = dict(loss_kwargs or {})
        for name in options:
            if name not in LOSSES[loss_name]:
                raise ValueError(
                    f"loss_kwargs: expected some of {', '.join(LOSSES[loss_name])} for loss_name "
                    f"{loss_name!r}, got {name!r}"
                )
        for name in ("durations", "big_blank_durations"):
            if name in LOSSES[loss_name]:
                options[name] = tuple(options.get(name) or ())
        self.omega = options.pop("omega", 0.0)
        check_probability(self.omega, "omega")
        self.blank, self.reduction, self.loss_name = num_classes, reduction, loss_name
        self.options: dict[str, Any] = options
        self.fused_options: dict[str, Any] = {}
        self._loss_of(options)  # raises errors for options

    def _loss_of(self, options: dict[str, Any]) -> nn.Module:
        if "durations" in options:
            return TDTLoss(self.blank, **options, reduction="none")
        if "big_blank_durations" in options:
            return MultiBlankLoss(self.blank, **options, reduction="none")
        return TransducerLoss(self.blank, **options, reduction="none")

    def _sampled_options(self) -> tuple[dict[str, Any], int | None]:
        """Returns the options of a call and the number of columns that it reads, None for all.

        With probability omega a TDT loss is the RNN-T loss of the token logits.
        """
        if self.omega == 0 or random.uniform(0, 1) >= self.omega:
            return self.options, None
        return {name: self.options[name] for name in _RNNT if name in self.options}, self.blank + 1

    def forward(
        self, log_probs: Tensor, targets: Tensor, input_lengths: Tensor, target_lengths: Tensor
    ) -> Tensor:
        """Computes the loss of the output of a joint network.

        Args:
            log_probs: (B, T, U + 1, V) logits, normalized or not.
            targets: (B, U) labels.
            input_lengths: (B,) number of frames.
            target_lengths: (B,) number of labels.
        """
        options, num_columns = self._sampled_options()
        logits = log_probs[..., :num_columns]
        losses = self._loss_of(options)(logits, targets, input_lengths, target_lengths)
        return self.reduce(losses, target_lengths)

    def fused(
        self, joint: JointInputs, targets: Tensor, input_lengths: Tensor, target_lengths: Tensor
    ) -> Tensor:
        """Computes the loss of the inputs of a joint network."""
        options, num_columns = self._sampled_options()
        assert joint.weight is not None
        weight = joint.weight[:num_columns]
        bias = None if joint.bias is None else joint.bias[:num_columns]
        joint = JointInputs(joint.enc, joint.pred, joint.activation, weight, bias)
        losses = joint.loss(
            targets,
            input_lengths,
            target_lengths,
            self.blank,
            **options,
            **self.fused_options,
            reduction="none",
        )
        return self.reduce(losses, target_lengths)

    def reduce(
        self, losses: Tensor | Sequence[Tensor], target_lengths: Tensor | Sequence[Tensor]
    ) -> Tensor:
        """Reduces (B,) losses, or those of parts of a batch."""
        if not isinstance(losses, Tensor):
            losses = torch.cat(list(losses))
        if not isinstance(target_lengths, Tensor):
            target_lengths = torch.cat(list(target_lengths))
        return reduce_by_labels(losses, target_lengths, self.reduction or "none")

    def extra_repr(self) -> str:
        return f"blank={self.blank}, loss_name={self.loss_name!r}, reduction={self.reduction!r}"


def use_fused_loss(
    model: nn.Module, *, dropped_mass: float = 1e-7, precision: str = "auto"
) -> None:
    """Makes a transducer of NeMo compute its loss without the logits of its joint network.

    ``model.loss`` becomes an :class:`RNNTLoss` with the same options, and ``fuse_loss_wer`` of
    ``model.joint`` is switched on. Its ``fused_batch_size`` is the number of utterances that are
    decoded together for the WER; the loss takes the whole batch. Weights and the config stay as
    they are. Call it again after ``change_vocabulary`` and ``change_decoding_strategy``.

    Args:
        model: an ``EncDecRNNTModel`` or a relative of it, such as ``EncDecHybridRNNTCTCBPEModel``.
        dropped_mass: as in :func:`~transducer_toolkit.fused_joiner_loss`.
        precision: as in :func:`~transducer_toolkit.fused_joiner_loss`.

    Raises:
        ImportError: NeMo is not installed.
        TypeError: the model has no ``RNNTJoint``.
        ValueError: the joint network has dropout, an adapter, or an activation that the fused loss
            lacks; the loss is one that :class:`RNNTLoss` lacks.

    Example:
        >>> model = EncDecRNNTBPEModel.from_pretrained("NAME")  # doctest: +SKIP
        >>> use_fused_loss(model)  # doctest: +SKIP
    """
    rnnt = import_nemo("collections.asr.modules.rnnt", "use_fused_loss")
    joint: Any = getattr(model, "joint", None)
    loss: Any = getattr(model, "loss", None)
    if type(joint) not in (rnnt.RNNTJoint, _joint_class()):
        raise TypeError(
            f"model.joint: expected nemo.collections.asr.modules.RNNTJoint, got "
            f"{type(joint).__name__}"
        )
    own_loss = _as_own_loss(loss)
    own_loss.fused_options = {"dropped_mass": dropped_mass, "precision": precision}
    FusedJoinerLoss(own_loss.blank, **own_loss.fused_options)  # raises errors for options
    _output_layer(joint)
    joint.__class__ = _joint_class()
    joint.set_fused_batch_size(joint.fused_batch_size or _WHOLE_BATCH)
    model.loss = own_loss
    joint.set_fuse_loss_wer(True, own_loss, getattr(model, "wer", None))


def _as_own_loss(loss: Any) -> RNNTLoss:
    """Returns an RNNTLoss with the options of NeMo's."""
    if isinstance(loss, RNNTLoss):
        return loss
    inner: Any = getattr(loss, "_loss", None)
    name = _NAMES.get(type(inner).__name__)
    if type(inner).__module__.startswith("warprnnt_pytorch"):
        name = "warprnnt"
    if name is None:
        raise ValueError(
            f"loss: expected NeMo's RNNTLoss with loss_name one of {', '.join(LOSSES)}, got "
            f"{type(loss).__name__} with {type(inner).__name__}"
        )
    options = {key: getattr(inner, key) for key in LOSSES[name] if hasattr(inner, key)}
    return RNNTLoss(inner.blank, loss.reduction, name, options)


def _output_layer(joint: Any) -> tuple[str, nn.Linear]:
    """Returns the activation and the output layer of a joint network.

    Raises:
        ValueError: the fused loss cannot compute this joint network.
    """
    for index, module in enumerate(joint.joint_net):
        if isinstance(module, nn.Dropout) and module.p > 0:
            raise ValueError(
                f"joint.joint_net[{index}]: expected dropout 0, got {module.p}, because the fused "
                "loss computes cells twice; set model.joint.jointnet.dropout=0 in the config, or "
                f"model.joint.joint_net[{index}].p = 0"
            )
    if joint.is_adapter_available():
        raise ValueError("joint: expected no adapter; add adapters to the encoder or the decoder")
    if joint.temperature != 1:
        raise ValueError(f"joint.temperature: expected 1, got {joint.temperature}")
    head = joint.joint_net[-1]
    if not is_plain_linear(head):
        raise ValueError(
            f"joint.joint_net[-1]: expected a plain torch.nn.Linear, got {type(head).__name__}"
        )
    return activation_of(joint.joint_net[0], "joint.jointnet.activation"), head


@functools.cache
def _joint_class() -> Any:
    """Makes the class; NeMo takes long to import."""
    rnnt = import_nemo("collections.asr.modules.rnnt", "use_fused_loss")

    class FusedRNNTJoint(rnnt.RNNTJoint):  # type: ignore[misc, name-defined]
        """NeMo's ``RNNTJoint``, which computes the loss without logits."""

        def forward(
            self,
            encoder_outputs: Tensor,
            decoder_outputs: Tensor | None,
            encoder_lengths: Tensor | None = None,
            transcripts: Tensor | None = None,
            transcript_lengths: Tensor | None = None,
            compute_wer: bool = False,
            keep_hypotheses: bool = False,
        ) -> Any:
            inputs = {
                "encoder_outputs": encoder_outputs,
                "encoder_lengths": encoder_lengths,
                "transcripts": transcripts,
                "transcript_lengths": transcript_lengths,
                "compute_wer": compute_wer,
                "keep_hypotheses": keep_hypotheses,
            }
            if not self.fuse_loss_wer or decoder_outputs is None:
                return super().forward(decoder_outputs=decoder_outputs, **inputs)
            if transcripts is None or encoder_lengths is None or transcript_lengths is None:
                raise ValueError(
                    "transcripts, encoder_lengths, transcript_lengths: expected tensors, because "
                    "the joint network computes the loss, got None"
                )
            activation, head = _output_layer(self)
            pred = self.project_prednet(decoder_outputs.transpose(1, 2))
            if self.training and self.masking_prob > 0:  # HAINAN
                rows = torch.rand(*pred.shape[:2], 1).to(pred.device)
                pred = pred * (rows > self.masking_prob)
            enc = self.project_encoder(encoder_outputs.transpose(1, 2))
            joint = JointInputs(enc, pred, activation, head.weight, head.bias)
            loss = self.loss.fused(joint, transcripts, encoder_lengths, transcript_lengths)
            self.hypotheses = None
            if not compute_wer:
                return loss, None, None, None
            return loss, *super().forward(decoder_outputs=None, **inputs)[1:]

    FusedRNNTJoint.__qualname__ = "FusedRNNTJoint"  # pickle and copy ask this module for it
    return FusedRNNTJoint


def __getattr__(name: str) -> Any:
    if name == "FusedRNNTJoint":
        return _joint_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
