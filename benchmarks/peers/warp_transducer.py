# SPDX-License-Identifier: Apache-2.0
"""warp-transducer's CPU library, called as warprnnt_pytorch does: padded log-probabilities.

The library is the one that PaddlePaddle ships; benchmarks/install_peers.py takes it out of there.
"""

import ctypes

import torch
from torch import Tensor

from benchmarks.jobs import Implementation, LossOfLogits, int32_indices, unpruned
from benchmarks.workloads import Workload

FLOAT_BYTES = 4


class Options(ctypes.Structure):
    """rnntOptions of include/rnnt.h."""

    _fields_ = (
        ("location", ctypes.c_int),  # 0 is the CPU
        ("num_threads", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("blank_label", ctypes.c_int),
        ("max_frames", ctypes.c_int),
        ("max_columns", ctypes.c_int),
        ("batch_first", ctypes.c_bool),
        ("fastemit_lambda", ctypes.c_float),
    )


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


class WarpTransducerLoss(torch.autograd.Function):
    """Gradients are made in forward, as in every binding of this library."""

    @staticmethod
    def forward(ctx, log_probs: Tensor, targets, logit_lengths, target_lengths, library) -> Tensor:
        batch, max_frames, max_columns, vocab_size = log_probs.shape
        options = Options(
            num_threads=torch.get_num_threads(),
            max_frames=max_frames,
            max_columns=max_columns,
            batch_first=True,
        )
        size = ctypes.c_size_t()
        status = library.get_rnnt_workspace_size(
            max_frames, max_columns, batch, False, ctypes.byref(size), ctypes.c_size_t(FLOAT_BYTES)
        )
        if status == 0:
            workspace = torch.empty(size.value, dtype=torch.uint8)
            costs, grads = torch.empty(batch), torch.zeros_like(log_probs)
            status = library.compute_rnnt_loss(
                _pointer(log_probs),
                _pointer(grads),
                _pointer(targets),
                _pointer(target_lengths),
                _pointer(logit_lengths),
                vocab_size,
                batch,
                _pointer(costs),
                _pointer(workspace),
                options,
            )
        if status != 0:
            raise RuntimeError(f"warp-transducer: status {status}")
        ctx.grads = grads
        return costs

    @staticmethod
    def backward(ctx, grad_losses: Tensor):
        return ctx.grads.mul_(grad_losses[:, None, None, None]), None, None, None, None


def make_loss(workload: Workload) -> LossOfLogits:
    from warp_transducer_library import PATH

    if workload.device != "cpu":
        raise ValueError(f"device: expected cpu, which the library is for, got {workload.device}")
    library = ctypes.CDLL(PATH)
    indices = int32_indices(workload)
    return lambda logits: WarpTransducerLoss.apply(logits.log_softmax(-1), *indices, library)


IMPLEMENTATIONS = [
    Implementation(
        "warp-transducer",
        project="warp-transducer",
        module="warp_transducer_library",
        needs=("PATH",),
        distribution="paddlepaddle",
        jobs=unpruned(make_loss, packed=False),
    )
]
