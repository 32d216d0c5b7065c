# SPDX-License-Identifier: Apache-2.0
"""Two processes, and two nodes of one process, train as one process does."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch

from tests.cli.conftest import with_pictures
from tests.fork_server import python
from tests.training.recorder import recorded

ROOT = Path(__file__).parents[2]
EXPECTED_FILES = [
    "checkpoints/best.ckpt",
    "checkpoints/last.ckpt",
    "pictures/learning_curves.png",
    "pictures/utterance.png",
    "metrics/metrics.csv",
    "results.json",
    "train.log",
    ".hydra/config.yaml",
]
STEPS = 26
WEIGHTS = "+callbacks.record._target_=tests.training.ddp.RecordWeights"


@pytest.fixture(scope="module")
def options(train_overrides):
    return [
        *with_pictures(train_overrides),
        "trainer.max_epochs=-1",
        f"+trainer.max_steps={STEPS}",
        "+trainer.check_val_every_n_epoch=6",
        "+trainer.precision=64-true",
        "loss.dropped_mass=0",
        "model.encoder.dropout=0",
        "data.max_utterances=4",
        "data.spec_augment=null",
        WEIGHTS,
    ]


def environment(**more):
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        **more,
    }


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def start(folder, *command, **variables):
    return subprocess.Popen(
        [python(), "-m", *map(str, command)],
        cwd=folder,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def two_processes(folder, options):
    """As Lightning starts them."""
    train = "transducer_toolkit.cli.train"
    return [start(folder, train, *options, "trainer=ddp", "trainer.devices=2")]


def two_nodes(folder, options):
    """As torchrun starts them, one process a node."""
    port = free_port()
    torchrun = ["torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    torchrun += ["--master-addr=127.0.0.1", f"--master-port={port}"]
    train = ["-m", "transducer_toolkit.cli.train", *options]
    train += ["trainer=ddp", "trainer.devices=1", "trainer.num_nodes=2"]
    return [start(folder, *torchrun, f"--node-rank={node}", *train) for node in (0, 1)]


def finish(processes, timeout_s=600):
    try:
        for process in processes:
            out, _ = process.communicate(timeout=timeout_s)
            assert process.returncode == 0, out
    finally:
        for process in processes:
            if process.poll() is None:  # its group: the processes it has started too
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, console, options):
    from transducer_toolkit.cli.train import main

    folder = tmp_path_factory.mktemp("one")
    data = "data._target_=tests.training.ddp.JoinedRanksDataModule"
    console(main, folder, *options, data, "test=false", f"+callbacks.record.path={folder}/one")
    return torch.load(folder / "one.pt"), json.loads((folder / "one.0.json").read_text())


@pytest.mark.parametrize("launch", [two_processes, two_nodes])
def test_the_same_training_as_one_process(tmp_path, options, one_process, launch):
    expected, expected_batches = one_process
    finish(launch(tmp_path, [*options, f"+callbacks.record.path={tmp_path}/two"]))
    batches = [json.loads((tmp_path / f"two.{rank}.json").read_text()) for rank in (0, 1)]
    joined = [first + second for first, second in zip(*batches, strict=True)]
    assert len(joined) == STEPS and joined == expected_batches
    found = torch.load(tmp_path / "two.pt")
    for name, gradient in expected["gradients"].items():
        # Of the first step, at equal weights.
        torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-6, atol=1e-12)
    for name, weight in expected["weights"].items():
        assert weight.dtype == torch.float64
        torch.testing.assert_close(found["weights"][name], weight, rtol=1e-9, atol=1e-9)
    # One run folder, of both, with everything.
    (run_dir,) = (tmp_path / "outputs" / "transducer").iterdir()
    for name in EXPECTED_FILES:
        assert (run_dir / name).stat().st_size > 0, name
    assert json.loads((run_dir / "results.json").read_text())["optimizer_steps"] == STEPS
    # Every test utterance once, decoded by one process or the other.
    ids = [row.split("\t")[0] for row in (run_dir / "transcripts" / "tones.tsv").open()]
    assert ids == ["id", *(f"test-{index}" for index in range(6))]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_group_within_a_minute(tmp_path, train_overrides, rank):
    kill = ["+callbacks.record._target_=tests.training.recorder.RecordBatches"]
    kill += [f"+callbacks.record.path={tmp_path}/batches", "+callbacks.record.kill_after=3"]
    endless = ["trainer.max_epochs=100000", f"+callbacks.record.rank={rank}", *kill]
    (process,) = two_processes(tmp_path, [*train_overrides, *endless])
    try:
        deadline = time.monotonic() + 300  # until torch is imported
        while not (tmp_path / f"batches.{rank}").exists() or (
            len(recorded(tmp_path / "batches", rank)) < 3
        ):
            assert time.monotonic() < deadline and process.poll() in (None, -signal.SIGKILL)
            time.sleep(0.05)
        out, _ = process.communicate(timeout=60)  # until all of the group have ended
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0, out
    # Ours, or Lightning's, whose launcher may be the first to notice and ends the others.
    assert re.search(r"process of this training has ended|Child process .* terminated", out), out


def test_processes_of_torchrun_without_devices_are_refused(tmp_path, train_overrides, tones):
    """Each would train by itself, in the same run folder."""
    command = [python(), "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--standalone", "-m", "transducer_toolkit.cli.train"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *train_overrides], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    message = "transducer-train: torchrun started 2 processes, but trainer.devices and "
    assert message in done.stderr and "add trainer=ddp trainer.devices=N" in done.stderr
    assert not list(tmp_path.rglob("*.ckpt"))
