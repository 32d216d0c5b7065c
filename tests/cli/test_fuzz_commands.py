# SPDX-License-Identifier: Apache-2.0
"""A short run of the fuzz of the commands, and whether it would notice."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.fork_server import python
from tests.soak import fuzz_commands
from tests.soak.fuzz_commands import COMMANDS, Case, finding_of, make_case, message_of
from tests.soak.spoilt_files import World

ROOT = Path(__file__).parents[2]
NUM_CASES = 60


@pytest.fixture
def world(trained, tones):
    return World(trained / "checkpoints" / "best.ckpt", tones)


def test_spoilt_files_and_options(world):
    command = [python(), "-m", "tests.soak.fuzz_commands", f"--cases={NUM_CASES}"]
    command += [f"--checkpoint={world.checkpoint}", f"--tones={world.tones}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{NUM_CASES} cases in" in done.stdout and ": 0 findings" in done.stdout


def test_every_command_is_spoilt_in_files_and_options(world, tmp_path):
    for command in COMMANDS:
        spoilt = set()
        for seed in range(60):
            folder = tmp_path / f"{command}-{seed}"
            folder.mkdir()
            case = make_case(seed, [command], world, folder)
            assert case.command == command and 1 <= len(case.spoilt) <= 2
            spoilt |= set(case.spoilt)
        options = fuzz_commands.OPTIONS[command].keys()
        assert spoilt & options and spoilt - options


@pytest.mark.parametrize(
    ("status", "output", "kind"),
    [
        (0, "done", "accepts what is not valid"),
        (None, "", "a hang"),
        (-11, "", "a crash, SIGSEGV"),
        (1, "transducer-average: cannot", "a message that names nothing of it"),
        (1, "transducer-average: no checkpoint at spoilt.ckpt", None),
        (1, "Traceback (most recent call last):\n  x\nKeyError: 'spoilt.ckpt'", "a traceback"),
    ],
)
def test_what_is_a_finding(monkeypatch, tmp_path, status, output, kind):
    case = Case("average", names={"spoilt.ckpt"}, must_fail=True)
    monkeypatch.setattr(fuzz_commands, "run", lambda case, folder: (status, output))
    found = finding_of(case, tmp_path)
    assert (found and found[0]) == kind
    (tmp_path / "canary").touch()
    assert finding_of(case, tmp_path)[0] == "code of a checkpoint was run"


def test_errors_of_hydra_commands(monkeypatch, tmp_path):
    case = Case("train", names={"optimizer.lr"}, must_fail=True)
    start = "Error executing job with overrides: ['optimizer.lr=x']\n"
    trace = 'Traceback (most recent call last):\n  File "train.py", line 1, in train\n'
    for error, kind in (
        ("ValueError: optimizer.lr must be a number", None),
        ("hydra.errors.InstantiationException: Error in call to optimizer.lr", None),
        ("KeyError: 'optimizer.lr'", "an error of another kind"),
        ("ValueError: must be a number", "a message that names nothing of it"),
    ):
        output = start + trace + error + "\n"
        monkeypatch.setattr(fuzz_commands, "run", lambda case, folder, out=output: (1, out))
        found = finding_of(case, tmp_path)
        assert (found and found[0]) == kind, error
    assert "optimizer.lr" not in message_of(start + trace)
