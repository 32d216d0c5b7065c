# SPDX-License-Identifier: Apache-2.0
"""What pyproject.toml asks of pip, and what the pages say of it."""

import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from transducer_toolkit.optional import OLDEST_TRANSFORMERS

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
INSTALLATION = (ROOT / "docs" / "installation.md").read_text()
# GHSA-w37p-236h-pfx3: uploads by a thief. https://github.com/advisories/GHSA-w37p-236h-pfx3
STOLEN = {"lightning": ["2.6.2", "2.6.3"]}


def requirements(extra):
    return [Requirement(text) for text in EXTRAS[extra]]


def test_known_bad_releases_are_excluded():
    seen = 0
    for extra in EXTRAS:
        for requirement in requirements(extra):
            for version in STOLEN.get(requirement.name, []):
                seen += 1
                assert version not in requirement.specifier
    assert seen == 2
    (lightning,) = (r for r in requirements("train") if r.name == "lightning")
    assert "2.6.1" in lightning.specifier and "2.6.6" in lightning.specifier


def test_torch_is_pinned_nowhere():
    for extra in EXTRAS:
        for requirement in requirements(extra):
            if requirement.name in ("torch", "torchaudio"):
                assert str(requirement.specifier) == ">=2.11", extra
    assert "torchaudio" not in {r.name for r in requirements("train")}


def test_the_oldest_transformers_is_that_of_the_extras():
    found = [r for extra in ("transformers", "test") for r in requirements(extra)]
    bounds = {str(r.specifier) for r in found if r.name == "transformers"}
    assert bounds == {f"<6,>={OLDEST_TRANSFORMERS}"}


def test_the_core_needs_torch_and_numpy_only():
    core = {Requirement(text).name: Requirement(text).specifier for text in PROJECT["dependencies"]}
    assert set(core) == {"torch", "numpy"}
    assert core["torch"] == SpecifierSet(">=2.4")


def test_all_has_every_extra_but_the_developers():
    (own,) = (r for r in requirements("all") if r.name == PROJECT["name"])
    assert own.extras == set(EXTRAS) - {"all", "lint", "docs", "tensorflow"}  # a large one


def test_the_installation_page_lists_the_extras():
    (paragraph,) = re.findall(
        r"\*\*Which extras are there\?\*\*(.*?)\n\n", INSTALLATION, flags=re.S
    )
    assert sorted(re.findall(r"`(\w+)`\s\(", paragraph)) == sorted(EXTRAS)


@pytest.mark.parametrize("extra", ["lint", "docs"])
def test_make_installs_what_the_extra_names(extra):
    (recipe,) = re.findall(
        rf"^{extra}: .*\n\t.* install --quiet (.*)$", (ROOT / "Makefile").read_text(), flags=re.M
    )
    assert re.findall(r"'([^']+)'", recipe) == EXTRAS[extra]


def test_every_extra_that_is_named_exists():
    named = set()
    places = [*ROOT.glob("docs/*.md"), *ROOT.rglob("recipes/*/README.md"), ROOT / "README.md"]
    places += [*(ROOT / "transducer_toolkit").rglob("*.py"), *(ROOT / "conf").rglob("*.yaml")]
    places += [ROOT / "Makefile", ROOT / "benchmarks" / "README.md"]
    for path in places:
        text = path.read_text()
        for found in re.findall(r"(?:\.|transducer_toolkit)\[([a-z]+(?:,[a-z]+)*)\]", text):
            named |= set(found.split(","))
        named |= set(re.findall(r"[Ee]xtra `(\w+)`", text))
    assert named and named <= set(EXTRAS)
    assert {"train", "export", "all", "sweep"} <= named


def test_versions_of_python_are_said_once():
    classified = {
        c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)
    }
    lowest, highest = re.search(
        r"versions of Python\?\*\* (3\.\d+) to (3\.\d+)", INSTALLATION
    ).groups()
    minors = range(int(lowest.split(".")[1]), int(highest.split(".")[1]) + 1)
    assert classified == {f"3.{minor}" for minor in minors}
    assert PROJECT["requires-python"] == f">={lowest}"
