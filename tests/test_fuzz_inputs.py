# SPDX-License-Identifier: Apache-2.0
"""A few hundred cases of each soak fuzz, and the findings of earlier runs."""

import pytest
import torch

import transducer_toolkit as tt
from tests.losses.additive import additive_batch, boundary_row
from tests.soak import fuzz_numerics
from tests.soak.calls import FUNCTIONS
from tests.soak.fuzz_inputs import finding_of, fuzz, make_case

NUM_CASES = 400


@pytest.mark.filterwarnings("ignore")
def test_spoilt_calls_in_a_process_that_may_die():
    findings = list(fuzz(range(NUM_CASES), list(FUNCTIONS)))
    assert not findings


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_has_valid_and_spoilt_calls(name):
    """Valid calls succeed and are right; others are spoilt."""
    cases = [make_case(seed, [name]) for seed in range(40)]
    assert all(case.function == name for case in cases)
    assert any(not case.spoilt for case in cases) and any(case.spoilt for case in cases)
    assert all(finding_of(case) is None for case in cases if not case.spoilt)


def _long_only(right):
    def function(target_lengths, **kwargs):
        if getattr(target_lengths, "dtype", None) == torch.int32:
            raise ValueError("target_lengths must be int64")
        return right(target_lengths=target_lengths, **kwargs)

    return function


def _nameless_errors(right):
    def function(**kwargs):
        try:
            return right(**kwargs)
        except (TypeError, ValueError) as error:
            raise ValueError("bad input") from error

    return function


def _no_errors(right):
    def function(**kwargs):
        try:
            return right(**kwargs)
        except (TypeError, ValueError):
            return torch.tensor(float("nan"))

    return function


def test_a_defect_is_found(monkeypatch):
    """The fuzz itself: a loss that is off by a thousandth, a crash, a wrong check, none at all."""
    right, generate = FUNCTIONS["transducer_loss"]
    for wrong, kind in (
        (_long_only(right), "refuses what is valid"),
        (_nameless_errors(right), "an error that names no argument"),
        (_no_errors(right), "accepts what is not valid"),
        (_no_errors(right), "accepts what has no right result"),
        (lambda **kwargs: 1.001 * right(**kwargs), "a wrong number"),
        (lambda **kwargs: [][0], "IndexError"),
        (lambda logits, **kwargs: right(logits=logits.abs_(), **kwargs), "changes an argument"),
    ):
        monkeypatch.setitem(FUNCTIONS, "transducer_loss", (wrong, generate))
        cases = (make_case(seed, ["transducer_loss"]) for seed in range(100))
        kinds = {found[0] for found in map(finding_of, cases) if found is not None}
        assert kind in kinds


@pytest.mark.parametrize("seed", range(12))
def test_numbers_are_within_the_error_budget(seed):
    case = fuzz_numerics.make_case(seed)
    assert not fuzz_numerics.problems(case), case.name()


# --- what it found ------------------------------------------------------------------------------

LOGITS, LABEL, ONE = torch.zeros(1, 1, 2, 5), torch.tensor([[2]]), torch.tensor([1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": LOGITS.to_sparse()}, r"logits: expected a dense .* layout torch.sparse_coo"),
        ({"targets": LABEL.to_sparse_csr()}, "targets: expected a dense torch.Tensor"),
        ({"logit_lengths": torch.nested.nested_tensor([ONE])}, r"logit_lengths: .* nested tensor"),
        ({"from_log_softmax": "yes"}, "from_log_softmax: expected a bool, got str"),
        ({"inplace": 1}, "inplace: expected a bool, got int"),
        ({"validate": "no"}, "validate: expected a bool, got str"),
        ({"delay_penalty": "0.1"}, "delay_penalty: expected a number, got str"),
        ({"clamp": None}, "clamp: expected a number, got NoneType"),
    ],
)
def test_types_are_named(changes, message):
    arguments = {"logits": LOGITS, "targets": LABEL, "logit_lengths": ONE, "target_lengths": ONE}
    with pytest.raises(TypeError, match=message):
        tt.transducer_loss(**arguments | {"blank": 0} | changes)


def test_types_are_named_elsewhere():
    enc = torch.zeros(1, 1, 3)
    for tile_cells in (True, 2.0):
        with pytest.raises(ValueError, match="tile_cells: expected None or an int of at least 1"):
            tt.fused_joiner_loss(
                *(enc, torch.zeros(1, 2, 3), torch.zeros(5, 3), None),
                *(LABEL, ONE, ONE, 0),
                tile_cells=tile_cells,
            )
    with pytest.raises(TypeError, match="termination_symbol: expected an int, got bool"):
        tt.rnnt_loss_simple(torch.zeros(1, 2, 5), torch.zeros(1, 1, 5), LABEL, False)
    with pytest.raises(TypeError, match="return_grad: expected a bool, got str"):
        tt.mutual_information_recursion(torch.zeros(1, 1, 2), torch.zeros(1, 2, 1), None, "yes")
    with pytest.raises(TypeError, match="logit_lengths: expected integers, got 'three'"):
        tt.LatticeShape.from_lengths("three", [1])
    with pytest.raises(ValueError, match=r"target_lengths: expected a tensor with data, .* meta"):
        tt.LatticeShape.from_lengths([1], ONE.to("meta"))


@pytest.mark.parametrize("start", [-1, 2, 2**63 - 1, -(2**63)])
def test_windows_beyond_the_symbols(start):
    """The largest start once wrapped round in the check; the scores were not checked at all."""
    ranges = torch.full((1, 1, 1), start)
    for function in (tt.rnnt_loss_pruned, tt.get_rnnt_logprobs_pruned):
        with pytest.raises(ValueError, match=r"ranges\[0, 0\]"):
            function(LOGITS[:, :, :1], LABEL, ranges, 0)
        with pytest.raises(TypeError, match=r"ranges: expected a torch.Tensor, got None"):
            function(LOGITS, LABEL, None, 0)


@pytest.mark.parametrize("rnnt_type", ["regular", "modified", "constrained"])
def test_am_alone(rnnt_type):
    """am_only_scale = 1: the blank scores are the same in every column, which all must be there."""
    batch = additive_batch([boundary_row(4, 2), boundary_row(3, 3)])
    arguments = *batch.arguments, 0.0, 1.0, batch.boundary, rnnt_type
    loss = tt.rnnt_loss_smoothed(*arguments, reduction="none")
    expected = batch.expected(rnnt_type, am_only_scale=1.0)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    _, py = tt.get_rnnt_logprobs_smoothed(*arguments)
    assert py.shape == (2, batch.lm.size(1), batch.am.size(1))


@pytest.mark.parametrize("value", [float("inf"), 1e308, float("nan")])
@pytest.mark.parametrize("method", ["greedy", "optimal"])
def test_windows_of_posteriors_that_are_none(value, method):
    px_grad, py_grad = torch.zeros(1, 3, 5), torch.full((1, 4, 4), value, dtype=torch.float64)
    ranges = tt.get_rnnt_prune_ranges(px_grad.double(), py_grad, None, 2, method=method)
    assert ranges[0, 0, 0] == 0 and ranges[0, -1, 0] == 2
