# SPDX-License-Identifier: Apache-2.0
"""Reads hostile files, each in a process that may die.

    python -m tests.soak.fuzz_files --cases 3000 [--seed 0] [--kind NAME ...] [--repeat SEED]

A case is one file, or one folder of a model, from an untrusted source. It is right if the reader
returns what the file says, or raises a ValueError or an OSError with one short line that names the
file, and its line where there are lines. All else is a finding: another error, a crash, more than a
few seconds or GiB, code that runs, a file outside of the folder that is opened, a connection, a
result that is not in the file. A finding is printed with the seed that makes it again.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import random
import re
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.soak.hostile_models import (
    HAS_TRANSFORMERS,
    OUTSIDE,
    Models,
    checkpoint_case,
    encoder_case,
    make_models,
    transducer_case,
)
from tests.soak.hostile_texts import (
    Case,
    alignment_case,
    arpa_case,
    hotword_case,
    manifest_case,
    pieces_case,
)
from tests.soak.spoilt_files import CANARY

TIMEOUT_S = 60  # of a case, on a busy machine
CPU_S = 5
MORE_MEMORY_BYTES = 3 * 2**30  # beside what a process has after the imports
MAX_MESSAGE = 1000
TEXTS = ("arpa", "hotwords", "alignment", "manifest", "pieces", "checkpoint")
FOLDERS = ("transducer", "encoder")
KINDS = (*TEXTS, *(FOLDERS if HAS_TRANSFORMERS else ()))
# Weights count: reading a folder takes a hundred times as long as reading a text.
FREQUENCY = {"arpa": 5, "hotwords": 3, "alignment": 2, "manifest": 2, "pieces": 2, "checkpoint": 4,
             "transducer": 5, "encoder": 5}  # fmt: skip
# Faults of a whole file, for which no line is named.
WHOLE_FILE = re.compile(
    r"no (ARPA|hotword) file|binary file of KenLM|can write none|gzip|holds no phrases|"
    r"regular file|its entries are words|Is a directory|symbolic links"
)
NO_MEMORY = re.compile(r"can't allocate|nable to allocate|bad_alloc|MemoryError|enough memory")
FORBIDDEN_EVENTS = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect",
                    "socket.getaddrinfo")  # fmt: skip
_events: list[str] = []


def make_case(seed: int, kinds: list[str], models: Models, folder: Path) -> Case:
    """The case of a seed; its files are made in `folder`."""
    random_ = random.Random(seed)
    kind = random_.choices(kinds, [FREQUENCY[kind] for kind in kinds])[0]
    if kind == "pieces":
        return pieces_case(folder, random_, models.pieces)
    texts = {"arpa": arpa_case, "hotwords": hotword_case, "alignment": alignment_case,
             "manifest": manifest_case}  # fmt: skip
    if kind in texts:
        return texts[kind](folder, random_)
    makers = {"transducer": transducer_case, "encoder": encoder_case, "checkpoint": checkpoint_case}
    return makers[kind](folder, random_, models)


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event in FORBIDDEN_EVENTS:
        _events.append(f"{event} {str(arguments)[:100]}")
    elif event == "open" and f"/{OUTSIDE}/" in os.path.realpath(str(arguments[0])):
        _events.append(f"opens {arguments[0]}")


def finding_of(case: Case) -> tuple[str, str] | None:
    """Runs a case: None if all is right, else the kind of the finding and its details."""
    _events.clear()
    begin = time.process_time()
    problem: tuple[str, str] | None = None
    try:
        result = case.read()
        took = time.process_time() - begin
        events = list(_events)
        if case.must_fail:
            problem = "accepts what is not valid", str(result)[:200]
        else:
            wrong = case.wrong(result)
            problem = None if wrong is None else ("a wrong result", wrong)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of Rust is no Exception
        took, events = time.process_time() - begin, list(_events)
        problem = _problem_of(error, case)
    if (Path.cwd() / CANARY).exists():
        (Path.cwd() / CANARY).unlink()
        return "code of the file was run", str(problem)
    if events:
        return "opens or runs something", "; ".join(events[:3])
    if took > CPU_S:
        return f"takes more than {CPU_S} s", f"{took:.1f} s, {problem}"
    return problem


def _problem_of(error: BaseException, case: Case) -> tuple[str, str] | None:
    text, where = str(error), traceback.extract_tb(error.__traceback__)[-1]
    said = f"{type(error).__name__}: {text[:600]} ({where.name}, {where.filename[-40:]})"
    parts, part = [], error
    while part is not None:
        parts.append(f"{type(part).__name__} {part}")
        part = part.__cause__ or part.__context__  # type: ignore[assignment]
    if NO_MEMORY.search(" ".join(parts)):
        return "fills the memory", said
    if not isinstance(error, (ValueError, OSError)) or isinstance(error, UnicodeError):
        return "another error", said
    if case.must_fail is False:
        return "refuses what is valid", said
    if not any(name in text for name in case.names):
        return "a message that does not name the file", said
    if "\n" in text.strip() or len(text) > MAX_MESSAGE:
        return "a long message", f"{len(text)} characters: {said}"
    is_whole = isinstance(error, OSError) or WHOLE_FILE.search(text)
    if case.has_lines and not is_whole and not re.search(r"line \d", text):
        return "a message that does not name the line", said
    return None


# --- processes ----------------------------------------------------------------------------------


class Worker:
    """A forked process that runs cases, and another when it has died."""

    def __init__(self, kinds: list[str], models: Models) -> None:
        self.kinds, self.models = kinds, models
        self.pid = 0

    def run(self, seed: int) -> tuple[str, tuple[str, str] | None]:
        """Name of the case, and None or kind and details of a finding."""
        if not self.pid:
            self._start()
        os.write(self._to, f"{seed}\n".encode())
        line = self._line()
        if line:
            name, found = json.loads(line)
            return name, found and tuple(found)
        if line is None:
            os.kill(self.pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self._close()
        with tempfile.TemporaryDirectory(prefix="fuzz_files_") as name:
            case = make_case(seed, self.kinds, self.models, Path(name))
        kind = "a hang" if line is None else "a crash"
        return f"{case.kind} {case.how}", (kind, f"status {status}")

    def _start(self) -> None:
        to_read, self._to = os.pipe()
        self._from, to_write = os.pipe()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._to)
            os.close(self._from)
            _work(to_read, to_write, self.kinds, self.models)
        os.close(to_read)
        os.close(to_write)

    def _line(self) -> bytes | None:
        """The next line; b"" if the process has died, None if it says nothing."""
        end, found = time.monotonic() + TIMEOUT_S, b""
        while not found.endswith(b"\n"):
            if not select.select([self._from], [], [], max(0.0, end - time.monotonic()))[0]:
                return None
            part = os.read(self._from, 2**16)
            if not part:
                return b""
            found += part
        return found

    def _close(self) -> None:
        os.close(self._to)
        os.close(self._from)
        self.pid = 0

    def close(self) -> None:
        if self.pid:
            pid = self.pid
            self._close()
            os.waitpid(pid, 0)


def _work(to_read: int, to_write: int, kinds: list[str], models: Models) -> None:
    """Reads seeds, writes a line for each: the name of the case, and its finding or null."""
    status = 1
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 2)
        with open("/proc/self/statm") as file:
            in_use = int(file.read().split()[0]) * resource.getpagesize()
        limit = in_use + MORE_MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        warnings.simplefilter("ignore")
        logging.disable()
        sys.addaudithook(_watch)
        with os.fdopen(to_read) as seeds:
            for seed in seeds:
                with tempfile.TemporaryDirectory(prefix="fuzz_files_") as name:
                    os.chdir(name)
                    os.mkdir("cache")
                    os.environ["XDG_CACHE_HOME"] = str(Path(name, "cache").resolve())
                    case = make_case(int(seed), kinds, models, Path(name))
                    with contextlib.redirect_stdout(io.StringIO()):
                        found = finding_of(case)
                    os.chdir("/")
                answer = json.dumps([f"{case.kind} {case.how}", found])
                os.write(to_write, answer.encode("ascii", "replace") + b"\n")
        status = 0
    except BaseException:
        traceback.print_exc(file=sys.stdout)
        sys.stdout.flush()
    os._exit(status)


def fuzz(
    seeds: range, kinds: list[str], models: Models, seconds: float = float("inf")
) -> Iterator[tuple[int, str, tuple[str, str] | None]]:
    """Runs cases; yields seed, name, and kind and details of a finding, once a name, or None."""
    worker = Worker(kinds, models)
    seen: Counter[str] = Counter()
    end = time.monotonic() + seconds
    for seed in seeds:
        if time.monotonic() > end:
            break
        name, found = worker.run(seed)
        if found is not None:
            key = re.sub(r"-?\b[\d.]+(e[+-]?\d+)?\b", "#", f"{name} {found[0]}")
            seen[key] += 1
            if seen[key] > 1:
                found = None
        yield seed, name, found
    worker.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--kind", nargs="*", default=list(KINDS), choices=KINDS)
    parser.add_argument("--repeat", type=int, help="run one case here, with its traceback")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="fuzz_files_models_") as name:
        models = make_models(Path(name))
        if options.repeat is not None:
            folder = Path(name) / "case"
            folder.mkdir()
            os.chdir(folder)
            case = make_case(options.repeat, options.kind, models, folder)
            print(case.kind, case.how, f"must fail: {case.must_fail}")
            print(finding_of(case))
            with contextlib.suppress(KeyboardInterrupt):
                print(str(case.read())[:2000])
            return
        begin, count, num_cases = time.monotonic(), 0, 0
        seeds = range(options.seed, options.seed + options.cases)
        for seed, case_name, found in fuzz(seeds, options.kind, models, options.seconds):
            num_cases += 1
            if found is not None:
                count += 1
                print(f"{found[0]}: {case_name}, seed {seed}\n    {found[1]}", flush=True)
        minutes = (time.monotonic() - begin) / 60
        print(f"{num_cases} cases of {len(options.kind)} kinds in {minutes:.1f} min: "
              f"{count} findings")  # fmt: skip
        sys.exit(bool(count))


if __name__ == "__main__":
    main()
