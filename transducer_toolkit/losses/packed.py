# SPDX-License-Identifier: Apache-2.0
"""The exact transducer loss on packed or padded logits, through the compiled stages."""

from typing import Any

from torch import Tensor, nn

from transducer_toolkit.ops import checks, native
from transducer_toolkit.ops.lattice import LatticeShape, Lengths, check_shape
from transducer_toolkit.ops.logits_loss import LogitsInputs, logits_loss, most_frames
from transducer_toolkit.ops.options import LossOptions
from transducer_toolkit.ops.restriction import Restriction
from transducer_toolkit.ops.topology import get_topology


def transducer_loss(
    logits: Tensor,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    blank: int,
    from_log_softmax: bool = False,
    one_sym_per_frame: bool = False,
    reduction: str = "mean",
    *,
    topology: str = "regular",
    normalization: str = "softmax",
    fastemit_lambda: float = 0.0,
    delay_penalty: float = 0.0,
    clamp: float = 0.0,
    inplace: bool = False,
    alignment: Tensor | None = None,
    left: int = 0,
    right: int = 0,
    shape: LatticeShape | None = None,
    validate: bool | None = None,
) -> Tensor:
    """Computes the negative log-probability of the targets under an RNN-Transducer.

    The probability of a target sequence is a sum over all paths through the lattice, from cell
    (0, 0) to a final blank in cell (T_b - 1, U_b). The probability of a path is the product of its
    blank and label probabilities::

        loss_b = -log alpha(T_b - 1, U_b) - log_softmax(logits(T_b - 1, U_b))[blank]
        alpha(t, u) = alpha(t - 1, u) * P(blank | t - 1, u) + alpha(t, u - 1) * P(y_u | t, u - 1)

    Forward reads the logits once. Backward reads them again and writes their gradient. No other
    tensor of the logits' size is made.

    With padded logits the loss equals ``torchaudio.functional.rnnt_loss``; with packed logits it
    equals ``optimized_transducer.transducer_loss``, whose argument order it has.

    Args:
        logits: joiner outputs, float16, bfloat16, float32 or float64; packed
            ``(sum_b T_b * (U_b + 1), V)``, in the order of
            :class:`~transducer_toolkit.LatticeShape`, or padded ``(B, T, U + 1, V)``. They are not
            normalized, unless `from_log_softmax`. -inf means probability zero.
        targets: (B, U) int32 or int64 labels in [0, V) other than blank, on the device of logits.
            Padding may hold any value.
        logit_lengths: (B,) int32 or int64, the number of frames T_b >= 1 of each utterance; on the
            CPU (preferred, since it needs no synchronization) or on the device of logits.
        target_lengths: (B,) int32 or int64, the number of labels U_b >= 0 of each utterance; on the
            CPU or on the device of logits.
        blank: index of the blank symbol in [0, V).
        from_log_softmax: the logits are log-probabilities already, and the gradient is with respect
            to them. Only the entries of blank and label are read and get a gradient.
        one_sym_per_frame: another way to write ``topology="one_sym_per_frame"``.
        reduction: "none" (B,), "mean" over utterances, or "sum".
        topology: which arcs the lattice has. "regular": a label stays on its frame. The others
            advance one frame with every label: "modified" (a path may end with a label),
            "constrained" (a blank follows every label on its frame) and "one_sym_per_frame" (a path
            ends with a blank). For "tdt-0-1-2" and "multi_blank-2-4" see
            :func:`~transducer_toolkit.tdt_loss` and :func:`~transducer_toolkit.multi_blank_loss`.
        normalization: "softmax" of all symbols, or "hat" (hybrid autoregressive transducer):
            ``P(blank) = sigmoid(logit of blank)``, and the labels share the rest by the softmax of
            their logits. The labels then are a language model of their own, which a decoder can
            take out.
        fastemit_lambda: >= 0; multiplies the gradient through label arcs by 1 + lambda, which makes
            labels earlier (FastEmit). The value of the loss does not change.
        delay_penalty: >= 0; adds ``delay_penalty * ((T_b - 1) / 2 - t)`` to the log-probability of
            every label at frame t. The value of the loss changes.
        clamp: > 0 limits each d loss_b / d logit to [-clamp, clamp] before the upstream gradient
            multiplies it; <= 0 is off.
        inplace: backward writes the gradient over the logits instead of into a new tensor. This
            works in eager mode only. The logits must be neither a leaf nor a view (``nn.Linear``
            returns a view for padded input), and no other backward may need them. A second backward
            raises an error.
        alignment: (B, U) int32 or int64, on the CPU or on the device of logits: the frame a_u of
            each label, from any aligner; not decreasing. Label u may be emitted on the frames
            ``a_u - left`` to ``a_u + right`` only (alignment-restricted transducer). The cells
            outside of these windows are not read, and their gradient is 0. Padding may hold any
            value. None: no restriction.
        left: >= 0, frames that a label may be emitted before its frame in the alignment.
        right: >= 0, frames that a label may be emitted behind its frame in the alignment.
        shape: the lattices; other lengths than those of the call are an error, if both are on the
            CPU. After ``shape.to(device)`` the loss copies nothing to the device, so that it can be
            captured in a CUDA graph.
        validate: whether to check lengths, labels and the alignment. None checks those that can be
            read without waiting for a device. Without a check, an invalid label or length gives its
            utterance a NaN loss and never reads outside of a tensor.

    Returns:
        The loss in nats, float64 for float64 logits and float32 otherwise. If -inf logits, or an
        alignment that is not checked, leave an utterance no path, its loss is +inf and its gradient
        zero. If its logits hold NaN, +inf or a row of nothing but -inf, its loss and its gradient
        are NaN; other utterances are not affected. An utterance whose upstream gradient is 0 gets a
        zero gradient, so that ``torch.where`` can mask a non-finite loss.

    Raises:
        TypeError: not a tensor, or a wrong dtype.
        ValueError: sizes, devices, blank, reduction, options, lengths, labels or an alignment that
            do not fit; an alignment that leaves an utterance no path; names the argument or
            utterance, what was expected and what came.
        RuntimeError: no stage for this device in this build; a second derivative.

    Example:
        >>> import torch
        >>> logits = torch.zeros(2 * 2 + 3 * 1, 5, requires_grad=True)
        >>> loss = transducer_loss(
        ...     logits,
        ...     targets=torch.tensor([[1], [-1]]),
        ...     logit_lengths=torch.tensor([2, 3]),
        ...     target_lengths=torch.tensor([1, 0]),
        ...     blank=0,
        ...     reduction="sum",
        ... )
        >>> round(loss.item(), 4)  # 3 log 5 - log 2, and 3 log 5
        8.9635
        >>> loss.backward()
        >>> logits.grad.shape
        torch.Size([7, 5])

    Source:
        A. Graves, "Sequence Transduction with Recurrent Neural Networks", 2012, eq. 12-22; packing:
        J. Li et al., "Improving RNN Transducer Modeling for End-to-End Speech Recognition", 2019;
        restriction: J. Mahadeokar et al., "Alignment Restricted Streaming Recurrent Neural Network
        Transducer", 2020; HAT: E. Variani et al., "Hybrid Autoregressive Transducer (HAT)", 2020,
        arXiv:2003.07705.
    """
    checks.check_reduction(reduction)
    options = LossOptions(
        blank=blank,
        topology=_topology(topology, one_sym_per_frame),
        normalization=normalization,
        from_log_softmax=from_log_softmax,
        fastemit_lambda=fastemit_lambda,
        delay_penalty=delay_penalty,
        clamp=clamp,
        validate=validate,
    )
    check_logits(logits, targets, logit_lengths, target_lengths, options)
    checks.check_flag(inplace, "inplace")
    restriction = Restriction.of(alignment, left, right, targets)
    check_shape(shape, logit_lengths, target_lengths)
    lengths = (logit_lengths, target_lengths) if shape is None else shape.lengths
    index = None if shape is None else shape.index(logits.device)
    windows = None
    if restriction is not None:
        num_frames = most_frames(logits, lengths[0])
        windows = restriction.checked_windows(Lengths(*lengths, index), options, num_frames)
        windows = native.to_device(windows, logits.device)
    inputs = LogitsInputs(logits, targets, *lengths, shape_index=index, windows=windows)
    return checks.reduce_losses(logits_loss(inputs, options, inplace=inplace).losses, reduction)


class TransducerLoss(nn.Module):
    """Module form of :func:`transducer_loss`: options here, tensors in forward.

    Example:
        >>> import torch
        >>> criterion = TransducerLoss(blank=0, reduction="sum")
        >>> lengths = torch.tensor([2]), torch.tensor([1])
        >>> criterion(torch.zeros(1, 2, 2, 5), torch.tensor([[1]]), *lengths)
        tensor(4.1352)
    """

    def __init__(
        self,
        blank: int,
        from_log_softmax: bool = False,
        one_sym_per_frame: bool = False,
        reduction: str = "mean",
        *,
        topology: str = "regular",
        normalization: str = "softmax",
        fastemit_lambda: float = 0.0,
        delay_penalty: float = 0.0,
        clamp: float = 0.0,
        inplace: bool = False,
        left: int = 0,
        right: int = 0,
        validate: bool | None = None,
    ) -> None:
        super().__init__()
        checks.check_reduction(reduction)
        checks.check_at_least(0, left=left, right=right)
        self.options: dict[str, Any] = {
            "blank": blank,
            "from_log_softmax": from_log_softmax,
            "one_sym_per_frame": one_sym_per_frame,
            "reduction": reduction,
            "topology": topology,
            "normalization": normalization,
            "fastemit_lambda": fastemit_lambda,
            "delay_penalty": delay_penalty,
            "clamp": clamp,
            "inplace": inplace,
            "left": left,
            "right": right,
            "validate": validate,
        }
        LossOptions.check(self.options | {"topology": _topology(topology, one_sym_per_frame)})

    def forward(
        self,
        logits: Tensor,
        targets: Tensor,
        logit_lengths: Tensor,
        target_lengths: Tensor,
        shape: LatticeShape | None = None,
        alignment: Tensor | None = None,
    ) -> Tensor:
        lengths = logit_lengths, target_lengths
        options = {**self.options, "shape": shape, "alignment": alignment}
        return transducer_loss(logits, targets, *lengths, **options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def _topology(topology: str, one_sym_per_frame: bool) -> str:
    """Returns the topology; `one_sym_per_frame` is another name for one."""
    checks.check_flag(one_sym_per_frame, "one_sym_per_frame")
    get_topology(topology)
    if not one_sym_per_frame:
        return topology
    if topology not in ("regular", "one_sym_per_frame"):
        raise ValueError(f"one_sym_per_frame: expected False with topology {topology!r}, got True")
    return "one_sym_per_frame"


def check_logits(
    logits: Tensor,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    options: LossOptions,
) -> None:
    """Checks types, dtypes, devices and shapes of a loss's tensors, and blank."""
    checks.check_tensor(logits, "logits")
    checks.check_dtype(logits, "logits", native.SUPPORTED_DTYPES)
    if logits.dim() not in (2, 4):
        raise ValueError(
            "logits: expected packed (sum_b T_b * (U_b + 1), V) or padded (B, T, U + 1, V), "
            f"got shape {tuple(logits.shape)}"
        )
    checks.check_targets_and_lengths(targets, logit_lengths, target_lengths, logits.device)
    if logits.dim() == 4:
        num_utterances, _, columns, _ = logits.shape
        if (num_utterances, columns) != (targets.size(0), targets.size(1) + 1):
            raise ValueError(
                f"logits: expected shape ({targets.size(0)}, T, {targets.size(1) + 1}, V), B and "
                f"U + 1 from targets {tuple(targets.shape)}, got {tuple(logits.shape)}"
            )
    vocab_size = options.vocab_size(logits.size(-1))
    checks.check_blank(options.blank, vocab_size)
    checks.check_labels_of_hat(options.is_hat, vocab_size)
    checks.check_big_blanks(options.arcs.num_big_blanks, vocab_size)
