# SPDX-License-Identifier: Apache-2.0
"""What bad input to the simple losses gets: an error that names it, or a loss that shows it."""

import pytest
import torch

from tests.losses.additive import additive_batch, boundary_row
from transducer_toolkit import rnnt_loss_simple, rnnt_loss_smoothed
from transducer_toolkit.ops import checks
from transducer_toolkit.ops.topology import K2_TOPOLOGIES

FULL = [boundary_row(4, 2)] * 2


def grads_of(loss, *tensors):
    return torch.autograd.grad(loss.sum(), tensors, retain_graph=True)


def bad_call(**changes):
    batch = additive_batch(FULL, 5, padding=0.0, extra=0)
    values = {
        "lm": batch.lm,
        "am": batch.am,
        "symbols": batch.symbols,
        "termination_symbol": 0,
        "boundary": batch.boundary,
    }
    for name, change in changes.items():
        values[name] = change(values[name]) if callable(change) else change
    return rnnt_loss_smoothed(**values)


def with_value(index, value):
    def change(tensor):
        tensor = tensor.clone()
        tensor[index] = value
        return tensor

    return change


BAD = [
    ({"lm": lambda x: x.tolist()}, TypeError, r"lm: expected a torch\.Tensor, got list"),
    ({"am": lambda x: x.int()}, TypeError, r"am: expected dtype .* got torch\.int32"),
    ({"am": lambda x: x.float()}, TypeError, r"am: expected dtype torch\.float64, that of lm"),
    ({"am": lambda x: x.to("meta")}, ValueError, "am: expected device cpu, that of lm, got meta"),
    ({"lm": lambda x: x[0]}, ValueError, r"lm: expected shape \(B, S \+ 1, V\), got \(3, 5\)"),
    ({"am": lambda x: x[0]}, ValueError, r"am: expected shape \(B, T, V\), got \(4, 5\)"),
    ({"lm": lambda x: x[:, :2]}, ValueError, r"lm: expected shape \(2, 3, 5\), .* \(2, 2, 5\)"),
    ({"lm": lambda x: x[:, :, :4]}, ValueError, r"lm: expected shape \(2, 3, 5\)"),
    ({"am": lambda x: x[:1]}, ValueError, r"am: expected shape \(2, T, V\) .* got \(1, 4, 5\)"),
    ({"am": lambda x: x[:, :0]}, ValueError, r"am: .* T >= 1, .* got \(2, 0, 5\)"),
    ({"symbols": lambda x: x.double()}, TypeError, "symbols: expected dtype int32, int64"),
    ({"symbols": lambda x: x[0]}, ValueError, r"symbols: expected shape \(B, S\), got \(2,\)"),
    ({"symbols": lambda x: x[:0]}, ValueError, "symbols: expected at least 1 utterance"),
    ({"symbols": lambda x: x.to("meta")}, ValueError, "symbols: expected device cpu"),
    (
        {"symbols": with_value((1, 0), 5)},
        ValueError,
        r"symbols\[1, 0\] \(utterance 1\): expected a symbol in \[0, 5\), got 5",
    ),
    ({"symbols": with_value((0, 1), -1)}, ValueError, r"symbols\[0, 1\].* got -1"),
    ({"termination_symbol": 5}, ValueError, "termination_symbol: .* < 5 .* got 5"),
    ({"termination_symbol": -1}, ValueError, "termination_symbol: .* got -1"),
    ({"termination_symbol": 1.0}, TypeError, "termination_symbol: expected an int, got float"),
    ({"boundary": lambda x: x.float()}, TypeError, "boundary: expected dtype int32, int64"),
    ({"boundary": lambda x: x[:1]}, ValueError, r"boundary: expected shape \(2, 4\)"),
    (
        {"boundary": with_value((1, 3), 0)},
        ValueError,
        r"boundary\[1\] \(utterance 1\): .* t_begin < t_end <= 4, got t_begin = 0, t_end = 0",
    ),
    ({"boundary": with_value((1, 3), 5)}, ValueError, "utterance 1.* t_end = 5"),
    ({"boundary": with_value((0, 2), 3)}, ValueError, "utterance 0.* s_end = 3"),
    (
        {"boundary": with_value((0, 3), 1), "rnnt_type": "modified"},
        ValueError,
        "utterance 0: topology 'modified' needs at least",
    ),
    ({"rnnt_type": "other"}, ValueError, "rnnt_type: expected one of .* got 'other'"),
    ({"reduction": "max"}, ValueError, "reduction: expected one of .* got 'max'"),
    ({"delay_penalty": -1.0}, ValueError, r"delay_penalty: .* got -1\.0"),
    (
        {"lm_only_scale": -0.1},
        ValueError,
        r"lm_only_scale: expected a number in \[0, 1\], got -0\.1",
    ),
    ({"am_only_scale": float("nan")}, ValueError, "am_only_scale: .* got nan"),
    (
        {"lm_only_scale": 0.6, "am_only_scale": 0.6},
        ValueError,
        r"expected a sum of at most 1, got 0\.6 \+ 0\.6",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD)
def test_bad_input_is_named(changes, error, message):
    with pytest.raises(error, match=message):
        bad_call(**changes)


# --- non-finite values --------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("rnnt_type", K2_TOPOLOGIES)
@pytest.mark.parametrize("which", [0, 1])
def test_one_bad_utterance_leaves_the_others_alone(value, rnnt_type, which):
    batch = additive_batch([boundary_row(3, 2)] * 3, dtype=torch.float32)
    options = {"boundary": batch.boundary, "rnnt_type": rnnt_type, "reduction": "none"}
    clean = rnnt_loss_simple(*batch.arguments, **options)
    clean_grads = grads_of(clean, *batch.inputs)
    with torch.no_grad():
        batch.inputs[which][1, 1, 4] = value
    loss = rnnt_loss_simple(*batch.arguments, **options)
    assert loss[1].isnan() and torch.equal(loss[[0, 2]], clean[[0, 2]])
    for grad, clean_grad in zip(grads_of(loss, *batch.inputs), clean_grads, strict=True):
        assert grad[1].isnan().any() and torch.equal(grad[[0, 2]], clean_grad[[0, 2]])
    masked = torch.where(loss.isfinite(), loss, 0.0)
    for grad, clean_grad in zip(grads_of(masked, *batch.inputs), clean_grads, strict=True):
        assert grad[1].eq(0).all() and torch.equal(grad[[0, 2]], clean_grad[[0, 2]])


def test_rows_of_minus_infinity():
    batch = additive_batch(FULL, 4, extra=0)
    with torch.no_grad():
        batch.am[0, 1, :2] = float("-inf")
        batch.lm[0, 1, 2:] = float("-inf")  # together they leave nothing
        batch.am[1, 3, 0] = float("-inf")  # no final blank
    losses = rnnt_loss_simple(*batch.arguments, reduction="none")
    assert losses[0].isnan() and losses[1] == float("inf")
    for grad in grads_of(losses, *batch.inputs):
        assert grad[1].eq(0).all()
    with torch.no_grad():
        batch.am[0, 1] = float("-inf")
    assert rnnt_loss_simple(*batch.arguments, reduction="none")[0].isnan()


def test_invalid_values_nobody_checked_give_nan(monkeypatch):
    # The values of a boundary on a device are not read.
    monkeypatch.setattr(checks, "check_boundary_values", lambda *_, **__: None)
    batch = additive_batch([boundary_row(3, 2)] * 3, padding=0.0)
    batch.boundary[1, 3] = 50
    losses = rnnt_loss_simple(*batch.arguments, boundary=batch.boundary, reduction="none")
    assert losses[1].isnan() and losses[[0, 2]].isfinite().all()
