# SPDX-License-Identifier: Apache-2.0
"""Replacements for the transducer loss, the joint and the output layer of SpeechBrain.

A hyperparameter file names them instead of SpeechBrain's, and the recipe stays as it is::

    transducer_cost: !name:transducer_toolkit.compat.speechbrain.transducer_loss
        blank_index: !ref <blank_index>

:class:`Transducer_joint` and :class:`Linear` together make the loss compute without logits.
SpeechBrain need not be installed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from transducer_toolkit.compat.common import JointInputs, activation_of, joint_summands
from transducer_toolkit.losses.packed import transducer_loss as _transducer_loss
from transducer_toolkit.modules.joiner import is_plain_linear
from transducer_toolkit.ops import checks


def transducer_loss(
    logits: Tensor | JointInputs,
    targets: Tensor,
    input_lens: Tensor,
    target_lens: Tensor,
    blank_index: int,
    reduction: str = "mean",
    use_torchaudio: bool = True,
) -> Tensor:
    """Computes the transducer loss with the signature of ``speechbrain.nnet.losses``.

    Args:
        logits: (B, T, U + 1, V), or the output of :class:`Linear` behind :class:`Transducer_joint`.
        targets: (B, U) labels.
        input_lens: (B,) relative lengths in (0, 1]: the fraction of T.
        target_lens: (B,) relative lengths in [0, 1]: the fraction of U.
        blank_index: index of blank.
        reduction: "none", "mean" over utterances, or "sum".
        use_torchaudio: True: the values of torchaudio, which SpeechBrain 1.0 computes by default.
            False: each loss is divided by its number of frames, as in SpeechBrain's Numba kernels.
            The gradient always is that of the value. The gradient of the Numba kernels is that of
            ``reduction="sum", use_torchaudio=True``, whatever their reduction.

    Example:
        >>> one = torch.tensor([1.0])
        >>> transducer_loss(torch.zeros(1, 1, 2, 4), torch.tensor([[2]]), one, one, 0)
        tensor(2.7726)
    """
    checks.check_tensor(targets, "targets")
    num_frames = logits.enc.size(1) if isinstance(logits, JointInputs) else logits.size(1)
    lengths = _absolute(input_lens, num_frames), _absolute(target_lens, targets.size(1))
    return TransducerLoss(blank_index, reduction, use_torchaudio)(logits, targets, *lengths)


class TransducerLoss(nn.Module):
    """Transducer loss of absolute lengths, as SpeechBrain's class; it runs on the CPU, too.

    Args:
        blank: index of blank.
        reduction: as in :func:`transducer_loss`.
        use_torchaudio: as in :func:`transducer_loss`; SpeechBrain's class is its Numba kernels.

    Example:
        >>> one = torch.tensor([1])
        >>> TransducerLoss(blank=0)(torch.zeros(1, 1, 2, 4), torch.tensor([[2]]), one, one)
        tensor(2.7726)
    """

    def __init__(
        self, blank: int = 0, reduction: str = "mean", use_torchaudio: bool = True
    ) -> None:
        super().__init__()
        checks.check_int(blank, "blank")
        checks.check_reduction(reduction)
        checks.check_flag(use_torchaudio, "use_torchaudio")
        self.blank, self.reduction, self.use_torchaudio = blank, reduction, use_torchaudio

    def forward(self, logits: Tensor | JointInputs, labels: Tensor, T: Tensor, U: Tensor) -> Tensor:
        """Computes the loss.

        Args:
            logits: as in :func:`transducer_loss`.
            labels: (B, U) labels.
            T: (B,) number of frames.
            U: (B,) number of labels.
        """
        indices = labels, T, U, self.blank
        if isinstance(logits, JointInputs):
            losses = logits.loss(*indices, reduction="none")
        else:
            losses = _transducer_loss(logits, *indices, reduction="none")
        if not self.use_torchaudio:
            losses = losses / T.to(losses)
        return checks.reduce_losses(losses, self.reduction)


class Transducer_joint(nn.Module):
    """SpeechBrain's ``Transducer_joint`` for the fused loss.

    In a training step and in validation it returns its inputs, which :class:`Linear` takes. For a
    single frame and label, as in a search, it returns the sum.

    Args:
        joint_network: None; a network between joint and output layer cannot be fused.
        joint: "sum".
        nonlinearity: the class of an activation, or a function that makes one: tanh, ReLU, GELU,
            SiLU or identity.

    Raises:
        ValueError: an argument that the fused loss lacks.

    Example:
        >>> joint = Transducer_joint(nonlinearity=torch.nn.Tanh)
        >>> output = Linear(n_neurons=5, input_size=4)
        >>> logits = output(joint(torch.zeros(2, 6, 1, 4), torch.zeros(2, 1, 3, 4)))
        >>> lengths, labels = torch.ones(2), torch.tensor([[1, 2], [3, 4]])
        >>> transducer_loss(logits, labels, lengths, lengths, 0).shape
        torch.Size([])
    """

    def __init__(
        self,
        joint_network: None = None,
        joint: str = "sum",
        nonlinearity: Callable[[], nn.Module] = nn.LeakyReLU,
    ) -> None:
        super().__init__()
        if joint_network is not None:
            raise ValueError(
                f"joint_network: expected null, got {type(joint_network).__name__}; the fused loss "
                "has no network between joint and output layer"
            )
        checks.check_choice(joint, "joint", ("sum",))
        self.joint, self.nonlinearity = joint, nonlinearity()
        self.activation = activation_of(self.nonlinearity, "nonlinearity")

    def forward(self, input_TN: Tensor, input_PN: Tensor) -> Tensor | JointInputs:
        """Returns the inputs of the fused loss, or the activation of their sum for one cell.

        Args:
            input_TN: (B, T, 1, D) encoder frames in joiner width.
            input_PN: (B, 1, U + 1, D) predictor outputs in joiner width.
        """
        summands = joint_summands(input_TN, input_PN)
        if summands is not None:
            return JointInputs(*summands, self.activation)
        output: Tensor = self.nonlinearity(input_TN + input_PN)
        return output


class Linear(nn.Module):
    """SpeechBrain's ``Linear`` as output layer behind :class:`Transducer_joint`.

    The names of its weights are SpeechBrain's, so checkpoints load.

    Args:
        n_neurons: V, including blank.
        input_shape: shape of the input, whose last size is D.
        input_size: D.
        bias: whether the layer has a bias.

    Example:
        >>> Linear(n_neurons=5, input_size=4)(torch.zeros(2, 4)).shape
        torch.Size([2, 5])
    """

    def __init__(
        self,
        n_neurons: int,
        input_shape: Sequence[int] | None = None,
        input_size: int | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if input_size is None:
            if input_shape is None:
                raise ValueError("input_size: expected an int, or input_shape, got neither")
            input_size = input_shape[-1]
        self.w = nn.Linear(input_size, n_neurons, bias=bias)

    def forward(self, x: Tensor | JointInputs) -> Tensor | JointInputs:
        """Adds the weights to the inputs of the fused loss, or computes logits of a tensor."""
        if not isinstance(x, JointInputs):
            logits: Tensor = self.w(x)
            return logits
        if not is_plain_linear(self.w):
            raise ValueError(f"w: expected a plain torch.nn.Linear, got {type(self.w).__name__}")
        return dataclasses.replace(x, weight=self.w.weight, bias=self.w.bias)


def _absolute(relative: Tensor, size: int) -> Tensor:
    """Returns lengths of relative lengths, rounded as SpeechBrain does."""
    checks.check_tensor(relative, "input_lens and target_lens")
    return (relative * size).round().int()
