# SPDX-License-Identifier: Apache-2.0
"""Fetches other projects' CUDA losses where there is a network; builds them where there is a GPU.

    python benchmarks/gpu/peers.py fetch                    # sources from PyPI into .gpu_kit/peers
    python benchmarks/gpu/peers.py build --target DIR       # builds the ones that were fetched
    python benchmarks/gpu/peers.py build --target .gpu_kit/built --architecture 90 --only fast_rnnt

Fetching needs pip alone. Building needs nvcc, cmake, make, pybind11 and a torch of CUDA. Without
--architecture it builds for the GPU of this machine. What the last command built on another machine
with the same Python and torch is copied instead of built: fast_rnnt takes minutes.
The patches change how the sources are built (C++17, the installed pybind11, one architecture), not
what they compute. optimized_transducer is left out because its CUDA sources need moderngpu, which
is not on PyPI; NeMo's Triton loss is left out because it needs NeMo.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.install_peers import PYBIND11_CMAKE, TORCH_CMAKE, NotBuilt, pip

SOURCES = {
    "warprnnt_numba": "warprnnt_numba==0.4.1",
    "warp_rnnt": "warp_rnnt==0.7.0",
    "fast_rnnt": "fast_rnnt==1.3",  # last: a file takes nvcc minutes
}
# Their setup.py files call bdist_wheel and pkg_resources, which newer versions do not have.
TOOLS = ("setuptools==80.9.0", "wheel==0.45.1")
# warp_rnnt's setup.py refuses to say even its name where torch sees no GPU.
STAND_IN_FOR_TORCH = """
class cuda:
    is_available = staticmethod(lambda: True)
"""
STAND_IN_FOR_EXTENSIONS = """
import setuptools.command.build_ext
CUDAExtension = CppExtension = lambda *args, **kwargs: setuptools.Extension("unused", [])
BuildExtension = setuptools.command.build_ext.build_ext
"""
WITH_CUDA_CMAKE = """
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
include_directories(SYSTEM ${CUDAToolkit_INCLUDE_DIRS})
list(APPEND TORCH_LIBRARIES
  ${TORCH_DIR}/lib/libtorch_cuda.so ${TORCH_DIR}/lib/libc10_cuda.so CUDA::cudart)
"""


def fetch(requirement: str, folder: Path) -> None:
    """Downloads the source distribution as a file.

    pip asks its setup.py for the name, which needs the tools in `folder`.
    """
    with build_tools(folder) as tools, tempfile.TemporaryDirectory() as stand_in:
        utilities = Path(stand_in) / "torch" / "utils"
        utilities.mkdir(parents=True)
        (utilities.parent / "__init__.py").write_text(STAND_IN_FOR_TORCH)
        (utilities / "__init__.py").write_text("")
        (utilities / "cpp_extension.py").write_text(STAND_IN_FOR_EXTENSIONS)
        download = ("download", "--no-deps", "--no-build-isolation", "--no-binary", ":all:")
        environment = {"PYTHONPATH": os.pathsep.join([stand_in, str(tools)])}
        pip(*download, "--dest", str(folder), requirement, environment=environment)


def fetch_tools(folder: Path) -> None:
    """Downloads the wheels that every peer's setup.py needs."""
    pip("download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), *TOOLS)


@contextmanager
def build_tools(folder: Path) -> Iterator[Path]:
    """A temporary folder for PYTHONPATH with the tools in it; the environment stays as it is."""
    with tempfile.TemporaryDirectory() as target:
        install = ("install", "--no-deps", "--no-index", "--find-links", str(folder))
        pip(*install, "--target", target, *TOOLS)
        yield Path(target)


def patch_cuda(folder: Path, architecture: str) -> None:
    """Sets C++17, the installed pybind11, torch's libraries by name, and one architecture."""
    listing = folder / "CMakeLists.txt"
    text, changes = re.subn(r"(?<=set\(CMAKE_CXX_STANDARD )14", "17", listing.read_text())
    text, more = re.subn(
        r"(?<=_COMPUTE_ARCH_CANDIDATES) [\d ]+(?=\))", f" {architecture}", text, count=1
    )
    # Further architectures for newer toolkits: each would be compiled as well.
    text = re.sub(r"list\(APPEND \w+_COMPUTE_ARCH_CANDIDATES [\d ]+\)", "", text)
    if not (changes and more):
        raise NotBuilt("its CMakeLists.txt does not name C++14 and architectures: another version?")
    listing.write_text(text)
    (folder / "cmake" / "pybind11.cmake").write_text(PYBIND11_CMAKE)
    (folder / "cmake" / "torch.cmake").write_text(TORCH_CMAKE + WITH_CUDA_CMAKE)


def build(name: str, sources: Path, target: Path, *, jobs: int, architecture: str) -> str:
    """Builds and installs one peer; returns a message. architecture "": that of this GPU."""
    archives = sorted(sources.glob(f"{name}-*.tar.gz"))
    if not archives:
        raise NotBuilt(f"no source distribution in {sources}")
    with build_tools(sources) as tools, tempfile.TemporaryDirectory() as folder:
        environment = {"MAX_JOBS": str(jobs), "PYTHONPATH": str(tools)}
        with tarfile.open(archives[-1]) as opened:
            opened.extractall(folder, filter="data")
        source = Path(folder) / archives[-1].name.removesuffix(".tar.gz")
        if (source / "CMakeLists.txt").exists():
            import pybind11
            import torch

            if not architecture and not torch.cuda.is_available():
                raise NotBuilt("torch sees no GPU to build for; name an --architecture")
            architecture = architecture or "{}{}".format(*torch.cuda.get_device_capability())
            patch_cuda(source, architecture)
            environment["FT_MAKE_ARGS"] = f"-j{jobs}"
            environment["FT_CMAKE_ARGS"] = " ".join(
                [
                    "-DCMAKE_BUILD_TYPE=Release -DFT_BUILD_TESTS=OFF -DFT_WITH_CUDA=ON",
                    f"-DCMAKE_CUDA_ARCHITECTURES={architecture}",
                    f"-DPYTHON_EXECUTABLE={sys.executable} -DPython_EXECUTABLE={sys.executable}",
                    f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                ]
            )
        install = ("install", "--no-deps", "--no-index", "--no-build-isolation", "--upgrade")
        pip(*install, "--target", str(target), str(source), environment=environment)
    return f"{archives[-1].name}: built"


def bring(name: str, built: Path, target: Path) -> bool:
    """Copies a peer that another machine built, if there is one."""
    folder = built / name
    if not folder.is_dir():
        return False
    shutil.copytree(folder, target, dirs_exist_ok=True)
    return True


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("fetch", "build"))
    parser.add_argument("--sources", type=Path, default=Path(".gpu_kit/peers"))
    parser.add_argument("--target", type=Path, default=Path("build/gpu_peers"))
    parser.add_argument("--built", type=Path, default=Path(".gpu_kit/built"), help="to copy from")
    parser.add_argument("--only", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--architecture", default="", help="such as 90; else that of this GPU")
    parser.add_argument("--jobs", type=int, default=8, help="compilers at once")
    options = parser.parse_args(arguments)
    if options.action == "fetch":
        options.sources.mkdir(parents=True, exist_ok=True)
        fetch_tools(options.sources)
    found = []
    for name in options.only:
        requirement = SOURCES[name]
        try:
            if options.action == "fetch":
                fetch(requirement, options.sources)
                said = "fetched"
            else:
                target = options.target.resolve()
                if options.architecture:  # a folder for each, so that one can be copied
                    target /= name
                target.mkdir(parents=True, exist_ok=True)
                said = "brought along"
                if options.architecture or not bring(name, options.built, target):
                    how = {"jobs": options.jobs, "architecture": options.architecture}
                    said = build(name, options.sources, target, **how)
            print(f"{name}: {said}", flush=True)
            found.append(name)
        except NotBuilt as error:
            print(f"{name}: {error}", flush=True)
        print(f"figures: {options.action}: {', '.join(found) or 'none'}", flush=True)


if __name__ == "__main__":
    main()
