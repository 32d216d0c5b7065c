# SPDX-License-Identifier: Apache-2.0
"""Reference results of the additive and fused losses and of the joiners."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tests.soak.expect_common import (
    clamp_of,
    is_band,
    k2_arguments,
    k2_loss_results,
    log_prob_results,
    utterance_is_valid,
)
from tests.soak.truth import (
    LARGE,
    Expected,
    Options,
    Results,
    Solution,
    Undecided,
    defined,
    eps_of,
    largest,
    loss_results,
    nothing,
    number,
    solve,
    twin,
)

ACTIVATIONS = {
    "identity": lambda x: x,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
}


def _additive(a: dict[str, Any]) -> tuple:
    """Log-probabilities (T_b, U_b + 1, V) of each utterance, or None where there is no number."""
    lm, am = a["lm"].detach(), a["am"].detach()
    lm_scale = number(a.get("lm_only_scale", 0.1 if "am_only_scale" in a else 0.0))
    am_scale = number(a.get("am_only_scale", 0.0))
    if lm_scale + am_scale > 1:
        raise Undecided
    symbols, options, rows = k2_arguments(a, am.size(1))
    same = {"lm": twin(lm), "am": twin(am)}
    parts = [
        (same["lm"][b, s_begin : s_end + 1], same["am"][b, t_begin:t_end])
        for b, (s_begin, t_begin, s_end, t_end) in enumerate(rows)
    ]
    values = torch.cat([part.detach().flatten() for pair in parts for part in pair])
    if largest(values) > 1e3 or (am_scale and not values.isfinite().all()):
        raise Undecided
    unigram = torch.cat([part.softmax(-1) for part, _ in parts]).mean(0).log()
    log_probs: list[Tensor | None] = []
    for part, frames in parts:
        real = torch.cat([part.detach(), frames.detach()])
        logits = frames[:, None] + part
        if real.isnan().any() or (real == math.inf).any():
            log_probs.append(None)
            continue
        if bool((logits == -math.inf).all(-1).any()):
            log_probs.append(None)
            continue
        mixed: Any = 0.0
        if lm_scale + am_scale < 1:
            mixed = mixed + (1 - lm_scale - am_scale) * logits.log_softmax(-1)
        if lm_scale:
            mixed = mixed + lm_scale * part.log_softmax(-1)
        if am_scale:
            mixed = mixed + am_scale * (frames + unigram).log_softmax(-1)[:, None]
        log_probs.append(mixed.expand(len(frames), len(part), -1))
    inputs = {"lm": (lm, same["lm"]), "am": (am, same["am"])}
    return log_probs, symbols, options, rows, inputs


def rnnt_loss_simple(a: dict[str, Any], weights: Tensor) -> Results:
    log_probs, symbols, options, rows, inputs = _additive(a)
    options.from_log_softmax = True
    solutions = []
    for b, (s_begin, t_begin, s_end, t_end) in enumerate(rows):
        if log_probs[b] is None:
            parts = inputs["am"][1][b, t_begin:t_end], inputs["lm"][1][b, s_begin : s_end + 1]
            posteriors = (
                torch.full((t_end - t_begin, s_end - s_begin + more), math.nan) for more in (0, 1)
            )
            solutions.append(Solution(nothing(torch.cat(parts)), *posteriors))
        else:
            targets = symbols[b, s_begin:s_end]
            solutions.append(solve(log_probs[b], targets, options, begin=t_begin))
    dtype = inputs["am"][0].dtype
    return k2_loss_results(a, weights, solutions, rows, inputs, a["am"].size(1), 4 * eps_of(dtype))


def get_rnnt_logprobs(a: dict[str, Any], weights: Tensor) -> Results:
    log_probs, symbols, options, rows, _ = _additive(a)
    error = 64 * eps_of(a["am"].dtype) * largest(a["am"], a["lm"])
    common = symbols, options, rows
    return log_prob_results(log_probs, [None] * len(rows), common, a["am"].size(1), error)


def fused_joiner_loss(a: dict[str, Any], weights: Tensor) -> Results:
    enc, pred, weight = (a[name].detach() for name in ("enc", "pred", "weight"))
    bias = None if a["bias"] is None else a["bias"].detach()
    targets = a["targets"].detach()
    frames, symbols = a["logit_lengths"].tolist(), a["target_lengths"].tolist()
    options = Options(
        a["blank"],
        a.get("topology", "regular"),
        False,
        number(a.get("fastemit_lambda", 0.0)),
        number(a.get("delay_penalty", 0.0)),
        clamp_of(a),
    )
    activation = ACTIVATIONS[a.get("activation", "tanh")]
    dropped_mass = number(a.get("dropped_mass", 1e-7))
    shape, band = a.get("shape"), a.get("ranges")
    if shape is not None and (
        shape.logit_lengths.tolist() != frames or shape.target_lengths.tolist() != symbols
    ):
        raise Undecided
    named: dict[str, Tensor] = {"enc": enc, "pred": pred, "weight": weight}
    named |= {} if bias is None else {"bias": bias}
    same = {name: twin(x) for name, x in named.items()}
    losses, all_valid = [], True
    for b, (t, u) in enumerate(zip(frames, symbols, strict=True)):
        # With validate=False: a NaN loss for an utterance that makes no sense.
        valid = utterance_is_valid(targets[b].tolist(), t, u, enc.size(1), len(weight))
        defined(valid or a.get("validate") is False)
        hidden = activation(same["enc"][b, :t, None] + same["pred"][b, None, : u + 1])
        logits = functional.linear(hidden, same["weight"], same.get("bias"))
        exists = None
        if band is not None:
            window = band[b, :t].long()
            if not is_band(window, targets.size(1)):
                defined(a.get("validate") is False)
                raise Undecided
            columns = torch.arange(u + 1)
            exists = (columns >= window[:, :1]) & (columns <= window[:, -1:])
        all_valid &= valid
        losses.append(
            solve(logits, targets[b, :u], options, exists=exists).loss if valid else nothing(logits)
        )
    if largest(*named.values()) > 1e3:
        raise Undecided
    is_number = all(bool(x.isfinite().all()) for x in named.values())
    coarse = torch.finfo(enc.dtype).eps
    size = largest(weight) * enc.size(2) * largest(enc + 0, pred + 0)
    return loss_results(
        losses,
        a.get("reduction", "mean"),
        weights,
        {name: (x, same[name]) for name, x in named.items()},
        cells=max(t + u for t, u in zip(frames, symbols, strict=True)),
        eps=coarse * max(1.0, size) + 2 * dropped_mass,
        with_grad=all_valid and is_number and dropped_mass <= 1e-6 and enc.element_size() > 2,
    )


def join(a: dict[str, Any], weights: Tensor) -> Results:
    enc, pred = a["enc"].detach(), a["pred"].detach()
    activation = ACTIVATIONS[a.get("activation", "tanh")]
    hidden = activation(enc.double()[:, :, None] + pred.double()[:, None])
    if "weight" in a:
        bias = None if a["bias"] is None else a["bias"].detach().double()
        hidden = functional.linear(hidden, a["weight"].detach().double(), bias)
    packed = a["shape"].pack(hidden)
    if largest(enc, pred) > LARGE or ("weight" in a and largest(a["weight"]) > LARGE):
        raise Undecided
    eps = torch.finfo(enc.dtype).eps
    inner = largest(a["weight"]) * enc.size(2) if "weight" in a else 1.0
    error = 8 * eps * inner * largest(enc, pred)
    return {"rows": Expected(packed, error, 0.0, packed.isfinite())}


def from_lengths(a: dict[str, Any], weights: Tensor) -> Results:
    frames, symbols = (list(map(int, a[name])) for name in ("logit_lengths", "target_lengths"))
    cells = sum(t * (u + 1) for t, u in zip(frames, symbols, strict=True))
    return {"cells": Expected(torch.tensor(float(cells), dtype=torch.float64), 0.0, 1e-15)}
