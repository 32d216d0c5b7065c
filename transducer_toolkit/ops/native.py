# SPDX-License-Identifier: Apache-2.0
"""The interface to the compiled module: dtypes, devices, streams, addresses and memory.

No other file imports ``transducer_toolkit._C``.
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
    from transducer_toolkit import _C as extension
except ImportError as error:
    _here = Path(__file__).resolve().parent
    if (_here.parents[1] / "CMakeLists.txt").exists():
        raise ImportError(
            "transducer_toolkit was imported from its source tree, where the compiled module "
            "transducer_toolkit._C has not been built. If Python starts in the source tree, the "
            "tree hides an installed package: change to another folder, or build in place with "
            f"`pip install -e .` (original error: {error})"
        ) from error
    raise ImportError(
        "the compiled module transducer_toolkit._C is missing or was built for another Python: "
        "reinstall it in a clone with `pip install --force-reinstall --no-deps .` "
        f"(original error: {error})"
    ) from error

ACTIVATIONS = tuple(extension.Activation.__members__)
DTYPES = {
    torch.float16: extension.DType.float16,
    torch.bfloat16: extension.DType.bfloat16,
    torch.float32: extension.DType.float32,
    torch.float64: extension.DType.float64,
}
SUPPORTED_DTYPES = tuple(DTYPES)


SIXTEEN_BIT = (torch.float16, torch.bfloat16)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of arithmetic and losses for inputs of `dtype`: float32 for 16 bits."""
    return torch.float32 if dtype in SIXTEEN_BIT else dtype


# The dtype of scores, posteriors and sums of logarithms (Score in csrc/common.h).
SCORE_DTYPE = torch.float64


def build_info() -> dict[str, Any]:
    """Returns a description of the compiled module.

    The keys are:

    - version, compiler, build_type;
    - cpu_path: "avx512", "avx2" or "baseline";
    - cuda_runtime: for example 13000; 0 without CUDA;
    - cuda_architectures: for example "75-real 80-real 80-virtual";
    - cuda_driver_floor: the lowest NVIDIA driver branch, for example 580; 0 without CUDA;
    - cuda_devices: the number of usable devices; 0 if this build or torch has no CUDA. Before torch
      initializes CUDA, torch.cuda.device_count() counts them, so that a process forked later can
      still use CUDA.

    Example:
        >>> build_info()["cpu_path"] in ("avx512", "avx2", "baseline")
        True
    """
    info: dict[str, Any] = dict(extension.build_info())
    runtime = int(info["cuda_runtime"])
    # The oldest driver branch that runs any release of the runtime's major version
    # (CUDA Compatibility, "Minor Version Compatibility").
    info["cuda_driver_floor"] = {0: 0, 11: 450, 12: 525, 13: 580}.get(runtime // 1000, 580)
    info["cuda_devices"] = 0
    if runtime:
        # Our own count initializes the driver. A forked process could then not use CUDA.
        ours, torchs = extension.cuda.device_count, torch.cuda.device_count
        info["cuda_devices"] = (ours if torch.cuda.is_initialized() else torchs)()
    return info


def require_supported_device(device: torch.device) -> None:
    """Raises a RuntimeError that says what to do if no stage runs on `device`."""
    if device.type == "cpu" or (device.type == "cuda" and hasattr(extension.cuda, "lattice")):
        return
    if device.type == "cuda":
        raise RuntimeError(
            "the tensors are on a CUDA device, but this transducer_toolkit was built without CUDA. "
            "Add nvcc to the PATH and rebuild it in a clone: CMAKE_ARGS=-DTRANSDUCER_CUDA=ON "
            "pip install --force-reinstall --no-deps --no-cache-dir ."
        )
    raise RuntimeError(f"device: expected type cpu or cuda, got {device.type!r}")


class Backend:
    """The stages for one type of device, with their number of threads or their stream.

    Attributes:
        stages: the module of the compiled functions.
        is_cuda: whether they are the CUDA stages, real or emulated.
        queue: the keyword argument that sets the number of threads or the stream.
    """

    def __init__(self, stages: Any, device: torch.device) -> None:
        self.stages = stages
        self.is_cuda = stages is not extension.cpu
        if not self.is_cuda:
            self.queue = {"num_threads": torch.get_num_threads()}
        elif device.type == "cuda":
            self.queue = {"stream": torch.cuda.current_stream(device).cuda_stream}
        else:
            self.queue = {"stream": 0}


_stages_for_cpu_tensors: Any = extension.cpu


@contextmanager
def backend_of(tensor: Tensor) -> Iterator[Backend]:
    """Yields the backend of the tensor's device, which is the current CUDA device inside."""
    device = tensor.device
    is_cuda = device.type == "cuda"
    with torch.cuda.device(device) if is_cuda else nullcontext():
        yield Backend(extension.cuda if is_cuda else _stages_for_cpu_tensors, device)


def runs_on_cpu(tensor: Tensor) -> bool:
    """Returns whether the stages of the CPU run for the tensor, and not CUDA's or emulated ones."""
    return tensor.device.type == "cpu" and _stages_for_cpu_tensors is extension.cpu


@contextmanager
def emulated(module: Any) -> Iterator[None]:
    """Runs the emulated CUDA stages on tensors on the CPU, for tests.

    It affects all threads of the process.

    Args:
        module: the module _emulated.
    """
    global _stages_for_cpu_tensors
    before = _stages_for_cpu_tensors
    _stages_for_cpu_tensors = module.cuda
    try:
        yield
    finally:
        _stages_for_cpu_tensors = before


def address(tensor: Tensor) -> int:
    assert tensor.is_contiguous()  # the stages do not take strides
    return tensor.data_ptr()


_HUGE_FROM_BYTES = 8 * 2**20
_MAPPED_FROM_BYTES = 2**18


def empty(*size: int, like: Tensor) -> Tensor:
    """Returns an uninitialized tensor like `like`, on huge pages if it is large and on the CPU."""
    tensor = like.new_empty(size)
    num_bytes = tensor.numel() * tensor.element_size()
    if tensor.device.type == "cpu" and num_bytes >= _HUGE_FROM_BYTES:
        extension.cpu.advise_huge_pages(data=tensor.data_ptr(), bytes=num_bytes)
    return tensor


def mapped(size: int, like: Tensor) -> Tensor:
    """Returns an uninitialized tensor (size,) with the dtype and the device of `like`.

    A large tensor on the CPU is mapped with mmap, so that the operating system gets its memory back
    when the tensor is freed. Memory from the heap would stay in the process, and fragmentation of
    the heap could raise the peak.

    Raises:
        RuntimeError: if there is not enough memory.
    """
    num_bytes = size * like.element_size()
    if like.device.type != "cpu" or num_bytes < _MAPPED_FROM_BYTES:
        return like.new_empty(size)
    try:
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        # A RuntimeError, as torch's allocator raises.
        raise RuntimeError(f"not enough memory: tried to map {num_bytes} bytes") from error
    tensor = torch.frombuffer(memory, dtype=like.dtype)
    extension.cpu.advise_huge_pages(data=tensor.data_ptr(), bytes=num_bytes)
    return tensor


def zeros(*sizes: int, like: Tensor) -> list[Tensor]:
    """Returns zeros in memory of :func:`mapped`. On a GPU, one launch fills all tensors."""
    tensors = [mapped(size, like=like) for size in sizes]
    torch._foreach_zero_(tensors)
    return tensors


def is_capturing(device: torch.device) -> bool:
    """Returns whether a CUDA graph is being captured, which forbids uploads and synchronization."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a tensor from the CPU to a device asynchronously, on the current stream.

    Raises:
        RuntimeError: if a CUDA graph is being captured.
    """
    if is_capturing(device):
        raise RuntimeError(
            "lengths cannot be copied from the CPU while a CUDA graph is being captured: make a "
            f"LatticeShape, call its to({str(device)!r}) before the capture, and pass it as shape"
        )
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns the tensor on a device; it :func:`uploads <upload>` one that is elsewhere."""
    return tensor if tensor.device == device else upload(tensor, device)
