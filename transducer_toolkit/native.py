# SPDX-License-Identifier: Apache-2.0
"""The only door to the compiled stages: tensors on this side, addresses on the other.

Every function here allocates its outputs and calls one native stage (csrc/README.md). Arguments
are trusted: the public functions in :mod:`transducer_toolkit.losses` and
:mod:`transducer_toolkit.modules` check them first.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
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


SIXTEEN_BIT = (torch.float16, torch.bfloat16)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What arithmetic on `dtype` happens in, and losses come out in: float32 for 16-bit types."""
    return torch.float32 if dtype in SIXTEEN_BIT else dtype


# Of scores, posteriors and sums of logarithms (csrc/common.h: Score).
SCORE_DTYPE = torch.float64


def build_info() -> dict[str, Any]:
    """What this binary is.

    Returns:
        version, compiler, build_type, cpu_path ("avx512", "avx2" or "baseline"), cuda_runtime (e.g.
        13000, 0 without CUDA), cuda_architectures (e.g. "75-real 80-real 80-virtual"),
        cuda_driver_floor (the lowest NVIDIA driver branch, e.g. 580; 0 without CUDA) and
        cuda_devices (how many can be used here; 0 without CUDA in the build or in torch). Until
        torch initializes CUDA, devices are counted as torch.cuda.device_count() does, so that a
        process that is forked later can still use them.

    Example:
        >>> build_info()["cpu_path"] in ("avx512", "avx2", "baseline")
        True
    """
    info: dict[str, Any] = dict(_C.build_info())
    runtime = int(info["cuda_runtime"])
    # The oldest driver branch that runs any release of the runtime's major version
    # (CUDA Compatibility, "Minor Version Compatibility").
    info["cuda_driver_floor"] = {0: 0, 11: 450, 12: 525, 13: 580}.get(runtime // 1000, 580)
    info["cuda_devices"] = 0
    if runtime:
        # Our own count initializes the driver, which a forked process cannot do again.
        count = _C.cuda.device_count if torch.cuda.is_initialized() else torch.cuda.device_count
        info["cuda_devices"] = count()
    return info


def require_supported_device(device: torch.device) -> None:
    """Raises a RuntimeError that says what to do if no stage runs on `device`."""
    if device.type == "cpu" or (device.type == "cuda" and hasattr(_C.cuda, "lattice")):
        return
    if device.type == "cuda":
        raise RuntimeError(
            "the tensors are on a CUDA device, but this transducer_toolkit was built without CUDA. "
            "Put nvcc on the PATH and rebuild: CMAKE_ARGS=-DTRANSDUCER_CUDA=ON pip install "
            "--force-reinstall --no-deps --no-cache-dir transducer_toolkit"
        )
    raise RuntimeError(f"no transducer stage for device type {device.type!r}: expected cpu or cuda")


class _Backend:
    """The stages for one kind of device, and how they are told to run."""

    def __init__(self, stages: Any, device: torch.device) -> None:
        self.stages = stages
        self.is_cuda = stages is not _C.cpu  # or emulated: the same functions
        if not self.is_cuda:
            self.queue = {"num_threads": torch.get_num_threads()}
        elif device.type == "cuda":
            self.queue = {"stream": torch.cuda.current_stream(device).cuda_stream}
        else:
            self.queue = {"stream": 0}


_stages_for_cpu_tensors: Any = _C.cpu


@contextmanager
def _backend_of(tensor: Tensor) -> Iterator[_Backend]:
    """The backend that holds the tensor; inside, its device is CUDA's current one."""
    device = tensor.device
    is_cuda = device.type == "cuda"
    with torch.cuda.device(device) if is_cuda else nullcontext():
        yield _Backend(_C.cuda if is_cuda else _stages_for_cpu_tensors, device)


@contextmanager
def emulated(module: Any) -> Iterator[None]:
    """For tests: inside, the CUDA stages of the module _emulated serve tensors on the CPU.

    Holds for the whole process, not for the thread.
    """
    global _stages_for_cpu_tensors
    before = _stages_for_cpu_tensors
    _stages_for_cpu_tensors = module.cuda
    try:
        yield
    finally:
        _stages_for_cpu_tensors = before


def _address(tensor: Tensor) -> int:
    assert tensor.is_contiguous()  # the stages know no strides
    return tensor.data_ptr()


_HUGE_FROM_BYTES = 8 * 2**20


def empty(*size: int, like: Tensor) -> Tensor:
    """A tensor of dtype and device of `like`, on huge pages if it is large and on the CPU."""
    tensor = like.new_empty(size)
    num_bytes = tensor.numel() * tensor.element_size()
    if tensor.device.type == "cpu" and num_bytes >= _HUGE_FROM_BYTES:
        _C.cpu.advise_huge_pages(data=tensor.data_ptr(), bytes=num_bytes)
    return tensor


def mapped(size: int, like: Tensor) -> Tensor:
    """(size,) of dtype and device of `like`; large ones on the CPU come from the system itself.

    The allocator's heap keeps what is freed, in pieces that the next tensor of the same size does
    not always fit; this goes back when the tensor does.
    """
    num_bytes = size * like.element_size()
    if like.device.type != "cpu" or num_bytes < _HUGE_FROM_BYTES:
        return like.new_empty(size)
    try:
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:  # what torch raises
        raise RuntimeError(f"not enough memory: tried to map {num_bytes} bytes") from error
    tensor = torch.frombuffer(memory, dtype=like.dtype)
    _C.cpu.advise_huge_pages(data=tensor.data_ptr(), bytes=num_bytes)
    return tensor


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured: nothing may be copied from the host or waited for."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of a tensor on the CPU that runs behind what the device is still doing.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """
    if is_capturing(device):
        raise RuntimeError(
            "a CUDA graph that is being captured cannot copy lengths from the CPU: make a "
            f"LatticeShape, call its to({str(device)!r}) before, and pass it as shape"
        )
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _index(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.detach().to(device=device, dtype=torch.int64).contiguous()


class LatticeBatch:
    """Native view of a batch's lattices: which row of a logits-like tensor each cell is.

    Args:
        logit_lengths: (B,) integers, frames of each utterance.
        target_lengths: (B,) integers, symbols of each utterance.
        targets: (B, U) integers; padding may hold anything.
        max_frames: T; no utterance has more frames.
        padded: rows laid out as (B, T, U + 1), or (B, T, R) with a band, instead of packed.
        device: where the stage runs.
        num_rows: rows of the logits-like tensor; None computes them from lengths on the CPU.
        band_start: (B, T) integers, for each frame the first of its R cells; None: all U + 1 exist.
        band_width: R, with band_start.
        begins: (B, 2) integers, symbol and frame at which each lattice begins inside of the
            padded layout; lengths count from there. None: zeros.
        index: LatticeShape.index(device) of these lengths, if there is one: then nothing is copied
            from the CPU.
        skip: (B,) bool on `device`: utterances without cells. Their rows are padding.
    """

    def __init__(
        self,
        logit_lengths: Tensor,
        target_lengths: Tensor,
        targets: Tensor,
        *,
        max_frames: int,
        padded: bool,
        device: torch.device,
        num_rows: int | None = None,
        band_start: Tensor | None = None,
        band_width: int = 0,
        begins: Tensor | None = None,
        index: Tensor | None = None,
        skip: Tensor | None = None,
    ) -> None:
        # Lengths on the CPU are worked on there: num_rows is known without waiting for a device.
        on_cpu = logit_lengths.device.type == target_lengths.device.type == "cpu"
        place = torch.device("cpu") if on_cpu and begins is None and index is None else device
        if index is None:
            num_frames, num_targets = (_index(x, place) for x in (logit_lengths, target_lengths))
        else:
            num_frames, num_targets, first_cell, frames_before = index.unbind()
        targets = _index(targets, device)
        num_utterances, max_targets = targets.shape
        # The stages read so many elements, whatever the caller forgot to check.
        for name, tensor, size in (
            ("logit_lengths", logit_lengths, (num_utterances,)),
            ("target_lengths", target_lengths, (num_utterances,)),
            ("band_start", band_start, (num_utterances, max_frames)),
            ("begins", begins, (num_utterances, 2)),
        ):
            if tensor is not None and tuple(tensor.shape) != size:
                raise ValueError(f"{name}: expected shape {size}, got {tuple(tensor.shape)}")
        if padded:
            stride = max_targets + 1 if band_start is None else band_width
            rows_per_utterance = max_frames * stride
            first_row = torch.arange(num_utterances, device=place) * rows_per_utterance
            total = num_utterances * rows_per_utterance
        else:
            stride = 0 if band_start is None else band_width
            rows_per_utterance = 0
            total = -1
            if index is not None:
                assert num_rows is not None
                first_row = frames_before * stride if stride else first_cell
            else:
                # Clamped: lengths nobody validated must not make the rows of two overlap.
                columns = stride or (num_targets.clamp(-1, max_targets) + 1)
                ends = (num_frames.clamp(0, max_frames) * columns).cumsum(0)
                first_row = torch.cat([ends.new_zeros(1), ends[:-1]])
        first_frame = None
        if band_start is not None:
            band_start = _index(band_start, device)
        if begins is not None:
            first_symbol, first_frame = (_index(part, device) for part in begins.unbind(1))
            # What leaves the rows of its utterance gets a length that no stage accepts.
            is_inside = (first_symbol >= 0) & (first_symbol <= max_targets - num_targets)
            is_inside &= (first_frame >= 0) & (first_frame <= max_frames - num_frames)
            num_frames = torch.where(is_inside, num_frames, -1)
            targets = _shift(targets, first_symbol)
            first_row = first_row + first_frame * stride
            if band_start is None:
                first_row = first_row + first_symbol
            else:
                band_start = _shift(band_start, first_frame) - first_symbol[:, None]
        if num_rows is None:
            num_rows = int(ends[-1]) if total < 0 else total
        if place != device:
            together = torch.stack([num_frames, num_targets, first_row])
            num_frames, num_targets, first_row = upload(together, device).unbind()
        if skip is not None:
            num_frames = num_frames.masked_fill(skip, -1)  # an invalid length
        self.num_rows = num_rows
        self.num_utterances = num_utterances
        self.max_frames = max_frames
        self.max_targets = max_targets
        tensors = {
            "num_frames": num_frames,
            "num_targets": num_targets,
            "first_row": first_row,
            "targets": targets,
            "band_start": band_start,
            "first_frame": first_frame,
        }
        self._keep_alive = tensors
        self.native = _C.LatticeBatch(
            num_utterances=num_utterances,
            max_frames=max_frames,
            max_targets=max_targets,
            num_rows=num_rows,
            row_stride=stride,
            rows_per_utterance=rows_per_utterance,
            **{name: 0 if t is None else _address(t) for name, t in tensors.items()},
        )

    def all_rows(self) -> RowTile:
        """The tile of all rows, padding included."""
        return RowTile(0, self.num_rows)


def _shift(rows: Tensor, begins: Tensor) -> Tensor:
    """Each row (B, N) moved left by its own number of places; the elements at the ends fill up."""
    places = torch.arange(rows.size(1), device=rows.device) + begins[:, None]
    return rows.gather(1, places.clamp(0, rows.size(1) - 1)) if rows.size(1) else rows


class RowTile:
    """Some rows of a batch, in ascending order: what one call of a stage works on.

    Args:
        begin: first row, or first element of `rows`.
        size: number of rows.
        rows: (N,) int64, ascending; None: begin, begin + 1, ...
        whole_logits: logits_grad reads the logits of all rows of the batch.
    """

    def __init__(
        self, begin: int, size: int, rows: Tensor | None = None, *, whole_logits: bool = False
    ) -> None:
        self.begin = begin
        self.size = size
        self.rows = rows  # kept alive for the stages, too
        address = 0 if rows is None else _address(rows)
        self.native = _C.RowTile(rows=address, begin=begin, size=size, whole_logits=whole_logits)


class CellScores:
    """What stage 1 gives for each row of a batch: three tensors (rows,) float64."""

    def __init__(self, batch: LatticeBatch, device: torch.device) -> None:
        # Zeros: the stages write real cells only, and padding must not show what the memory held.
        self.normaliser, self.blank, self.label = (
            torch.zeros(batch.num_rows, dtype=SCORE_DTYPE, device=device) for _ in range(3)
        )


def cell_scores(
    logits: Tensor,
    batch: LatticeBatch,
    tile: RowTile,
    out: CellScores,
    *,
    blank: int,
    from_log_softmax: bool = False,
) -> None:
    """Stage 1. logits (tile rows, V) -> normaliser, blank score and label score of these rows."""
    with _backend_of(logits) as backend:
        backend.stages.cell_scores(
            batch.native,
            tile.native,
            dtype=_DTYPES[logits.dtype],
            logits=_address(logits),
            vocab_size=logits.size(-1),
            blank=blank,
            from_log_softmax=from_log_softmax,
            **backend.queue,
            normaliser=_address(out.normaliser),
            blank_score=_address(out.blank),
            label_score=_address(out.label),
        )


def lattice(
    blank_score: Tensor,
    label_score: Tensor,
    batch: LatticeBatch,
    *,
    topology: str,
    delay_penalty: float,
    fastemit_lambda: float,
    with_uses: bool,
    exact: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Stage 2. Scores (rows,) -> loss (B,), uses of the blank and of the label score (rows,).

    Without `with_uses` only the loss is computed and the other two have no elements. `exact` is for
    scores that come of float64: without it, CUDA adds the float64 logarithms up with float32's
    exponentials (an error of 1e-7 a term). The CPU is exact always.
    """
    loss = blank_score.new_empty(batch.num_utterances)
    use_blank, use_label = (
        blank_score.new_zeros(batch.num_rows if with_uses else 0) for _ in range(2)
    )
    with _backend_of(blank_score) as backend:
        native_topology = _C.Topology.__members__[topology]
        scratch = blank_score.new_empty(
            backend.stages.lattice_scratch(
                batch.native, topology=native_topology, with_uses=with_uses
            )
        )
        backend.stages.lattice(
            batch.native,
            topology=native_topology,
            delay_penalty=delay_penalty,
            fastemit_lambda=fastemit_lambda,
            exact=exact,
            blank_score=_address(blank_score),
            label_score=_address(label_score),
            **backend.queue,
            scratch=_address(scratch),
            loss=_address(loss),
            use_blank=_address(use_blank) if with_uses else 0,
            use_label=_address(use_label) if with_uses else 0,
        )
    return loss, use_blank, use_label


def kept_rows(
    use_blank: Tensor, use_label: Tensor, batch: LatticeBatch, *, dropped_mass: float
) -> tuple[Tensor, Tensor]:
    """The rows of the cells that carry gradient (csrc/occupancy.h), and their numbers (B,).

    The first is (rows,): what stands behind its first ``numbers.sum()`` elements means nothing.
    Waits for no device.
    """
    rows = torch.empty(batch.num_rows, dtype=torch.int64, device=use_blank.device)
    counts = torch.empty(batch.num_utterances, dtype=torch.int64, device=use_blank.device)
    dropped = use_blank.new_empty(batch.num_utterances)
    with _backend_of(use_blank) as backend:
        arguments = {
            "use_blank": _address(use_blank),
            "use_label": _address(use_label),
            "dropped_mass": dropped_mass,
            **backend.queue,
            "kept_rows": _address(rows),
            "num_kept": _address(counts),
            "dropped": _address(dropped),
        }
        if backend.is_cuda:
            scratch = use_blank.new_empty(backend.stages.kept_rows_scratch(batch.native))
            backend.stages.kept_rows(batch.native, **arguments, scratch=_address(scratch))
        else:
            total = backend.stages.kept_rows(batch.native, **arguments)
            assert total <= batch.num_rows
    return rows, counts


def logits_grad(
    logits: Tensor,
    batch: LatticeBatch,
    tile: RowTile,
    normaliser: Tensor,
    use_blank: Tensor,
    use_label: Tensor,
    loss_grad: Tensor,
    *,
    blank: int,
    from_log_softmax: bool = False,
    clamp: float = 0.0,
    out: Tensor,
) -> None:
    """Stage 3. Posteriors and upstream gradient (B,) float64 -> gradient of the tile's logits.

    Written to `out` (tile rows, V); it may be the logits themselves, unless these are whole.
    """
    with _backend_of(logits) as backend:
        backend.stages.logits_grad(
            batch.native,
            tile.native,
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
            **backend.queue,
            grad=_address(out),
        )


def join_forward(
    enc: Tensor, pred: Tensor, batch: LatticeBatch, tile: RowTile, *, activation: str, out: Tensor
) -> None:
    """activation(enc_t + pred_u) of the tile's cells: (B,T,D), (B,U+1,D) -> out (tile rows, D)."""
    with _backend_of(enc) as backend:
        backend.stages.join_forward(
            batch.native,
            tile.native,
            dtype=_DTYPES[enc.dtype],
            enc=_address(enc),
            pred=_address(pred),
            width=enc.size(-1),
            activation=_C.Activation.__members__[activation],
            **backend.queue,
            hidden=_address(out),
        )


def join_backward(
    grad_hidden: Tensor,
    hidden: Tensor,
    enc: Tensor,
    pred: Tensor,
    batch: LatticeBatch,
    tile: RowTile,
    *,
    activation: str,
    grad_enc: Tensor,
    grad_pred: Tensor,
) -> None:
    """Adds the tile's part of the gradients of enc and pred, which are of compute_dtype."""
    with _backend_of(enc) as backend:
        scratch_size = backend.stages.join_backward_scratch(batch.native, tile.native)
        scratch = enc.new_empty(scratch_size, dtype=torch.int32)
        backend.stages.join_backward(
            batch.native,
            tile.native,
            dtype=_DTYPES[enc.dtype],
            grad_hidden=_address(grad_hidden),
            hidden=_address(hidden),
            enc=_address(enc),
            pred=_address(pred),
            width=enc.size(-1),
            activation=_C.Activation.__members__[activation],
            **backend.queue,
            scratch=_address(scratch),
            grad_enc=_address(grad_enc),
            grad_pred=_address(grad_pred),
        )
