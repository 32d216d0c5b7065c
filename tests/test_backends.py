# SPDX-License-Identifier: Apache-2.0
"""Stages on every backend against the CPU; in several orders of threads, bit for bit.

Stage 2 is in test_backends_lattice.py.
"""

import pytest
import torch

from tests import stage_calls as stages
from tests.backends import accelerated, check_close, in_every_order, of
from tests.stage_calls import lattice_batch
from tests.stage_cases import (
    LAYOUTS,
    cell_rows,
    kept_rows,
    make_case,
    misaligned,
    random_scores,
    random_uses,
    run_lattice,
    score,
)
from transducer_toolkit.ops import native
from transducer_toolkit.ops.additive_stages import (
    AdditiveInputs,
    AdditiveOptions,
    AdditiveStages,
    ScoreGrads,
)
from transducer_toolkit.ops.lattice import CellScores, RowTile
from transducer_toolkit.ops.prune_windows import greedy_ranges

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# Of single numbers that were computed in float32, and rounded to 16 bits once.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def check_stage_1(backend, case, vocab_size, dtype, *, shift=0, **options):
    batch = case.batch()
    logits = (3 * torch.randn(batch.num_rows, vocab_size)).to(dtype)
    logits[0, vocab_size // 2] = -torch.inf
    expected = score(logits, batch, batch.all_rows(), **options)

    def run():
        on_device = misaligned(logits.to(backend.device), shift)
        there = case.batch(backend.device)
        return score(on_device, there, there.all_rows(), **options)

    actual = in_every_order(backend, run)
    # Scores are sums of float32 numbers whatever the dtype.
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    check_close(actual, expected, tolerance, ("normalizer", "blank", "label"))


@accelerated
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cell_scores(name, layout, dtype):
    check_stage_1(of(name), make_case(layout), 7, dtype)
    check_stage_1(of(name), make_case(layout), 7, dtype, from_log_softmax=True)


@accelerated
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [2, 31, 128, 500, 517, 4096, 4097, 5003])
def test_cell_scores_of_any_vocabulary_and_alignment(name, dtype, vocab_size):
    case = make_case("packed", (2, 2), (1, 2), vocab_size)
    for shift in (0, 8 // dtype.itemsize, 1):
        check_stage_1(of(name), case, vocab_size, dtype, shift=shift, blank=vocab_size - 1)


@accelerated
def test_cell_scores_do_not_depend_on_the_address(name):
    backend = of(name)
    case = make_case("packed", (5,), (3,), 517)
    logits = torch.randn(20, 517, device=backend.device)
    batch = case.batch(backend.device)
    with backend.active():
        results = [score(misaligned(logits, k), batch, batch.all_rows()) for k in range(5)]
    for result in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(result, results[0], strict=True))


@accelerated
@pytest.mark.parametrize("vocab_size", [7, 5000])
def test_cell_scores_of_bad_rows(name, vocab_size):
    backend = of(name)
    case = make_case("packed", (4,), (2,), vocab_size)
    case.targets[0, 1] = vocab_size  # out of range
    logits = torch.randn(12, vocab_size)
    logits[0] = -torch.inf
    logits[1, :5] = torch.tensor([-torch.inf, torch.nan, -torch.inf, -torch.inf, 0.5])
    logits[2, 3] = torch.inf
    logits[3, 1:] = -torch.inf
    logits[5, -1] = torch.nan
    logits[8, 4:] = -torch.inf
    batch = case.batch()
    expected = score(logits, batch, batch.all_rows())
    there = case.batch(backend.device)
    actual = in_every_order(
        backend, lambda: score(logits.to(backend.device), there, there.all_rows())
    )
    check_close(actual, expected, 2e-6, ("normalizer", "blank", "label"))
    assert expected[0][:6].isnan().tolist() == [True, True, True, False, False, True]


# --- stage 3 ------------------------------------------------------------------------------------


def run_gradient(logits, batch, normalizer, uses, loss_grad, device, *, inplace=False, **options):
    logits = logits.to(device, copy=True)
    out = logits if inplace else torch.full_like(logits, 7.0)
    stages.logits_grad(
        logits,
        batch,
        batch.all_rows(),
        *(tensor.to(device) for tensor in (normalizer, *uses, loss_grad)),
        **{"blank": 0, **options},
        out=out,
    )
    return (out,)


def check_stage_3(backend, batches, logits, uses, loss_grad, **options):
    normalizer = logits.double().logsumexp(-1)
    arguments = normalizer, uses, loss_grad
    inplace = options.pop("inplace", False)
    expected = run_gradient(logits, batches[0], *arguments, "cpu", **options)
    actual = in_every_order(
        backend,
        lambda: run_gradient(
            logits, batches[1], *arguments, backend.device, inplace=inplace, **options
        ),
    )
    scale = float(loss_grad.abs().max().clamp(1e-6, 1e6))
    tolerance = TOLERANCE[logits.dtype]
    check_close(
        [actual[0].double() / scale], [expected[0].double() / scale], tolerance, ("gradient",)
    )
    return actual[0]


@accelerated
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [{}, {"from_log_softmax": True}, {"clamp": 0.05}, {"inplace": True}],
    ids=["plain", "log_softmax", "clamp", "inplace"],
)
def test_logits_grad(name, layout, dtype, options):
    backend = of(name)
    case = make_case(layout)
    batches = case.batch(), case.batch(backend.device)
    uses = random_uses(batches[0])
    logits = (3 * torch.randn(batches[0].num_rows, 7)).to(dtype)
    loss_grad = torch.tensor([1.0, -2.5, 0.0, 1e-3], dtype=torch.float64)
    grad = check_stage_3(backend, batches, logits, uses, loss_grad, **options)
    assert grad[~cell_rows(batches[0])].eq(0).all()


@accelerated
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nonsense_lengths_are_nan_and_touch_nothing(name, layout):
    backend = of(name)
    case = make_case(layout, (4, 3, 5, 2), (2, 3, 1, 2))
    good = case.batch()
    rows = good.num_rows
    case.logit_lengths[1] = 10**12
    case.target_lengths[2] = -3
    fields = dict(vars(case))
    bad = [
        lattice_batch(
            **{k: v.to(d) if hasattr(v, "to") else v for k, v in fields.items()},
            device=torch.device(d),
            num_rows=rows,
        )
        for d in ("cpu", backend.device)
    ]
    scores = random_scores(good)
    expected = run_lattice(scores, bad[0], "cpu", topology="regular")
    actual = in_every_order(
        backend, lambda: run_lattice(scores, bad[1], backend.device, topology="regular")
    )
    check_close(actual, expected, 1e-10, ("loss", "use_blank", "use_label"))
    assert expected[0][1:3].isnan().all()
    logits = torch.randn(rows, 7)
    loss_grad = torch.ones(4, dtype=torch.float64)
    check_stage_3(backend, bad, logits, expected[1:], loss_grad)


@accelerated
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [2, 31, 500, 517, 5003])
def test_logits_grad_of_any_vocabulary(name, dtype, vocab_size):
    """Tiny occupancies too: no subnormal comes out, and the row's two entries are right."""
    backend = of(name)
    case = make_case("packed", (3, 2), (1, 2), vocab_size)
    batches = case.batch(), case.batch(backend.device)
    uses = random_uses(batches[0])
    uses[0][1], uses[1][1] = 3e-38, 2e-38
    uses[0][2], uses[1][2] = 1e-300, 0
    uses[0][3] = torch.nan
    logits = (3 * torch.randn(12, vocab_size)).to(dtype)
    logits[4, 1] = -torch.inf
    loss_grad = torch.tensor([1.0, 1e2 if dtype == torch.float16 else 1e5], dtype=torch.float64)
    options = {"blank": vocab_size - 1} if vocab_size != 500 else {}
    for inplace in (False, True):
        grad = check_stage_3(
            backend, batches, logits, uses, loss_grad, inplace=inplace, **options
        ).double()
    assert grad[3].isnan().all() and grad[[0, 1, 2, *range(4, 12)]].isfinite().all()
    if dtype == torch.float32:
        finite = grad[~grad.isnan()].abs()
        assert ((finite == 0) | (finite >= torch.finfo(dtype).tiny)).all()


@accelerated
def test_logits_grad_where_blank_is_the_target(name):
    backend = of(name)
    case = make_case("packed")
    case.targets[:] = 0
    batches = case.batch(), case.batch(backend.device)
    logits = torch.randn(batches[0].num_rows, 7)
    check_stage_3(backend, batches, logits, random_uses(batches[0]), torch.ones(4).double())


# --- tiles, occupancy, joiner -------------------------------------------------------------------


@accelerated
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("listed", [False, True])
def test_tiles_give_what_all_rows_give(name, layout, listed):
    backend = of(name)
    case = make_case(layout)
    batch = case.batch(backend.device)
    rows = torch.arange(batch.num_rows, device=backend.device)
    logits = torch.randn(batch.num_rows, 7).to(backend.device)
    with backend.active():
        whole = score(logits, batch, batch.all_rows())
        out = CellScores.zeros(batch, backend.device)
        for tensor in (out.normalizer, out.blank, out.label):
            tensor.fill_(7.0)
        for begin in range(0, batch.num_rows, 11):
            size = min(11, batch.num_rows - begin)
            tile = RowTile(begin, size, rows if listed else None)
            stages.cell_scores(logits[begin : begin + size], batch, tile, out, blank=0)
    parts = out.normalizer, out.blank, out.label
    assert all(torch.equal(*pair) for pair in zip(parts, whole, strict=True))


@accelerated
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dropped_mass", [0.0, 1e-9, 1e-4, 1e-1, 10.0])
def test_kept_rows(name, layout, dropped_mass):
    backend = of(name)
    case = make_case(layout, (40, 1, 26, 33), (14, 0, 9, 12))
    batch = case.batch()
    uses = random_uses(batch)
    uses[0][batch.num_rows // 2] = torch.nan
    expected = kept_rows(uses, batch, dropped_mass)
    there = case.batch(backend.device)
    actual = in_every_order(
        backend,
        lambda: kept_rows(uses, there, dropped_mass, backend.device),
    )
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


@accelerated
@pytest.mark.parametrize("layout", ["packed", "padded", "band_begins"])
@pytest.mark.parametrize("dropped_mass", [0.0, 1e-4, 10.0])
def test_kept_rows_of_long_utterances(name, layout, dropped_mass):
    """Several blocks an utterance; most cells below 2^-128, whole runs without a kept one."""
    backend = of(name)
    case = make_case(layout, (130, 2, 300), (80, 3, 39), band_width=34)
    batch = case.batch()
    uses = random_uses(batch)
    quarter = batch.num_rows // 4
    for use in uses:
        use[:quarter] *= 1e-60
        use[-quarter:] = 0
    expected = kept_rows(uses, batch, dropped_mass)
    there = case.batch(backend.device)
    actual = in_every_order(
        backend,
        lambda: kept_rows(uses, there, dropped_mass, backend.device),
    )
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


@accelerated
def test_kept_rows_of_extreme_occupancies_and_bad_lengths(name):
    backend = of(name)
    case = make_case("padded", (40, 3, 26), (14, 2, 9))
    case.logit_lengths[1] = 41
    batch = case.batch()
    uses = [torch.zeros(batch.num_rows, dtype=torch.float64) for _ in range(2)]
    uses[0][:] = torch.pow(10.0, torch.linspace(-320, 9, batch.num_rows, dtype=torch.float64))
    uses[0][5] = torch.inf
    expected = kept_rows(uses, batch, 1e-7)
    assert expected[1][1] == 0
    there = case.batch(backend.device)
    actual = in_every_order(
        backend,
        lambda: kept_rows(uses, there, 1e-7, backend.device),
    )
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


def run_join(case, enc, pred, grad_hidden, device, activation, tile_size=None, kept=None, shift=0):
    """hidden, grad_enc, grad_pred; in tiles, of all rows or of those in `kept`."""
    batch = case.batch(device)
    enc, pred = (misaligned(tensor.to(device), shift) for tensor in (enc, pred))
    grad_hidden = grad_hidden.to(device)
    rows = None if kept is None else kept.to(device)
    count = batch.num_rows if rows is None else rows.numel()
    hidden = torch.full((count, enc.size(-1)), 7.0, dtype=enc.dtype, device=device)
    dtype = native.compute_dtype(enc.dtype)
    grads = torch.zeros_like(enc, dtype=dtype), torch.zeros_like(pred, dtype=dtype)
    for begin in range(0, count, tile_size or count):
        end = min(begin + (tile_size or count), count)
        tile = RowTile(begin, end - begin, rows)
        part = hidden[begin:end]
        stages.join_forward(enc, pred, batch, tile, activation=activation, out=part)
        stages.join_backward(
            grad_hidden[begin:end],
            part,
            enc,
            pred,
            batch,
            tile,
            activation=activation,
            grad_enc=grads[0],
            grad_pred=grads[1],
        )
    return hidden, *grads


@accelerated
@pytest.mark.parametrize("activation", native.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_join(name, layout, dtype, activation):
    backend = of(name)
    case = make_case(layout)
    width = 24
    batch = case.batch()
    enc = torch.randn(4, case.max_frames, width).to(dtype)
    pred = torch.randn(4, case.targets.size(1) + 1, width).to(dtype)
    for b, (frames, symbols) in enumerate(
        zip(case.logit_lengths, case.target_lengths, strict=True)
    ):
        enc[b, frames:], pred[b, symbols + 1 :] = torch.nan, torch.nan
    grad_hidden = torch.randn(batch.num_rows, width).to(dtype)
    inputs = case, enc, pred, grad_hidden
    expected = run_join(*inputs, "cpu", activation)
    actual = in_every_order(backend, lambda: run_join(*inputs, backend.device, activation))
    tolerance = TOLERANCE[dtype]
    check_close(actual[:1], expected[:1], tolerance, ("hidden",))
    check_close(actual[1:], expected[1:], 10 * tolerance, ("grad_enc", "grad_pred"))


def check_join_in_tiles(backend, case, width, sizes=(9, 50)):
    """All rows, and a list of rows across utterances, in tiles that cut frames anywhere."""
    rows = case.batch().num_rows
    enc = torch.randn(len(case.logit_lengths), case.max_frames, width)
    pred = torch.randn(len(case.logit_lengths), case.targets.size(1) + 1, width)
    is_cell = cell_rows(case.batch())
    is_kept = is_cell & (torch.rand(rows) < 0.4)
    is_kept[is_cell.nonzero()[0]] = True
    kept_of = is_kept.nonzero()[:, 0]
    grad_hidden = torch.randn(rows, width)
    for listed in (None, kept_of):
        count = rows if listed is None else listed.numel()
        inputs = case, enc, pred, grad_hidden[:count]
        expected = run_join(*inputs, "cpu", "tanh", 9, listed)
        results = [
            in_every_order(
                backend,
                lambda size=size, shift=shift, inputs=inputs, listed=listed: run_join(
                    *inputs, backend.device, "tanh", size, listed, shift
                ),
            )
            for size, shift in ((None, 0), (sizes[0], 0), (sizes[1], 1))
        ]
        check_close(results[0], expected, 1e-5, ("hidden", "grad_enc", "grad_pred"))
        for result in results[1:]:
            names = ("hidden", "grad_enc", "grad_pred")
            for what, *pair in zip(names, result, results[0], strict=True):
                assert torch.equal(*pair), (what, (pair[0] - pair[1]).abs().max().item())


@accelerated
@pytest.mark.parametrize("width", [1, 7, 130, 260])
@pytest.mark.parametrize("layout", ["packed", "band"])
def test_join_in_tiles_gives_the_same_bits(name, layout, width):
    check_join_in_tiles(of(name), make_case(layout, (9, 1, 17), (12, 0, 5)), width)


@accelerated
@pytest.mark.parametrize(
    ("frames", "symbols", "sizes"),
    [
        ((1,), (0,), (9, 50)),
        ((1,), (40,), (9, 50)),
        ((80,), (0,), (9, 50)),
        ((70, 3, 33), (2, 6, 1), (9, 50)),
        ((1, 1), (1100, 2), (90, 500)),
    ],
    ids=["one cell", "one frame", "no symbols", "more frames than lanes", "wide"],
)
def test_join_of_any_shape(name, frames, symbols, sizes):
    for layout in ("packed", "padded_begins"):
        check_join_in_tiles(of(name), make_case(layout, frames, symbols), 12, sizes)


@accelerated
@pytest.mark.parametrize("width", [40, 41])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_are_rounded_to_nearest_even(name, dtype, width):
    """Sums of two numbers, many of them halfway between two others, subnormal, infinite or NaN."""
    backend = of(name)
    case = make_case("packed", (60,), (9,))
    enc = torch.randn(1, 60, width).to(dtype)
    pred = (torch.randn(1, 10, width) * torch.logspace(-7, 2, 10)[:, None]).to(dtype)
    enc[0, 0], pred[0, 0] = torch.finfo(dtype).max, torch.finfo(dtype).max
    enc[0, 3:9] *= 1e-7
    enc[0, 1, ::3], enc[0, 2, ::3], pred[0, 1, ::2] = torch.nan, torch.inf, -torch.inf
    expected = (enc.float()[:, :, None] + pred.float()[:, None]).to(dtype).reshape(600, width)

    def run():
        batch = case.batch(backend.device)
        inputs = enc.to(backend.device), pred.to(backend.device)
        out = torch.empty(600, width, dtype=dtype, device=backend.device)
        tile = batch.all_rows()
        stages.join_forward(*inputs, batch, tile, activation="identity", out=out)
        return (out,)

    (actual,) = in_every_order(backend, run)
    assert torch.equal(actual.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))
    assert torch.equal(actual.isnan(), expected.isnan()) and expected.isnan().any()


@accelerated
def test_bfloat16_tanh_errs_less_than_it_is_rounded(name):
    """A device takes tanh.approx, off by 2^-11; emulation takes tanhf, as for float32."""
    backend = of(name)
    case = make_case("packed", (200,), (0,))
    enc = torch.linspace(-9, 9, 200 * 64).view(1, 200, 64).bfloat16()
    pred = torch.zeros(1, 1, 64).bfloat16()
    pred[..., ::2] = 2.0**-12
    exact = torch.tanh(enc.double() + pred.double())[0]
    with backend.active():
        batch = case.batch(backend.device)
        out = torch.empty(200, 64, dtype=torch.bfloat16, device=backend.device)
        inputs = enc.to(backend.device), pred.to(backend.device)
        stages.join_forward(*inputs, batch, batch.all_rows(), activation="tanh", out=out)
    out = out.cpu().double()
    spacing = torch.finfo(torch.bfloat16).eps * torch.exp2(exact.abs().log2().floor())
    allowed = 0.5 * spacing + exact.abs() * (2.0**-11 if name == "cuda" else 2.0**-22)
    assert ((out - exact).abs() <= allowed).all()


# --- additive joiners ---------------------------------------------------------------------------


@accelerated
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("vocab_size", [2, 31, 70])
@pytest.mark.parametrize("scales", [(1.0, 0.0, 0.0), (0.5, 0.3, 0.2)])
@pytest.mark.parametrize("num_symbols", [0, 3, 34])
def test_additive_stages(name, dtype, vocab_size, scales, num_symbols):
    backend = of(name)
    spread = torch.tensor([1.0, 200.0, 1.0])[:, None, None]  # the second needs repair
    am = (spread * torch.randn(3, 5, vocab_size)).to(dtype)
    contexts = (spread * torch.randn(3, num_symbols + 1 + (scales[2] > 0), vocab_size)).to(dtype)
    am[1, 0] = -torch.inf  # no cell of it has a sum
    contexts[1, 0, 0] = am[2, 4] = torch.nan  # the latter in the padding
    am[1, 3, 1:] = -torch.inf
    symbols = torch.randint(0, vocab_size, (3, num_symbols))  # many twice
    symbols[:, 1:2] = vocab_size  # is read where it is not in the padding
    boundary = torch.tensor([[0, 0, num_symbols, 5]] * 3)
    boundary[2] = torch.tensor([num_symbols // 3, 1, num_symbols // 2, 4])
    uses = torch.rand(2, 3, 5, num_symbols + 1, dtype=torch.float64)
    uses[1, :, :, -1] = 0
    uses[:, 1, 2, 0] = torch.nan
    factor = torch.tensor([-1.5, 2.0, 0.5], dtype=torch.float64)

    def run(device, factor):
        inputs = AdditiveInputs(*(x.to(device) for x in (contexts, am, symbols, boundary)))
        stage = AdditiveStages(inputs, AdditiveOptions(1, *scales), with_scores=True)
        blank, label, normalizer, product = stage.scores()
        grads = ScoreGrads(*(x.to(device) for x in (*uses, factor)))
        stage = AdditiveStages(inputs, AdditiveOptions(1, *scales), with_scores=False)
        gradients = stage.gradients(product, normalizer, grads)
        return blank, label, normalizer, product, *gradients

    masked = factor.masked_fill(torch.tensor([False, True, False]), 0.0)
    for upstream in (factor, masked):
        expected = run("cpu", upstream)
        actual = in_every_order(backend, lambda factor=upstream: run(backend.device, factor))
        names = "blank", "label", "normalizer", "product", "grad_contexts", "grad_am"
        # Gradients are sums of up to 70 terms of about 1.
        check_close(actual, expected, 1e-11 if dtype == torch.float64 else 3e-5, names)
        assert expected[0].isnan().any() and expected[5][2, 4].eq(0).all()
    assert expected[4][1].eq(0).all() and expected[5][1].eq(0).all()


@accelerated
def test_lattices_of_a_boundary(name):
    """A boundary that leaves the grid gets -1 frames; a device's values are not checked."""
    backend = of(name)
    rows = [[0, 0, 3, 5], [1, 2, 3, 4], [0, 0, 4, 5], [0, -1, 3, 5], [2, 0, 1, 5], [0, 2**62, 1, 5]]
    boundary = torch.tensor(rows)
    expected = torch.tensor(
        [[5, 2, -1, -1, -1, -1], [3, 2, 0, 0, 0, 0], [0, 29, 0, 0, 0, 0], [0, 2, 0, 0, 0, 0]]
    )

    def run():
        contexts, am = torch.zeros(6, 4, 7), torch.zeros(6, 5, 7)
        tensors = contexts, am, torch.zeros(6, 3, dtype=torch.int64), boundary
        inputs = AdditiveInputs(*(x.to(backend.device) for x in tensors))
        options = AdditiveOptions(0, 1.0, 0.0, 0.0)
        return (AdditiveStages(inputs, options, with_scores=True).lattices,)

    assert torch.equal(in_every_order(backend, run)[0], expected)
    assert torch.equal(in_every_order(of("cpu"), run)[0], expected)


@accelerated
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("num_frames", [1, 33, 600])
@pytest.mark.parametrize("width, step", [(1, 1), (3, 2), (6, 1)])
def test_prune_windows(name, dtype, num_frames, width, step):
    backend = of(name)
    px_grad, py_grad = torch.rand(3, 5, num_frames + 1), torch.rand(3, 6, num_frames)
    px_grad[0, 2], py_grad[1, 3] = torch.nan, torch.inf
    py_grad[2] = torch.round(py_grad[2])  # of several equal masses, the lowest
    boundary = torch.tensor([[0, 0, 5, num_frames]] * 3)
    boundary[1] = torch.tensor([1, num_frames // 3, 4, num_frames // 2 + 1])
    tensors = px_grad.to(dtype), py_grad.to(dtype), boundary

    def run(device):
        return (greedy_ranges(*(x.to(device) for x in tensors), width, step),)

    expected = run("cpu")[0]
    assert torch.equal(in_every_order(backend, lambda: run(backend.device))[0], expected)
    assert num_frames == 1 or width == 6 or len(expected[2, :, 0].unique()) > 1
