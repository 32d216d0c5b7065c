# SPDX-License-Identifier: Apache-2.0
"""Reference results of the losses of logits."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests.soak.expect_common import (
    clamp_of,
    k2_arguments,
    k2_loss_results,
    log_prob_results,
    unbanded,
    utterance_is_valid,
)
from tests.soak.truth import (
    LARGE,
    Options,
    Results,
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
from transducer_toolkit.ops.topology import get_topology, multi_blank_topology, tdt_topology


def transducer_loss(a: dict[str, Any], weights: Tensor) -> Results:
    logits, targets = a["logits"].detach(), a["targets"].detach()
    num_utterances = len(targets)
    frames, symbols = a["logit_lengths"].tolist(), a["target_lengths"].tolist()
    options = Options(
        a["blank"],
        topology_of(a),
        a.get("from_log_softmax", False),
        number(a.get("fastemit_lambda", 0.0)),
        number(a.get("delay_penalty", 0.0)),
        clamp_of(a),
        a.get("normalization", "softmax"),
        number(a.get("sigma", 0.0)),
    )
    vocab_size = logits.size(-1) - get_topology(options.topology).num_durations
    padded = logits.dim() == 4
    max_frames = logits.size(1) if padded else logits.size(0)
    # With validate=False: a NaN loss for an utterance that makes no sense.
    valid = [
        utterance_is_valid(row, t, u, max_frames, vocab_size)
        for row, t, u in zip(targets.tolist(), frames, symbols, strict=True)
    ]
    cells = [t * (u + 1) for t, u in zip(frames, symbols, strict=True)]
    right_rows = padded or (min(cells) >= 0 and sum(cells) == logits.size(0))
    if not (right_rows and all(valid)):
        defined(a.get("validate") is False)
    if not right_rows:
        raise Undecided  # where the rows of the others begin
    same = twin(logits)
    losses, row = [], 0
    for b in range(num_utterances):
        if not valid[b]:
            losses.append(nothing(same[b] if padded else same[row : row + cells[b]]))
        else:
            t, u = frames[b], symbols[b]
            packed = None if padded else same[row : row + cells[b]].view(t, u + 1, -1)
            x = same[b, :t, : u + 1] if packed is None else packed
            exists = None if a.get("alignment") is None else _near_alignment(a, b, t, u)
            may_label = None if exists is None else exists[:, 1:] & exists[:, :-1]
            solution = solve(x, targets[b, :u], options, exists=exists, may_label=may_label)
            loss = solution.loss
            if exists is not None and loss == math.inf:
                defined(a.get("validate") is False or bool((x == -math.inf).any()))
            losses.append(loss)
        row += cells[b]
    return loss_results(
        losses,
        a.get("reduction", "mean"),
        weights,
        {"logits": (logits, same)},
        cells=max((t + u for t, u in zip(frames, symbols, strict=True)), default=1),
        eps=eps_of(logits.dtype),
        with_grad=all(valid),
    )


def topology_of(a: dict[str, Any]) -> str:
    """The name of the topology that the arguments of a loss choose."""
    if a.get("durations") is not None:
        return tdt_topology(tuple(a["durations"])).name
    if a.get("big_blank_durations") is not None:
        return multi_blank_topology(tuple(a["big_blank_durations"])).name
    if a.get("one_sym_per_frame", False):
        return "one_sym_per_frame"
    return a.get("topology", "regular")


def _near_alignment(a: dict[str, Any], b: int, num_frames: int, num_targets: int) -> Tensor:
    """Cells (T, U + 1) between whose label arcs none is missed and none is early."""
    frame_of = a["alignment"][b, :num_targets].tolist()
    if frame_of != sorted(frame_of):
        defined(a.get("validate") is False)
        raise Undecided
    left, right = a.get("left", 0), a.get("right", 0)
    exists = torch.ones(num_frames, num_targets + 1, dtype=torch.bool)
    for t in range(num_frames):
        for u, frame in enumerate(frame_of):
            if frame + right < t:  # label u has been emitted
                exists[t, : u + 1] = False
            if frame - left > t:  # label u has not
                exists[t, u + 1 :] = False
    return exists


def torchaudio_rnnt_loss(a: dict[str, Any], weights: Tensor) -> Results:
    passed = {name: a[name] for name in ("logits", "targets", "logit_lengths", "target_lengths")}
    results = transducer_loss(
        {
            **passed,
            "blank": a.get("blank", -1) % a["logits"].size(-1),
            "reduction": a.get("reduction", "mean"),
            "clamp": a.get("clamp", -1.0),
            "from_log_softmax": not a.get("fused_log_softmax", True),
        },
        weights,
    )
    results["loss"].relative = torch.finfo(a["logits"].dtype).eps
    return results


def rnnt_loss(a: dict[str, Any], weights: Tensor) -> Results:
    logits, band = a["logits"].detach(), a.get("ranges")
    num_frames = logits.size(1)
    symbols, options, rows = k2_arguments(a, num_frames)
    same = twin(logits)
    solutions = []
    for b, (s_begin, t_begin, s_end, t_end) in enumerate(rows):
        cells, exists = same[b, t_begin:t_end], None
        if band is None:
            cells = cells[:, s_begin : s_end + 1]
        else:
            window = band[b, t_begin:t_end].long()
            cells, exists = unbanded(cells, window, symbols.size(1) + 1)
            cells, exists = cells[:, s_begin : s_end + 1], exists[:, s_begin : s_end + 1]
        targets = symbols[b, s_begin:s_end]
        solutions.append(solve(cells, targets, options, exists=exists, begin=t_begin))
    inputs = {"logits": (logits, same)}
    return k2_loss_results(a, weights, solutions, rows, inputs, num_frames, eps_of(logits.dtype))


def get_rnnt_logprobs_joint(a: dict[str, Any], weights: Tensor) -> Results:
    logits, band = a["logits"].detach(), a.get("ranges")
    num_frames = logits.size(1)
    common = k2_arguments(a, num_frames)
    symbols, _, rows = common
    if largest(logits) > LARGE:
        raise Undecided
    log_probs, exists = [], []
    for b, (s_begin, t_begin, s_end, t_end) in enumerate(rows):
        cells, there = logits[b, t_begin:t_end].double(), None
        if band is not None:
            window = band[b, t_begin:t_end].long()
            cells, there = unbanded(cells, window, symbols.size(1) + 1)
            there = there[:, s_begin : s_end + 1]
        cells = cells[:, s_begin : s_end + 1]
        real = cells if there is None else cells[there]
        is_number = not bool(real.isnan().any() or (real == math.inf).any())
        is_number &= not bool((real == -math.inf).all(-1).any())
        log_probs.append(cells.log_softmax(-1) if is_number else None)
        exists.append(there)
    error = 64 * eps_of(logits.dtype) * largest(logits)
    return log_prob_results(log_probs, exists, common, num_frames, error)
