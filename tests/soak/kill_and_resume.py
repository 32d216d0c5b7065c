# SPDX-License-Identifier: Apache-2.0
"""Small trainings that are killed at random moments, each resumed by the same command.

    python -m tests.soak.kill_and_resume --kills 20

After each SIGKILL all checkpoints must load; each training must end with the weights, bit for bit,
and the batches of one that was never killed. Every other training validates within its epochs.
Then the disk fills up, and one process of a group is killed: the others must end within a minute.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from tests.cli.conftest import write_tones
from tests.training.recorder import recorded
from transducer_toolkit.training.checkpoints import AtomicCheckpointIO

ROOT = Path(__file__).parents[2]
EPOCHS, BATCHES = 4, 4
OPTIONS = [
    "~experiment",
    "data=manifest",
    "data.max_utterances=8",
    "model.encoder.conv_channels=4",
    "model.encoder.hidden_dim=16",
    "model.predictor.embedding_dim=8",
    "model.joiner.joiner_dim=16",
    "trainer.accelerator=cpu",
    f"trainer.max_epochs={EPOCHS}",
    "num_threads=1",
    "name=soak",
    "test=false",
    "~callbacks.progress_bar",
    "callbacks.last_checkpoint.every_n_steps=1",
    "+callbacks.record._target_=tests.training.recorder.RecordBatches",
]


def start(
    folder: Path, overrides: list[str], *, max_file_bytes: int | None = None, fresh: bool = False
) -> int:
    """Start a training, its output in ``folder/output``; returns the process id.

    A fork of this process, which has imported everything, or a fresh one: what starts further
    processes by its command line needs its own.
    """
    import transducer_toolkit.cli.train
    import transducer_toolkit.training.lightning_module

    if pid := os.fork():
        return pid
    status = 1
    with contextlib.suppress(BaseException):
        os.setsid()
        os.chdir(folder)
        output = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ["TRANSDUCER_TOOLKIT_RUN_ID"] = "run"
        os.environ["PYTHONPATH"] = str(ROOT)
        overrides = [*overrides, f"+callbacks.record.path={folder}/batches"]
        if fresh:
            command = [sys.executable, "-m", "transducer_toolkit.cli.train", *overrides]
            os.execv(sys.executable, command)
        sys.argv = ["transducer-train", *overrides]
        if max_file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
        try:
            transducer_toolkit.cli.train.main()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
    sys.stdout.flush()
    os._exit(status)


def wait(pid: int, timeout_s: float) -> int | None:
    """Exit status of a child, negative for a signal; None if it still runs."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    return None


def kill(pid: int) -> None:
    """End a training and what it has started."""
    os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def final(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / "outputs/soak/run/checkpoints/last.ckpt"
    return AtomicCheckpointIO().load_checkpoint(path, weights_only=True)["state_dict"]


def check(condition: bool, what: str, folder: Path) -> None:
    if not condition:
        output = (folder / "output").read_text()[-3000:]
        raise SystemExit(f"FAILED: {what}, in {folder}\n{output}")


def whole(work: Path, overrides: list[str], name: str) -> tuple[Path, float]:
    """A training that is never killed, and how long it takes."""
    folder = work / name
    folder.mkdir()
    began = time.monotonic()
    status = wait(start(folder, overrides), 3600)
    check(status == 0, f"exit status {status} of a training that was never killed", folder)
    return folder, time.monotonic() - began


def killed(work: Path, overrides: list[str], reference: Path, duration_s: float, name: str,
           choices: random.Random, num_kills: int) -> tuple[int, int]:  # fmt: skip
    """One training, killed up to ``num_kills`` times; kills and checkpoints looked at."""
    folder = work / name
    folder.mkdir()
    kills = checkpoints = 0
    while True:
        pid = start(folder, overrides)
        delay_s = choices.uniform(0.0, duration_s) if kills < num_kills else 3600.0
        status = wait(pid, delay_s)
        if status is not None:
            break
        kill(pid)
        kills += 1
        for path in (folder / "outputs").rglob("*.ckpt"):
            AtomicCheckpointIO().load_checkpoint(path, weights_only=True)
            checkpoints += 1
    check(status == 0, f"exit status {status} after {kills} kills", folder)
    expected, found = final(reference), final(folder)
    same = all(torch.equal(found[key], expected[key]) for key in expected)
    check(same, f"other weights after {kills} kills", folder)
    # Each process goes on at a batch that was done before, or at the next.
    rows, position = recorded(folder / "batches"), -1
    order = recorded(reference / "batches")
    for row in rows:
        index = order.index(row)
        check(index <= position + 1, f"batch {row[:2]} comes too early", folder)
        position = index
    check(position == EPOCHS * BATCHES - 1, "the last batch is missing", folder)
    return kills, checkpoints


def disk_full(work: Path, overrides: list[str]) -> None:
    folder = work / "disk"
    folder.mkdir()
    status = wait(start(folder, overrides, max_file_bytes=20_000), 3600)
    text = (folder / "output").read_text()
    check(status == 1 and "MiB not written" in text, f"no word of a full disk ({status})", folder)
    check(not list((folder / "outputs").rglob("*.ckpt")), "a part of a checkpoint", folder)
    status = wait(start(folder, overrides), 3600)
    check(status == 0, f"exit status {status} once there is room", folder)


def rank_killed(work: Path, overrides: list[str]) -> float:
    """Seconds until a group of two ends, one of which is killed."""
    folder = work / "rank"
    folder.mkdir()
    more = ["trainer=ddp", "trainer.devices=2", "trainer.max_epochs=100000"]
    more += ["+callbacks.record.kill_after=3", "+callbacks.record.rank=1"]
    pid = start(folder, overrides + more, fresh=True)
    path = Path(f"{folder}/batches.1")
    while not (path.exists() and len(recorded(folder / "batches", 1)) >= 3):
        check(wait(pid, 0.1) is None, "the group ended before the kill", folder)
    began = time.monotonic()
    status = wait(pid, 600)
    elapsed_s = time.monotonic() - began
    check(status not in (0, None) and elapsed_s < 60, f"{status} after {elapsed_s:.0f} s", folder)
    text = (folder / "output").read_text()
    # Ours, or Lightning's, whose launcher may be the first to notice.
    named = re.search(r"process of this training has ended|Child process .* terminated", text)
    check(named is not None, "no message that says so", folder)
    return elapsed_s


def group_stopped(work: Path, overrides: list[str]) -> None:
    """SIGTERM to one process of a group: all save the same step and end, and all go on."""
    folder = work / "group"
    folder.mkdir()
    more = [*overrides, "trainer=ddp", "trainer.devices=2"]
    stop = ["+callbacks.record.kill_after=3", "+callbacks.record.signal_name=SIGTERM"]
    for rank, done in ((1, 3), (0, 6)):
        pid = start(folder, [*more, *stop, f"+callbacks.record.rank={rank}"], fresh=True)
        status = wait(pid, 600)
        check(status == 143, f"exit status {status} after SIGTERM to process {rank}", folder)
        rows = [recorded(folder / "batches", rank) for rank in (0, 1)]
        check([len(part) for part in rows] == [done, done], f"steps {rows}", folder)
    check(wait(start(folder, more, fresh=True), 600) == 0, "the group did not go on", folder)
    steps = [row[:2] for row in recorded(folder / "batches")]
    expected = [[epoch, index] for epoch in range(EPOCHS) for index in range(BATCHES // 2)]
    check(steps == expected, f"steps {steps}", folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-group", action="store_true", help="leave out the group of processes")
    args = parser.parse_args()
    choices = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="kill_and_resume_") as name:
        work = Path(name)
        write_tones(work / "tones")
        tones = [f"data.corpus.{part}={work}/tones/{part}.jsonl" for part in ("train", "val")]
        plain = [*OPTIONS, *tones]
        variants = [plain, [*plain, "+trainer.val_check_interval=2", "data.num_workers=0"]]
        references = [whole(work, options, f"whole{i}") for i, options in enumerate(variants)]
        kills = checkpoints = trainings = 0
        while kills < args.kills:
            variant = trainings % len(variants)
            wanted = min(5, args.kills - kills)
            done, looked_at = killed(
                work, variants[variant], *references[variant], f"killed{trainings}", choices, wanted
            )
            kills, checkpoints, trainings = kills + done, checkpoints + looked_at, trainings + 1
            print(f"{kills} kills, {trainings} trainings", flush=True)
        print(
            f"{kills} SIGKILLs, {checkpoints} checkpoints read after them, {trainings} trainings "
            "ended with the weights and batches of one that was never killed"
        )
        # No process that reads: the limit holds for the memory that it shares with us, too.
        disk_full(work, [*plain, "data.num_workers=0"])
        print("disk full: named, nothing half-written, resumed once there was room", flush=True)
        if not args.no_group:
            group_stopped(work, plain)
            print("SIGTERM to one process of two: both saved, ended, and went on, twice",
                  flush=True)  # fmt: skip
            print(f"a process of a group killed: the other ended {rank_killed(work, plain):.0f} s "
                  "later")  # fmt: skip


if __name__ == "__main__":
    main()
