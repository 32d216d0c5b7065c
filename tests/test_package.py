# SPDX-License-Identifier: Apache-2.0
"""The package as a whole: documentation examples, what imports what, what it says of itself."""

import ast
import doctest
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import transducer_toolkit
from tests.conftest import LONG

PACKAGE_DIR = Path(transducer_toolkit.__file__).parent
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages([str(PACKAGE_DIR)], "transducer_toolkit.")
    if not module.name.endswith(("__main__", "._C"))
)


@pytest.mark.parametrize("name", MODULES)
def test_documentation_examples(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module, extraglobs={"torch": torch}, optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


def test_long_files_are_there():
    assert all((Path(__file__).parent / name).is_file() for name in LONG)


def test_public_functions_have_examples():
    for name in transducer_toolkit.__all__:
        value = getattr(transducer_toolkit, name)
        assert name == "__version__" or ">>>" in (value.__doc__ or ""), name


# cli -> {training, export, inference} -> {decoding, data} -> {losses, modules} -> ops -> _C
LAYERS = {
    "cli": 6,
    "export": 5,
    "training": 5,
    "inference": 4,
    "compat": 4,
    "data": 3,
    "decoding": 3,
}
LAYERS |= {"losses": 2, "modules": 2, "ops": 1, "_C": 0, "_version": 0, "conf": 0}
FORBIDDEN = {("losses", "modules"), ("modules", "losses")}


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_run_one_way():
    checked = 0
    for path in PACKAGE_DIR.rglob("*.py"):
        parts = path.relative_to(PACKAGE_DIR).with_suffix("").parts
        if parts[0] in ("__init__", "__main__"):
            continue
        for name in imports_of(path):
            target = name.split(".")[1:2] if name.startswith("transducer_toolkit.") else []
            if not target or target[0] not in LAYERS:
                continue
            checked += 1
            assert LAYERS[parts[0]] >= LAYERS[target[0]], f"{path} imports {name}"
            assert (parts[0], target[0]) not in FORBIDDEN, f"{path} imports {name}"
            assert target[0] != "_C" or parts == ("ops", "native"), f"{path} imports {name}"
    assert checked > 20


def test_import_is_light():
    heavy = ["lightning", "hydra", "torchaudio", "lhotse", "soundfile", "matplotlib", "jiwer"]
    code = f"import sys, transducer_toolkit; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


def test_says_what_it_is():
    result = subprocess.run(
        [sys.executable, "-m", "transducer_toolkit"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    for word in (transducer_toolkit.__version__, "compiler", "CPU path", "CUDA", "torch"):
        assert word in result.stdout
    info = transducer_toolkit.build_info()
    assert info["version"] == transducer_toolkit.__version__
    if info["cuda_runtime"]:
        assert "-real" in info["cuda_architectures"] and info["cuda_driver_floor"] >= 525
        assert f"R{info['cuda_driver_floor']}" in result.stdout


def test_missing_binary_is_explained(tmp_path):
    copy = tmp_path / "transducer_toolkit"
    copy.mkdir()
    for folder in (".", "ops", "losses"):
        (copy / folder).mkdir(exist_ok=True)
        for path in (PACKAGE_DIR / folder).glob("*.py"):
            (copy / folder / path.name).write_text(path.read_text())

    # An editable install would find the real binary for the copied package: take its hook away.
    code = """
import pathlib, sys
sys.meta_path = [f for f in sys.meta_path if 'ditable' not in str(f)]
for _ in range(2):
    try:
        import transducer_toolkit.ops.native
    except ImportError as error:
        print(str(error).replace("\\n", " "))
    pathlib.Path("CMakeLists.txt").write_text("")
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    missing, hidden = result.stdout.splitlines()
    assert "missing or was built for another Python" in missing
    assert "hides an installed package" in hidden and "hides" not in missing
