# SPDX-License-Identifier: Apache-2.0
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from tests.full_disk import full_disk
from transducer_toolkit.data.cache import build_once, default_cache_dir, fingerprint


def test_built_once(tmp_path):
    calls = []

    def build(folder):
        calls.append(folder)
        (folder / "a").write_text("1")

    for _ in range(2):
        assert build_once(tmp_path / "x" / "corpus", build) == tmp_path / "x" / "corpus"
    assert len(calls) == 1
    assert (tmp_path / "x" / "corpus" / "a").read_text() == "1"


def test_a_failure_leaves_nothing_and_can_be_repeated(tmp_path):
    def fail(folder):
        (folder / "a").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        build_once(tmp_path / "corpus", fail)
    assert not any(path.is_dir() for path in tmp_path.iterdir())
    build_once(tmp_path / "corpus", lambda folder: (folder / "a").write_text("whole"))
    assert (tmp_path / "corpus" / "a").read_text() == "whole"


def _slow_build(folder: Path) -> None:
    (folder / str(os.getpid())).write_text("")
    time.sleep(0.5)


def _build(folder: Path) -> None:
    build_once(folder, _slow_build)


def test_two_processes_build_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_build, args=(tmp_path / "corpus",)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(list((tmp_path / "corpus").iterdir())) == 1


def test_a_killed_process_blocks_nobody(tmp_path):
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=build_once, args=(tmp_path / "corpus", _hang))
    process.start()
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".corpus.partial-*/half")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (tmp_path / "corpus").exists()
    build_once(tmp_path / "corpus", lambda folder: (folder / "whole").touch())
    assert [path.name for path in (tmp_path / "corpus").iterdir()] == ["whole"]
    assert not list(tmp_path.glob(".corpus.partial-*"))


def _hang(folder: Path) -> None:
    (folder / "half").touch()
    time.sleep(600)


def test_default_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "transducer_toolkit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "transducer_toolkit"


def test_fingerprint_sees_every_value():
    keys = [{"a": 1}, {"a": 2}, {"b": 1}, {"a": "1"}, [{"a": 1}], {"a": 1.5}]
    assert len({fingerprint(key) for key in keys}) == len(keys)


def test_a_full_disk_leaves_nothing_and_can_be_repeated(tmp_path):
    def build(folder):
        for name in ("a", "b"):
            (folder / name).write_bytes(bytes(10**5))

    with full_disk(), pytest.raises(OSError, match="File too large"):
        build_once(tmp_path / "corpus", build)
    assert not any(path.is_dir() for path in tmp_path.iterdir())
    assert len(list(build_once(tmp_path / "corpus", build).iterdir())) == 2
