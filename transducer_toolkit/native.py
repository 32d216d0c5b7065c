# SPDX-License-Identifier: Apache-2.0
"""The only door to the compiled stages: tensors on this side, addresses on the other.

Every function here allocates its outputs and calls one native stage (csrc/README.md). Arguments
are trusted: the public functions in :mod:`transducer_toolkit.losses` and
:mod:`transducer_toolkit.modules` check them first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    from transducer_toolkit import _C  # type: ignore[attr-defined]
except ImportError as error:
    _here = Path(__file__).resolve().parent
    if (_here.parent / "CMakeLists.txt").exists():
        raise ImportError(
            "transducer_toolkit was imported from its source tree, where the compiled module "
            "transducer_toolkit._C has not been built. The tree shadows an installed package when "
            "Python starts in it: leave the folder, or build in place with `pip install -e .` "
            f"(original error: {error})"
        ) from error
    raise ImportError(
        "the compiled module transducer_toolkit._C is missing or was built for another Python: "
        "reinstall with `pip install --force-reinstall --no-deps transducer_toolkit` "
        f"(original error: {error})"
    ) from error

TOPOLOGIES = tuple(_C.Topology.__members__)
ACTIVATIONS = tuple(_C.Activation.__members__)
_DTYPES = {
    torch.float16: _C.DType.float16,
    torch.bfloat16: _C.DType.bfloat16,
    torch.float32: _C.DType.float32,
    torch.float64: _C.DType.float64,
}
SUPPORTED_DTYPES = tuple(_DTYPES)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What arithmetic on `dtype` happens in, and losses come out in: float32 for 16-bit types."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


# Of scores, posteriors and the recursion on the CPU (csrc/common.h: Score).
SCORE_DTYPE = torch.float64


def build_info() -> dict[str, Any]:
    """What this binary is.

    Returns:
        version, compiler, build_type, cpu_path ("avx512", "avx2" or "baseline"), cuda_runtime (e.g.
        13000, 0 without CUDA), cuda_architectures (e.g. "75-real 80-real 80-virtual"),
        cuda_driver_floor (the lowest NVIDIA driver branch, e.g. 580; 0 without CUDA) and
        cuda_devices (how many can be used here).

    Example:
        >>> build_info()["cpu_path"] in ("avx512", "avx2", "baseline")
        True
    """
    info: dict[str, Any] = dict(_C.build_info())
    runtime = int(info["cuda_runtime"])
    # The oldest driver branch that runs any release of the runtime's major version
    # (CUDA Compatibility, "Minor Version Compatibility").
    info["cuda_driver_floor"] = {0: 0, 11: 450, 12: 525, 13: 580}.get(runtime // 1000, 580)
    info["cuda_devices"] = _C.cuda.device_count()
    return info


def require_supported_device(device: torch.device) -> None:
    """Raises a RuntimeError that says what to do if no stage runs on `device`."""
    if device.type == "cpu":
        return
    if device.type == "cuda" and not _C.build_info()["cuda_runtime"]:
        raise RuntimeError(
            "the tensors are on a CUDA device, but this transducer_toolkit was built without CUDA. "
            "Put nvcc on the PATH and rebuild: CMAKE_ARGS=-DTRANSDUCER_CUDA=ON pip install "
            "--force-reinstall --no-deps --no-cache-dir transducer_toolkit"
        )
    if device.type == "cuda":
        raise RuntimeError(
            "this version of transducer_toolkit has no CUDA stages yet: move the tensors to the "
            "CPU, or select loss=torchaudio in training"
        )
    raise RuntimeError(f"no transducer stage for device type {device.type!r}: expected cpu or cuda")


def _address(tensor: Tensor) -> int:
    assert tensor.is_contiguous()  # the stages know no strides
    return tensor.data_ptr()


def _index(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.detach().to(device=device, dtype=torch.int64).contiguous()


class LatticeBatch:
    """Native view of a batch's lattices: which row of a logits-like tensor each cell is.

    Args:
        logit_lengths: (B,) integers, frames of each utterance.
        target_lengths: (B,) integers, symbols of each utterance.
        targets: (B, U) integers; padding may hold anything.
        num_rows: rows of the logits-like tensor.
        max_frames: T; no utterance has more frames.
        padded: rows laid out as (B, T, U + 1) instead of packed.
        device: where the stage runs.
    """

    def __init__(
        self,
        logit_lengths: Tensor,
        target_lengths: Tensor,
        targets: Tensor,
        *,
        num_rows: int,
        max_frames: int,
        padded: bool,
        device: torch.device,
    ) -> None:
        num_frames = _index(logit_lengths, device)
        num_targets = _index(target_lengths, device)
        targets = _index(targets, device)
        num_utterances, max_targets = targets.shape
        if padded:
            per_utterance = max_frames * (max_targets + 1)
            first_row = torch.arange(num_utterances, device=device) * per_utterance
        else:
            # Clamped: lengths nobody validated must not make the rows of two utterances overlap.
            cells = num_frames.clamp(min=0) * (num_targets.clamp(min=-1) + 1)
            first_row = cells.cumsum(0) - cells
        self.num_rows = num_rows
        self.num_utterances = num_utterances
        self.max_frames = max_frames
        self.max_targets = max_targets
        self._keep_alive = (num_frames, num_targets, first_row, targets)
        self.native = _C.LatticeBatch(
            num_utterances=num_utterances,
            max_frames=max_frames,
            max_targets=max_targets,
            num_rows=num_rows,
            row_stride=max_targets + 1 if padded else 0,
            num_frames=_address(num_frames),
            num_targets=_address(num_targets),
            first_row=_address(first_row),
            targets=_address(targets),
        )


def cell_scores(
    logits: Tensor, batch: LatticeBatch, *, blank: int, from_log_softmax: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Stage 1. logits (rows, V) -> normaliser, blank score, label score, each (rows,) float64."""
    # Zeros: the stages write real cells only, and padding must not show what the memory held.
    normaliser, blank_score, label_score = (
        torch.zeros(batch.num_rows, dtype=SCORE_DTYPE, device=logits.device) for _ in range(3)
    )
    _C.cpu.cell_scores(
        batch.native,
        dtype=_DTYPES[logits.dtype],
        logits=_address(logits),
        vocab_size=logits.size(-1),
        blank=blank,
        from_log_softmax=from_log_softmax,
        num_threads=torch.get_num_threads(),
        normaliser=_address(normaliser),
        blank_score=_address(blank_score),
        label_score=_address(label_score),
    )
    return normaliser, blank_score, label_score


def lattice(
    blank_score: Tensor,
    label_score: Tensor,
    batch: LatticeBatch,
    *,
    topology: str,
    delay_penalty: float,
    fastemit_lambda: float,
    with_uses: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Stage 2. Scores (rows,) -> loss (B,), uses of the blank and of the label score (rows,).

    Without `with_uses` only the loss is computed and the other two have no elements.
    """
    loss = blank_score.new_empty(batch.num_utterances)
    use_blank, use_label = (
        blank_score.new_zeros(batch.num_rows if with_uses else 0) for _ in range(2)
    )
    scratch = blank_score.new_empty(0 if with_uses else batch.num_rows)
    _C.cpu.lattice(
        batch.native,
        topology=_C.Topology.__members__[topology],
        delay_penalty=delay_penalty,
        fastemit_lambda=fastemit_lambda,
        blank_score=_address(blank_score),
        label_score=_address(label_score),
        num_threads=torch.get_num_threads(),
        scratch=_address(scratch),
        loss=_address(loss),
        use_blank=_address(use_blank) if with_uses else 0,
        use_label=_address(use_label) if with_uses else 0,
    )
    return loss, use_blank, use_label


def logits_grad(
    logits: Tensor,
    batch: LatticeBatch,
    normaliser: Tensor,
    use_blank: Tensor,
    use_label: Tensor,
    loss_grad: Tensor,
    *,
    blank: int,
    from_log_softmax: bool,
    clamp: float,
    out: Tensor | None = None,
) -> Tensor:
    """Stage 3. Posteriors and upstream gradient (B,) -> gradient of the logits, shaped like them.

    Written to `out` if given, which may be the logits themselves.
    """
    grad = torch.empty_like(logits) if out is None else out
    loss_grad = loss_grad.to(SCORE_DTYPE).contiguous()
    _C.cpu.logits_grad(
        batch.native,
        dtype=_DTYPES[logits.dtype],
        logits=_address(logits),
        vocab_size=logits.size(-1),
        blank=blank,
        from_log_softmax=from_log_softmax,
        clamp=clamp,
        normaliser=_address(normaliser),
        use_blank=_address(use_blank),
        use_label=_address(use_label),
        loss_grad=_address(loss_grad),
        num_threads=torch.get_num_threads(),
        grad=_address(grad),
    )
    return grad


def join_forward(enc: Tensor, pred: Tensor, batch: LatticeBatch, *, activation: str) -> Tensor:
    """activation(enc_t + pred_u) of every cell: (B,T,D), (B,U+1,D) -> (rows, D)."""
    hidden = enc.new_empty(batch.num_rows, enc.size(-1))
    _C.cpu.join_forward(
        batch.native,
        dtype=_DTYPES[enc.dtype],
        enc=_address(enc),
        pred=_address(pred),
        width=enc.size(-1),
        activation=_C.Activation.__members__[activation],
        num_threads=torch.get_num_threads(),
        hidden=_address(hidden),
    )
    return hidden


def join_backward(
    grad_hidden: Tensor,
    hidden: Tensor,
    enc: Tensor,
    pred: Tensor,
    batch: LatticeBatch,
    *,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of enc and pred from that of `hidden`: segmented sums, deterministic."""
    dtype = compute_dtype(enc.dtype)
    grad_enc, grad_pred = torch.empty_like(enc, dtype=dtype), torch.empty_like(pred, dtype=dtype)
    _C.cpu.join_backward(
        batch.native,
        dtype=_DTYPES[enc.dtype],
        grad_hidden=_address(grad_hidden),
        hidden=_address(hidden),
        enc=_address(enc),
        pred=_address(pred),
        width=enc.size(-1),
        activation=_C.Activation.__members__[activation],
        num_threads=torch.get_num_threads(),
        grad_enc=_address(grad_enc),
        grad_pred=_address(grad_pred),
    )
    return grad_enc.to(enc.dtype), grad_pred.to(pred.dtype)


def _additive_cells(am: Tensor, lm: Tensor, product: Tensor, threshold: float) -> dict[str, Any]:
    return {
        "dtype": _DTYPES[am.dtype],
        "num_utterances": am.size(0),
        "num_frames": am.size(1),
        "num_columns": lm.size(1),
        "vocab_size": am.size(2),
        "am": _address(am),
        "lm": _address(lm),
        "product": _address(product),
        "threshold": threshold,
        "num_threads": torch.get_num_threads(),
    }


def repair_normaliser(
    am: Tensor, lm: Tensor, product: Tensor, threshold: float, normaliser: Tensor
) -> None:
    """Overwrites `normaliser` with logsumexp(am_t + lm_u) in the cells of product < threshold.

    am (B,T,V), lm (B,U+1,V), product (B,T,U+1) float32 or float64; normaliser (B,T,U+1) float64.
    """
    cells = _additive_cells(am, lm, product, threshold)
    _C.cpu.repair_normaliser(**cells, normaliser=_address(normaliser))


def repair_normaliser_backward(
    am: Tensor,
    lm: Tensor,
    product: Tensor,
    threshold: float,
    normaliser: Tensor,
    grad: Tensor,
    grad_am: Tensor,
    grad_lm: Tensor,
) -> None:
    """Adds grad * softmax(am_t + lm_u) of the cells of product < threshold to grad_am, grad_lm."""
    _C.cpu.repair_normaliser_backward(
        **_additive_cells(am, lm, product, threshold),
        normaliser=_address(normaliser),
        grad=_address(grad),
        grad_am=_address(grad_am),
        grad_lm=_address(grad_lm),
    )
