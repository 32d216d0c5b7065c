# SPDX-License-Identifier: Apache-2.0
"""What each bad input gets: an error that names it."""

import pytest
import torch

from tests.losses.helpers import ragged_batch
from transducer_toolkit import LatticeShape, TransducerLoss, transducer_loss

pytestmark = pytest.mark.usefixtures("stages")


def arguments(**changes):
    batch = ragged_batch([4, 3], [2, 1], 5, padding=0.0)
    values = {
        "logits": batch.logits,
        "targets": batch.targets,
        "logit_lengths": batch.logit_lengths,
        "target_lengths": batch.target_lengths,
        "blank": 0,
    }
    for name, change in changes.items():
        values[name] = change(values[name]) if callable(change) else change
    return values


def targets_with(value, index=(0, 1)):
    def change(targets):
        targets = targets.clone()
        targets[index] = value
        return targets

    return change


CASES = [
    ({"logits": lambda x: x.tolist()}, TypeError, "logits: expected a torch.Tensor, got list"),
    ({"logits": lambda x: x.int()}, TypeError, "logits: expected dtype .* got torch.int32"),
    ({"logits": lambda x: x[0]}, ValueError, r"logits: expected packed .* got shape \(4, 3, 5\)"),
    (
        {"logits": lambda x: x[:, :, :2]},
        ValueError,
        r"logits: expected shape \(2, T, 3, V\), .* got \(2, 4, 2, 5\)",
    ),
    (
        {"logits": lambda x: x.reshape(-1, 5)[:17]},
        ValueError,
        "logits: expected 18 rows, .* got 17",
    ),
    (
        {"logits": lambda x: x.new_zeros(19, 5)},
        ValueError,
        "logits: expected 18 rows, .* got 19",
    ),
    ({"targets": lambda x: x.float()}, TypeError, "targets: expected dtype int32, int64"),
    ({"targets": lambda x: x[0]}, ValueError, r"targets: expected shape \(B, U\), got \(2,\)"),
    ({"targets": lambda x: x[:0]}, ValueError, "got B = 0"),
    ({"targets": targets_with(5)}, ValueError, r"utterance 0.*label in \[0, 5\), got 5"),
    ({"targets": targets_with(10**8)}, ValueError, "got 100000000"),
    ({"targets": targets_with(-1)}, ValueError, r"targets\[0, 1\].* got -1"),
    ({"targets": targets_with(0, (1, 0))}, ValueError, r"targets\[1, 0\].*other than blank \(0\)"),
    ({"logit_lengths": lambda x: x[:1]}, ValueError, r"logit_lengths: expected shape \(2,\)"),
    ({"logit_lengths": lambda x: x.double()}, TypeError, "logit_lengths: expected dtype"),
    ({"logit_lengths": [4, 3]}, TypeError, "logit_lengths: expected a torch.Tensor, got list"),
    ({"logit_lengths": torch.tensor([4, 0])}, ValueError, r"logit_lengths\[1\]: .* got 0"),
    ({"logit_lengths": torch.tensor([-1, 3])}, ValueError, r"logit_lengths\[0\]: .* got -1"),
    ({"logit_lengths": torch.tensor([4, 5])}, ValueError, r"logit_lengths\[1\]: expected 1 to 4"),
    ({"target_lengths": torch.tensor([3, 1])}, ValueError, r"target_lengths\[0\]: .* 0 to 2 .* 3"),
    ({"target_lengths": torch.tensor([2, -1])}, ValueError, r"target_lengths\[1\]: .* got -1"),
    ({"blank": 5}, ValueError, "blank: expected 0 <= blank < 5 .* got 5"),
    ({"blank": -1}, ValueError, r"blank: .* \(V\), got -1; the last symbol is 4"),
    ({"reduction": "avg"}, ValueError, "reduction: expected one of .* got 'avg'"),
    (
        {"fastemit_lambda": -0.1},
        ValueError,
        "fastemit_lambda: expected a finite number >= 0, got -0.1",
    ),
    ({"delay_penalty": float("nan")}, ValueError, "delay_penalty: .* got nan"),
    ({"delay_penalty": float("inf")}, ValueError, "delay_penalty: .* got inf"),
    ({"clamp": float("nan")}, ValueError, "clamp: expected a number, got nan"),
    ({"blank": 0.5}, TypeError, "blank: expected an int, got float"),
    (
        {"one_sym_per_frame": True, "logit_lengths": torch.tensor([2, 3])},
        ValueError,
        "utterance 0: topology 'one_sym_per_frame' needs at least 3 frames for 2 symbols, got 2",
    ),
    ({"targets": lambda x: x.to("meta")}, ValueError, "targets: expected device cpu"),
    ({"target_lengths": lambda x: x.to("meta")}, ValueError, "target_lengths: expected device"),
    (
        {"shape": LatticeShape.from_lengths([4, 2], [2, 1])},
        ValueError,
        "shape: expected the logit_lengths of the call, got 2 and not 3 for utterance 1",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), CASES)
def test_message(changes, error, message):
    with pytest.raises(error, match=message):
        transducer_loss(**arguments(**changes))


def test_unknown_option_is_an_error():
    with pytest.raises(TypeError, match="unexpected keyword argument 'fast_emit'"):
        transducer_loss(**arguments(), fast_emit=1)


def test_module_checks_its_options_at_once():
    with pytest.raises(ValueError, match="reduction"):
        TransducerLoss(blank=0, reduction="avg")
    with pytest.raises(ValueError, match="delay_penalty"):
        TransducerLoss(blank=0, delay_penalty=-1)


def test_device_without_stages():
    logits = torch.empty(2, 4, 3, 5, device="meta")
    targets = torch.empty(2, 2, dtype=torch.long, device="meta")
    lengths = torch.tensor([4, 3]), torch.tensor([2, 1])
    with pytest.raises(RuntimeError, match="expected type cpu or cuda, got 'meta'"):
        transducer_loss(logits, targets, *lengths, blank=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"targets": targets_with(10**15)},
        {"targets": targets_with(5)},  # V: the next row begins there
        {"targets": targets_with(-7)},
        {"logit_lengths": torch.tensor([10**12, 3])},
        {"logit_lengths": torch.tensor([0, 3])},
        {"logit_lengths": torch.tensor([-(10**12), 3])},
        {"target_lengths": torch.tensor([10**12, 1])},
        {"target_lengths": torch.tensor([-5, 1])},
    ],
)
def test_unvalidated_nonsense_is_nan_for_that_utterance_only(changes):
    expected = transducer_loss(**(clean := arguments()), reduction="none")
    values = clean | {
        name: change(clean[name]) if callable(change) else change
        for name, change in changes.items()
    }
    loss = transducer_loss(**values, reduction="none", validate=False)
    assert loss[0].isnan() and loss[1] == expected[1]
    loss[1].backward()
    assert values["logits"].grad[1].isfinite().all()


def test_lengths_whose_product_overflows():
    """2**62 + 1 frames of 4 cells are 4 cells modulo 2**64."""
    values = (torch.randn(4, 5), torch.tensor([[1, 2, 3]]), torch.tensor([2**62 + 1]))
    with pytest.raises(ValueError, match=r"logit_lengths\[0\]: expected 1 to 4"):
        transducer_loss(*values, torch.tensor([3]), blank=0)
    assert transducer_loss(*values, torch.tensor([3]), blank=0, validate=False).isnan()


def test_unvalidated_negative_lengths_leave_no_memory_in_the_gradient():
    logits = torch.randn(2, 5, requires_grad=True)
    one, lengths = torch.tensor([[1]]), (torch.tensor([-1]), torch.tensor([-3]))
    loss = transducer_loss(logits, one, *lengths, blank=0, reduction="none", validate=False)
    assert loss.isnan().all()
    loss.sum().backward()
    assert logits.grad.isnan().all()


def test_invalid_utterance_can_be_masked_out():
    values = arguments(logit_lengths=torch.tensor([4, 9]))
    loss = transducer_loss(**values, reduction="none", validate=False)
    torch.where(loss.isnan(), 0.0, loss).sum().backward()
    assert values["logits"].grad.isfinite().all() and values["logits"].grad[0].any()
