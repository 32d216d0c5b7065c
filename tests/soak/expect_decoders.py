# SPDX-License-Identifier: Apache-2.0
"""What the decoders must give, one cell and one utterance at a time."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tests.decoding.test_beam_search import BigramModel, beam_reference
from tests.soak.decoder_calls import MAX_SYMBOLS, nbest_tensors, padded
from tests.soak.truth import (
    INDICES,
    LARGE,
    Expected,
    Options,
    Refused,
    Results,
    Undecided,
    flag,
    integer,
    largest,
    number,
    one_of,
    require,
    solve,
    tensor,
)
from transducer_toolkit import LatticeShape
from transducer_toolkit.decoding import TOPOLOGIES, ModifiedBeamSearch


def _float64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _batch(a: dict[str, Any]) -> tuple[Any, Any, Tensor, list[int]]:
    predictor, joiner = a["predictor"], a["joiner"]
    require(isinstance(predictor, nn.Module) and isinstance(joiner, nn.Module))
    weight = next(joiner.parameters())
    x = tensor(a["encoder_out"], 3, (weight.dtype,))
    require(x.size(2) == weight.size(1))
    if len(x) == 0 and isinstance(a["encoder_lengths"], Tensor):
        require(tuple(a["encoder_lengths"].shape) == (0,))
        raise Undecided  # of which dtype, does not matter
    lengths = tensor(a["encoder_lengths"], 1, INDICES).tolist()
    require(len(lengths) == len(x) and all(0 <= length <= x.size(1) for length in lengths))
    return predictor, joiner, x, lengths


def _require_numbers(x: Tensor, lengths: list[int]) -> None:
    """A frame with NaN gives logits that are NaN."""
    require(not any(bool(frames[:t].isnan().any()) for frames, t in zip(x, lengths, strict=True)))


def _walk(predictor: Any, joiner: Any, frames: Tensor, limit: int) -> tuple[list, list, list]:
    """Symbols, frames and log-probabilities of one utterance."""
    found: tuple[list, list, list] = ([], [], [])
    token = torch.tensor([predictor.blank])
    out, state = predictor.step(token, predictor.initial_state(1))
    for t in range(len(frames)):
        for _ in range(limit):
            logits = joiner.step(frames[t : t + 1], out)[0]
            require(bool(logits.max().isfinite()) and not bool(logits.isnan().any()))
            first, second = logits.double().topk(2).values.tolist()
            if first - second < 1e-4 * max(1.0, abs(first)):
                raise Undecided  # a tie, but for rounding
            symbol = int(logits.argmax())
            if symbol == predictor.blank:
                break
            log_prob = float(logits.double().log_softmax(-1)[symbol])
            for part, value in zip(found, (symbol, t, log_prob), strict=True):
                part.append(value)
            out, state = predictor.step(torch.tensor([symbol]), state)
    return found


def _greedy(batch: tuple[Any, Any, Tensor, list[int]], limit: int) -> Results:
    predictor, joiner, x, lengths = batch
    _require_numbers(x, lengths)
    with torch.inference_mode():
        found = [
            _walk(predictor, joiner, frames[:t], limit)
            for frames, t in zip(x, lengths, strict=True)
        ]
    tokens, frames, log_probs = (padded(part) for part in zip(*found, strict=True))
    results = {"tokens": Expected(tokens), "frames": Expected(frames)}
    if largest(x) <= LARGE:
        results["log_probs"] = Expected(log_probs, 1e-4, 1e-4)  # of float32 logits up to 100
    return results


def greedy_search(a: dict[str, Any], weights: Tensor) -> Results:
    batch = _batch(a)
    limit = integer(a.get("max_symbols_per_frame", MAX_SYMBOLS), 1, math.inf)
    return _greedy(batch, min(limit, MAX_SYMBOLS))


def advance(a: dict[str, Any], weights: Tensor) -> Results:
    topology = one_of(a.get("topology", "regular"), TOPOLOGIES)
    state = integer(a["state"], 0, math.inf)
    batch = _batch(a)
    require(state == len(batch[2]))
    results = _greedy(batch, MAX_SYMBOLS if topology == "regular" else 1)
    return results | {"num_frames": Expected(_float64(batch[3]))}


def nbest(a: dict[str, Any], weights: Tensor) -> Results:
    names = "beam", "topology", "length_normalized", "lm", "lm_weight"
    options = {name: a[name] for name in names if name in a}
    integer(options.get("beam", 4), 1, 2**20 + 1)
    one_of(options.get("topology", "modified"), TOPOLOGIES)
    flag(options.get("length_normalized", True))
    require(options.get("lm") is None or isinstance(options["lm"], BigramModel))
    number(options.get("lm_weight", 0.3), -math.inf)
    predictor, joiner, x, lengths = _batch(a)
    _require_numbers(x, lengths)
    if x.dtype != torch.float64 or largest(x) > LARGE or not bool(x.isfinite().all()):
        raise Undecided  # ties, or logits that may be infinite
    search = ModifiedBeamSearch(predictor, joiner, **options)
    with torch.inference_mode():
        found = [beam_reference(search, frames[:t]) for frames, t in zip(x, lengths, strict=True)]
    expected = nbest_tensors(found)
    return {
        "tokens": Expected(expected["tokens"]),
        "scores": Expected(expected["scores"], 1e-9, 1e-9),
    }


def _viterbi(blank: Tensor, label: Tensor, topology: str) -> tuple[float, list[int]]:
    """The best path, from a table of the best scores to the end of the lattice."""
    num_frames, num_symbols = len(blank), blank.size(1) - 1
    here = 1 if topology == "regular" else 0  # a label stays on its frame, or leads on
    if topology == "constrained":
        label = label + blank[:, 1:]
    end = torch.full((num_frames + 1, num_symbols + 1), -math.inf, dtype=torch.float64)
    end[num_frames, num_symbols] = 0
    steps: dict[tuple[int, int], bool] = {}  # whether a label is taken
    for t in range(num_frames - 1, -1, -1):
        for u in range(num_symbols, -1, -1):
            by_blank, by_label = float(blank[t, u] + end[t + 1, u]), -math.inf
            last = topology == "one_sym_per_frame" and t == num_frames - 1
            if u < num_symbols and not last:
                by_label = float(label[t, u] + end[t if here else t + 1, u + 1])
            end[t, u], steps[t, u] = max(by_blank, by_label), by_label > by_blank
            if by_blank == by_label != -math.inf:
                raise Undecided  # a tie
    if not math.isfinite(end[0, 0]):
        raise Refused
    frames, t, u = [], 0, 0
    while t < num_frames:
        if steps[t, u]:
            frames.append(t)
            t, u = (t if here else t + 1), u + 1
        else:
            t += 1
    return float(end[0, 0]), frames


def best_path(a: dict[str, Any], weights: Tensor) -> Results:
    topology = one_of(a["topology"], TOPOLOGIES)
    blank, label = tensor(a["blank_log_probs"], 2), tensor(a["label_log_probs"], 2)
    require(min(blank.shape) >= 1)
    require(tuple(label.shape) == (len(blank), blank.size(1) - 1))
    require(not bool(blank.isnan().any() or label.isnan().any()))
    if bool((blank == math.inf).any() or (label == math.inf).any()):
        raise Undecided
    log_prob, frames = _viterbi(blank.double(), label.double(), topology)
    size = largest(blank, label)
    results = {"log_prob": Expected(_float64(log_prob), 1e-12 * size * sum(blank.shape))}
    if size <= LARGE:
        results["frames"] = Expected(_float64(frames))
    return results


def _lattices(a: dict[str, Any]) -> tuple[Tensor, list, LatticeShape, int, str]:
    """Logits, and of each utterance its own and its labels."""
    topology = one_of(a.get("topology", "regular"), TOPOLOGIES)
    logits, targets, shape = tensor(a["logits"], 2), tensor(a["targets"], 2, INDICES), a["shape"]
    require(isinstance(shape, LatticeShape) and len(logits) == shape.num_cells)
    blank = integer(a["blank"], 0, logits.size(1))
    require(len(targets) == shape.num_utterances and targets.size(1) >= shape.max_targets)
    parts = []
    for b in range(len(targets)):
        t, u = int(shape.logit_lengths[b]), int(shape.target_lengths[b])
        first = int(shape.cell_offsets[b])
        rows = logits[first : first + t * (u + 1)].double().view(t, u + 1, -1)
        require(all(0 <= label < logits.size(1) for label in targets[b, :u].tolist()))
        parts.append((rows, targets[b, :u].long()))
    return logits, parts, shape, blank, topology


def align(a: dict[str, Any], weights: Tensor) -> Results:
    logits, parts, shape, blank, topology = _lattices(a)
    paths = []
    for rows, labels in parts:
        log_probs = rows.log_softmax(-1)
        require(not bool(log_probs.isnan().any()))
        index = labels.expand(len(rows), -1)[..., None]
        label = log_probs[:, :-1].gather(2, index).squeeze(2)
        paths.append(_viterbi(log_probs[..., blank], label, topology))
    size, eps = largest(logits), torch.finfo(logits.dtype).eps
    error = 16 * eps * size * (shape.max_frames + shape.max_targets)
    results = {"log_prob": Expected(_float64([x for x, _ in paths]), error)}
    if logits.dtype == torch.float64 and size <= LARGE:
        results["frames"] = Expected(padded([frames for _, frames in paths]))
    return results


def lattice_posteriors(a: dict[str, Any], weights: Tensor) -> Results:
    logits, parts, shape, blank, topology = _lattices(a)
    num = len(parts), shape.max_frames, shape.max_targets
    likelihood = torch.zeros(num[0], dtype=torch.float64)
    occupancy = torch.zeros(num[0], num[1], num[2] + 1, dtype=torch.float64)
    labels = torch.zeros(num, dtype=torch.float64)
    counts = torch.ones_like(occupancy, dtype=torch.bool)
    for b, (rows, targets) in enumerate(parts):
        require(blank not in targets.tolist())
        feasible = len(rows) >= len(targets) + (topology == "one_sym_per_frame")
        require(topology == "regular" or feasible)
        solution = solve(rows, targets, Options(blank, topology))
        likelihood[b] = -solution.loss
        if solution.loss.isnan():
            counts[b] = False
            continue
        t, u = len(rows), len(targets)
        labels[b, :t, :u] = solution.label_posterior
        occupancy[b, :t, : u + 1] = solution.blank_posterior
        occupancy[b, :t, :u] += solution.label_posterior
        if topology == "constrained":  # a label drags a blank along
            occupancy[b, :t, 1 : u + 1] += solution.label_posterior
    size = largest(logits)
    eps = torch.finfo(torch.float64 if logits.dtype == torch.float64 else torch.float32).eps
    error = 64 * eps * size * (num[1] + num[2])
    fine = torch.finfo(logits.dtype).eps if logits.element_size() == 2 else 0.0
    results = {"log_likelihood": Expected(likelihood, error, fine)}
    if size <= LARGE:
        results["occupancy"] = Expected(occupancy, error, fine, counts)
        results["labels"] = Expected(labels, error, fine, counts[:, :, : num[2]])
    return results
