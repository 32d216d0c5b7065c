# SPDX-License-Identifier: Apache-2.0
"""Small random valid calls of the public decoders, each a function that returns tensors."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.decoding.models import random_model
from tests.decoding.test_beam_search import BigramModel
from transducer_toolkit import LatticeShape, decoding
from transducer_toolkit.decoding import TOPOLOGIES

NOTHING = -9.0  # where an utterance has fewer symbols or hypotheses than another
MAX_SYMBOLS = 12  # a frame: some models never say blank, and 2^62 symbols take their time


def padded(rows: Sequence[Sequence[float]]) -> Tensor:
    """(number of rows, length of the longest), float64."""
    width = max((len(row) for row in rows), default=0)
    values = [[*row, *[NOTHING] * (width - len(row))] for row in rows]
    return torch.tensor(values, dtype=torch.float64).view(len(rows), width)


def hypothesis_tensors(hypotheses: Sequence[decoding.Hypothesis]) -> dict[str, Tensor]:
    return {
        "tokens": padded([h.tokens for h in hypotheses]),
        "frames": padded([h.frames for h in hypotheses]),
        "log_probs": padded([h.log_probs for h in hypotheses]),
    }


def _greedy_search(
    predictor: Any,
    joiner: Any,
    encoder_out: Any,
    encoder_lengths: Any,
    max_symbols_per_frame: Any = MAX_SYMBOLS,
) -> dict[str, Tensor]:
    if isinstance(max_symbols_per_frame, int) and max_symbols_per_frame > MAX_SYMBOLS:
        decoding.GreedySearch(predictor, joiner, max_symbols_per_frame=max_symbols_per_frame)
        max_symbols_per_frame = MAX_SYMBOLS
    found = decoding.greedy_search(
        predictor,
        joiner,
        encoder_out,
        encoder_lengths,
        max_symbols_per_frame=max_symbols_per_frame,
    )
    return hypothesis_tensors(found)


def _advance(
    predictor: Any,
    joiner: Any,
    encoder_out: Any,
    encoder_lengths: Any,
    state: Any,
    topology: Any = "regular",
) -> dict[str, Tensor]:
    """The first chunk; `state` may be a number of utterances, for the first state of them."""
    search = decoding.GreedySearch(
        predictor, joiner, max_symbols_per_frame=MAX_SYMBOLS, topology=topology
    )
    if isinstance(state, int) and not isinstance(state, bool):
        state = search.initial_state(min(state, 1000))
    found, after = search.advance(encoder_out, encoder_lengths, state)
    return hypothesis_tensors(found) | {"num_frames": after.num_frames.double()}


def _nbest(
    predictor: Any,
    joiner: Any,
    encoder_out: Any,
    encoder_lengths: Any,
    beam: Any = 4,
    topology: Any = "modified",
    length_normalized: Any = False,
    lm: Any = None,
    lm_weight: Any = 0.3,
) -> dict[str, Tensor]:
    search = decoding.ModifiedBeamSearch(
        predictor,
        joiner,
        beam=beam,
        topology=topology,
        length_normalized=length_normalized,
        lm=lm,
        lm_weight=lm_weight,
    )
    found = search.nbest(encoder_out, encoder_lengths)
    return nbest_tensors([[(h.tokens, h.score) for h in hypotheses] for hypotheses in found])


def nbest_tensors(found: Sequence[Sequence[tuple[Sequence[int], float]]]) -> dict[str, Tensor]:
    """Symbols and scores of the hypotheses of each utterance, all in a row of each."""
    return {
        "tokens": padded([[x for tokens, _ in row for x in (-1, *tokens)] for row in found]),
        "scores": padded([[score for _, score in row] for row in found]),
    }


def _best_path(blank_log_probs: Any, label_log_probs: Any, topology: Any) -> dict[str, Tensor]:
    path = decoding.best_path(blank_log_probs, label_log_probs, topology=topology)
    frames = torch.tensor(path.frames, dtype=torch.float64)
    return {"log_prob": torch.tensor(path.log_prob, dtype=torch.float64), "frames": frames}


def _align(
    logits: Any, targets: Any, shape: Any, blank: Any, topology: Any = "regular"
) -> dict[str, Tensor]:
    paths = decoding.align(logits, targets, shape, blank, topology=topology)
    log_probs = torch.tensor([path.log_prob for path in paths], dtype=torch.float64)
    return {"log_prob": log_probs, "frames": padded([path.frames for path in paths])}


def _posteriors(
    logits: Any, targets: Any, shape: Any, blank: Any, topology: Any = "regular"
) -> dict[str, Tensor]:
    found = decoding.lattice_posteriors(logits, targets, shape, blank, topology=topology)
    names = "log_likelihood", "occupancy", "labels"
    return {name: getattr(found, name) for name in names}


def _model(random_: random.Random) -> dict[str, Any]:
    names = "predictor", "joiner", "encoder_out", "encoder_lengths"
    call = dict(zip(names, random_model(random_.randrange(2**31), max_frames=6), strict=True))
    if random_.random() < 0.3:
        for name in names[:3]:
            call[name] = call[name].float()
    return call


def _greedy_call(random_: random.Random) -> dict[str, Any]:
    return _model(random_) | {"max_symbols_per_frame": random_.choice([1, 2, 5])}


def _advance_call(random_: random.Random) -> dict[str, Any]:
    call = _model(random_)
    return call | {
        "state": len(call["encoder_out"]),
        "topology": random_.choice(tuple(TOPOLOGIES)),
    }


def _nbest_call(random_: random.Random) -> dict[str, Any]:
    call = _model(random_)
    options = {
        "beam": random_.choice([1, 2, 4, 7]),
        "topology": random_.choice(tuple(TOPOLOGIES)),
        "length_normalized": random_.random() < 0.5,
        "lm": BigramModel(call["predictor"].vocab_size, random_.randrange(100)),
        "lm_weight": random_.choice([0.0, 0.3, -0.3]),
    }
    return call | {name: value for name, value in options.items() if random_.random() < 0.7}


def _lattices(random_: random.Random) -> dict[str, Any]:
    topology = random_.choice(tuple(TOPOLOGIES))
    size, vocab_size = random_.choice([1, 2, 3]), random_.choice([2, 3, 6])
    frames = [random_.choice([1, 2, 4, 6]) for _ in range(size)]
    symbols = [random_.choice([0, 1, 3]) for _ in range(size)]
    min_frames = TOPOLOGIES[topology].min_frames
    frames = [max(t, min_frames(u)) for t, u in zip(frames, symbols, strict=True)]
    shape, blank = LatticeShape.from_lengths(frames, symbols), random_.randrange(vocab_size)
    targets = torch.randint(0, vocab_size - 1, (size, max(symbols) + random_.choice([0, 1])))
    targets += targets >= blank
    for b, u in enumerate(symbols):
        targets[b, u:] = random_.choice([-1, 10**8])
    dtype = random_.choice([torch.float64, torch.float32])
    logits = random_.choice([1.0, 20.0]) * torch.randn(shape.num_cells, vocab_size)
    call = {"logits": logits.to(dtype), "targets": targets, "shape": shape, "blank": blank}
    return call | {"topology": topology}


def _one_lattice(random_: random.Random) -> dict[str, Any]:
    topology = random_.choice(tuple(TOPOLOGIES))
    frames = random_.choice([1, 2, 5, 8])
    symbols = random_.choice([0, 1, 4])
    frames = max(frames, TOPOLOGIES[topology].min_frames(symbols))
    dtype = random_.choice([torch.float64, torch.float32])
    return {
        "blank_log_probs": torch.randn(frames, symbols + 1).to(dtype),
        "label_log_probs": torch.randn(frames, symbols).to(dtype),
        "topology": topology,
    }


# Name: the function, what makes arguments for it.
DECODERS: dict[str, tuple[Callable[..., Any], Callable[..., dict[str, Any]]]] = {
    "greedy_search": (_greedy_search, _greedy_call),
    "GreedySearch.advance": (_advance, _advance_call),
    "ModifiedBeamSearch.nbest": (_nbest, _nbest_call),
    "best_path": (_best_path, _one_lattice),
    "align": (_align, _lattices),
    "lattice_posteriors": (_posteriors, _lattices),
}
