# SPDX-License-Identifier: Apache-2.0
"""What the losses of logits must give for any arguments."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests.soak.calls import REDUCTIONS
from tests.soak.expect_common import (
    clamp_of,
    is_feasible,
    k2_arguments,
    k2_loss_results,
    lengths_of,
    log_prob_results,
    require_windows,
    unbanded,
    utterance_is_valid,
    validate_of,
)
from tests.soak.truth import (
    INDICES,
    LARGE,
    Options,
    Results,
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


def transducer_loss(a: dict[str, Any], weights: Tensor) -> Results:
    logits = tensor(a["logits"], (2, 4))
    targets = tensor(a["targets"], 2, INDICES)
    num_utterances, max_targets = targets.shape
    require(num_utterances > 0)
    frames, symbols = lengths_of(a, num_utterances)
    blank = integer(a["blank"], 0, logits.size(-1))
    reduction = one_of(a.get("reduction", "mean"), REDUCTIONS)
    one_sym = flag(a.get("one_sym_per_frame", False))
    options = Options(
        blank,
        "one_sym_per_frame" if one_sym else "regular",
        flag(a.get("from_log_softmax", False)),
        number(a.get("fastemit_lambda", 0.0), 0),
        number(a.get("delay_penalty", 0.0), 0),
        clamp_of(a),
    )
    inplace = flag(a.get("inplace", False))
    x = a["logits"]
    if inplace and x.requires_grad and (x.is_leaf or x._is_view() or not x.is_contiguous()):
        require(not a["with_grad"])
    validate = validate_of(a.get("validate"))
    padded = logits.dim() == 4
    if padded:
        require(logits.shape[0] == num_utterances and logits.shape[2] == max_targets + 1)
    max_frames = logits.size(1) if padded else logits.size(0)
    valid = [
        utterance_is_valid(row, t, u, max_frames, logits.size(-1), blank if validate else None)
        for row, t, u in zip(targets.tolist(), frames, symbols, strict=True)
    ]
    feasible = all(
        is_feasible(t, u, options.topology) for t, u in zip(frames, symbols, strict=True)
    )
    require(not validate or (all(valid) and feasible))
    cells = [t * (u + 1) for t, u in zip(frames, symbols, strict=True)]
    if not padded:
        if not all(valid) and max(map(abs, (*frames, *symbols))) < 2**31:
            require(sum(cells) == logits.size(0))
        if not all(count >= 0 for count in cells) or max(cells) > 2**31:
            raise Undecided  # where the rows of the others begin is anyone's guess
        require(sum(cells) == logits.size(0))
    same = twin(logits)
    losses, row = [], 0
    for b in range(num_utterances):
        if not valid[b]:
            losses.append(nothing(same[b] if padded else same[row : row + cells[b]]))
        else:
            t, u = frames[b], symbols[b]
            packed = None if padded else same[row : row + cells[b]].view(t, u + 1, -1)
            x = same[b, :t, : u + 1] if packed is None else packed
            losses.append(solve(x, targets[b, :u], options).loss)
        row += cells[b]
    return loss_results(
        losses,
        reduction,
        weights,
        {"logits": (logits, same)},
        cells=max((t + u for t, u in zip(frames, symbols, strict=True)), default=1),
        eps=eps_of(logits.dtype),
        with_grad=all(valid),
    )


def torchaudio_rnnt_loss(a: dict[str, Any], weights: Tensor) -> Results:
    logits = tensor(a["logits"], 4)
    blank = a.get("blank", -1)
    vocab = logits.size(-1)
    blank = integer(blank, -vocab, vocab) % vocab if vocab else blank
    passed = {name: a[name] for name in ("targets", "logit_lengths", "target_lengths")}
    results = transducer_loss(
        {
            **passed,
            "logits": a["logits"],
            "blank": blank,
            "reduction": a.get("reduction", "mean"),
            "clamp": a.get("clamp", -1.0),
            "with_grad": a["with_grad"],
            "from_log_softmax": not flag(a.get("fused_log_softmax", True)),
        },
        weights,
    )
    results["loss"].relative = torch.finfo(logits.dtype).eps
    return results


def rnnt_loss(a: dict[str, Any], weights: Tensor) -> Results:
    logits = tensor(a["logits"], 4)
    num_utterances, num_frames, columns, vocab = logits.shape
    band = None
    if "ranges" in a:
        band = tensor(a["ranges"], 3, INDICES)
        require(tuple(band.shape) == (num_utterances, num_frames, columns) and columns > 0)
    symbols, options, rows = k2_arguments(a, vocab, num_frames)
    require(num_utterances == len(symbols) and num_frames > 0)
    require(band is not None or columns == symbols.size(1) + 1)
    one_of(a.get("reduction", "mean"), REDUCTIONS)
    flag(a.get("return_grad", False))
    same = twin(logits)
    solutions = []
    for b, (s_begin, t_begin, s_end, t_end) in enumerate(rows):
        cells, exists = same[b, t_begin:t_end], None
        if band is None:
            cells = cells[:, s_begin : s_end + 1]
        else:
            window = band[b, t_begin:t_end].long()
            require_windows(window, symbols.size(1))
            cells, exists = unbanded(cells, window, symbols.size(1) + 1)
            cells, exists = cells[:, s_begin : s_end + 1], exists[:, s_begin : s_end + 1]
        targets = symbols[b, s_begin:s_end]
        solutions.append(solve(cells, targets, options, exists=exists, begin=t_begin))
    inputs = {"logits": (logits, same)}
    return k2_loss_results(a, weights, solutions, rows, inputs, num_frames, eps_of(logits.dtype))


def get_rnnt_logprobs_joint(a: dict[str, Any], weights: Tensor) -> Results:
    logits = tensor(a["logits"], 4)
    num_utterances, num_frames, columns, vocab = logits.shape
    band = None
    if "ranges" in a:
        band = tensor(a["ranges"], 3, INDICES)
        require(tuple(band.shape) == (num_utterances, num_frames, columns) and columns > 0)
    common = k2_arguments(a, vocab, num_frames, False)
    symbols, _, rows = common
    require(num_utterances == len(symbols) and num_frames > 0)
    require(band is not None or columns == symbols.size(1) + 1)
    if largest(logits) > LARGE:
        raise Undecided
    log_probs, exists = [], []
    for b, (s_begin, t_begin, s_end, t_end) in enumerate(rows):
        cells, there = logits[b, t_begin:t_end].double(), None
        if band is not None:
            window = band[b, t_begin:t_end].long()
            require_windows(window, symbols.size(1))
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
