# SPDX-License-Identifier: Apache-2.0
"""The native core from Python: threads, fork, CUDA in the binary."""

import math
import multiprocessing
import resource
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests import stage_calls as stages
from tests.losses.helpers import ragged_batch
from tests.stage_calls import lattice_batch
from transducer_toolkit import transducer_loss
from transducer_toolkit.ops import native
from transducer_toolkit.ops.options import LossOptions
from transducer_toolkit.ops.stages import _logit_rows, _logits_options


def _loss_and_grad(batch):
    loss = transducer_loss(batch.logits, *batch.index_arguments, reduction="sum")
    return loss, torch.autograd.grad(loss, batch.logits)[0]


def test_works_after_fork():
    batch = ragged_batch([40, 30], [10, 9], 30)
    torch.set_num_threads(2)
    expected = _loss_and_grad(batch)[0].item()  # the parent's pool has threads now
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    batch.logits = batch.logits.detach().requires_grad_()
    process = context.Process(target=_forward_only, args=(batch, queue))
    process.start()
    assert queue.get(timeout=60) == expected
    process.join(timeout=60)
    assert process.exitcode == 0


def _forward_only(batch, queue):
    # autograd itself refuses to run in a forked child; the stages must not mind.
    torch.set_num_threads(2)
    with torch.no_grad():
        queue.put(float(transducer_loss(batch.logits, *batch.index_arguments, reduction="sum")))


def test_concurrent_calls_from_python_threads():
    batch = ragged_batch([30, 20], [9, 7], 25)
    torch.set_num_threads(2)
    expected_loss, expected_grad = _loss_and_grad(batch)
    failures = []

    def work():
        for _ in range(10):
            loss, grad = _loss_and_grad(batch)
            if not (torch.equal(loss, expected_loss) and torch.equal(grad, expected_grad)):
                failures.append(loss)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_caller_keeps_its_denormals():
    tiny = torch.tensor(1e-38)
    _loss_and_grad(ragged_batch([3], [1], 4, dtype=torch.float32))
    assert (tiny * 0.1).item() != 0


def test_no_subnormal_gradients():
    batch = ragged_batch([60], [20], 40, dtype=torch.float32, scale=30.0)
    grad = _loss_and_grad(batch)[1].abs()
    assert ((grad == 0) | (grad >= torch.finfo(torch.float32).tiny)).all()
    assert (grad == 0).any() and (grad > 0).any()


def test_no_subnormal_gradients_of_blanks_and_labels():
    """They are computed apart from the other symbols; what is a little larger is kept."""
    batch = ragged_batch([6], [3], 4, dtype=torch.float32)
    loss = transducer_loss(batch.logits, *batch.index_arguments, reduction="sum")
    tiny = torch.finfo(torch.float32).tiny
    (grad,) = torch.autograd.grad(2 * tiny * loss, batch.logits, retain_graph=True)
    assert ((grad == 0) | (grad.abs() >= tiny)).all()
    (small,) = torch.autograd.grad(2.0**30 * tiny * loss, batch.logits, retain_graph=True)
    (grad,) = torch.autograd.grad(loss, batch.logits)
    assert grad.abs().min() > 1e-6
    torch.testing.assert_close(small / tiny / 2.0**30, grad)


def test_rows_of_padding_are_zero_whatever_the_memory_held():
    """A joiner's weight gradient multiplies them by zero, and 0 * NaN is not zero."""
    band_start = torch.zeros(2, 3, dtype=torch.int64)
    batch = lattice_batch(
        *(torch.tensor(values) for values in ([3, 1], [1, 1], [[1], [1]])),
        num_rows=12,
        max_frames=3,
        padded=False,
        device=torch.device("cpu"),
        band_start=band_start,
        band_width=2,
    )
    enc, pred = torch.ones(2, 3, 5), torch.ones(2, 2, 5)
    out = torch.full((12, 5), torch.nan)
    stages.join_forward(enc, pred, batch, batch.all_rows(), activation="identity", out=out)
    assert (out[:8] == 2).all() and (out[8:] == 0).all()


def losses_of_ones(batch):
    """Stage 2 on scores of log(1)."""
    scores = torch.zeros(batch.num_rows, dtype=native.SCORE_DTYPE)
    options = {"delay_penalty": 0.0, "fastemit_lambda": 0.0, "with_uses": True}
    return stages.lattice(scores, scores, batch, topology="regular", **options)


@pytest.mark.parametrize("begin", [(0, 2), (1, 0), (0, -1), (-1, 0), (0, 2**62), (-(2**63), 0)])
def test_a_lattice_that_leaves_its_utterances_rows_is_nan(begin):
    """What a boundary on a device, which nobody has validated, may ask for."""
    batch = lattice_batch(
        *(torch.tensor(values) for values in ([3, 3], [1, 1], [[1], [1]])),
        max_frames=3,
        padded=True,
        device=torch.device("cpu"),
        begins=torch.tensor([begin, (0, 0)]),
    )
    losses, use_blank, _ = losses_of_ones(batch)
    assert losses[0].isnan() and float(losses[1]) == pytest.approx(-math.log(3))
    assert use_blank[6:].sum() == pytest.approx(3.0)


def test_a_lattice_that_begins_among_the_rows_of_another_is_nan():
    batch = lattice_batch(
        *(torch.tensor(values) for values in ([3, 3], [1, 1], [[1], [1]])),
        max_frames=3,
        padded=True,
        device=torch.device("cpu"),
        begins=torch.tensor([(0, 0), (0, -1)]),
    )
    losses = losses_of_ones(batch)[0]
    assert losses[1].isnan() and float(losses[0]) == pytest.approx(-math.log(3))


@pytest.mark.parametrize("first_row", [-1, 1, 5, 6, 12, 2**63 - 1, -(2**63)])
def test_rows_that_belong_to_another_utterance_are_not_read(first_row):
    """The stages themselves, whatever native.py may let through."""
    tensors = [torch.tensor(values) for values in ([3, 3], [1, 1], [first_row, 6], [1, 1])]
    batch = lattice_batch(
        *(torch.tensor(values) for values in ([3, 3], [1, 1], [[1], [1]])),
        max_frames=3,
        padded=True,
        device=torch.device("cpu"),
    )
    names = "num_frames", "num_targets", "first_row", "targets"
    batch.native = native.extension.LatticeBatch(
        num_utterances=2,
        max_frames=3,
        max_targets=1,
        num_rows=12,
        row_stride=2,
        rows_per_utterance=6,
        band_start=0,
        windows=0,
        first_frame=0,
        **{name: x.data_ptr() for name, x in zip(names, tensors, strict=True)},
    )
    losses, use_blank, _ = losses_of_ones(batch)
    assert losses[0].isnan() and float(losses[1]) == pytest.approx(-math.log(3))
    assert use_blank[6:].sum() == pytest.approx(3.0) and not use_blank[:6].any()


def test_lengths_that_wrap_round_leave_the_others_alone():
    """2**62 frames of 4 cells are no rows modulo 2**64: nobody may lie on the first utterance."""
    batch = lattice_batch(
        *(torch.tensor(values) for values in ([2, 2, 2], [1, 2**62 - 1, 1], [[1], [1], [1]])),
        max_frames=2,
        padded=False,
        num_rows=12,
        device=torch.device("cpu"),
    )
    losses, use_blank, _ = losses_of_ones(batch)
    assert losses[1].isnan() and losses[[0, 2]].isfinite().all()
    assert use_blank[:4].sum() == pytest.approx(2.0)


without_cuda = pytest.mark.skipif(
    bool(native.build_info()["cuda_runtime"]), reason="a build with CUDA"
)
with_cuda = pytest.mark.skipif(not native.build_info()["cuda_runtime"], reason="no CUDA in it")


@pytest.mark.parametrize("dtype", native.SUPPORTED_DTYPES)
@pytest.mark.parametrize("megabytes", [0, 1, 32])
def test_mapped_memory_goes_back_to_the_system(dtype, megabytes):
    size = megabytes * 2**20 // dtype.itemsize
    before = _resident_bytes()
    tensor = native.mapped(size, like=torch.empty(0, dtype=dtype))
    assert tensor.shape == (size,) and tensor.dtype == dtype
    half = tensor[size // 2 :].fill_(2)
    tensor.fill_(1)
    assert half.sum(dtype=torch.float64) == half.numel()
    if megabytes == 32:
        assert _resident_bytes() - before > 30 * 2**20
        del tensor
        with_half = _resident_bytes()
        assert with_half - before > 30 * 2**20  # `half` is a view of it
        del half
        assert with_half - _resident_bytes() > 24 * 2**20


def test_memory_that_is_not_there_is_the_error_of_torch():
    with pytest.raises(RuntimeError, match="not enough memory: tried to map 4611686018427387904"):
        native.mapped(2**60, like=torch.empty(0))


def _resident_bytes():
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()


@without_cuda
def test_cuda_tensors_get_words():
    with pytest.raises(RuntimeError, match=r"CMAKE_ARGS=-DTRANSDUCER_CUDA=ON pip install .* \.$"):
        native.require_supported_device(torch.device("cuda"))
    with pytest.raises(RuntimeError, match="device: expected type cpu or cuda, got 'meta'"):
        native.require_supported_device(torch.device("meta"))


@pytest.mark.parametrize(
    ("runtime", "is_up", "devices"), [(0, True, 0), (13000, False, 2), (13000, True, 3)]
)
def test_build_info_does_not_initialize_the_driver(monkeypatch, runtime, is_up, devices):
    """Only torch's count, which asks NVML, until CUDA is initialized anyway."""

    class Module:
        cuda = SimpleNamespace(device_count=lambda: 3)

        @staticmethod
        def build_info():
            return {"cuda_runtime": runtime}

    monkeypatch.setattr(native, "extension", Module)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: is_up)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert native.build_info()["cuda_devices"] == devices


@with_cuda
def test_cuda_stages_are_linked_and_say_why_they_cannot_run():
    """On a machine without a driver the library loads and a launch reports CUDA's own words."""
    native.require_supported_device(torch.device("cuda"))
    if native.build_info()["cuda_devices"]:
        pytest.skip("there is a device: tests/test_backends.py")
    batch = lattice_batch(
        *(torch.tensor(values) for values in ([1], [0], [[]])),
        max_frames=1,
        padded=False,
        device=torch.device("cpu"),
    )
    options = LossOptions(blank=0)
    with pytest.raises(native.extension.Error, match=r"logits_grad_cuda.cu:\d+: CUDA error: \w+"):
        native.extension.cuda.logits_grad(
            batch.native,
            batch.all_rows().native,
            logits=_logit_rows(torch.zeros(1, 5), options),
            options=_logits_options(options),
            posteriors=native.extension.Posteriors(
                **dict.fromkeys(native.extension.Posteriors.fields, 0)
            ),
            stream=0,
            grad=0,
        )
