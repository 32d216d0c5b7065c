# SPDX-License-Identifier: Apache-2.0
"""Numbers of the losses against 80-bit floating point, and identities that hold in any case.

    python -m tests.soak.fuzz_numerics --cases 400 [--seed 0] [--large]

A case is a lattice up to T = 300, U = 60 (with --large T = 2000, U = 400), V <= 32, logits up to
10^4, some symbols masked by -inf, every topology and dtype. The error of loss and gradient must be
at most that of plain torch in the same dtype plus a tolerance (STYLE: error budget); posteriors and
gradients sum to what they must; padding, layout and company in the batch change no bit.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from dataclasses import dataclass

import torch
from torch import Tensor

import transducer_toolkit as tt
from tests.soak.exact import exact_solution, plain_solution
from transducer_toolkit.ops.topology import K2_TOPOLOGIES, TOPOLOGIES

# What is allowed beyond the error of plain torch: of the loss relatively, of a gradient entry.
TOLERANCE = {
    torch.float64: (1e-13, 1e-10),
    torch.float32: (1e-6, 1e-5),
    torch.float16: (1e-6, 1e-5),
    torch.bfloat16: (1e-6, 1e-5),
}
SIZES = [(1, 0), (1, 30), (30, 0), (7, 5), (60, 20), (60, 60), (300, 3), (300, 60), (5, 60)]
LARGE_SIZES = [(2000, 400), (2000, 5), (1100, 400), (10, 400), (2000, 0), (1500, 390)]


@dataclass
class Case:
    """One lattice and how its loss is asked for."""

    logits: Tensor  # (T, U + 1, V)
    targets: Tensor
    blank: int
    topology: str
    has_mask: bool

    def name(self) -> str:
        frames, columns, vocab = self.logits.shape
        kind = str(self.logits.dtype).removeprefix("torch.")
        largest = float(self.logits[self.logits.isfinite()].abs().max())
        mask = ", masked" if self.has_mask else ""
        sizes = f"T={frames} U={columns - 1} V={vocab}"
        return f"{sizes} {self.topology} {kind} |x|<={largest:.3g}{mask}"


def make_case(seed: int, *, large: bool = False) -> Case:
    """The case of a seed."""
    random_ = random.Random(seed)
    torch.manual_seed(seed)
    topology = random_.choice(tuple(TOPOLOGIES))
    frames, symbols = random_.choice(LARGE_SIZES if large else SIZES)
    frames = max(frames, TOPOLOGIES[topology].min_frames(symbols))
    vocab = random_.choice([2, 5, 16, 32] if frames * symbols < 10**5 else [2, 7])
    dtype = random_.choice(list(TOLERANCE))
    scale = random_.choice([0.1, 1.0, 10.0, 100.0, 2500.0])
    logits = (scale * torch.randn(frames, symbols + 1, vocab)).clamp(-1e4, 1e4)
    blank = random_.randrange(vocab)
    targets = torch.randint(0, vocab - 1, (symbols,))
    targets += targets >= blank
    has_mask = random_.random() < 0.25
    if has_mask:
        mask = torch.rand(logits.shape) < 0.1
        mask[:, :, blank] = False  # a path is left: all labels early or late, and no row is empty
        mask[0] = mask[-1] = False
        logits = logits.masked_fill(mask, -torch.inf)
    return Case(logits.to(dtype), targets, blank, topology, has_mask)


def _packed_loss(case: Case, logits: Tensor, padding: tuple[int, int] = (0, 0)) -> Tensor:
    """The loss of one lattice: packed, or padded with NaN by so many frames and symbols."""
    frames, columns, vocab = logits.shape
    lengths = torch.tensor([frames]), torch.tensor([columns - 1])
    targets = torch.nn.functional.pad(case.targets, (0, padding[1]), value=10**8)[None]
    if case.topology in K2_TOPOLOGIES and case.topology != "regular":
        padded = _padded(logits, padding)[None]
        boundary = torch.tensor([[0, 0, columns - 1, frames]])
        loss = tt.rnnt_loss(padded, targets, case.blank, boundary, case.topology, reduction="sum")
        assert isinstance(loss, Tensor)
        return loss
    x = logits.reshape(-1, vocab) if padding == (0, 0) else _padded(logits, padding)[None]
    return tt.transducer_loss(
        x, targets, *lengths, case.blank, topology=case.topology, reduction="sum"
    )


def _padded(logits: Tensor, padding: tuple[int, int]) -> Tensor:
    return torch.nn.functional.pad(logits, (0, 0, 0, padding[1], 0, padding[0]), value=torch.nan)


def _solve(case: Case, padding: tuple[int, int] = (0, 0)) -> tuple[Tensor, Tensor]:
    x = case.logits.clone().requires_grad_()
    loss = _packed_loss(case, x, padding)
    return loss.detach(), torch.autograd.grad(loss, x)[0]


def problems(case: Case) -> list[str]:
    """What is wrong with a case, in words; nothing if all is right."""
    found = []
    frames, columns, _ = case.logits.shape
    loss, grad = _solve(case)
    exact_loss, exact_grad, post_blank, post_label = exact_solution(
        case.logits, case.targets, case.blank, case.topology
    )
    if exact_loss == float("inf"):  # the mask leaves no path
        return [] if loss == exact_loss and not grad.any() else [f"no path, but loss {loss}"]
    loss_allowed, grad_allowed = TOLERANCE[case.logits.dtype]
    loss_error = abs(float(loss) - exact_loss)
    # A gradient is written in its dtype: rounded once.
    rounding = exact_grad.abs() * torch.finfo(case.logits.dtype).eps / 2
    grad_error = float(((grad.double() - exact_grad).abs() - rounding).max())
    plain_loss_error = plain_grad_error = 0.0
    if not case.has_mask:  # whose derivative of log_softmax and logaddexp is NaN in plain torch
        plain_loss, plain_grad = plain_solution(
            case.logits, case.targets, case.blank, case.topology
        )
        if plain_grad.isfinite().all():  # float16 overflows
            plain_loss_error = abs(plain_loss - exact_loss)
            plain_grad_error = float((plain_grad - exact_grad).abs().max())
    if not loss_error <= plain_loss_error + loss_allowed * (1 + abs(exact_loss)):
        found.append(f"loss off by {loss_error:.3g} (plain torch {plain_loss_error:.3g})")
    # Posteriors are exponentials of differences of sums of the loss's size, in float64.
    grad_allowed += 4e-15 * abs(exact_loss)
    if not grad_error <= plain_grad_error + grad_allowed:
        found.append(f"gradient off by {grad_error:.3g} (plain torch {plain_grad_error:.3g})")
    arcs = float(post_blank.sum() + post_label.sum())
    stays = TOPOLOGIES[case.topology].labels_share_frames
    expected = frames + columns - 1 if stays else frames
    if not abs(arcs - expected) < 1e-9 * expected:
        found.append(f"the exact posteriors sum to {arcs}, not {expected}")
    if not float(loss) >= -loss_allowed:
        found.append(f"loss {float(loss)} of probabilities")
    eps = torch.finfo(case.logits.dtype).eps
    sums = grad.double().sum(-1).abs().max()
    if not sums <= 4 * eps + grad_allowed:
        found.append(f"a cell's gradient sums to {float(sums):.3g}")
    for padding in ((3, 0), (0, 2), (2, 3)):
        padded = _solve(case, padding)
        if not (torch.equal(padded[0], loss) and torch.equal(padded[1], grad)):
            found.append(f"padding by {padding} changes bits")
    found += _company(case, loss, grad)
    found += _posteriors(case, post_blank, post_label, grad_allowed)
    return found


def _company(case: Case, loss: Tensor, grad: Tensor) -> list[str]:
    """The utterance between two others, packed: the same bits."""
    if case.topology in K2_TOPOLOGIES and case.topology != "regular":
        return []  # rnnt_loss takes no packed logits
    frames, columns, vocab = case.logits.shape
    others = torch.randn(2, 3 * 2, vocab).to(case.logits.dtype)
    x = torch.cat([others[0], case.logits.reshape(-1, vocab), others[1]]).requires_grad_()
    targets = torch.full((3, max(columns - 1, 1)), 1 - min(case.blank, 1))
    targets[1, : columns - 1] = case.targets
    losses = tt.transducer_loss(
        x,
        targets,
        torch.tensor([3, frames, 3]),
        torch.tensor([1, columns - 1, 1]),
        case.blank,
        topology=case.topology,
        reduction="none",
    )
    (all_grads,) = torch.autograd.grad(losses.sum(), x)
    mine = all_grads[6:-6].view(grad.shape)
    same = torch.equal(losses[1], loss) and torch.equal(mine, grad)
    return [] if same else ["others in the batch change bits"]


def _posteriors(case: Case, post_blank: Tensor, post_label: Tensor, allowed: float) -> list[str]:
    """return_grad, and the band that is everything."""
    if case.topology not in K2_TOPOLOGIES:
        return []
    frames, columns, _ = case.logits.shape
    arguments = case.logits[None], case.targets[None], case.blank
    options = {"rnnt_type": case.topology, "reduction": "sum", "return_grad": True}
    full, (px_grad, py_grad) = tt.rnnt_loss(*arguments, **options)  # type: ignore[misc]
    found = []
    for name, got, want in (
        ("px_grad", px_grad[0, :, :frames], post_label.T),
        ("py_grad", py_grad[0], post_blank.T),
    ):
        error = float((got.double() - want).abs().max()) if got.numel() else 0.0
        if not error <= allowed + 1e-6 * (got.dtype == torch.float32):
            found.append(f"{name} off by {error:.3g}")
    ranges = torch.arange(columns).expand(1, frames, columns)
    band = tt.rnnt_loss_pruned(case.logits[None], case.targets[None], ranges, case.blank, **options)
    if not torch.equal(band[0], full):
        found.append("the band that is everything has another loss")
    narrow = max(1, columns - 2)
    starts = torch.linspace(0, columns - narrow, frames).long()
    window = starts[:, None] + torch.arange(narrow)
    logits = case.logits.gather(1, window[..., None].expand(-1, -1, case.logits.size(2)))
    pruned = tt.rnnt_loss_pruned(
        logits[None], case.targets[None], window[None], case.blank, **options
    )
    if not pruned[0] >= full - 1e-6 * (1 + full.abs()):
        found.append(f"pruned {float(pruned[0])} below full {float(full)}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--large", action="store_true", help="up to T = 2000, U = 400")
    options = parser.parse_args()
    begin, count = time.monotonic(), 0
    for seed in range(options.seed, options.seed + options.cases):
        case = make_case(seed, large=options.large)
        found = problems(case)
        count += bool(found)
        if found:
            print(f"seed {seed}: {case.name()}: {'; '.join(found)}", flush=True)
    minutes = (time.monotonic() - begin) / 60
    print(f"{options.cases} lattices in {minutes:.1f} min: {count} with findings")
    sys.exit(bool(count))


if __name__ == "__main__":
    main()
