# SPDX-License-Identifier: Apache-2.0
"""rnnt_loss and rnnt_loss_pruned against paths written out, and against each other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import transducer_toolkit as tt
from transducer_toolkit.losses.reference import arc_scores, lattice_paths
from transducer_toolkit.ops.topology import K2_TOPOLOGIES

pytestmark = pytest.mark.usefixtures("stages")

RNNT_TYPES = tuple(K2_TOPOLOGIES)


class Batch:
    """Padded logits with a boundary whose begins may be nonzero, NaN and 10**8 around it."""

    def __init__(
        self, lengths, begins, *, width=None, vocab_size=6, dtype=torch.float64, scale=1.0
    ):
        frames = [t0 + t for (t, _), (_, t0) in zip(lengths, begins, strict=True)]
        symbols = [s0 + u for (_, u), (s0, _) in zip(lengths, begins, strict=True)]
        size, num_frames, num_symbols = len(lengths), max(frames) + 1, max(symbols) + 1
        self.boundary = torch.tensor(
            [[s0, t0, s, t] for (s0, t0), s, t in zip(begins, symbols, frames, strict=True)]
        )
        columns = width or num_symbols + 1
        self.ranges = None
        if width:
            rows = []
            for s0, t0, s, t in self.boundary.tolist():
                last = max(s0, s + 1 - width)
                starts = torch.linspace(s0, last, t - t0).round().long().clamp(0)
                starts = torch.cat(
                    [torch.full((t0,), s0), starts, torch.full((num_frames - t,), last)]
                )
                rows.append(starts.clamp(max=num_symbols + 1 - width))
            self.ranges = torch.stack(rows)[:, :, None] + torch.arange(width)
        self.logits = scale * torch.randn(size, num_frames, columns, vocab_size, dtype=dtype)
        self.symbols = torch.randint(1, vocab_size, (size, num_symbols))
        for b, (s0, t0, s, t) in enumerate(self.boundary.tolist()):
            self.symbols[b, :s0] = self.symbols[b, s:] = 10**8
            self.logits[b, :t0] = self.logits[b, t:] = float("nan")
            for frame in range(t0, t):
                for column in range(columns):
                    u = column if self.ranges is None else int(self.ranges[b, frame, column])
                    if not s0 <= u <= s:
                        self.logits[b, frame, column] = float("nan")
        self.logits.requires_grad_()

    def loss(self, rnnt_type="regular", **options):
        options = {"reduction": "none", "boundary": self.boundary, "rnnt_type": rnnt_type} | options
        if self.ranges is None:
            return tt.rnnt_loss(self.logits, self.symbols, 0, **options)
        return tt.rnnt_loss_pruned(self.logits, self.symbols, self.ranges, 0, **options)

    def oracle(self, rnnt_type, delay_penalty=0.0):
        """Every path written out: losses (differentiable), posteriors of labels and of blanks."""
        losses = []
        size, num_symbols = self.symbols.shape
        num_frames = self.logits.size(1)
        px = torch.zeros(size, num_symbols, num_frames + (rnnt_type == "regular")).double()
        py = torch.zeros(size, num_symbols + 1, num_frames).double()
        for b, (s0, t0, s, t) in enumerate(self.boundary.tolist()):
            # The utterance's own lattice, -inf where a band has no cell.
            x = self.logits.new_full((t - t0, s - s0 + 1, self.logits.size(3)), -torch.inf)
            cells = []
            for frame in range(t0, t):
                for column in range(self.logits.size(2)):
                    u = column if self.ranges is None else int(self.ranges[b, frame, column])
                    if s0 <= u <= s:
                        cells.append((frame - t0, u - s0))
                        log_probs = self.logits[b, frame, column].log_softmax(-1)
                        x = x.index_put((torch.tensor(frame - t0), torch.tensor(u - s0)), log_probs)
            targets = self.symbols[b, s0:s]
            blank, label = arc_scores(x, targets, 0, rnnt_type, 0.0)
            times = torch.arange(t0, t, dtype=x.dtype)
            label = label + delay_penalty * ((t - 1) / 2 - times)[:, None]
            scores = {"blank": blank, "label": label}
            totals, paths = [], []
            for path in lattice_paths(t - t0, s - s0, rnnt_type):
                if all((frame, u) in cells for _, frame, u in path):
                    total = torch.stack([scores[kind][frame, u] for kind, frame, u in path]).sum()
                    if total > -torch.inf:
                        totals.append(total)
                        paths.append(path)
            if not totals:
                losses.append(x.new_full((), torch.inf))
                continue
            losses.append(-torch.logsumexp(torch.stack(totals), 0))
            weights = torch.stack(totals).softmax(0).detach()
            for weight, path in zip(weights, paths, strict=True):
                for kind, frame, u in path:
                    if kind == "blank":
                        py[b, s0 + u, t0 + frame] += weight
                    else:
                        px[b, s0 + u, t0 + frame] += weight
        return torch.stack(losses), (px, py)


def check_against_oracle(batch, rnnt_type, delay_penalty):
    expected, posteriors = batch.oracle(rnnt_type, delay_penalty)
    losses, grads = batch.loss(rnnt_type, delay_penalty=delay_penalty, return_grad=True)
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-10)
    for actual, wanted in zip(grads, posteriors, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-10)
    finite = expected.isfinite()
    weights = torch.randn(len(expected), dtype=torch.float64)[finite]
    (grad,) = torch.autograd.grad((losses[finite] * weights).sum(), batch.logits)
    if not finite.any():
        assert grad.eq(0).all()
        return
    (wanted,) = torch.autograd.grad((expected[finite] * weights).sum(), batch.logits)
    torch.testing.assert_close(grad, wanted.nan_to_num(), rtol=0, atol=1e-10)


@settings(max_examples=250, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 3)), min_size=1, max_size=3),
    begins=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=3, max_size=3),
    rnnt_type=st.sampled_from(RNNT_TYPES),
    width=st.sampled_from([None, 1, 2, 3]),
    delay_penalty=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 2**31),
)
def test_any_batch_equals_paths_written_out(lengths, begins, rnnt_type, width, delay_penalty, seed):
    torch.manual_seed(seed)
    lengths = [(t, u if rnnt_type == "regular" else min(t, u)) for t, u in lengths]
    begins = begins[: len(lengths)]
    if width:
        width = min(width, max(s + u for (_, u), (s, _) in zip(lengths, begins, strict=True)) + 2)
    check_against_oracle(Batch(lengths, begins, width=width), rnnt_type, delay_penalty)


@pytest.mark.parametrize("rnnt_type", RNNT_TYPES)
@pytest.mark.parametrize("width", [None, 2])
def test_gradcheck(rnnt_type, width):
    batch = Batch([(4, 2), (3, 1)], [(0, 0), (1, 1)], width=width)
    logits = batch.logits.detach().nan_to_num().requires_grad_()

    def loss_of(logits):
        batch.logits = logits
        return batch.loss(rnnt_type, delay_penalty=0.2)

    assert torch.autograd.gradcheck(loss_of, (logits,), atol=1e-8)


@pytest.mark.parametrize("rnnt_type", RNNT_TYPES)
def test_no_boundary_is_everything_and_a_full_band_is_the_full_loss(rnnt_type):
    torch.manual_seed(3)
    logits = torch.randn(2, 6, 4, 7, dtype=torch.float64)
    symbols = torch.randint(0, 7, (2, 3))  # the termination symbol may be among them
    everything = torch.tensor([[0, 0, 3, 6]] * 2)
    full = tt.rnnt_loss(logits, symbols, 0, rnnt_type=rnnt_type, reduction="none")
    same = tt.rnnt_loss(logits, symbols, 0, everything, rnnt_type=rnnt_type, reduction="none")
    assert torch.equal(full, same)
    ranges = torch.arange(4).expand(2, 6, 4)
    pruned = tt.rnnt_loss_pruned(logits, symbols, ranges, 0, rnnt_type=rnnt_type, reduction="none")
    assert torch.equal(full, pruned)
    mean = tt.rnnt_loss(logits, symbols, 0, rnnt_type=rnnt_type)
    torch.testing.assert_close(mean, full.mean())
    for columns in ([0, 1, 2], [0, 1]):  # nested windows: fewer paths, larger loss
        starts = torch.linspace(0, 4 - len(columns), 6).round().long()
        ranges = (starts[:, None] + torch.tensor(columns)).expand(2, -1, -1)
        cut = torch.gather(logits, 2, ranges[..., None].expand(-1, -1, -1, 7))
        narrower = tt.rnnt_loss_pruned(
            cut, symbols, ranges, 0, rnnt_type=rnnt_type, reduction="none"
        )
        assert (narrower > full).all()


@pytest.mark.parametrize("rnnt_type", RNNT_TYPES)
@pytest.mark.parametrize("width", [None, 2])
def test_logprobs_through_the_recursion_are_the_loss(rnnt_type, width):
    batch = Batch([(4, 2), (5, 3), (3, 0)], [(0, 0), (1, 2), (0, 1)], width=width)
    if width:
        px, py = tt.get_rnnt_logprobs_pruned(
            batch.logits, batch.symbols, batch.ranges, 0, batch.boundary, rnnt_type
        )
    else:
        px, py = tt.get_rnnt_logprobs_joint(
            batch.logits, batch.symbols, 0, batch.boundary, rnnt_type
        )
    score = tt.mutual_information_recursion(px, py, batch.boundary)
    expected = batch.loss(rnnt_type)
    torch.testing.assert_close(-score, expected, rtol=0, atol=1e-10)
    grad, wanted = (
        torch.autograd.grad(value.sum(), batch.logits)[0] for value in (-score, expected)
    )
    torch.testing.assert_close(grad, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_dtypes(dtype):
    batch = Batch([(30, 8), (20, 5)], [(0, 0), (2, 3)], width=4, dtype=torch.float32)
    exact = batch.logits.detach().to(dtype).double()
    batch.logits = batch.logits.detach().to(dtype).requires_grad_()
    losses = batch.loss()
    assert losses.dtype == torch.float32
    (grad,) = torch.autograd.grad(losses.sum(), batch.logits)
    batch.logits = exact.requires_grad_()
    torch.testing.assert_close(losses.double(), batch.loss(), rtol=1e-6, atol=0)
    (wanted,) = torch.autograd.grad(batch.loss().sum(), batch.logits)
    tolerance = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(grad.double(), wanted, rtol=tolerance, atol=1e-5)


def test_band_outside_of_all_paths_is_infinite_with_zero_gradient():
    batch = Batch([(4, 3), (4, 1)], [(0, 0), (0, 0)], width=2)
    batch.ranges[0] = torch.tensor([0, 1])
    batch.logits = batch.logits.detach().nan_to_num().requires_grad_()
    losses = batch.loss()
    assert losses[0] == torch.inf and losses[1].isfinite()
    (grad,) = torch.autograd.grad(losses.sum(), batch.logits)
    assert grad[0].eq(0).all() and grad[1].abs().sum() > 0


def test_ranges_outside_of_the_boundary_do_not_matter():
    batch = Batch([(4, 2), (3, 1)], [(0, 0), (1, 2)], width=2)
    expected, grads = batch.loss(return_grad=True)
    arguments = batch.symbols, batch.ranges, 0, batch.boundary
    px, py = tt.get_rnnt_logprobs_pruned(batch.logits, *arguments)
    for b, (_, t0, _, t) in enumerate(batch.boundary.tolist()):
        batch.ranges[b, :t0] = -7
        batch.ranges[b, t:] = 10**6
    losses, same = batch.loss(return_grad=True)
    assert torch.equal(losses, expected)
    assert all(torch.equal(a, b) for a, b in zip(grads, same, strict=True))
    again = tt.get_rnnt_logprobs_pruned(batch.logits, *arguments)
    assert torch.equal(again[0], px) and torch.equal(again[1], py)


def test_pruned_compiles_into_one_graph():
    torch.compiler.reset()
    batch = Batch([(6, 3), (5, 2)], [(0, 0), (0, 0)], width=2)
    compiled = torch.compile(tt.rnnt_loss_pruned, fullgraph=True, backend="aot_eager")
    arguments = (batch.logits, batch.symbols, batch.ranges, 0, batch.boundary)
    torch.testing.assert_close(compiled(*arguments), tt.rnnt_loss_pruned(*arguments))


def test_seed_readme_pruned_example():
    """The second usage example of tf_fast_rnnt's README, its undefined names supplied."""
    import numpy as np

    B, T, S, C = 2, 20, 6, 10
    seq_length, frames = torch.tensor([6, 4]), torch.tensor([20, 15])
    rnnt_type = "regular"
    joiner = torch.nn.Sequential(torch.nn.Tanh(), torch.nn.Linear(C, C))
    termination_symbol = C - 1

    am = torch.from_numpy(np.random.randn(B, T, C).astype("f")).requires_grad_()
    lm = torch.from_numpy(np.random.randn(B, S + 1, C).astype("f")).requires_grad_()
    symbols = torch.from_numpy(np.random.randint(0, C - 1, (B, S)).astype(np.int64))
    terminal_symbol = C - 1

    boundary = np.zeros((B, 4))
    boundary[:, 2] = seq_length
    boundary[:, 3] = frames
    boundary = torch.from_numpy(boundary).to(torch.int64)

    simple_loss, (px_grad, py_grad) = tt.rnnt_loss_simple(
        lm=lm,
        am=am,
        symbols=symbols,
        termination_symbol=terminal_symbol,
        boundary=boundary,
        rnnt_type=rnnt_type,
        return_grad=True,
        reduction="none",
        delay_penalty=0.2,
    )
    s_range = 5  # can be other values
    ranges = tt.get_rnnt_prune_ranges(
        px_grad=px_grad,
        py_grad=py_grad,
        boundary=boundary,
        s_range=s_range,
    )

    am_pruned, lm_pruned = tt.do_rnnt_pruning(am=am, lm=lm, ranges=ranges)

    logits = joiner(am_pruned + lm_pruned)
    pruned_loss = tt.rnnt_loss_pruned(
        logits=logits,
        symbols=symbols,
        ranges=ranges,
        termination_symbol=termination_symbol,
        boundary=boundary,
        reduction="sum",
    )
    (simple_loss.sum() + pruned_loss).backward()
    assert simple_loss.shape == (B,) and pruned_loss.isfinite()
    assert ranges.shape == (B, T, s_range)
    assert am.grad.isfinite().all() and lm.grad[0].abs().sum() > 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(2, 5, 7)}, ValueError, r"logits: expected shape \(B, T, S"),
        ({"logits": torch.zeros(2, 5, 3, 6)}, ValueError, r"expected shape \(2, T, 4, V\), T >= 1"),
        ({"logits": torch.zeros(2, 5, 4, 6).int()}, TypeError, "logits: expected dtype"),
        ({"symbols": torch.ones(2, 3)}, TypeError, "symbols: expected dtype int32, int64"),
        ({"symbols": torch.full((2, 3), 6)}, ValueError, r"symbols\[0, 0\].* got 6"),
        ({"termination_symbol": 6}, ValueError, "termination_symbol: expected 0 <= .* got 6"),
        ({"rnnt_type": "free"}, ValueError, "rnnt_type: expected one of"),
        ({"boundary": torch.tensor([[0, 0, 3, 5]])}, ValueError, r"boundary: expected shape"),
        ({"boundary": torch.tensor([[0, 0, 3, 5], [0, 2, 3, 2]])}, ValueError, r"boundary\[1\]"),
        ({"boundary": torch.tensor([[0, 0, 3, 5], [0, 0, 4, 5]])}, ValueError, r"boundary\[1\]"),
        ({"boundary": torch.tensor([[0, 0, 3, 5], [0, 3, 3, 5]]), "rnnt_type": "modified"},
         ValueError, "utterance 1: topology 'modified' needs at least"),
        ({"delay_penalty": -1.0}, ValueError, "delay_penalty: expected a finite number >= 0"),
    ],
)  # fmt: skip
def test_bad_input(change, error, message):
    arguments = {
        "logits": torch.zeros(2, 5, 4, 6),
        "symbols": torch.ones(2, 3, dtype=torch.int64),
        "termination_symbol": 0,
    }
    with pytest.raises(error, match=message):
        tt.rnnt_loss(**(arguments | change))


@pytest.mark.parametrize(
    ("ranges", "error", "message"),
    [
        (torch.zeros(2, 5, 3), TypeError, "ranges: expected dtype int32, int64"),
        (torch.zeros(2, 4, 3).long(), ValueError, r"ranges: expected shape \(2, 5, R\)"),
        (torch.zeros(2, 5, 3).long(), ValueError, r"ranges\[0, 0\] .* 3 consecutive symbols"),
        (torch.arange(2, 5).expand(2, 5, 3), ValueError, r"within 0 ... 3, got \[2, 3, 4\]"),
        (None, TypeError, "ranges: expected a torch.Tensor, got None"),
    ],
)
def test_bad_ranges(ranges, error, message):
    with pytest.raises(error, match=message):
        tt.rnnt_loss_pruned(torch.zeros(2, 5, 3, 6), torch.ones(2, 3).long(), ranges, 0)


@pytest.mark.parametrize("rnnt_type", RNNT_TYPES)
def test_a_label_that_is_the_termination_symbol_is_both(rnnt_type):
    """k2 lets it be; its logit then has the gradient of a blank and that of a label."""
    logits = torch.randn(1, 4, 3, 5, dtype=torch.float64, requires_grad=True)
    symbols = torch.tensor([[0, 2]])
    loss = tt.rnnt_loss(logits, symbols, 0, rnnt_type=rnnt_type, reduction="sum")
    log_probs = logits.log_softmax(-1)
    px = log_probs[:, :, :-1].gather(3, symbols[:, None, :, None].expand(-1, 4, -1, 1))[..., 0]
    py = log_probs[..., 0]
    if rnnt_type == "constrained":
        px = px + py[:, :, 1:]
    px, py = px.transpose(1, 2), py.transpose(1, 2)
    if rnnt_type == "regular":
        px = torch.nn.functional.pad(px, (0, 1), value=-torch.inf)
    expected = -tt.mutual_information_recursion(px.contiguous(), py.contiguous()).sum()
    torch.testing.assert_close(loss, expected)
    grads = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (loss, expected)]
    torch.testing.assert_close(*grads)
