# SPDX-License-Identifier: Apache-2.0
"""Runs the commands with spoilt files and options, each in a process that may die.

    python -m tests.soak.fuzz_commands --cases 1000 [--seed 0] [--command NAME ...] [--repeat SEED]

A case is a right command line of which one or two parts are spoilt: a checkpoint that is a text,
cut off or edited, audio that is none, a manifest with a wrong row, an option out of range. It is
right if it ends in time, with an exit status other than 0 where something must be refused, and
then with a message that names one of the spoilt parts and is of a documented kind: the commands
with plain options print no traceback at all. A finding is printed with the seed that makes it
again.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests import composition
from tests.soak.spoilt_files import CANARY, World, bad_audio, bad_checkpoint, bad_manifest

TIMEOUT_S = 120
MEMORY_BYTES = 24 * 2**30
HYDRA = ("train", "evaluate", "prepare")
COMMANDS = ("train", "evaluate", "prepare", "transcribe", "align", "average", "export")
# Kinds of errors that say what is wrong with what the user gave.
DOCUMENTED = re.compile(
    r"^(ValueError|TypeError|OSError|[\w.]*NotFoundError|\w*(Directory|Exists|Permission)\w*Error|"
    r"[\w.]*(Override|Config|Missing|Interpolation|Instantiation|Misconfiguration|Validation|"
    r"Unsupported|NonFinite)\w*(Error|Exception)?|hydra\.errors\.\w+|[\w.]*MissingMandatoryValue)\b"
)


@dataclass
class Case:
    """A command line with spoilt parts."""

    command: str
    arguments: list[str] = field(default_factory=list)
    spoilt: dict[str, str] = field(default_factory=dict)  # part: how
    names: set[str] = field(default_factory=set)  # one of them must be in the message
    must_fail: bool = False

    def spoil(self, part: str, how: str, names: list[str], must_fail: bool | None) -> None:
        self.spoilt[part] = how
        self.names |= set(names)
        self.must_fail |= bool(must_fail)

    def name(self) -> str:
        how = ", ".join(f"{part}: {how}" for part, how in self.spoilt.items())
        return f"{self.command}({how})"


# --- options ------------------------------------------------------------------------------------

# Value, and whether it must be refused; None: it may be.
Values = dict[str, list[tuple[str, bool | None]]]


def refused(*values: str) -> list[tuple[str, bool | None]]:
    return [(value, True) for value in values]


OPTIONS: dict[str, Values] = {
    "transcribe": {
        "--format": refused("mp3", ""),
        "--search": refused("widest", ""),
        "--beam": refused("0", "-1", "x", "2.5"),
        "--max-symbols-per-frame": refused("0", "-3", "x"),
        "--window-s": refused("0", "-1", "nan", "x", "-inf", "inf"),
        "--overlap-s": refused("-1", "nan", "inf", "15"),
        "--device": refused("abacus", "cuda:99", "cpu:x", ""),
        "--num-threads": refused("0", "-1", "x"),
        "--output": refused("no/such/folder/file", "/proc/none/"),
        "--colour": refused("red"),
    },
    "align": {
        "--format": refused("mp3", "", "png"),
        "--topology": refused("linear", ""),
        "--device": refused("abacus", "cuda:99"),
        "--num-threads": refused("0", "-1", "x"),
        "--output-dir": refused("/proc/none"),
        "--text": [("xyz", True), ("", None), ("a" * 500, None), ("\udcff", True)],
        "--colour": refused("red"),
    },
    "average": {"--output": refused("no/such/folder/file", "./././.", "/proc/none")},
    "export": {
        "--output": refused("/proc/none", "/dev/null"),
        "--chunk-frames": refused("0", "-1", "x", "4"),  # without --streaming
        "--colour": refused("red"),
    },
    "train": {
        "seed": [*refused("-1", "x", "1.5"), (str(2**70), True)],
        "trainer.max_epochs": refused("x", "-7", "1.5"),
        # Not 99: so many processes of CPUs are allowed, and would each start the fuzz.
        "trainer.devices": refused("0", "-3", "x"),
        "+trainer.max_steps": refused("x", "1.5"),
        "trainer.accelerator": refused("abacus", "gpu"),
        "trainer.precision": refused("12", "x"),
        "trainer.accumulate_grad_batches": refused("0", "-1", "x"),
        "trainer.gradient_clip_val": [("x", True), ("-1", None), ("nan", None)],
        "data.max_utterances": refused("0", "-1", "x", "1.5"),
        "data.max_cells": [*refused("0", "-1", "x"), ("1", None)],
        "data.num_workers": refused("-1", "x", "1.5"),
        "data.on_bad_audio": refused("ignore", "null"),
        "data.max_duration_s": [("0", True), ("-1", True), ("x", True), ("nan", None)],
        "data.spec_augment.max_freq_width": [("-1", True), ("x", True), ("10000", None)],
        "+data.spec_augment.max_time_fraction": refused("-1", "2", "x", "nan"),
        "data.seed": refused("x", "1.5", "null"),
        "+data.subsampling": refused("4", "8"),
        "data.tokenizer": refused("words"),
        "data.tokenizer.unknown": refused("x", "null"),
        "model": refused("transformer_xxl"),
        "model.encoder.hidden_dim": refused("0", "-1", "x", "1.5"),
        "model.encoder.num_layers": refused("0", "-1", "x"),
        "model.encoder.dropout": refused("-1", "2", "x", "nan"),
        "model.encoder.normalization": refused("batch", "null"),
        "model.encoder.subsampling_factor": [*refused("0", "-4", "3", "x", "1.5"), ("8", None)],
        "model.predictor.context_size": refused("0", "-1", "x"),
        "model.predictor.embedding_dim": refused("0", "-1", "x"),
        "model.joiner.joiner_dim": refused("0", "-1", "x"),
        "+model.joiner.activation": refused("sine"),
        "loss": refused("ctc", "packd"),
        "loss.rnnt_type": refused("linear", "null"),
        "loss.dropped_mass": refused("-1", "2", "x", "nan"),
        "loss.fastemit_lambda": refused("-1", "x", "nan"),
        "loss.delay_penalty": refused("-1", "x", "nan", "inf"),
        "loss.clamp": [("x", True), ("nan", True), ("-1", None)],
        "optimizer.lr": [*refused("-1", "x"), ("nan", None), ("1e30", None)],
        "optimizer.betas": refused("[2,2]", "x", "[0.9]"),
        "scheduler": refused("linear"),
        "scheduler.warmup_fraction": refused("-1", "2", "x", "nan"),
        "+scheduler.final_fraction": refused("-1", "2", "x", "nan"),
        "ctc.weight": refused("-1", "x", "nan"),
        "averaging": refused("median"),
        "max_symbols_per_frame": refused("0", "-1", "x", "1.5"),
        "num_threads": refused("0", "-1", "x"),
        "ckpt_path": refused("none.ckpt", "last"),
        "init_from": refused("none.ckpt"),
        "experiment": refused("nothing"),
        "flush_denormal": refused("x", "null"),
        "test": refused("x", "null"),
        "callbacks.non_finite_steps.max_consecutive": refused("-1", "x", "1.5"),
        "callbacks.last_checkpoint.every_n_steps": refused("-1", "0", "x"),
        "callbacks.last_checkpoint.every_minutes": refused("-1", "0", "x", "nan"),
        "optimzer.lr": refused("1"),
        "colour": refused("red"),
    },
    "evaluate": {
        "search": refused("widest"),
        "search.max_symbols_per_frame": refused("0", "-1", "x", "1.5"),
        "+search.beam": refused("3"),
        "data.max_cells": refused("0", "x"),
        "data.num_workers": refused("-1", "x"),
        "trainer.devices": refused("0", "x"),
        "trusted_packages": refused("x", "null", "[1]"),
        "colour": refused("red"),
    },
    "prepare": {
        "data": refused("nothing", "lhotse", "librispeech"),
        "data.corpus.download": refused("true"),
        "data.corpus.val": [("null", None), *refused("[]")],
        "colour": refused("red"),
    },
}


def make_case(seed: int, commands: list[str], world: World, folder: Path) -> Case:
    """The case of a seed; its files are made in `folder`."""
    random_ = random.Random(seed)
    case = Case(random_.choice(commands))
    options = dict(_right_options(case.command, world))
    parts = [*_file_parts(case.command), *["option"] * 3]
    for part in random_.sample(parts, random_.choice([1, 1, 1, 2])):
        here = folder / f"part{len(case.spoilt)}"
        here.mkdir()
        if part == "option":
            name = random_.choice(list(OPTIONS[case.command]))
            value, must_fail = random_.choice(OPTIONS[case.command][name])
            if name in case.spoilt:  # as a file: one of the two would not be there
                continue
            options[name] = value
            if name == "experiment":
                del options["~experiment"]
            if len(value) > 3 or (value and name == "--text"):  # a shorter one is in any message
                case.names |= {value.rstrip("/"), ascii(value)[1:-1]}
            names = [name.lstrip("-+"), name.rpartition(".")[2].lstrip("-+")]
            case.spoil(name, value[:30], [*names, names[-1].replace("-", "_")], must_fail)
            continue
        if part in case.spoilt:
            continue
        if part == "checkpoint":
            bad = bad_checkpoint(world, here, random_)
        elif part == "audio":
            bad = bad_audio(here, random_)
        else:
            bad = bad_manifest(world, part.rpartition(".")[2], here, random_)
        options[part] = str(bad.path)
        # Of which transducer-prepare says that they hold nothing.
        lists_it = case.command == "prepare" and bad.how in ("blank lines", "empty")
        must_fail = None if lists_it else bad.must_fail
        case.spoil(part, bad.how, [bad.path.stem, here.name, *bad.names], must_fail)
    case.arguments = _command_line(case.command, options)
    return case


def _file_parts(command: str) -> list[str]:
    return {
        "train": ["data.corpus.train", "data.corpus.val"],
        "evaluate": ["checkpoint", "checkpoint", "+data.corpus.test"],
        "prepare": ["data.corpus.train", "data.corpus.val"],
        "transcribe": ["checkpoint", "audio"],
        "align": ["checkpoint", "audio"],
        "average": ["checkpoint"],
        "export": ["checkpoint"],
    }[command]


def _right_options(command: str, world: World) -> Iterator[tuple[str, str]]:
    tones = {
        "data": "manifest",
        "data.corpus.train": f"{world.tones}/train.jsonl",
        "data.corpus.val": f"{world.tones}/val.jsonl",
    }
    if command in HYDRA:
        yield from tones.items()
    if command == "train":
        yield from {
            "~experiment": "",
            "model.encoder.conv_channels": "4",
            "model.encoder.hidden_dim": "16",
            "model.predictor.embedding_dim": "8",
            "model.joiner.joiner_dim": "16",
            "trainer.max_epochs": "1",
            "+trainer.limit_train_batches": "2",
            "trainer.accelerator": "cpu",
            "data.num_workers": "0",
            "data.max_utterances": "8",
            "num_threads": "1",
            "test": "false",
            "~callbacks.progress_bar": "",
        }.items()
    elif command == "evaluate":
        yield "checkpoint", str(world.checkpoint)
        yield "+data.corpus.test", f"{world.tones}/test.jsonl"
        yield from {"trainer.accelerator": "cpu", "data.num_workers": "0"}.items()
        yield "~callbacks.progress_bar", ""
    elif command in ("transcribe", "align", "average", "export"):
        yield "checkpoint", str(world.checkpoint)
        if command in ("transcribe", "align"):
            yield "audio", f"{world.tones}/test-0.wav"
        if command == "align":
            yield "--text", "a"
        elif command in ("average", "export"):
            yield "--output", "written"


def _command_line(command: str, options: dict[str, str]) -> list[str]:
    if command in HYDRA:
        pairs = []
        for name, value in options.items():
            if name == "+data.corpus.test":
                name = "+data.corpus.test.set"
            text = value if name != "checkpoint" else f"'{value}'"
            pairs.append(name if name.startswith("~") else f"{name}={text}")
        return pairs
    arguments = []
    for name, value in options.items():
        if name.startswith("--"):
            arguments.append(f"{name}={value}")
        elif name == "audio" or command in ("average", "export"):
            arguments.append(value)
        else:
            arguments += ["--checkpoint", value]
    return arguments


# --- processes ----------------------------------------------------------------------------------


def run(case: Case, folder: Path) -> tuple[int | None, str]:
    """Exit status (negative for a signal, None if it does not end) and all that was printed."""
    module = importlib.import_module(f"transducer_toolkit.cli.{case.command}")
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        _child(module, case, folder)
    end = time.monotonic() + TIMEOUT_S
    status = None
    while status is None and time.monotonic() < end:
        done, code = os.waitpid(pid, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(code)
        else:
            time.sleep(0.01)
    if status is None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    return status, (folder / "output").read_text(errors="replace")


def _child(module: object, case: Case, folder: Path) -> None:
    status = 1
    try:
        os.setsid()
        os.chdir(folder)
        output = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(output, stream)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.environ |= {"TRANSDUCER_TOOLKIT_RUN_ID": "run", "COLUMNS": "500"}
        sys.argv = [f"transducer-{case.command}", *case.arguments]
        result = module.main()  # type: ignore[attr-defined]
        status = result if isinstance(result, int) else 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def message_of(output: str) -> str:
    """What is said, without the command line that Hydra repeats and the code of a traceback."""
    lines = output.splitlines()
    if lines[:1] and "Traceback" not in output:
        lines = [line for line in lines if not line.startswith(("usage:", " " * 8))]
    return "\n".join(
        line for line in lines
        if not line.startswith(("  ", "Error executing job", "Set the environment"))
    )  # fmt: skip


def finding_of(case: Case, folder: Path) -> tuple[str, str] | None:
    """Runs a case: None if all is right, else the kind of the finding and what was printed."""
    status, output = run(case, folder)
    said = message_of(output)
    if (folder / CANARY).exists():
        return "code of a checkpoint was run", output
    if status is None:
        return "a hang", output[-1500:]
    if status < 0:
        return f"a crash, {signal.Signals(-status).name}", output[-1500:]
    if status == 0:
        return ("accepts what is not valid", output[-800:]) if case.must_fail else None
    if "Traceback" in output:
        if case.command not in HYDRA:
            return "a traceback", output[-1500:]
        last = output.rpartition("Traceback (most recent call last):")[2].splitlines()
        kind = next((line for line in last[1:] if line and not line.startswith(" ")), "")
        if not DOCUMENTED.match(kind):
            return "an error of another kind", f"{kind}\n{output[-1500:]}"
    if not any(name in said for name in case.names):
        return "a message that names nothing of it", said[-1500:]
    return None


def fuzz(
    seeds: range, commands: list[str], world: World, seconds: float = float("inf")
) -> Iterator[tuple[int, Case, tuple[str, str] | None]]:
    """Runs cases; yields seed, case, and kind and output of a finding, once a name, or None."""
    for command in commands:
        importlib.import_module(f"transducer_toolkit.cli.{command}")
    _import_what_commands_import()
    for command in sorted(set(commands) & set(HYDRA)):
        groups = ["data=manifest", *["~experiment"] * (command == "train")]
        composition.compose_for_forks(command, *groups)
    seen: Counter[str] = Counter()
    end = time.monotonic() + seconds
    for seed in seeds:
        if time.monotonic() > end:
            break
        with tempfile.TemporaryDirectory(prefix="fuzz_commands_") as name:
            folder = Path(name)
            case = make_case(seed, commands, world, folder)
            found = finding_of(case, folder)
        if found is not None:
            key = re.sub(r"-?\b[\d.]+(e[+-]?\d+)?\b", "#", f"{case.name()} {found[0]}")
            seen[key] += 1
            if seen[key] > 1:
                found = None
        yield seed, case, found


def _import_what_commands_import() -> None:
    """Once, before the forks: each of them would take seconds over it."""
    for name in ("data.datamodule", "export", "inference.aligner", "inference.recognizer",
                 "training.callbacks", "training.callbacks.prescan",
                 "training.callbacks.unreadable", "training.lightning_module",
                 "training.stages"):  # fmt: skip
        importlib.import_module(f"transducer_toolkit.{name}")


def make_world(folder: Path) -> World:
    """A corpus of tones and a small model trained on it."""
    from tests.cli.conftest import write_tones

    write_tones(folder / "tones")
    world = World(folder / "outputs/transducer/run/checkpoints/best.ckpt", folder / "tones")
    case = Case("train", _command_line("train", dict(_right_options("train", world))))
    status, output = run(case, folder)
    if status != 0:
        raise RuntimeError(f"the training without a spoilt part ends with {status}:\n{output}")
    return world


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--command", nargs="*", default=list(COMMANDS), choices=COMMANDS)
    parser.add_argument("--repeat", type=int, help="run one case and print what it prints")
    parser.add_argument("--checkpoint", type=Path, help="of a training on --tones; or made anew")
    parser.add_argument("--tones", type=Path)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    prefix = "fuzz_commands_world_"
    with composition.composed_once(), tempfile.TemporaryDirectory(prefix=prefix) as name:
        world = (
            World(options.checkpoint, options.tones)
            if options.checkpoint is not None
            else make_world(Path(name))
        )
        if options.repeat is not None:
            folder = Path(name) / "case"
            folder.mkdir()
            case = make_case(options.repeat, options.command, world, folder)
            print(case.name(), *case.arguments, sep="\n    ")
            found = finding_of(case, folder)
            print((folder / "output").read_text(errors="replace"), found and found[0])
            shutil.rmtree(folder)
            return
        begin, count, num_cases = time.monotonic(), 0, 0
        seeds = range(options.seed, options.seed + options.cases)
        for seed, case, found in fuzz(seeds, options.command, world, options.seconds):
            num_cases += 1
            if found is None:
                continue
            count, (kind, output) = count + 1, found
            indented = output.strip().replace("\n", "\n    ")
            print(f"{kind}: {case.name()}, seed {seed}\n    {indented}", flush=True)
        minutes = (time.monotonic() - begin) / 60
        print(f"{num_cases} cases in {minutes:.1f} min: {count} findings")
        sys.exit(bool(count))


if __name__ == "__main__":
    main()
