# SPDX-License-Identifier: Apache-2.0
"""Loads the compiled module and describes it: dtypes, devices, streams, addresses, memory.

This is the only file that imports ``transducer_toolkit._C``.
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
            "transducer_toolkit._C has not been built. The tree shadows an installed package when "
            "Python starts in it: leave the folder, or build in place with `pip install -e .` "
            f"(original error: {error})"
        ) from error
    raise ImportError(
        "the compiled module transducer_toolkit._C is missing or was built for another Python: "
        "reinstall with `pip install --force-reinstall --no-deps transducer_toolkit` "
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
    info: dict[str, Any] = dict(extension.build_info())
    runtime = int(info["cuda_runtime"])
    # The oldest driver branch that runs any release of the runtime's major version
    # (CUDA Compatibility, "Minor Version Compatibility").
    info["cuda_driver_floor"] = {0: 0, 11: 450, 12: 525, 13: 580}.get(runtime // 1000, 580)
    info["cuda_devices"] = 0
    if runtime:
        # Our own count initializes the driver, which a forked process cannot do again.
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
            "Put nvcc on the PATH and rebuild: CMAKE_ARGS=-DTRANSDUCER_CUDA=ON pip install "
            "--force-reinstall --no-deps --no-cache-dir transducer_toolkit"
        )
    raise RuntimeError(f"no transducer stage for device type {device.type!r}: expected cpu or cuda")


class Backend:
    """The stages for one kind of device, and their queue argument: threads or a stream."""

    def __init__(self, stages: Any, device: torch.device) -> None:
        self.stages = stages
        self.is_cuda = stages is not extension.cpu  # or emulated: the same functions
        if not self.is_cuda:
            self.queue = {"num_threads": torch.get_num_threads()}
        elif device.type == "cuda":
            self.queue = {"stream": torch.cuda.current_stream(device).cuda_stream}
        else:
            self.queue = {"stream": 0}


_stages_for_cpu_tensors: Any = extension.cpu


@contextmanager
def backend_of(tensor: Tensor) -> Iterator[Backend]:
    """The backend that holds the tensor; inside, its device is CUDA's current one."""
    device = tensor.device
    is_cuda = device.type == "cuda"
    with torch.cuda.device(device) if is_cuda else nullcontext():
        yield Backend(extension.cuda if is_cuda else _stages_for_cpu_tensors, device)


@contextmanager
def emulated(module: Any) -> Iterator[None]:
    """Runs the CUDA stages of the module _emulated on tensors on the CPU. For tests.

    Affects the whole process, not only the thread.
    """
    global _stages_for_cpu_tensors
    before = _stages_for_cpu_tensors
    _stages_for_cpu_tensors = module.cuda
    try:
        yield
    finally:
        _stages_for_cpu_tensors = before


def address(tensor: Tensor) -> int:
    assert tensor.is_contiguous()  # the stages know no strides
    return tensor.data_ptr()


_HUGE_FROM_BYTES = 8 * 2**20


def empty(*size: int, like: Tensor) -> Tensor:
    """Returns a tensor like `like`, on huge pages if it is large and on the CPU."""
    tensor = like.new_empty(size)
    num_bytes = tensor.numel() * tensor.element_size()
    if tensor.device.type == "cpu" and num_bytes >= _HUGE_FROM_BYTES:
        extension.cpu.advise_huge_pages(data=tensor.data_ptr(), bytes=num_bytes)
    return tensor


def mapped(size: int, like: Tensor) -> Tensor:
    """Returns a tensor (size,) of dtype and device of `like`; a large one on the CPU is mmapped.

    Its memory is returned to the system together with the tensor. Freed heap blocks stay with the
    allocator, in pieces that the next tensor of the same size does not always fit.
    """
    num_bytes = size * like.element_size()
    if like.device.type != "cpu" or num_bytes < _HUGE_FROM_BYTES:
        return like.new_empty(size)
    try:
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:  # what torch raises
        raise RuntimeError(f"not enough memory: tried to map {num_bytes} bytes") from error
    tensor = torch.frombuffer(memory, dtype=like.dtype)
    extension.cpu.advise_huge_pages(data=tensor.data_ptr(), bytes=num_bytes)
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
