# SPDX-License-Identifier: Apache-2.0
"""The native core from Python: threads, fork, CUDA in the binary."""

import multiprocessing
import threading

import pytest
import torch

from tests.losses.helpers import ragged_batch
from transducer_toolkit import native, transducer_loss


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


without_cuda = pytest.mark.skipif(
    bool(native.build_info()["cuda_runtime"]), reason="a build with CUDA"
)
with_cuda = pytest.mark.skipif(not native.build_info()["cuda_runtime"], reason="no CUDA in it")


@without_cuda
def test_cuda_tensors_get_words():
    with pytest.raises(RuntimeError, match=r"built without CUDA.* CMAKE_ARGS=-DTRANSDUCER_CUDA=ON"):
        native.require_supported_device(torch.device("cuda"))
    with pytest.raises(RuntimeError, match="no transducer stage for device type 'meta'"):
        native.require_supported_device(torch.device("meta"))


@with_cuda
def test_cuda_stages_are_linked_and_say_why_they_cannot_run():
    """On a machine without a driver the library loads and a launch reports CUDA's own words."""
    native.require_supported_device(torch.device("cuda"))
    if native.build_info()["cuda_devices"]:
        pytest.skip("there is a device: tests/test_backends.py")
    batch = native.LatticeBatch(
        *(torch.tensor(values) for values in ([1], [0], [[]])),
        max_frames=1,
        padded=False,
        device=torch.device("cpu"),
    )
    with pytest.raises(native._C.Error, match=r"logits_grad_cuda.cu:\d+: CUDA error: \w+"):
        native._C.cuda.logits_grad(
            batch.native,
            batch.all_rows().native,
            dtype=native._C.DType.float32,
            vocab_size=5,
            blank=0,
            from_log_softmax=False,
            clamp=0.0,
            stream=0,
            **dict.fromkeys(("logits", "normaliser", "use_blank", "use_label"), 0),
            **dict.fromkeys(("loss_grad", "grad"), 0),
        )
