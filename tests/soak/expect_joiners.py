# SPDX-License-Identifier: Apache-2.0
"""What the losses of joiners, additive and fused, and the joiners must give."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tests.soak.calls import REDUCTIONS
from tests.soak.expect_common import (
    clamp_of,
    is_feasible,
    k2_arguments,
    k2_loss_results,
    lengths_of,
    log_prob_results,
    require_windows,
    validate_of,
)
from tests.soak.truth import (
    FLOATS,
    INDICES,
    LARGE,
    Expected,
    Options,
    Refused,
    Results,
    Solution,
    Undecided,
    eps_of,
    flag,
    integer,
    largest,
    loss_results,
    nothing,
    number,
    one_of,
    require,
    solve,
    tensor,
    twin,
)
from transducer_toolkit import LatticeShape
from transducer_toolkit.ops import native
from transducer_toolkit.ops.topology import TOPOLOGIES

ACTIVATIONS = {
    "identity": lambda x: x,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
}


def _additive(a: dict[str, Any], is_loss: bool) -> tuple:
    """Log-probabilities (T_b, U_b + 1, V) of each utterance, or None where there is no number."""
    lm, am = tensor(a["lm"], 3), tensor(a["am"], 3)
    require(lm.dtype == am.dtype)
    num_utterances, num_frames, vocab = am.shape
    lm_scale = number(a.get("lm_only_scale", 0.1 if "am_only_scale" in a else 0.0), 0, 1)
    am_scale = number(a.get("am_only_scale", 0.0), 0, 1)
    if lm_scale + am_scale > 1:
        require(lm_scale + am_scale <= 1 + 1e-6)
        raise Undecided
    symbols, options, rows = k2_arguments(a, vocab, num_frames, is_loss)
    require(tuple(lm.shape) == (len(symbols), symbols.size(1) + 1, vocab))
    require(num_utterances == len(symbols) and num_frames > 0)
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
    log_probs, symbols, options, rows, inputs = _additive(a, True)
    options.from_log_softmax = True
    one_of(a.get("reduction", "mean"), REDUCTIONS)
    flag(a.get("return_grad", False))
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
    log_probs, symbols, options, rows, _ = _additive(a, False)
    error = 64 * eps_of(a["am"].dtype) * largest(a["am"], a["lm"])
    common = symbols, options, rows
    return log_prob_results(log_probs, [None] * len(rows), common, a["am"].size(1), error)


def _joint(a: dict[str, Any]) -> tuple[Tensor, Tensor]:
    enc, pred = tensor(a["enc"], 3), tensor(a["pred"], 3)
    require(enc.dtype == pred.dtype and enc.size(0) == pred.size(0) and enc.size(2) == pred.size(2))
    return enc, pred


def _output(a: dict[str, Any], enc: Tensor, dtypes: tuple) -> tuple[Tensor, Tensor | None]:
    weight = tensor(a["weight"], 2, dtypes)
    bias = None if a["bias"] is None else tensor(a["bias"], 1, dtypes)
    require(weight.size(1) == enc.size(2))
    require(bias is None or tuple(bias.shape) == (weight.size(0),))
    return weight, bias


def fused_joiner_loss(a: dict[str, Any], weights: Tensor) -> Results:
    enc, pred = _joint(a)
    dtypes = {enc.dtype} | ({torch.float32} if enc.element_size() == 2 else set())
    weight, bias = _output(a, enc, tuple(dtypes))
    targets = tensor(a["targets"], 2, INDICES)
    require(len(targets) > 0 and (len(targets), targets.size(1) + 1) == tuple(pred.shape[:2]))
    frames, symbols = lengths_of(a, len(targets))
    topology = one_of(a.get("topology", "regular"), TOPOLOGIES)
    options = Options(
        integer(a["blank"], 0, len(weight)),
        topology,
        False,
        number(a.get("fastemit_lambda", 0.0), 0),
        number(a.get("delay_penalty", 0.0), 0),
        clamp_of(a),
    )
    activation = ACTIVATIONS[one_of(a.get("activation", "tanh"), native.ACTIVATIONS)]
    reduction = one_of(a.get("reduction", "mean"), REDUCTIONS)
    dropped_mass = number(a.get("dropped_mass", 1e-7), 0)
    require(dropped_mass < 1)
    if a.get("tile_cells") is not None:
        integer(a["tile_cells"], 1, math.inf)
    shape = a.get("shape")
    require(shape is None or isinstance(shape, LatticeShape))
    validate = validate_of(a.get("validate"))
    band = a.get("ranges")
    if band is not None:
        band = tensor(band, 3, INDICES)
        require(tuple(band.shape[:2]) == tuple(enc.shape[:2]) and band.size(2) > 0)
    if shape is not None and (
        shape.logit_lengths.tolist() != frames or shape.target_lengths.tolist() != symbols
    ):
        raise Undecided
    for t, u in zip(frames, symbols, strict=True):
        require(1 <= t <= enc.size(1) and 0 <= u <= targets.size(1))
        require(not validate or is_feasible(t, u, topology))
    named: dict[str, Tensor] = {"enc": enc, "pred": pred, "weight": weight}
    named |= {} if bias is None else {"bias": bias}
    same = {name: twin(x) for name, x in named.items()}
    losses, all_valid = [], True
    for b, (t, u) in enumerate(zip(frames, symbols, strict=True)):
        labels = targets[b, :u].tolist()
        valid = all(0 <= label < len(weight) for label in labels)
        require(not validate or (valid and options.blank not in labels))
        hidden = activation(same["enc"][b, :t, None] + same["pred"][b, None, : u + 1])
        logits = functional.linear(hidden, same["weight"], same.get("bias"))
        exists = None
        if band is not None:
            window = band[b, :t].long()
            try:
                require_windows(window, targets.size(1))
            except Refused:
                if validate:
                    raise
                raise Undecided from None
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
        reduction,
        weights,
        {name: (x, same[name]) for name, x in named.items()},
        cells=max(t + u for t, u in zip(frames, symbols, strict=True)),
        eps=coarse * max(1.0, size) + 2 * dropped_mass,
        with_grad=all_valid and is_number and dropped_mass <= 1e-6 and enc.element_size() > 2,
    )


def join(a: dict[str, Any], weights: Tensor) -> Results:
    enc, pred = _joint(a)
    require(isinstance(a["shape"], LatticeShape))
    shape = a["shape"]
    activation = ACTIVATIONS[one_of(a.get("activation", "tanh"), native.ACTIVATIONS)]
    require(enc.size(0) == shape.num_utterances)
    require(enc.size(1) >= shape.max_frames and pred.size(1) >= shape.max_targets + 1)
    hidden = activation(enc.double()[:, :, None] + pred.double()[:, None])
    if "weight" in a:
        weight, bias = _output(a, enc, FLOATS)
        hidden = functional.linear(hidden, weight.double(), None if bias is None else bias.double())
    packed = shape.pack(hidden)
    if largest(enc, pred) > LARGE or ("weight" in a and largest(a["weight"]) > LARGE):
        raise Undecided
    eps = torch.finfo(enc.dtype).eps
    inner = largest(a["weight"]) * enc.size(2) if "weight" in a else 1.0
    error = 8 * eps * inner * largest(enc, pred)
    return {"rows": Expected(packed, error, 0.0, packed.isfinite())}


def from_lengths(a: dict[str, Any], weights: Tensor) -> Results:
    lengths = []
    for name, low in (("logit_lengths", 1), ("target_lengths", 0)):
        x = a[name]
        if isinstance(x, list) or (hasattr(x, "__array__") and not isinstance(x, Tensor)):
            raise Undecided
        integers = (torch.uint8, torch.int8, torch.int16, *INDICES)
        lengths.append(tensor(x, 1, integers).tolist())
        require(len(lengths[-1]) > 0 and min(lengths[-1]) >= low)
    frames, symbols = lengths
    require(len(frames) == len(symbols))
    cells = [t * (u + 1) for t, u in zip(frames, symbols, strict=True)]
    if sum(cells) >= 2**61:
        raise Undecided
    return {"cells": Expected(torch.tensor(float(sum(cells)), dtype=torch.float64), 0.0, 1e-15)}
