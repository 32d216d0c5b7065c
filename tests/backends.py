# SPDX-License-Identifier: Apache-2.0
"""The three ways to run a stage: on the CPU, emulated CUDA on the CPU, and CUDA."""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch import Tensor

from transducer_toolkit.ops import native

ROOT = Path(__file__).resolve().parents[1]
# Results must not depend on which thread goes first.
ORDERS = (("forward", 0), ("reverse", 0), ("random", 1), ("random", 2))


def build_emulated(source: Path, build: Path, *options: str) -> Path:
    """Builds, or brings up to date, the module _emulated; returns its file."""
    import pybind11

    tools = Path(sys.executable).parent
    commands = [
        [tools / "cmake", "--build", build, "--target", "_emulated", "--parallel", "2"],
    ]
    if not (build / "build.ninja").exists():
        configure = [tools / "cmake", "-S", source, "-B", build, "-G", "Ninja"]
        configure += [f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}", "-DTRANSDUCER_EMULATION=ON"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", "-DTRANSDUCER_CUDA=OFF"]
        configure += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", *options]
        commands.insert(0, configure)
    for command in commands:
        result = subprocess.run(
            [str(part) for part in command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if result.returncode:
            raise RuntimeError(f"the emulated backend does not build:\n{result.stdout}")
    return next(build.glob("_emulated.*.so"))


def load_emulated(path: Path) -> Any:
    """The module of a file that build_emulated returned."""
    spec = importlib.util.spec_from_file_location("_emulated", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def emulated_module() -> ModuleType:
    """The emulated stages of this tree; EMULATED_MODULE names a file built before (sanitizers)."""
    given = os.environ.get("EMULATED_MODULE")
    if given:
        return load_emulated(Path(given))
    if not (ROOT / "csrc").exists():
        pytest.skip("the emulated stages need the sources")  # tests of a wheel have none
    build = ROOT / "build"
    build.mkdir(exist_ok=True)
    with FileLock(build / "emulated.lock"):  # pytest-xdist's workers build it once
        return load_emulated(build_emulated(ROOT, build / "emulated"))


@dataclass(frozen=True)
class Backend:
    """ "cpu", "emulated" or "cuda": tensors on `device` run there inside of `active`."""

    name: str

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.name == "cuda" else "cpu")

    @property
    def missing(self) -> str | None:
        """Why it cannot run here."""
        info = native.build_info()
        if self.name != "cuda" or (info["cuda_devices"] and torch.cuda.is_available()):
            return None
        return "needs a CUDA device, and torch and transducer_toolkit built for it"

    @property
    def orders(self) -> tuple[tuple[str, int], ...]:
        """Orders of threads to try. A device has its own; CUDA_REPETITIONS says how often."""
        repetitions = int(os.environ.get("CUDA_REPETITIONS", 3))
        own = (("own", 0),) * repetitions
        return {"emulated": ORDERS, "cuda": own}.get(self.name, (("only", 0),))

    @contextmanager
    def active(self, order: str = "forward", seed: int = 0) -> Iterator[None]:
        if self.name != "emulated":
            yield
            return
        module = emulated_module()
        module.set_order(getattr(module.Order, order), seed)
        with native.emulated(module):
            yield
        module.set_order(module.Order.forward, 0)


accelerated = pytest.mark.parametrize("name", ["emulated", "cuda"])


def of(name: str) -> Backend:
    """The backend, or the test is skipped."""
    backend = Backend(name)
    if backend.missing:
        pytest.skip(backend.missing)
    return backend


def in_every_order(backend: Backend, run: Callable[[], tuple[Tensor, ...]]) -> list[Tensor]:
    """What run() gives on the backend, on the CPU afterwards; the same bits in every order."""
    results = []
    for order, seed in backend.orders:
        with backend.active(order, seed):
            results.append([tensor.cpu() for tensor in run()])
    for result in results[1:]:
        for tensor, first in zip(result, results[0], strict=True):
            assert torch.equal(tensor.nan_to_num(nan=7e5), first.nan_to_num(nan=7e5))
    return results[0]


def check_close(
    actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float, names: Sequence[str]
) -> None:
    """Raises an AssertionError that names the tensor which is not within the tolerance."""
    for name, a, e in zip(names, actual, expected, strict=True):
        torch.testing.assert_close(
            a,
            e,
            rtol=tolerance,
            atol=tolerance,
            equal_nan=True,
            msg=functools.partial("{}: {}".format, name),
        )
