# SPDX-License-Identifier: Apache-2.0
"""Small valid calls of every public loss, joiner and decoder: what the input fuzz starts from."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import transducer_toolkit as tt
from tests.soak.decoder_calls import DECODERS
from transducer_toolkit.compat import torchaudio
from transducer_toolkit.ops import native
from transducer_toolkit.ops.topology import (
    K2_TOPOLOGIES,
    TOPOLOGIES,
    Topology,
    get_topology,
    multi_blank_topology,
    tdt_topology,
)

RNNT_TYPES = tuple(K2_TOPOLOGIES)
REDUCTIONS = ("none", "mean", "sum")


@dataclass
class Sizes:
    """A random batch. Fields as everywhere: B, T, U, V, and what each utterance has of them."""

    random_: random.Random
    topology: str

    def __post_init__(self) -> None:
        choice = self.random_.choice
        self.B, self.V = choice([1, 1, 2, 3]), choice([2, 3, 5, 9])
        self.frames = [choice([1, 1, 2, 3, 5]) for _ in range(self.B)]
        self.symbols = [choice([0, 1, 2, 4]) for _ in range(self.B)]
        is_feasible = get_topology(self.topology).is_feasible
        for b in range(self.B):
            while not is_feasible(self.frames[b], self.symbols[b]):
                if self.symbols[b]:
                    self.symbols[b] -= 1
                else:
                    self.frames[b] += 1
        self.begins = [(0, 0)] * self.B  # symbol, frame
        self.T = max(self.frames) + choice([0, 0, 1])
        self.U = max(self.symbols) + choice([0, 0, 1])
        self.blank = self.random_.randrange(self.V)
        self.dtype = choice([torch.float64, torch.float64, torch.float32, torch.bfloat16])
        self.scale = choice([0.3, 3.0, 30.0])

    def floats(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        return (self.scale * torch.randn(size)).to(dtype or self.dtype)

    def begin_somewhere(self) -> None:
        """Lattices that begin behind frame 0 and symbol 0, in tensors that have room for it."""
        self.begins = [(self.random_.randrange(3), self.random_.randrange(3)) for _ in self.frames]
        self.T, self.U = self.T + 2, self.U + 2

    def targets(self) -> Tensor:
        """(B, U), in the padding anything."""
        labels = torch.randint(0, self.V - 1, (self.B, self.U))
        labels += labels >= self.blank
        for b, (first, _) in enumerate(self.begins):
            labels[b, :first] = labels[b, first + self.symbols[b] :] = self.random_.choice([-1, 99])
        return labels.to(self.random_.choice([torch.int32, torch.int64]))

    def lengths(self) -> tuple[Tensor, Tensor]:
        dtype = self.random_.choice([torch.int32, torch.int64])
        return torch.tensor(self.frames, dtype=dtype), torch.tensor(self.symbols, dtype=dtype)

    def boundary(self) -> Tensor:
        rows = [
            (s, t, s + symbols, t + frames)
            for (s, t), symbols, frames in zip(self.begins, self.symbols, self.frames, strict=True)
        ]
        return torch.tensor(rows, dtype=self.random_.choice([torch.int32, torch.int64]))

    def ranges(self) -> Tensor:
        """(B, T, R): windows that climb, though not always far enough for a path to exist."""
        width = self.random_.randint(1, self.U + 1)
        starts = torch.rand(self.B, self.T).sort(1).values * (self.U + 2 - width)
        starts = starts.long().clamp(max=self.U + 1 - width)
        return starts[:, :, None] + torch.arange(width)

    def shape(self) -> tt.LatticeShape:
        return tt.LatticeShape.from_lengths(self.frames, self.symbols)


def _options(random_: random.Random, **choices: tuple[Any, ...]) -> dict[str, Any]:
    """Half of the options, each with one of its values."""
    return {
        name: random_.choice(values) for name, values in choices.items() if random_.random() < 0.5
    }


def _transducer_loss(random_: random.Random) -> dict[str, Any]:
    topology = random_.choice(tuple(TOPOLOGIES))
    # Another way to write this topology.
    has_flag = topology == "one_sym_per_frame" and random_.random() < 0.5
    sizes = Sizes(random_, topology)
    padded = random_.random() < 0.5
    rows = (sizes.B, sizes.T, sizes.U + 1) if padded else (sizes.shape().num_cells,)
    frames, symbols = sizes.lengths()
    call = {
        "logits": sizes.floats(*rows, sizes.V),
        "targets": sizes.targets(),
        "logit_lengths": frames,
        "target_lengths": symbols,
        "blank": sizes.blank,
        "one_sym_per_frame": has_flag,
        "topology": "regular" if has_flag else topology,
        **_options(
            random_,
            from_log_softmax=(False, True),
            reduction=REDUCTIONS,
            fastemit_lambda=(0.0, 0.3),
            delay_penalty=(0.0, 0.2),
            clamp=(-1.0, 0.0, 0.05),
            inplace=(False, True),
            validate=(None, True, False),
        ),
        **(_alignment(random_, sizes) if random_.random() < 0.3 else {}),
    }
    if random_.random() < 0.3 and not call.get("from_log_softmax"):
        call["normalization"] = "hat"
    return call


def _alignment(random_: random.Random, sizes: Sizes) -> dict[str, Any]:
    """Windows about the frames of a path."""
    frames = torch.zeros(sizes.B, sizes.U, dtype=torch.int64)
    for b, symbols in enumerate(sizes.symbols):
        row = get_topology(sizes.topology)
        last = sizes.frames[b] - (not row.may_label_last_frame)
        if row.labels_share_frames:
            chosen = torch.randint(0, last, (symbols,))
        else:
            chosen = torch.randperm(last)[:symbols]
        frames[b, :symbols] = chosen.sort().values
    return {
        "alignment": frames.to(random_.choice([torch.int32, torch.int64])),
        "left": random_.choice([0, 1, 4]),
        "right": random_.choice([0, 1, 4]),
    }


def _durations(
    random_: random.Random, topology: Topology, num_extra: int, **more: tuple[Any, ...]
) -> dict[str, Any]:
    """Arguments of the losses with durations; logits have num_extra more columns than V."""
    sizes = Sizes(random_, topology.name)
    padded = random_.random() < 0.5
    rows = (sizes.B, sizes.T, sizes.U + 1) if padded else (sizes.shape().num_cells,)
    frames, symbols = sizes.lengths()
    return {
        "logits": sizes.floats(*rows, sizes.V + num_extra),
        "targets": sizes.targets(),
        "logit_lengths": frames,
        "target_lengths": symbols,
        "blank": sizes.blank,
        **_options(
            random_,
            sigma=(0.0, 0.05, 0.5),
            reduction=REDUCTIONS,
            fastemit_lambda=(0.0, 0.3),
            delay_penalty=(0.0, 0.2),
            clamp=(-1.0, 0.0, 0.05),
            inplace=(False, True),
            validate=(None, True, False),
            **more,
        ),
    }


def _tdt(random_: random.Random) -> dict[str, Any]:
    durations = random_.choice([(0, 1), (1,), (0, 1, 2, 3, 4), (0, 2), (1, 3)])
    normalization = ("softmax", "hat")
    topology = tdt_topology(durations)
    call = _durations(random_, topology, len(durations), normalization=normalization)
    return {**call, "durations": durations}


def _multi_blank(random_: random.Random) -> dict[str, Any]:
    durations = random_.choice([(2,), (2, 4, 8), (3, 2)])
    topology = multi_blank_topology(durations)
    call = _durations(random_, topology, len(durations) + 1)  # behind labels: big blanks, blank
    return {
        **call,
        "blank": call["logits"].size(-1) - 1,
        "big_blank_durations": durations,
    }


def _torchaudio(random_: random.Random) -> dict[str, Any]:
    sizes = Sizes(random_, "regular")
    frames, symbols = sizes.lengths()
    return {
        "logits": sizes.floats(sizes.B, sizes.T, sizes.U + 1, sizes.V),
        "targets": sizes.targets(),
        "logit_lengths": frames,
        "target_lengths": symbols,
        "blank": random_.choice([sizes.blank, sizes.blank - sizes.V]),
        **_options(
            random_,
            clamp=(-1.0, 0.05),
            reduction=REDUCTIONS,
            fused_log_softmax=(False, True),
        ),
    }


def _k2_sizes(random_: random.Random) -> tuple[Sizes, dict[str, Any]]:
    """Sizes, and the arguments that every k2 loss has."""
    rnnt_type = random_.choice(RNNT_TYPES)
    sizes = Sizes(random_, rnnt_type)
    if random_.random() < 0.3:
        sizes.begin_somewhere()
        boundary: Tensor | None = sizes.boundary()
    elif random_.random() < 0.5:
        boundary = sizes.boundary()
    else:
        boundary = None
        sizes.frames, sizes.symbols = [sizes.T] * sizes.B, [sizes.U] * sizes.B
        if rnnt_type != "regular":
            sizes.U = min(sizes.U, sizes.T)
            sizes.symbols = [sizes.U] * sizes.B
    return sizes, {
        "symbols": sizes.targets(),
        "termination_symbol": sizes.blank,
        "boundary": boundary,
        "rnnt_type": rnnt_type,
    }


def _k2_loss_options(random_: random.Random, **more: tuple[Any, ...]) -> dict[str, Any]:
    return _options(
        random_,
        delay_penalty=(0.0, 0.2),
        reduction=REDUCTIONS,
        return_grad=(False, True),
        **more,
    )


def _full(random_: random.Random) -> dict[str, Any]:
    sizes, common = _k2_sizes(random_)
    return {"logits": sizes.floats(sizes.B, sizes.T, sizes.U + 1, sizes.V), **common}


def _pruned(random_: random.Random) -> dict[str, Any]:
    sizes, common = _k2_sizes(random_)
    ranges = sizes.ranges()
    logits = sizes.floats(sizes.B, sizes.T, ranges.size(2), sizes.V)
    return {"logits": logits, "ranges": ranges, **common}


def _additive(random_: random.Random) -> dict[str, Any]:
    sizes, common = _k2_sizes(random_)
    return {
        "lm": sizes.floats(sizes.B, sizes.U + 1, sizes.V),
        "am": sizes.floats(sizes.B, sizes.T, sizes.V),
        **common,
    }


def _scales(random_: random.Random) -> dict[str, Any]:
    lm_scale, am_scale = random_.choice([(0.0, 0.0), (0.25, 0.0), (0.25, 0.75), (0.0, 1.0)])
    return {"lm_only_scale": lm_scale, "am_only_scale": am_scale}


def _fused(random_: random.Random) -> dict[str, Any]:
    topology = random_.choice(tuple(TOPOLOGIES))
    sizes = Sizes(random_, topology)
    sizes.scale = min(sizes.scale, 3.0)
    width = random_.choice([1, 3, 8])
    weight_dtype = sizes.dtype if random_.random() < 0.7 else torch.float32
    if sizes.dtype == torch.float64:
        weight_dtype = torch.float64
    frames, symbols = sizes.lengths()
    return {
        "enc": sizes.floats(sizes.B, sizes.T, width),
        "pred": sizes.floats(sizes.B, sizes.U + 1, width),
        "weight": sizes.floats(sizes.V, width, dtype=weight_dtype),
        "bias": random_.choice([None, sizes.floats(sizes.V, dtype=weight_dtype)]),
        "targets": sizes.targets(),
        "logit_lengths": frames,
        "target_lengths": symbols,
        "blank": sizes.blank,
        "topology": topology,
        **_options(
            random_,
            activation=native.ACTIVATIONS,
            ranges=(sizes.ranges(),),
            reduction=REDUCTIONS,
            fastemit_lambda=(0.0, 0.3),
            delay_penalty=(0.0, 0.2),
            clamp=(0.0, 0.05),
            dropped_mass=(0.0, 1e-7),
            tile_cells=(None, 1, 7, 100),
            shape=(sizes.shape(),),
            validate=(None, True, False),
        ),
    }


def _join(random_: random.Random) -> dict[str, Any]:
    sizes = Sizes(random_, "regular")
    width = random_.choice([1, 3, 8, 17])
    return {
        "enc": sizes.floats(sizes.B, sizes.T, width),
        "pred": sizes.floats(sizes.B, sizes.U + 1, width),
        "shape": sizes.shape(),
        "activation": random_.choice(native.ACTIVATIONS),
    }


def _joiner_logits(random_: random.Random) -> dict[str, Any]:
    call = _join(random_)
    width, dtype = call["enc"].size(2), call["enc"].dtype
    bias = random_.choice([None, torch.randn(4).to(dtype)])
    return {**call, "weight": torch.randn(4, width).to(dtype), "bias": bias}


def _recursion(random_: random.Random) -> dict[str, Any]:
    sizes = Sizes(random_, random_.choice(["regular", "modified"]))
    sizes.dtype = random_.choice([torch.float32, torch.float64])
    boundary = None
    if random_.random() < 0.6:
        sizes.begin_somewhere()
        boundary = sizes.boundary()
    extra = sizes.topology == "regular"
    return {
        "px": sizes.floats(sizes.B, sizes.U, sizes.T + extra),
        "py": sizes.floats(sizes.B, sizes.U + 1, sizes.T),
        "boundary": boundary,
    }


def _joint_recursion(random_: random.Random) -> dict[str, Any]:
    call = _recursion(random_)
    several = [[call[name], torch.randn_like(call[name])] for name in ("px", "py")]
    return {"px": several[0], "py": several[1], "boundary": call["boundary"]}


def _prune_ranges(random_: random.Random) -> dict[str, Any]:
    sizes, common = _k2_sizes(random_)
    rnnt_type = common["rnnt_type"]
    return {
        "px_grad": torch.rand(sizes.B, sizes.U, sizes.T + (rnnt_type == "regular")),
        "py_grad": torch.rand(sizes.B, sizes.U + 1, sizes.T),
        "boundary": common["boundary"],
        "s_range": random_.randint(1, 5),
        "rnnt_type": rnnt_type,
        **_options(random_, method=("greedy", "optimal")),
    }


def _do_pruning(random_: random.Random) -> dict[str, Any]:
    sizes, common = _k2_sizes(random_)
    return {
        "am": sizes.floats(sizes.B, sizes.T, 3),
        "lm": sizes.floats(sizes.B, sizes.U + 1, 2),
        "ranges": sizes.ranges(),
        "boundary": common["boundary"],
    }


def _from_lengths(random_: random.Random) -> dict[str, Any]:
    frames, symbols = Sizes(random_, "regular").lengths()
    return {"logit_lengths": frames, "target_lengths": symbols}


# name: the function, what makes arguments for it, what may come on top.
FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[..., dict[str, Any]]]] = {
    "transducer_loss": (tt.transducer_loss, _transducer_loss),
    "tdt_loss": (tt.tdt_loss, _tdt),
    "multi_blank_loss": (tt.multi_blank_loss, _multi_blank),
    "torchaudio.rnnt_loss": (torchaudio.rnnt_loss, _torchaudio),
    "rnnt_loss": (
        tt.rnnt_loss,
        lambda r: _full(r) | _k2_loss_options(r, fastemit_lambda=(0.0, 0.3)),
    ),
    "rnnt_loss_pruned": (
        tt.rnnt_loss_pruned,
        lambda r: _pruned(r) | _k2_loss_options(r, fastemit_lambda=(0.0, 0.3)),
    ),
    "rnnt_loss_simple": (tt.rnnt_loss_simple, lambda r: _additive(r) | _k2_loss_options(r)),
    "rnnt_loss_smoothed": (
        tt.rnnt_loss_smoothed,
        lambda r: _additive(r) | _k2_loss_options(r) | _scales(r),
    ),
    "fused_joiner_loss": (tt.fused_joiner_loss, _fused),
    "get_rnnt_logprobs": (tt.get_rnnt_logprobs, _additive),
    "get_rnnt_logprobs_smoothed": (
        tt.get_rnnt_logprobs_smoothed,
        lambda r: _additive(r) | _scales(r),
    ),
    "get_rnnt_logprobs_joint": (tt.get_rnnt_logprobs_joint, _full),
    "get_rnnt_logprobs_pruned": (tt.get_rnnt_logprobs_pruned, _pruned),
    "mutual_information_recursion": (
        tt.mutual_information_recursion,
        lambda r: _recursion(r) | _options(r, return_grad=(False, True)),
    ),
    "joint_mutual_information_recursion": (
        tt.joint_mutual_information_recursion,
        _joint_recursion,
    ),
    "get_rnnt_prune_ranges": (tt.get_rnnt_prune_ranges, _prune_ranges),
    "do_rnnt_pruning": (tt.do_rnnt_pruning, _do_pruning),
    "join": (tt.join, _join),
    "joiner_logits": (tt.joiner_logits, _joiner_logits),
    "LatticeShape.from_lengths": (tt.LatticeShape.from_lengths, _from_lengths),
    **DECODERS,
}
