# SPDX-License-Identifier: Apache-2.0
"""What the recursions and the choice of windows must give for any arguments."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests.soak.calls import RNNT_TYPES
from tests.soak.expect_common import boundary_rows
from tests.soak.truth import (
    FLOATS,
    INDICES,
    LARGE,
    Expected,
    Results,
    Undecided,
    eps_of,
    flag,
    integer,
    largest,
    loss_results,
    nothing,
    one_of,
    require,
    tensor,
    twin,
)
from transducer_toolkit.losses.reference import brute_force_score


def _recursion_arguments(a: dict[str, Any], px: Any, py: Any) -> tuple[Tensor, Tensor, list]:
    px, py = (tensor(x, 3, (torch.float32, torch.float64)) for x in (px, py))
    require(px.dtype == py.dtype and py.size(0) > 0 and py.size(1) > 0)
    shape = py.size(0), py.size(1) - 1
    require(tuple(px.shape) in [(*shape, py.size(2)), (*shape, py.size(2) + 1)])
    return px, py, boundary_rows(a, len(px), px.size(1), py.size(2), 0)


def mutual_information_recursion(a: dict[str, Any], weights: Tensor) -> Results:
    px, py, rows = _recursion_arguments(a, a["px"], a["py"])
    return_grad = flag(a.get("return_grad", False))
    same = {"px": twin(px), "py": twin(py)}
    extra = px.size(2) - py.size(2)
    scores = []
    for b, (s_begin, t_begin, s_end, t_end) in enumerate(rows):
        x = same["px"][b, s_begin:s_end, t_begin : t_end + extra]
        y = same["py"][b, s_begin : s_end + 1, t_begin:t_end]
        used = torch.cat([x.detach().flatten(), y.detach().flatten()])
        if (used == math.inf).any():
            raise Undecided
        if used.isnan().any():
            scores.append(nothing(same["py"][b]))
            continue
        score = brute_force_score(x, y)
        no_change = 0 * same["py"][b].nan_to_num(0.0, 0.0, 0.0).sum()
        scores.append((score if score > -math.inf else score.detach()) + no_change)
    inputs = {"px": (px, same["px"]), "py": (py, same["py"])}
    everything = all(bool(x.isfinite().all()) for x in (px, py))
    results = loss_results(
        scores, "none", weights, inputs, cells=16, eps=eps_of(px.dtype), with_grad=everything
    )
    if return_grad and everything and largest(px, py) <= LARGE:
        grads = torch.autograd.grad(
            torch.stack(scores).sum(), list(same.values()), allow_unused=True
        )
        for name, x, grad in zip(("px_grad", "py_grad"), (px, py), grads, strict=True):
            grad = torch.zeros_like(x).double() if grad is None else grad
            results[name] = Expected(grad, 256 * eps_of(px.dtype) * largest(px, py))
    return results


def joint_mutual_information_recursion(a: dict[str, Any], weights: Tensor) -> Results:
    for name in ("px", "py"):
        require(isinstance(a[name], list) and len(a[name]) > 0)
    require(len(a["px"]) == len(a["py"]))
    for x, y in zip(a["px"], a["py"], strict=True):
        _recursion_arguments(a, x, y)
        for one, first in ((x, a["px"][0]), (y, a["py"][0])):
            require(one.shape == first.shape and one.dtype == first.dtype)
    sums = {name: sum(x.double() for x in a[name]) for name in ("px", "py")}
    if largest(*a["px"], *a["py"]) > LARGE:
        raise Undecided
    whole = {**sums, "boundary": a.get("boundary")}
    score = mutual_information_recursion(whole, weights)["loss"].value
    error = 1e3 * eps_of(a["px"][0].dtype) * largest(*sums.values()) * 16
    return {"sum of terms": Expected(score, error, 0.0, score.isfinite())}


def get_rnnt_prune_ranges(a: dict[str, Any], weights: Tensor) -> Results:
    """Only what must be refused: tests.soak.fuzz_inputs checks the windows by their definition."""
    px, py = (tensor(a[name], 3) for name in ("px_grad", "py_grad"))
    rnnt_type = a.get("rnnt_type")
    rnnt_type = None if rnnt_type is None else one_of(rnnt_type, RNNT_TYPES)
    require(len(px) > 0 and len(py) > 0)
    shape = py.size(0), py.size(1) - 1
    shapes = {True: (*shape, py.size(2) + 1), False: (*shape, py.size(2))}
    regular = rnnt_type == "regular" if rnnt_type else tuple(px.shape) == shapes[True]
    require(tuple(px.shape) == shapes[regular])
    integer(a["s_range"], 1, math.inf)
    one_of(a.get("method", "greedy"), ("greedy", "optimal"))
    boundary_rows(a, len(px), px.size(1), py.size(2), 1)
    return {}


def do_rnnt_pruning(a: dict[str, Any], weights: Tensor) -> Results:
    every = tuple({*FLOATS, *INDICES, torch.bool, torch.uint8, torch.int8, torch.int16})
    am, lm = tensor(a["am"], 3, every), tensor(a["lm"], 3, every)
    ranges = tensor(a["ranges"], 3, INDICES).long()
    require(len(am) == len(lm) and ranges.shape[:2] == am.shape[:2])
    if a.get("boundary") is not None:
        boundary_rows(a, len(am), lm.size(1) - 1, am.size(1), 0)
    require(bool(((ranges >= 0) & (ranges < lm.size(1))).all()))
    rows = torch.arange(len(am))[:, None, None]
    counts = None
    if a.get("boundary") is not None:
        frames = torch.arange(am.size(1))
        begin, end = a["boundary"][:, 1, None], a["boundary"][:, 3, None]
        counts = ((frames >= begin) & (frames < end))[:, :, None, None]
        low, high = a["boundary"][:, 0, None, None], a["boundary"][:, 2, None, None]
        counts = counts & ((ranges >= low) & (ranges <= high))[..., None]
    results = {}
    for name, value in (
        ("am_pruned", am.double()[:, :, None].expand(-1, -1, ranges.size(2), -1)),
        ("lm_pruned", lm.double()[rows, ranges]),
    ):
        where = None if counts is None else counts.expand_as(value)
        results[name] = Expected(value, 0.0, 0.0, where)
    return results
