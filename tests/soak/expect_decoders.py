# SPDX-License-Identifier: Apache-2.0
"""Reference results of the decoders, one cell and one utterance at a time."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests.decoding.test_beam_search import beam_reference
from tests.soak.decoder_calls import MAX_SYMBOLS, nbest_tensors, padded
from tests.soak.truth import (
    LARGE,
    Expected,
    Options,
    Results,
    Undecided,
    defined,
    largest,
    solve,
)
from transducer_toolkit import LatticeShape
from transducer_toolkit.decoding import TOPOLOGIES, ModifiedBeamSearch


def _float64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _batch(a: dict[str, Any]) -> tuple[Any, Any, Tensor, list[int]]:
    x, lengths = a["encoder_out"].detach(), a["encoder_lengths"].tolist()
    for frames, length in zip(x, lengths, strict=True):
        defined(not bool(frames[:length].isnan().any()))  # a frame with NaN gives NaN logits
    return a["predictor"], a["joiner"], x, lengths


def _walk(predictor: Any, joiner: Any, frames: Tensor, limit: int) -> tuple[list, list, list]:
    """Symbols, frames and log-probabilities of one utterance."""
    found: tuple[list, list, list] = ([], [], [])
    token = torch.tensor([predictor.blank])
    out, state = predictor.step(token, predictor.initial_state(1))
    for t in range(len(frames)):
        for _ in range(limit):
            logits = joiner.step(frames[t : t + 1], out)[0]
            defined(bool(logits.max().isfinite()) and not bool(logits.isnan().any()))
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
    limit = a.get("max_symbols_per_frame", MAX_SYMBOLS)
    return _greedy(_batch(a), min(limit, MAX_SYMBOLS))


def advance(a: dict[str, Any], weights: Tensor) -> Results:
    batch = _batch(a)
    stays = TOPOLOGIES[a.get("topology", "regular")].labels_share_frames
    results = _greedy(batch, MAX_SYMBOLS if stays else 1)
    return results | {"num_frames": Expected(_float64(batch[3]))}


def nbest(a: dict[str, Any], weights: Tensor) -> Results:
    names = "beam", "topology", "length_normalized", "lm", "lm_weight"
    options = {name: a[name] for name in names if name in a}
    predictor, joiner, x, lengths = _batch(a)
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
    row = TOPOLOGIES[topology]
    if row.label_takes_blank:
        label = label + blank[:, 1:]
    end = torch.full((num_frames + 1, num_symbols + 1), -math.inf, dtype=torch.float64)
    end[num_frames, num_symbols] = 0
    steps: dict[tuple[int, int], bool] = {}  # whether a label is taken
    for t in range(num_frames - 1, -1, -1):
        for u in range(num_symbols, -1, -1):
            by_blank, by_label = float(blank[t, u] + end[t + 1, u]), -math.inf
            may_label = t < num_frames - 1 or row.may_label_last_frame
            if u < num_symbols and may_label:
                by_label = float(label[t, u] + end[t + row.label_durations[0], u + 1])
            end[t, u], steps[t, u] = max(by_blank, by_label), by_label > by_blank
            if by_blank == by_label != -math.inf:
                raise Undecided  # a tie
    defined(math.isfinite(end[0, 0]))
    frames, t, u = [], 0, 0
    while t < num_frames:
        if steps[t, u]:
            frames.append(t)
            t, u = t + row.label_durations[0], u + 1
        else:
            t += 1
    return float(end[0, 0]), frames


def best_path(a: dict[str, Any], weights: Tensor) -> Results:
    blank, label = a["blank_log_probs"].detach(), a["label_log_probs"].detach()
    defined(not bool(blank.isnan().any() or label.isnan().any()))
    if bool((blank == math.inf).any() or (label == math.inf).any()):
        raise Undecided
    log_prob, frames = _viterbi(blank.double(), label.double(), a["topology"])
    size = largest(blank, label)
    results = {"log_prob": Expected(_float64(log_prob), 1e-12 * size * sum(blank.shape))}
    if size <= LARGE:
        results["frames"] = Expected(_float64(frames))
    return results


def _lattices(a: dict[str, Any]) -> tuple[Tensor, list, LatticeShape]:
    """Logits, and of each utterance its own and its labels."""
    logits, targets, shape = a["logits"].detach(), a["targets"].detach(), a["shape"]
    parts = []
    for b in range(len(targets)):
        t, u = int(shape.logit_lengths[b]), int(shape.target_lengths[b])
        first = int(shape.cell_offsets[b])
        rows = logits[first : first + t * (u + 1)].double().view(t, u + 1, -1)
        parts.append((rows, targets[b, :u].long()))
    return logits, parts, shape


def align(a: dict[str, Any], weights: Tensor) -> Results:
    logits, parts, shape = _lattices(a)
    blank, topology = a["blank"], a.get("topology", "regular")
    paths = []
    for rows, labels in parts:
        log_probs = rows.log_softmax(-1)
        defined(not bool(log_probs.isnan().any()))
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
    logits, parts, shape = _lattices(a)
    blank, topology = a["blank"], a.get("topology", "regular")
    num = len(parts), shape.max_frames, shape.max_targets
    likelihood = torch.zeros(num[0], dtype=torch.float64)
    occupancy = torch.zeros(num[0], num[1], num[2] + 1, dtype=torch.float64)
    labels = torch.zeros(num, dtype=torch.float64)
    counts = torch.ones_like(occupancy, dtype=torch.bool)
    for b, (rows, targets) in enumerate(parts):
        solution = solve(rows, targets, Options(blank, topology))
        likelihood[b] = -solution.loss
        if solution.loss.isnan():
            counts[b] = False
            continue
        t, u = len(rows), len(targets)
        labels[b, :t, :u] = solution.label_posterior
        occupancy[b, :t, : u + 1] = solution.blank_posterior
        occupancy[b, :t, :u] += solution.label_posterior
        if TOPOLOGIES[topology].label_takes_blank:
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
