# SPDX-License-Identifier: Apache-2.0
"""transducer_toolkit/_C.pyi names what the compiled module has, and nothing else."""

import ast
import re
from pathlib import Path

import pytest

import transducer_toolkit
from tests.backends import emulated_module
from transducer_toolkit.ops import native

STUB = ast.parse((Path(transducer_toolkit.__file__).parent / "_C.pyi").read_text())
CLASSES = {node.name: node for node in STUB.body if isinstance(node, ast.ClassDef)}
MODULES = ("cpu", "cuda")
STRUCTS = [
    name
    for name, value in vars(native.extension).items()
    if isinstance(value, type) and hasattr(value, "fields")
]
ENUMS = [name for name, value in vars(native.extension).items() if hasattr(value, "__members__")]


def public(names):
    return sorted(name for name in names if not name.startswith("_"))


def functions(body):
    """{name: names of all arguments but self} of the functions of a class or of the stub."""
    found = {}
    for node in body:
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.args, *node.args.kwonlyargs]
            found[node.name] = [a.arg for a in arguments if a.arg != "self"]
    return found


def bound_arguments(function):
    """Names of the arguments in the signature that pybind11 writes into the docstring."""
    signature = function.__doc__.splitlines()[0]
    assert signature.startswith(f"{function.__name__}(")
    return re.findall(r"[(,] ?(\w+): ", signature)


def test_names_of_the_module():
    constants = [node.target.id for node in STUB.body if isinstance(node, ast.AnnAssign)]
    names = [*CLASSES, *functions(STUB.body), *constants]
    assert public(names) == public(vars(native.extension))
    assert len(STRUCTS) == 30 and sorted(ENUMS) == ["Activation", "DType", "Topology"]


@pytest.mark.parametrize("name", STRUCTS)
def test_fields_of_a_struct(name):
    arguments = functions(CLASSES[name].body)["__init__"]
    assert tuple(arguments) == getattr(native.extension, name).fields


@pytest.mark.parametrize("name", ENUMS)
def test_members_of_an_enumeration(name):
    declared = [node.target.id for node in CLASSES[name].body if isinstance(node, ast.AnnAssign)]
    assert public(declared) == sorted(getattr(native.extension, name).__members__)


@pytest.mark.parametrize("name", MODULES)
def test_functions_of_a_submodule(name):
    """The CUDA stages are those of the emulated module, which every build has."""
    bound = dict(vars(getattr(native.extension, name)))
    if name == "cuda":
        bound |= vars(emulated_module().cuda)
    bound = {key: value for key, value in bound.items() if not key.startswith("_")}
    declared = functions(CLASSES[name].body)
    assert sorted(declared) == sorted(bound)
    for key, function in bound.items():
        assert declared[key] == bound_arguments(function), key
        assert len(declared[key]) <= 8


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"blank": 1}, "label: expected a keyword argument, got none"),
        ({"blank": 1, "label": 2, "loss": 3}, "expected no keyword arguments but the fields, got"),
        ({"blank": 1, "label": "x"}, "label: expected a value of the field's type, got"),
        ({"blank": -1, "label": 2}, "blank: expected a value of the field's type, got"),
    ],
)
def test_a_struct_takes_its_fields_alone(fields, message):
    with pytest.raises(TypeError, match=message):
        native.extension.LatticeScores(**fields)
