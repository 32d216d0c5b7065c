# SPDX-License-Identifier: Apache-2.0
"""Builds the native module with CMake. The metadata of the package is in pyproject.toml.

These standard variables apply: CMAKE_ARGS (for example -DTRANSDUCER_CUDA=OFF),
CMAKE_BUILD_PARALLEL_LEVEL, CMAKE_GENERATOR, CXX, CUDACXX, and CMAKE_CUDA_ARCHITECTURES as -D in
CMAKE_ARGS.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

SOURCE_DIR = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """A build_ext command that runs CMake instead of the compiler."""

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_dir = Path(self.build_temp).resolve() / "cmake"
        build_dir.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            "-S", str(SOURCE_DIR),
            "-B", str(build_dir),
            "-DCMAKE_BUILD_TYPE=Release",
            "-DTRANSDUCER_PYTHON=ON",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_INSTALL_PREFIX={output.parent}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]  # fmt: skip
        ninja = shutil.which("ninja")
        if "CMAKE_GENERATOR" not in os.environ and ninja:
            # Pass the path, because the cache of an earlier build in this tree may contain the
            # ninja of a build environment that pip has deleted.
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        build = ["cmake", "--build", str(build_dir), "--target", "install", "--verbose"]
        if "CMAKE_BUILD_PARALLEL_LEVEL" not in os.environ:
            build += ["--parallel", str(os.cpu_count() or 1)]
        for command in (configure, build):
            print("+", shlex.join(command), flush=True)
            subprocess.run(command, check=True)
        if not output.exists():
            raise RuntimeError(f"CMake succeeded but {output.name} is not in {output.parent}")


setup(
    packages=[*find_packages(include=["transducer_toolkit*"]), "transducer_toolkit.conf"],
    package_dir={"transducer_toolkit.conf": "conf"},
    package_data={
        "transducer_toolkit": ["py.typed", "*.pyi", "**/*.yaml", "**/*.json"],
        "transducer_toolkit.conf": ["**/*.yaml"],
    },
    ext_modules=[Extension("transducer_toolkit._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
