# SPDX-License-Identifier: Apache-2.0
"""Wheel, sdist and the developer build, from a copy of the tree as git would ship it."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import transducer_toolkit

TOOLS = Path(sys.executable).parent
ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ("csrc", "conf", "transducer_toolkit", "CMakeLists.txt", "setup.py", "pyproject.toml",
           "MANIFEST.in", "README.md", "LICENSE", "Makefile")  # fmt: skip
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
# Optimized code takes three times as long to build; the developer's build below has it.
QUICK_BUILD = (
    "-DTRANSDUCER_CUDA=OFF -DCMAKE_CXX_FLAGS_RELEASE=-O0 -DCMAKE_INTERPROCEDURAL_OPTIMIZATION=OFF"
)


def run(*command, cwd, **environment):
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def source_tree(tmp_path_factory):
    tree = tmp_path_factory.mktemp("source") / "p(1) a b's & $x [ü]#%@!"
    tree.mkdir()
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(ROOT / name, tree / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, tree / name)
    return tree


@pytest.fixture(scope="module")
def sdist(source_tree, tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    build_tool = out / "build_tool"
    # Without an environment of its own, which pip makes for the wheel below.
    run(*PIP, "install", "--quiet", "build", "setuptools>=77", "--target", build_tool, cwd=out)
    result = run(
        sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", out, source_tree,
        cwd=out,
        PYTHONPATH=str(build_tool),
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    return next(out.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def unpacked(sdist, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked") / "p(1) a b's & $x [ü]#%@!"
    shutil.unpack_archive(sdist, folder)
    return next(folder.iterdir())


def build_wheel(tree, out):
    return run(
        *PIP, "wheel", "--verbose", "--no-deps", "--wheel-dir", out, tree,
        cwd=out,
        CMAKE_ARGS=QUICK_BUILD,
        CMAKE_BUILD_PARALLEL_LEVEL="2",
    )  # fmt: skip


@pytest.fixture(scope="module")
def wheel(unpacked, tmp_path_factory):
    """Built from the sdist, for the CPU only, without torch in the build environment."""
    out = tmp_path_factory.mktemp("wheel")
    result = build_wheel(unpacked, out)
    assert result.returncode == 0, result.stdout
    assert "building for the CPU only" not in result.stdout  # asked for, not fallen back to
    assert "--parallel" not in result.stdout  # CMAKE_BUILD_PARALLEL_LEVEL is in charge
    return next(out.glob("*.whl"))


def test_wheel_and_sdist_are_complete(wheel, sdist):
    names = zipfile.ZipFile(wheel).namelist()
    assert any(re.fullmatch(r"transducer_toolkit/_C\..*\.(so|pyd)", name) for name in names)
    for path in [*(ROOT / "conf").rglob("*.yaml")]:
        assert f"transducer_toolkit/conf/{path.relative_to(ROOT / 'conf')}" in names
    for path in (ROOT / "transducer_toolkit").rglob("*"):
        if path.is_file() and path.suffix in (".py", ".pyi", ".typed", ".yaml", ".json"):
            assert str(path.relative_to(ROOT)) in names
    assert {"transducer_toolkit/py.typed", "transducer_toolkit/_C.pyi"} <= set(names)
    assert not [name for name in names if name.startswith(("tests", "csrc"))]
    with tarfile.open(sdist) as archive:
        shipped = {Path(*Path(name).parts[1:]) for name in archive.getnames()}
    for path in (ROOT / "csrc").rglob("*.*"):
        assert path.relative_to(ROOT) in shipped


def test_wheel_works_from_another_folder(wheel, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'ditable' not in str(f)];"
        f"sys.path.insert(0, {str(site)!r});"
        "import torch, transducer_toolkit as tt; assert 'site' in tt.__file__;"
        "one = torch.tensor([1]);"
        "print(tt.__version__, tt.build_info()['cuda_runtime'],"
        " tt.transducer_loss(torch.zeros(1, 1, 2, 4), one[None], one, one, 0).item())"
    )
    result = run(sys.executable, "-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stdout
    version, cuda_runtime, loss = result.stdout.split()
    assert version == transducer_toolkit.__version__
    assert cuda_runtime == "0"
    assert float(loss) == pytest.approx(2.772588722)


def test_a_second_build_in_the_same_tree(unpacked, wheel, tmp_path):
    """pip's build environment, and the ninja in it, is another one each time."""
    for source in (unpacked / "csrc").glob("*.cpp"):
        source.write_text("")  # compiles in no time
    result = build_wheel(unpacked, tmp_path)
    assert result.returncode == 0, result.stdout
    assert len(list(tmp_path.glob("*.whl"))) == 1


def test_cuda_on_without_nvcc_is_an_error(source_tree, tmp_path):
    result = run(
        TOOLS / "cmake", "-S", source_tree, "-B", tmp_path / "build",
        "-DTRANSDUCER_CUDA=ON",
        cwd=tmp_path,
        CUDACXX=str(tmp_path / "no_such_nvcc"),
    )  # fmt: skip
    assert result.returncode != 0
    assert "TRANSDUCER_CUDA=ON, but no working nvcc was found" in result.stdout


def test_cuda_auto_without_nvcc_builds_for_the_cpu(source_tree, tmp_path):
    result = run(
        TOOLS / "cmake", "-S", source_tree, "-B", tmp_path / "build",
        cwd=tmp_path,
        CUDACXX=str(tmp_path / "no_such_nvcc"),
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    assert "building for the CPU only" in result.stdout


@pytest.fixture(scope="module")
def developer_build(source_tree, tmp_path_factory):
    """cmake as the README has it, no Python involved."""
    folder = tmp_path_factory.mktemp("developer")
    build, plain = folder / "build", folder / "source"
    build.mkdir()
    shutil.copytree(source_tree, plain)  # CMake's own makefiles take no quote in a path
    for command in (
        (TOOLS / "cmake", "-S", plain, "-B", build, "-DTRANSDUCER_TESTS=ON",
         "-DTRANSDUCER_CUDA=OFF"),
        (TOOLS / "cmake", "--build", build, "--parallel", "2"),
    ):  # fmt: skip
        result = run(*command, cwd=build)
        assert result.returncode == 0, result.stdout
        assert "warning:" not in result.stdout
    return build


def test_native_stages_with_ctest(developer_build):
    result = run(
        TOOLS / "ctest", "--test-dir", developer_build, "--output-on-failure", cwd=developer_build
    )
    assert result.returncode == 0, result.stdout
    assert re.search(r"100% tests passed.* out of [1-9]\d*", result.stdout), result.stdout


def test_instruction_counts(developer_build):
    """No stage runs more than 5 % more instructions than recorded."""
    from benchmarks.instructions import RECORD, compare, count, this_platform

    record = json.loads(RECORD.read_text())
    if shutil.which("valgrind") is None or record["platform"] != this_platform():
        pytest.skip(f"needs valgrind and the platform of the record, {record['platform']}")
    lines = compare(count(developer_build / "stage_driver"), record["instructions"])
    assert len(lines) == 11 and not [line for line in lines if line.startswith("!")], lines
