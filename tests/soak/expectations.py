# SPDX-License-Identifier: Apache-2.0
"""What each function of calls.FUNCTIONS must give for any arguments: one function a family."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tests.soak.calls import REDUCTIONS, RNNT_TYPES
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
from transducer_toolkit import LatticeShape, native
from transducer_toolkit.losses.reference import brute_force_score

ACTIVATIONS = {
    "identity": lambda x: x,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
}


def _is_feasible(frames: int, symbols: int, topology: str) -> bool:
    if topology == "regular":
        return True
    return frames >= symbols + (topology == "one_sym_per_frame")


def _lengths(a: dict[str, Any], num_utterances: int) -> tuple[list[int], list[int]]:
    frames, symbols = (tensor(a[name], 1, INDICES) for name in ("logit_lengths", "target_lengths"))
    require(len(frames) == len(symbols) == num_utterances)
    return frames.tolist(), symbols.tolist()


def _utterance_is_valid(
    labels: list[int], frames: int, symbols: int, max_frames: int, vocab: int, blank: int | None
) -> bool:
    if not (1 <= frames <= max_frames and 0 <= symbols <= len(labels)):
        return False
    return all(0 <= label < vocab and label != blank for label in labels[:symbols])


def _clamp(a: dict[str, Any]) -> float:
    clamp = a.get("clamp", 0.0)
    return 0.0 if isinstance(clamp, float) and abs(clamp) == math.inf else number(clamp, -math.inf)


def _validate(value: Any) -> bool:
    return True if value is None else flag(value)


# --- losses of logits ---------------------------------------------------------------------------


def transducer_loss(a: dict[str, Any], weights: Tensor) -> Results:
    logits = tensor(a["logits"], (2, 4))
    targets = tensor(a["targets"], 2, INDICES)
    num_utterances, max_targets = targets.shape
    require(num_utterances > 0)
    frames, symbols = _lengths(a, num_utterances)
    blank = integer(a["blank"], 0, logits.size(-1))
    reduction = one_of(a.get("reduction", "mean"), REDUCTIONS)
    one_sym = flag(a.get("one_sym_per_frame", False))
    options = Options(
        blank,
        "one_sym_per_frame" if one_sym else "regular",
        flag(a.get("from_log_softmax", False)),
        number(a.get("fastemit_lambda", 0.0), 0),
        number(a.get("delay_penalty", 0.0), 0),
        _clamp(a),
    )
    inplace = flag(a.get("inplace", False))
    x = a["logits"]
    if inplace and x.requires_grad and (x.is_leaf or x._is_view() or not x.is_contiguous()):
        require(not a["with_grad"])
    validate = _validate(a.get("validate"))
    padded = logits.dim() == 4
    if padded:
        require(logits.shape[0] == num_utterances and logits.shape[2] == max_targets + 1)
    max_frames = logits.size(1) if padded else logits.size(0)
    valid = [
        _utterance_is_valid(row, t, u, max_frames, logits.size(-1), blank if validate else None)
        for row, t, u in zip(targets.tolist(), frames, symbols, strict=True)
    ]
    feasible = all(
        _is_feasible(t, u, options.topology) for t, u in zip(frames, symbols, strict=True)
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


# --- k2's ---------------------------------------------------------------------------------------


def _boundary(a: dict[str, Any], num_utterances: int, symbols: int, frames: int, low: int) -> list:
    """Rows s_begin, t_begin, s_end, t_end; an utterance has at least `low` frames."""
    if a.get("boundary") is None:
        rows = [[0, 0, symbols, frames]] * num_utterances
    else:
        boundary = tensor(a["boundary"], 2, INDICES)
        require(tuple(boundary.shape) == (num_utterances, 4))
        rows = boundary.tolist()
    for s_begin, t_begin, s_end, t_end in rows:
        require(0 <= s_begin <= s_end <= symbols)
        require(0 <= t_begin <= t_end <= frames and t_end - t_begin >= low)
    return rows


def _k2_common(a: dict[str, Any], vocab: int, max_frames: int, is_loss: bool = True) -> tuple:
    symbols = tensor(a["symbols"], 2, INDICES)
    require(symbols.size(0) > 0)
    rnnt_type = one_of(a.get("rnnt_type", "regular"), RNNT_TYPES)
    options = Options(
        integer(a["termination_symbol"], 0, vocab),
        rnnt_type,
        fastemit_lambda=number(a.get("fastemit_lambda", 0.0), 0),
        delay_penalty=number(a.get("delay_penalty", 0.0), 0),
    )
    rows = _boundary(a, symbols.size(0), symbols.size(1), max_frames, 1)
    for b, (s_begin, t_begin, s_end, t_end) in enumerate(rows):
        labels = symbols[b, s_begin:s_end].tolist()
        require(all(0 <= label < vocab for label in labels))
        if is_loss:
            require(_is_feasible(t_end - t_begin, s_end - s_begin, rnnt_type))
    return symbols, options, rows


def _posteriors(solutions: list[Solution], rows: list, shapes: tuple, eps: float) -> Results:
    px, py = (torch.zeros(shape, dtype=torch.float64) for shape in shapes)
    for b, (s_begin, t_begin, s_end, t_end) in enumerate(rows):
        if solutions[b].loss.isnan():  # nothing is said of the padding
            px[b], py[b] = math.nan, math.nan
            continue
        px[b, s_begin:s_end, t_begin:t_end] = solutions[b].label_posterior.T
        py[b, s_begin : s_end + 1, t_begin:t_end] = solutions[b].blank_posterior.T
    named = {"px_grad": px, "py_grad": py}
    return {name: Expected(x, eps, 0.0, ~x.isnan()) for name, x in named.items()}


def _k2_loss(
    a: dict[str, Any],
    weights: Tensor,
    solutions: list[Solution],
    rows: list,
    inputs: dict[str, tuple[Tensor, Tensor]],
    num_frames: int,
    eps: float,
) -> Results:
    reduction = one_of(a.get("reduction", "mean"), REDUCTIONS)
    cells = max(t_end - t_begin + s_end - s_begin for s_begin, t_begin, s_end, t_end in rows)
    losses = [solution.loss for solution in solutions]
    results = loss_results(losses, reduction, weights, inputs, cells=cells, eps=eps)
    size = largest(*(x for x, _ in inputs.values()))
    if flag(a.get("return_grad", False)) and size <= LARGE:
        num_symbols, extra = a["symbols"].size(1), a.get("rnnt_type", "regular") == "regular"
        shapes = (
            (len(rows), num_symbols, num_frames + extra),
            (len(rows), num_symbols + 1, num_frames),
        )
        results |= _posteriors(solutions, rows, shapes, 64 * eps * size * cells)
    return results


def rnnt_loss(a: dict[str, Any], weights: Tensor) -> Results:
    logits = tensor(a["logits"], 4)
    num_utterances, num_frames, columns, vocab = logits.shape
    band = None
    if "ranges" in a:
        band = tensor(a["ranges"], 3, INDICES)
        require(tuple(band.shape) == (num_utterances, num_frames, columns) and columns > 0)
    symbols, options, rows = _k2_common(a, vocab, num_frames)
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
            _check_windows(window, symbols.size(1))
            cells, exists = _unbanded(cells, window, symbols.size(1) + 1)
            cells, exists = cells[:, s_begin : s_end + 1], exists[:, s_begin : s_end + 1]
        targets = symbols[b, s_begin:s_end]
        solutions.append(solve(cells, targets, options, exists=exists, begin=t_begin))
    inputs = {"logits": (logits, same)}
    return _k2_loss(a, weights, solutions, rows, inputs, num_frames, eps_of(logits.dtype))


def _check_windows(window: Tensor, max_targets: int) -> None:
    start = window[:, :1]
    require(bool((window == start + torch.arange(window.size(1))).all()))
    require(bool(((start >= 0) & (start <= max_targets + 1 - window.size(1))).all()))


def _unbanded(cells: Tensor, window: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Band (T, R, V) -> full (T, columns, V), and which cells there are."""
    index = torch.arange(len(window))[:, None].expand_as(window), window
    full = cells.new_zeros(len(window), columns, cells.size(-1)).index_put(index, cells)
    exists = torch.zeros(len(window), columns, dtype=torch.bool)
    exists[index] = True
    return full, exists


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
    symbols, options, rows = _k2_common(a, vocab, num_frames, is_loss)
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
    return _k2_loss(a, weights, solutions, rows, inputs, a["am"].size(1), 4 * eps_of(dtype))


def _log_probs_results(
    log_probs: list[Tensor | None], exists: list, common: tuple, num_frames: int, error: float
) -> Results:
    symbols, options, rows = common
    blank, regular = options.blank, options.topology == "regular"
    shapes = (
        (len(rows), symbols.size(1), num_frames + regular),
        (len(rows), symbols.size(1) + 1, num_frames),
    )
    values = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
    counts = [torch.zeros(shape, dtype=torch.bool) for shape in shapes]
    for b, (s_begin, t_begin, s_end, t_end) in enumerate(rows):
        if log_probs[b] is None:
            continue
        x = log_probs[b].detach()
        if exists[b] is not None:
            x = torch.where(exists[b][..., None], x, -math.inf)
        index = symbols[b, s_begin:s_end].long().expand(len(x), -1)[..., None]
        label, stop = x[:, :-1].gather(2, index).squeeze(2), x[:, :, blank]
        if options.topology == "constrained":
            label = label + stop[:, 1:]
        places = (
            (b, slice(s_begin, s_end), slice(t_begin, t_end)),
            (b, slice(s_begin, s_end + 1), slice(t_begin, t_end)),
        )
        for place, value, count, part in zip(places, values, counts, (label, stop), strict=True):
            value[place] = part.T
            count[place] = True
    return {
        name: Expected(value, error, 0.0, count)
        for name, value, count in zip(("px", "py"), values, counts, strict=True)
    }


def get_rnnt_logprobs(a: dict[str, Any], weights: Tensor) -> Results:
    log_probs, symbols, options, rows, _ = _additive(a, False)
    error = 64 * eps_of(a["am"].dtype) * largest(a["am"], a["lm"])
    common = symbols, options, rows
    return _log_probs_results(log_probs, [None] * len(rows), common, a["am"].size(1), error)


def get_rnnt_logprobs_joint(a: dict[str, Any], weights: Tensor) -> Results:
    logits = tensor(a["logits"], 4)
    num_utterances, num_frames, columns, vocab = logits.shape
    band = None
    if "ranges" in a:
        band = tensor(a["ranges"], 3, INDICES)
        require(tuple(band.shape) == (num_utterances, num_frames, columns) and columns > 0)
    common = _k2_common(a, vocab, num_frames, False)
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
            _check_windows(window, symbols.size(1))
            cells, there = _unbanded(cells, window, symbols.size(1) + 1)
            there = there[:, s_begin : s_end + 1]
        cells = cells[:, s_begin : s_end + 1]
        real = cells if there is None else cells[there]
        is_number = not bool(real.isnan().any() or (real == math.inf).any())
        is_number &= not bool((real == -math.inf).all(-1).any())
        log_probs.append(cells.log_softmax(-1) if is_number else None)
        exists.append(there)
    error = 64 * eps_of(logits.dtype) * largest(logits)
    return _log_probs_results(log_probs, exists, common, num_frames, error)


# --- recursions ---------------------------------------------------------------------------------


def _recursion_arguments(a: dict[str, Any], px: Any, py: Any) -> tuple[Tensor, Tensor, list]:
    px, py = (tensor(x, 3, (torch.float32, torch.float64)) for x in (px, py))
    require(px.dtype == py.dtype and py.size(0) > 0 and py.size(1) > 0)
    shape = py.size(0), py.size(1) - 1
    require(tuple(px.shape) in [(*shape, py.size(2)), (*shape, py.size(2) + 1)])
    return px, py, _boundary(a, len(px), px.size(1), py.size(2), 0)


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


# --- joiners ------------------------------------------------------------------------------------


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
    frames, symbols = _lengths(a, len(targets))
    topology = one_of(a.get("topology", "regular"), native.TOPOLOGIES)
    options = Options(
        integer(a["blank"], 0, len(weight)),
        topology,
        False,
        number(a.get("fastemit_lambda", 0.0), 0),
        number(a.get("delay_penalty", 0.0), 0),
        _clamp(a),
    )
    activation = ACTIVATIONS[one_of(a.get("activation", "tanh"), native.ACTIVATIONS)]
    reduction = one_of(a.get("reduction", "mean"), REDUCTIONS)
    dropped_mass = number(a.get("dropped_mass", 1e-7), 0)
    require(dropped_mass < 1)
    if a.get("tile_cells") is not None:
        integer(a["tile_cells"], 1, math.inf)
    shape = a.get("shape")
    require(shape is None or isinstance(shape, LatticeShape))
    validate = _validate(a.get("validate"))
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
        require(not validate or _is_feasible(t, u, topology))
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
                _check_windows(window, targets.size(1))
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


# --- pruning ------------------------------------------------------------------------------------


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
    _boundary(a, len(px), px.size(1), py.size(2), 1)
    return {}


def do_rnnt_pruning(a: dict[str, Any], weights: Tensor) -> Results:
    every = tuple({*FLOATS, *INDICES, torch.bool, torch.uint8, torch.int8, torch.int16})
    am, lm = tensor(a["am"], 3, every), tensor(a["lm"], 3, every)
    ranges = tensor(a["ranges"], 3, INDICES).long()
    require(len(am) == len(lm) and ranges.shape[:2] == am.shape[:2])
    if a.get("boundary") is not None:
        _boundary(a, len(am), lm.size(1) - 1, am.size(1), 0)
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


EXPECTATIONS = {
    "transducer_loss": transducer_loss,
    "torchaudio.rnnt_loss": torchaudio_rnnt_loss,
    "rnnt_loss": rnnt_loss,
    "rnnt_loss_pruned": rnnt_loss,
    "rnnt_loss_simple": rnnt_loss_simple,
    "rnnt_loss_smoothed": rnnt_loss_simple,
    "fused_joiner_loss": fused_joiner_loss,
    "get_rnnt_logprobs": get_rnnt_logprobs,
    "get_rnnt_logprobs_smoothed": get_rnnt_logprobs,
    "get_rnnt_logprobs_joint": get_rnnt_logprobs_joint,
    "get_rnnt_logprobs_pruned": get_rnnt_logprobs_joint,
    "mutual_information_recursion": mutual_information_recursion,
    "joint_mutual_information_recursion": joint_mutual_information_recursion,
    "get_rnnt_prune_ranges": get_rnnt_prune_ranges,
    "do_rnnt_pruning": do_rnnt_pruning,
    "join": join,
    "joiner_logits": join,
    "LatticeShape.from_lengths": from_lengths,
}
