# SPDX-License-Identifier: Apache-2.0
"""No module imports, through others, a module that imports it; imports in functions count too."""

import ast
import graphlib
from pathlib import Path

import pytest

import transducer_toolkit

PACKAGE_DIR = Path(transducer_toolkit.__file__).parent


def modules_of(folder):
    """Path of each module of a package, by its dotted name."""
    found = {}
    for path in folder.rglob("*.py"):
        parts = (folder.name, *path.relative_to(folder).with_suffix("").parts)
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imports_of(path, modules):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # A name is a module, or something in one. The compiled module is neither.
            names = [f"{node.module}.{alias.name}" for alias in node.names if alias.name != "_C"]
            names = [name if name in modules else name.rpartition(".")[0] for name in names]
        else:
            continue
        yield from (name for name in names if name in modules)


def sorted_modules(folder):
    modules = modules_of(folder)
    graph = {name: {*imports_of(path, modules)} - {name} for name, path in modules.items()}
    return list(graphlib.TopologicalSorter(graph).static_order())


def test_there_are_none():
    modules = sorted_modules(PACKAGE_DIR)
    first, last = "transducer_toolkit.ops.native", "transducer_toolkit.cli.train"
    assert modules.index(first) < modules.index(last) and len(modules) > 100


def test_one_would_be_found(tmp_path):
    for name, text in {
        "__init__": "",
        "a": "from pack import b",
        "b": "def late():\n    from pack.c import value",
        "c": "import pack.a\nvalue = 1",
    }.items():
        (tmp_path / "pack").mkdir(exist_ok=True)
        (tmp_path / "pack" / f"{name}.py").write_text(text)
    with pytest.raises(graphlib.CycleError) as error:
        sorted_modules(tmp_path / "pack")
    assert set(error.value.args[1]) == {"pack.a", "pack.b", "pack.c"}
