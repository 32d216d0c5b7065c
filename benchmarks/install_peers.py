# SPDX-License-Identifier: Apache-2.0
"""Installs the other projects' losses for the CPU, from PyPI alone.

    python benchmarks/install_peers.py                                  # all, into build/peers
    python benchmarks/install_peers.py --target DIR fast_rnnt           # one, elsewhere
    python -m benchmarks.run --suite loss --peers-dir build/peers

Needs a C++17 compiler, make, and torch, setuptools, wheel, pybind11 >= 2.13 and cmake in the
environment of the Python that runs it, which is left as it is: everything goes to the target. The
sources are patched in a temporary folder; the patches change how they are built, not what they
compute. warp-transducer is not on PyPI, but PaddlePaddle's wheel (190 MB) has its compiled library,
which is taken out. Prints for each peer that it was built, or why not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ERROR_LINES = 4

# In place of the download of pybind11 2.6, which knows neither this CPython nor this torch.
PYBIND11_CMAKE = """
set(PYBIND11_FINDPYTHON ON)
find_package(pybind11 CONFIG REQUIRED)
set(PYTHON_EXECUTABLE ${Python_EXECUTABLE})
set(PYTHON_INCLUDE_DIRS ${Python_INCLUDE_DIRS})
set(PYTHON_LIBRARY "")
"""

# In place of find_package(Torch), which asks a torch that knows CUDA for nvcc, the CUDA toolkit and
# nvrtc even if nothing of it is used. Headers and three libraries are all that these peers need.
TORCH_CMAKE = """
function(ask_torch variable expression)
  execute_process(
    COMMAND "${PYTHON_EXECUTABLE}" -c "import os, torch; print(${expression}, end='')"
    OUTPUT_VARIABLE answer
    COMMAND_ERROR_IS_FATAL ANY)
  set(${variable} ${answer} PARENT_SCOPE)
endfunction()
ask_torch(TORCH_DIR "os.path.dirname(torch.__file__)")
ask_torch(TORCH_VERSION "torch.__version__")
ask_torch(TORCH_CXX11_ABI "int(torch._C._GLIBCXX_USE_CXX11_ABI)")
add_definitions(-D_GLIBCXX_USE_CXX11_ABI=${TORCH_CXX11_ABI})
include_directories(SYSTEM
  ${TORCH_DIR}/include ${TORCH_DIR}/include/torch/csrc/api/include ${PYTHON_INCLUDE_DIRS})
set(TORCH_LIBRARIES
  ${TORCH_DIR}/lib/libtorch.so ${TORCH_DIR}/lib/libtorch_cpu.so ${TORCH_DIR}/lib/libc10.so)
"""


class NotBuilt(Exception):
    """Why a peer could not be installed."""


@dataclass(frozen=True)
class Peer:
    """A source distribution: what to change in it, and what it needs without saying so."""

    requirement: str
    module: str
    patch: Callable[[Path], None] = lambda folder: None
    cmake_arguments_variable: str = ""  # the environment variable that its setup.py reads
    make_arguments_variable: str = ""
    undeclared: tuple[str, ...] = ()
    library: str = ""  # of a wheel instead: the file to take out; the module then has its PATH


def patch_cmake(folder: Path) -> None:
    """C++17, the installed pybind11, and torch without CUDA."""
    main = folder / "CMakeLists.txt"
    text = main.read_text()
    replaced = text.replace("set(CMAKE_CXX_STANDARD 14", "set(CMAKE_CXX_STANDARD 17")
    if replaced == text:
        raise NotBuilt("its CMakeLists.txt does not ask for C++14: another version?")
    main.write_text(replaced)
    (folder / "cmake" / "pybind11.cmake").write_text(PYBIND11_CMAKE)
    (folder / "cmake" / "torch.cmake").write_text(TORCH_CMAKE)


PEERS = {
    "fast_rnnt": Peer("fast_rnnt==1.3", "fast_rnnt", patch_cmake, "FT_CMAKE_ARGS", "FT_MAKE_ARGS"),
    "optimized_transducer": Peer(
        "optimized_transducer==1.4",
        "optimized_transducer",
        patch_cmake,
        "OT_CMAKE_ARGS",
        "OT_MAKE_ARGS",
    ),
    "warprnnt_numba": Peer(
        "warprnnt_numba==0.4.1", "warprnnt_numba", undeclared=("numba", "packaging")
    ),
    "warp_rnnt": Peer("warp_rnnt==0.7.0", "warp_rnnt"),
    "warp-transducer": Peer(
        "paddlepaddle==3.3.1", "warp_transducer_library", library="paddle/libs/libwarprnnt.so"
    ),
    "k2": Peer("k2", "k2"),
}


def run(command: list[str], environment: dict[str, str] | None = None) -> str:
    """Standard output of a command; NotBuilt with the end of what it said if it fails."""
    process = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **(environment or {})},
    )
    if process.returncode:
        raise NotBuilt(reason(process.stdout + process.stderr))
    return process.stdout


def reason(output: str) -> str:
    """The lines that say what went wrong: pip's, compilers' and exceptions', else the last ones."""
    noise = ("note:", "hint:", "WARNING:", "╰─>", "See above", "[end of output]")
    lines = [line.strip() for line in output.splitlines()]
    lines = [line for line in lines if line and not line.startswith(noise)]
    telling = [
        line
        for line in lines
        if ("rror:" in line or "Exception:" in line or "No matching" in line)
        and line not in ("error: subprocess-exited-with-error", "error: metadata-generation-failed")
    ]
    return "\n".join((telling or lines)[-ERROR_LINES:])


def pip(*arguments: str, environment: dict[str, str] | None = None) -> str:
    return run([sys.executable, "-m", "pip", *arguments], environment)


def build_environment(peer: Peer, jobs: int) -> dict[str, str]:
    """What the peer's setup.py hands to cmake and make."""
    environment = {
        # The target comes after the interpreter's own folders: cmake may be a script of either.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "MAX_JOBS": str(jobs),
    }
    if peer.cmake_arguments_variable:
        import pybind11

        prefix = peer.cmake_arguments_variable.removesuffix("_CMAKE_ARGS")
        environment[peer.cmake_arguments_variable] = " ".join(
            [
                "-DCMAKE_BUILD_TYPE=Release",
                f"-D{prefix}_WITH_CUDA=OFF",
                f"-D{prefix}_BUILD_TESTS=OFF",
                f"-DPYTHON_EXECUTABLE={sys.executable}",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            ]
        )
        environment[peer.make_arguments_variable] = f"-j{jobs}"
    return environment


def missing_requirements(requirements: tuple[str, ...]) -> list[str]:
    """name==version of all that these need and the environment lacks."""
    report = json.loads(pip("install", "--dry-run", "--quiet", "--report", "-", *requirements))
    wanted = [item["metadata"] for item in report["install"]]
    return [f"{item['name']}=={item['version']}" for item in wanted]


def install_library(peer: Peer, target: Path) -> None:
    """A package with nothing but a compiled library out of another project's wheel."""
    package = target / peer.module
    with tempfile.TemporaryDirectory() as folder:
        pip("download", "--no-deps", "--only-binary", ":all:", "--dest", folder, peer.requirement)
        (archive,) = Path(folder).glob("*.whl")
        package.mkdir(exist_ok=True)
        with zipfile.ZipFile(archive) as opened:
            (package / Path(peer.library).name).write_bytes(opened.read(peer.library))
    (package / "__init__.py").write_text(
        f'"""{peer.library} of {peer.requirement}."""\n\n'
        "from pathlib import Path\n\n"
        f'PATH = str(Path(__file__).with_name("{Path(peer.library).name}"))\n'
        f'__version__ = "{peer.requirement.split("==")[1]}"\n'
    )


def install_source(peer: Peer, target: Path, jobs: int) -> None:
    """Downloads, patches, builds and installs a source distribution, and what it needs."""
    into_target = ("install", "--no-deps", "--upgrade", "--target", str(target))
    environment = build_environment(peer, jobs)
    with tempfile.TemporaryDirectory() as folder:
        download = ("download", "--no-deps", "--no-build-isolation", "--no-binary", ":all:")
        pip(*download, "--dest", folder, peer.requirement, environment=environment)
        (archive,) = Path(folder).glob("*.tar.gz")
        with tarfile.open(archive) as opened:
            opened.extractall(folder, filter="data")
        source = archive.with_name(archive.name.removesuffix(".tar.gz"))
        peer.patch(source)
        pip(*into_target, "--no-build-isolation", str(source), environment=environment)
    if peer.undeclared and (missing := missing_requirements(peer.undeclared)):
        pip(*into_target, *missing)


def install(peer: Peer, target: Path, jobs: int) -> str:
    """Installs a peer and imports it beside torch; returns its version."""
    if peer.library:
        install_library(peer, target)
        query = (
            "import sys; sys.path.append(sys.argv[1]); import ctypes, torch, importlib;"
            "module = importlib.import_module(sys.argv[2]); ctypes.CDLL(module.PATH);"
            "print(sys.argv[3], module.__version__)"
        )
    else:
        install_source(peer, target, jobs)
        query = (
            "import sys; sys.path.append(sys.argv[1]); import torch, importlib.metadata;"
            "importlib.import_module(sys.argv[2]); print(importlib.metadata.version(sys.argv[3]))"
        )
    distribution = peer.requirement.split("==")[0]
    return run([sys.executable, "-c", query, str(target), peer.module, distribution]).strip()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/install_peers.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--target", type=Path, default=Path("build/peers"))
    parser.add_argument("--jobs", type=int, default=2, help="compilers at once")
    arguments = parser.parse_args()
    for name in arguments.names:
        if name not in PEERS:
            parser.error(f"name: expected one of {', '.join(PEERS)}, got {name}")
    arguments.target.mkdir(parents=True, exist_ok=True)
    failed = False
    for name in arguments.names or PEERS:
        try:
            version = install(PEERS[name], arguments.target.resolve(), arguments.jobs)
            made = "taken from its wheel" if PEERS[name].library else "built"
            print(f"{name} {version}: {made}", flush=True)
        except NotBuilt as error:
            failed = True
            indented = str(error).replace("\n", "\n    ")
            print(f"{name}: not built\n    {indented}", flush=True)
    if failed and arguments.names:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
