# SPDX-License-Identifier: Apache-2.0
"""Calls every loss, joiner and decoder with arguments spoilt at random, in processes that may die.

    python -m tests.soak.fuzz_inputs --cases 20000 [--seed 0] [--function NAME ...]

A case starts from a valid call (tests.soak.calls) and has up to three of its arguments spoilt
(tests.soak.mutations). It is right if the call raises a ValueError or TypeError that names an
argument, or else gives what the float64 reference gives (tests.soak.expectations). Where a
mutation changes no value, the call must not raise. Anything else is a finding: a crash, a hang,
another error, a wrong number, an argument changed, a call accepted that has no right result. Each
is minimized (arguments are put back one by one) and printed once, with the seed that makes it
again: --repeat SEED.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import itertools
import json
import random
import re
import resource
import selectors
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.soak.calls import FUNCTIONS
from tests.soak.expectations import EXPECTATIONS
from tests.soak.mutations import is_harmless, mutate
from tests.soak.truth import Expected, Results, Undecided, Undefined
from transducer_toolkit import LatticeShape

TIMEOUT_S = 240  # of one case, on a machine with other jobs
START_TIMEOUT_S = 1800  # until torch is imported
MEMORY_BYTES = 24 * 2**30  # of addresses: torch alone takes 8
# What may come out besides ValueError and TypeError.
DOCUMENTED = re.compile(r"expected type cpu or cuda, got|inplace=True allows one backward")


@dataclass
class Case:
    """A spoilt call, made from its seed."""

    function: str
    arguments: dict[str, Any]
    spoilt: dict[str, str] = field(default_factory=dict)  # argument: how
    context: str = "grad"

    def name(self) -> str:
        how = ", ".join(f"{name}: {mutation}" for name, mutation in self.spoilt.items())
        return f"{self.function}({how}) [{self.context}]"


def make_case(seed: int, functions: list[str], keep: set[int] | None = None) -> Case:
    """The case of a seed; with `keep` only these of its mutations, everything else as it was."""
    random_ = random.Random(seed)
    torch.manual_seed(seed)
    name = random_.choice(functions)
    _, generate = FUNCTIONS[name]
    arguments = generate(random_)
    case = Case(name, arguments, context=random_.choice(["grad", "grad", "grad", "no_grad"]))
    if arguments.get("inplace") and case.context == "grad":
        leaf = arguments["logits"].requires_grad_()
        arguments["logits"] = leaf * 1
    targets = random_.sample(list(arguments), min(len(arguments), random_.choice([0, 1, 1, 2, 3])))
    for index, argument in enumerate(targets):
        # A generator of its own: leaving a mutation out must not change the others.
        seed_here = random_.randrange(2**31)
        torch.manual_seed(seed_here)
        how, value = mutate(arguments[argument], random.Random(seed_here))
        if keep is None or index in keep:
            arguments[argument] = value
            case.spoilt[argument] = how
    return case


def _inputs_to_differentiate(case: Case) -> None:
    for value in case.arguments.values():
        if isinstance(value, Tensor) and value.is_floating_point() and value.is_leaf:
            with contextlib.suppress(RuntimeError):
                value.requires_grad_()


def _snapshot(value: Any) -> Any:
    if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested:
        if value.device.type != "cpu":
            return None
        return value.detach().clone(), value._version
    return None


def _was_changed(value: Any, before: Any) -> bool:
    if before is None:
        return False
    same = value._version == before[1] and value.shape == before[0].shape
    bits = (x.detach().resolve_neg().nan_to_num(nan=0.625) if x.is_floating_point() else x
            for x in (value, before[0]))  # fmt: skip
    return not same or not torch.equal(*bits)


def _call(case: Case, weights: Tensor) -> dict[str, Tensor]:
    """What the package gives, in the names that the expectations use."""
    function, _ = FUNCTIONS[case.function]
    if case.function.startswith("get_rnnt_logprobs"):
        return dict(zip(("px", "py"), function(**case.arguments), strict=True))
    if case.function == "do_rnnt_pruning":
        parts = function(**case.arguments)
        return dict(zip(("am_pruned", "lm_pruned"), parts, strict=True))
    output = function(**case.arguments)
    if isinstance(output, dict):  # of a decoder
        return output
    if isinstance(output, LatticeShape):
        return {"cells": torch.tensor(float(output.num_cells), dtype=torch.float64)}
    if case.function.startswith("join") and case.function != "joint_mutual_information_recursion":
        return {"rows": output}
    if case.function == "joint_mutual_information_recursion":
        return {"sum of terms": output.sum(0)}
    if case.function == "get_rnnt_prune_ranges":
        return {"ranges": output}
    results = {}
    if isinstance(output, tuple):
        output, (results["px_grad"], results["py_grad"]) = output
    results["loss"] = output
    if output.requires_grad:
        named = {name: x for name, x in case.arguments.items() if _wants_grad(x)}
        weight = weights[: output.numel()] if output.dim() else weights[0]
        grads = torch.autograd.grad(
            (output * weight).sum(), list(named.values()), allow_unused=True
        )
        for (name, x), grad in zip(named.items(), grads, strict=True):
            results[f"gradient of {name}"] = torch.zeros_like(x) if grad is None else grad
    return results


def _wants_grad(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def _difference(actual: dict[str, Tensor], expected: Results) -> str | None:
    for name, want in expected.items():
        if name not in actual:
            if name == "loss" or not name.startswith("gradient"):
                return f"no {name}"
            continue
        problem = _compare(actual[name], want)
        if problem:
            return f"{name}: {problem}"
    return None


def _compare(got: Tensor, want: Expected) -> str | None:
    if tuple(got.shape) != tuple(want.value.shape):
        return f"shape {tuple(got.shape)}, expected {tuple(want.value.shape)}"
    got, value = got.detach().double(), want.value.detach().double()
    allowed = want.absolute + want.relative * value.abs()
    wrong = ~((got == value) | (got.isnan() & value.isnan()) | ((got - value).abs() <= allowed))
    if want.counts is not None:
        wrong &= want.counts
    if not bool(wrong.any()):
        return None
    place = tuple(wrong.nonzero()[0].tolist())
    return f"{got[place].item():.8g}, expected {value[place].item():.8g}"


def _window_problem(case: Case, ranges: Tensor) -> str | None:
    """What the docstring of get_rnnt_prune_ranges promises, for windows that came out."""
    a = case.arguments
    num_utterances, num_frames, width = ranges.shape
    num_symbols = a["px_grad"].size(1)
    boundary = a.get("boundary")
    if boundary is None:
        boundary = torch.tensor([[0, 0, num_symbols, num_frames]] * num_utterances)
    regular = a["px_grad"].size(2) > num_frames if a.get("rnnt_type") is None else (
        a["rnnt_type"] == "regular"
    )  # fmt: skip
    step = width - 1 if regular else 1
    for b, (s_begin, t_begin, s_end, t_end) in enumerate(boundary.tolist()):
        starts = ranges[b, t_begin:t_end, 0].tolist()
        last = max(0, s_end - width + 1)
        reachable = min(s_begin, last) + step * (t_end - t_begin - 1)
        if starts[0] != min(s_begin, last) or starts[-1] != min(last, reachable):
            return f"utterance {b} goes from {starts[0]} to {starts[-1]}"
        if any(not 0 <= after - now <= step for now, after in itertools.pairwise(starts)):
            return f"utterance {b} has a step that is not: {starts}"
    if not torch.equal(ranges, ranges[:, :, :1] + torch.arange(width)):
        return "a window is not consecutive"
    return None if int(ranges.min()) >= 0 and int(ranges.max()) <= num_symbols else "out of range"


def _must_succeed(case: Case) -> bool:
    """Whether no mutation changed a value, a type or whether the call is allowed."""
    # In place, logits must be dense and no leaf.
    kept = {"logits"} if case.arguments.get("inplace") else set()
    return all(is_harmless(how) and name not in kept for name, how in case.spoilt.items())


def finding_of(case: Case) -> tuple[str, str] | None:
    """Runs a case: None if all is right, else the kind of the finding and its details."""
    _inputs_to_differentiate(case)
    weights = 1 + torch.rand(8, dtype=torch.float64)
    before = {name: _snapshot(x) for name, x in case.arguments.items()}
    try:
        with torch.set_grad_enabled(case.context == "grad"):
            actual = _call(case, weights)
    except (ValueError, TypeError) as error:
        said = f"{type(error).__name__}: {error}"
        if _must_succeed(case):
            return "refuses what is valid", said
        known = [*inspect.signature(FUNCTIONS[case.function][0]).parameters, "utterance"]
        known += ["batch_size"]  # of a decoder's state
        if not any(name in str(error) for name in known):
            return "an error that names no argument", said
        return None
    except Exception as error:
        if case.spoilt and DOCUMENTED.search(str(error)):
            return None
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}", f"{error} ({where.name})"
    arguments = dict(case.arguments)
    if arguments.get("inplace"):
        values = before["logits"]
        arguments["logits"] = None if values is None else values[0]
    else:
        changed = [name for name, x in case.arguments.items() if _was_changed(x, before[name])]
        if changed:
            return "changes an argument", ", ".join(changed)
    try:
        expected = EXPECTATIONS[case.function](arguments, weights)
        if "ranges" in actual:
            problem = _window_problem(case, actual["ranges"])
        else:
            problem = _difference(actual, expected)
    except Undecided:
        return None
    except Undefined:
        return "accepts what has no right result", ""
    except Exception as error:  # the reference cannot do anything with the arguments
        return "accepts what is not valid", f"{type(error).__name__}: {error}"
    return ("a wrong number", problem) if problem else None


# --- processes ----------------------------------------------------------------------------------


def work(functions: list[str]) -> None:
    """Reads lines of seed and mutations to keep, writes a line for each: nothing or a finding."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(2)  # the pool takes part
    warnings.simplefilter("ignore")
    print("ready", flush=True)
    for line in sys.stdin:
        seed, keep = json.loads(line)
        case = make_case(seed, functions, None if keep is None else set(keep))
        found = finding_of(case)
        print(json.dumps([case.name(), len(case.spoilt), found]), flush=True)


class Worker:
    """A process that runs cases, and another when it has died."""

    def __init__(self, functions: list[str]) -> None:
        self.functions = functions
        self.process: subprocess.Popen[str] | None = None

    def run(self, seed: int, keep: list[int] | None = None) -> tuple[str, int, Any]:
        """Name of the case, number of its mutations, and None or (kind, details)."""
        if self.process is None:
            command = [sys.executable, "-m", "tests.soak.fuzz_inputs", "--work", *self.functions]
            self.process = subprocess.Popen(
                command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            if self._answer(START_TIMEOUT_S) != "ready\n":
                raise RuntimeError("a worker does not start")
        process = self.process
        assert process.stdin is not None
        process.stdin.write(json.dumps([seed, keep]) + "\n")
        process.stdin.flush()
        line = self._answer(TIMEOUT_S)
        if line:
            return tuple(json.loads(line))  # type: ignore[return-value]
        if line is None:
            process.kill()
        code = process.wait()
        self.process = None
        kind = "a hang" if line is None else "a crash"
        signal_name = signal.Signals(-code).name if code < 0 else f"exit {code}"
        case = make_case(seed, self.functions, None if keep is None else set(keep))
        return case.name(), len(case.spoilt), (kind, signal_name)

    def _answer(self, timeout_s: float) -> str | None:
        """The next line; "" if the process has died, None if it says nothing."""
        assert self.process is not None and self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            return self.process.stdout.readline() if selector.select(timeout_s) else None

    def close(self) -> None:
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
            self.process.wait()


def minimised(worker: Worker, seed: int, number: int, found: Any) -> tuple[str, Any, list[int]]:
    """The fewest mutations that give a finding of the same kind."""
    for size in range(number):
        for keep in itertools.combinations(range(number), size):
            name, _, smaller = worker.run(seed, list(keep))
            if smaller is not None and smaller[0] == found[0]:
                return name, smaller, list(keep)
    name, _, again = worker.run(seed)
    return name, again if again is not None else found, list(range(number))


def fuzz(
    seeds: range, functions: list[str], seconds: float = float("inf")
) -> Iterator[tuple[str, Any, int, list[int]]]:
    """Runs cases; yields name, (kind, details), seed and mutations of each finding, once a name."""
    worker = Worker(functions)
    seen: Counter[str] = Counter()
    end = time.monotonic() + seconds
    for seed in seeds:
        if time.monotonic() > end:
            break
        _, number, found = worker.run(seed)
        if found is not None:
            name, smaller, keep = minimised(worker, seed, number, found)
            key = re.sub(r"-?[\d.e+]+", "#", f"{name} {smaller[0]}")
            seen[key] += 1
            if seen[key] == 1:
                yield name, smaller, seed, keep
    worker.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--function", nargs="*", default=list(FUNCTIONS), choices=list(FUNCTIONS))
    parser.add_argument("--repeat", type=int, help="run one case here, with its arguments printed")
    options = parser.parse_args()
    if options.repeat is not None:
        case = make_case(options.repeat, options.function)
        print(case.name(), *(f"{k} = {v!r}" for k, v in case.arguments.items()), sep="\n")
        print(finding_of(case))
        return
    begin = time.monotonic()
    count = 0
    seeds = range(options.seed, options.seed + options.cases)
    for name, (kind, details), seed, keep in fuzz(seeds, options.function, options.seconds):
        count += 1
        print(f"{kind}: {name}\n    {details}\n    seed {seed}, mutations {keep}", flush=True)
    minutes = (time.monotonic() - begin) / 60
    print(f"{options.cases} cases of {len(options.function)} functions in {minutes:.1f} min: "
          f"{count} findings")  # fmt: skip
    sys.exit(bool(count))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2:])
    else:
        main()
