# SPDX-License-Identifier: Apache-2.0
"""Reference results of the recursions and of the choice of windows."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests.soak.expect_common import boundary_rows
from tests.soak.truth import (
    LARGE,
    Expected,
    Results,
    Undecided,
    eps_of,
    largest,
    loss_results,
    nothing,
    twin,
)
from transducer_toolkit.losses.reference import brute_force_score


def mutual_information_recursion(a: dict[str, Any], weights: Tensor) -> Results:
    px, py = a["px"].detach(), a["py"].detach()
    rows = boundary_rows(a, len(px), px.size(1), py.size(2))
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
    if a.get("return_grad", False) and everything and largest(px, py) <= LARGE:
        grads = torch.autograd.grad(
            torch.stack(scores).sum(), list(same.values()), allow_unused=True
        )
        for name, x, grad in zip(("px_grad", "py_grad"), (px, py), grads, strict=True):
            grad = torch.zeros_like(x).double() if grad is None else grad
            results[name] = Expected(grad, 256 * eps_of(px.dtype) * largest(px, py))
    return results


def joint_mutual_information_recursion(a: dict[str, Any], weights: Tensor) -> Results:
    sums = {name: sum(x.double() for x in a[name]) for name in ("px", "py")}
    if largest(*a["px"], *a["py"]) > LARGE:
        raise Undecided
    whole = {**sums, "boundary": a.get("boundary")}
    score = mutual_information_recursion(whole, weights)["loss"].value
    error = 1e3 * eps_of(a["px"][0].dtype) * largest(*sums.values()) * 16
    return {"sum of terms": Expected(score, error, 0.0, score.isfinite())}


def get_rnnt_prune_ranges(a: dict[str, Any], weights: Tensor) -> Results:
    """Nothing: tests.soak.fuzz_inputs checks the windows by their definition."""
    return {}


def do_rnnt_pruning(a: dict[str, Any], weights: Tensor) -> Results:
    am, lm, ranges = a["am"].detach(), a["lm"].detach(), a["ranges"].long()
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
