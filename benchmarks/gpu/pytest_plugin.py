# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin for a short run on a GPU: each failure is recorded as soon as it happens.

    python -m pytest -p benchmarks.gpu.pytest_plugin --failures failed.txt --at-most 40 ...

- The id of a failed test is appended to the file of ``--failures`` at once.
- After an error that makes every further CUDA call fail, such as an illegal address, the xdist
  worker ends, and xdist starts another one for the tests that are left.
- SIGTERM ends the session as Ctrl-C does, so that ``--junitxml`` is written.
- ``--at-most N`` keeps N tests, spread evenly over the test functions and their parameters.
- The last line of the output counts the outcomes and names the first failure.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

LOST_CONTEXT_STATUS = 3


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gpu")
    group.addoption("--failures", type=Path, help="file to append the ids of failed tests to")
    group.addoption("--at-most", type=int, help="how many tests to run")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        config.pluginmanager.register(Worker(), "gpu_worker")
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    config.pluginmanager.register(Report(config.option.failures), "gpu_report")


class Report:
    """Counts outcomes in the process that the user started."""

    def __init__(self, failures: Path | None) -> None:
        self.failures = failures
        self.outcomes: Counter[str] = Counter()
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.outcome] += 1
        if report.failed:
            self.note_failure(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.outcomes["failed"] += 1
            self.note_failure(report.nodeid)

    def note_failure(self, test: str) -> None:
        self.failed.append(test)
        if self.failures is not None:
            with self.failures.open("a") as file:
                file.write(f"{test}\n")

    def pytest_unconfigure(self) -> None:
        counts = (f"{self.outcomes[name]} {name}" for name in ("passed", "failed", "skipped"))
        first = f"; first failure: {self.failed[0]}" if self.failed else ""
        print(f"\nfigures: {', '.join(counts)}{first}", flush=True)


class Worker:
    """Ends an xdist worker whose CUDA context is lost."""

    @pytest.hookimpl(trylast=True)  # xdist has sent the report by then
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and is_context_lost():
            time.sleep(1)  # lets the report leave the process
            os._exit(LOST_CONTEXT_STATUS)


def is_context_lost() -> bool:
    """Whether every further CUDA call of this process fails."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


@pytest.hookimpl(trylast=True)  # -k has made its choice
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    count = config.option.at_most
    if count is None or len(items) <= count:
        return
    kept = set(spread([item.nodeid for item in items], count))
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in kept])
    items[:] = [item for item in items if item.nodeid in kept]


def spread(tests: list[str], count: int) -> list[str]:
    """`count` of the ids: a turn for each test function, with parameters from all over its list."""
    by_function: dict[str, list[str]] = {}
    for test in tests:
        by_function.setdefault(test.partition("[")[0], []).append(test)
    turns = dict.fromkeys(by_function, 0)
    while sum(turns.values()) < min(count, len(tests)):
        for function, own in by_function.items():
            if turns[function] < len(own) and sum(turns.values()) < count:
                turns[function] += 1
    return [
        own[(2 * index + 1) * len(own) // (2 * turns[function])]
        for function, own in by_function.items()
        for index in range(turns[function])
    ]
