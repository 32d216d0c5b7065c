# SPDX-License-Identifier: Apache-2.0
"""A short run of the fuzz of files, and whether it would notice."""

import os
from pathlib import Path

import pytest

from tests.soak import fuzz_files
from tests.soak.fuzz_files import FOLDERS, KINDS, finding_of, make_case
from tests.soak.hostile_models import make_models
from tests.soak.hostile_texts import Case, read_reference
from tests.soak.spoilt_files import CANARY


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_files(kind, models, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    hows = set()
    for seed in range(12 if kind in FOLDERS else 40):
        folder = tmp_path / str(seed)
        folder.mkdir()
        monkeypatch.chdir(folder)
        case = make_case(seed, [kind], models, folder)
        hows.add(case.how)
        assert finding_of(case) is None, f"{kind} {case.how}, seed {seed}"
    assert len(hows) > 5


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ValueError("a.txt, line 3: expected a number"), None),
        (FileNotFoundError("no ARPA file at a.txt"), None),
        (ValueError("expected a number"), "a message that does not name the file"),
        (ValueError("a.txt: expected a number"), "a message that does not name the line"),
        (ValueError("a.txt, line 3: expected\na number"), "a long message"),
        (ValueError("a.txt, line 3: expected " + "x" * 1000), "a long message"),
        (KeyError("a.txt, line 3"), "another error"),
        (RecursionError("a.txt, line 3"), "another error"),
        (UnicodeDecodeError("utf-8", b"a.txt, line 3", 0, 1, "x"), "another error"),
        (ValueError("a.txt, line 3: MemoryError"), "fills the memory"),
    ],
)
def test_what_is_a_finding(error, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def read():
        raise error

    found = finding_of(Case("arpa", "x", read, str, True, ["a.txt"], has_lines=True))
    assert (found and found[0]) == kind
    if kind is None:
        found = finding_of(Case("arpa", "x", read, str, False, ["a.txt"], has_lines=True))
        assert found[0] == "refuses what is valid"


def test_findings_without_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert finding_of(Case("arpa", "x", str, lambda _: None, None)) is None
    assert (
        finding_of(Case("arpa", "x", str, lambda _: None, True))[0] == "accepts what is not valid"
    )
    assert finding_of(Case("arpa", "x", str, lambda _: "7", None)) == ("a wrong result", "7")
    touch = Case("arpa", "x", (tmp_path / CANARY).touch, lambda _: None, None)
    assert finding_of(touch)[0] == "code of the file was run"
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "a").touch()
    watched = []
    monkeypatch.setattr(fuzz_files, "_events", watched)
    fuzz_files._watch("open", (str(tmp_path / "outside" / "a"), "r", 0))
    fuzz_files._watch("open", (str(tmp_path / "a"), "r", 0))
    fuzz_files._watch("os.system", ("true",))
    assert len(watched) == 2


def test_a_crash_and_a_hang_are_findings(tmp_path, monkeypatch):
    deeds = [
        lambda: os._exit(3),
        lambda: os.kill(os.getpid(), 9),
        lambda: os.read(os.pipe()[0], 1),
    ]
    cases = [Case("arpa", "x", deed, lambda _: None, None) for deed in deeds]
    cases.append(Case("arpa", "x", str, lambda _: None, False))
    monkeypatch.setattr(fuzz_files, "TIMEOUT_S", 2)
    monkeypatch.setattr(fuzz_files, "make_case", lambda seed, *_: cases[seed])
    found = [found and found[0] for _, _, found in fuzz_files.fuzz(range(4), ["arpa"], None)]
    assert found[:2] == ["a crash", None]  # of the same name: told once
    assert found[2:] == ["a hang", None]


def test_the_reference_of_language_models():
    content = b"\\data\\\nngram 1=2\nngram 2=1\n\\1-grams:\n-1 a -0.5\n-2 b\n\\2-grams:\n-0.1 a b\n"
    content += b"\\end\\\n"
    assert read_reference(content) == {("a",): (-1, -0.5), ("b",): (-2, 0), ("a", "b"): (-0.1, 0)}
    for wrong in (b"1=3", b"-1 a -0.5 3", b"nan a", b"-1 b", b"", b"\\end\\ x"):
        with pytest.raises(ValueError):
            read_reference(content.replace(b"1=2" if b"=" in wrong else b"-1 a -0.5", wrong))


def test_every_kind_has_right_files_too(models, tmp_path):
    for kind in KINDS:
        if kind == "checkpoint":
            continue
        must_fail = set()
        for seed in range(40 if kind not in FOLDERS else 25):
            folder = Path(tmp_path, f"{kind}-{seed}")
            folder.mkdir()
            must_fail.add(make_case(seed, [kind], models, folder).must_fail)
        assert {True, False} <= must_fail, kind
