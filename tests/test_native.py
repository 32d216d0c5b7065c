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


def test_cuda_tensors_get_words():
    with pytest.raises(RuntimeError, match=r"built without CUDA|no CUDA stages yet"):
        native.require_supported_device(torch.device("cuda"))


@pytest.mark.skipif(not native.build_info()["cuda_runtime"], reason="a build without CUDA")
def test_cuda_kernel_is_linked_and_says_why_it_cannot_run():
    """On a machine without a driver the library loads and a launch reports CUDA's own words."""
    if native.build_info()["cuda_devices"]:
        data = torch.zeros(1000, device="cuda")
        native._C.cuda.add_constant(
            data=data.data_ptr(),
            size=1000,
            value=2.5,
            stream=torch.cuda.current_stream().cuda_stream,
        )
        assert data.eq(2.5).all()
    else:
        with pytest.raises(native._C.Error, match="CUDA error"):
            native._C.cuda.add_constant(data=0, size=1, value=1.0, stream=0)
