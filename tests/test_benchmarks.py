# SPDX-License-Identifier: Apache-2.0
"""The benchmarks measure what they say, and say so when they cannot."""

import importlib
import itertools
import json
import math
import os
import subprocess
import sys
import zipfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import transducer_toolkit
from benchmarks import decode, install_peers, report, run, tdt
from benchmarks.agreement import disagreement, gradient_error, signature
from benchmarks.jobs import Job
from benchmarks.measure import answer, measure
from benchmarks.peers import Absent, implementations, require_present
from benchmarks.session import Session, ended_process
from benchmarks.truth import cell_coordinates, loss_truth, step_truth
from benchmarks.workloads import Workload, choose_batch, scaling_workloads, utterance_shapes
from tests.fork_server import python
from transducer_toolkit.losses.reference import reference_duration_loss, reference_loss
from transducer_toolkit.optional import OLDEST_TRANSFORMERS

ODD = "tests.odd_implementations"
PROJECT_ROOT = Path(__file__).resolve().parents[1]
TINY = Workload(frames=(7, 5, 1), symbols=(3, 4, 1), vocab_size=6, joiner_dim=4)


def ask(suite, implementation, workload=TINY, **changes):
    """One measurement in this process."""
    request = {"suite": suite, "implementation": implementation, "repetitions": 1, "extra": []}
    request["workload"] = workload.__dict__
    return answer({**request, **changes})


# --- the truth ----------------------------------------------------------------------------------


@pytest.mark.parametrize("lattice", ["initial", "peaky", "trained"])
def test_truth_is_the_reference_recursion_with_autograd(lattice):
    workload = Workload(**{**TINY.__dict__, "lattice": lattice})
    shape = workload.shape
    inputs = [tensor.double().requires_grad_() for tensor in workload.joiner_inputs()]
    enc, pred, weight, bias = inputs
    logits = torch.tanh(enc[:, :, None] + pred[:, None]) @ weight.T + bias
    lengths = shape.logit_lengths, shape.target_lengths
    expected = reference_loss(logits, workload.targets(), *lengths, blank=0, reduction="none")
    losses, grads = step_truth(workload)
    torch.testing.assert_close(losses, expected.detach())
    torch.testing.assert_close(grads, torch.autograd.grad(expected.sum(), inputs))


def test_truth_of_tdt_is_the_reference(monkeypatch):
    monkeypatch.setattr("benchmarks.tdt.TILE_CELLS", 5)
    shape = TINY.shape
    inputs = [tensor.double().requires_grad_() for tensor in tdt.joiner_inputs(TINY)]
    logits = tdt.padded_logits(*inputs)
    expected = reference_duration_loss(
        logits,
        TINY.targets(),
        shape.logit_lengths,
        shape.target_lengths,
        0,
        durations=tdt.DURATIONS,
        sigma=tdt.SIGMA,
        reduction="none",
    )
    losses, grads = tdt.truth(TINY)
    torch.testing.assert_close(losses, expected.detach())
    torch.testing.assert_close(grads, torch.autograd.grad(expected.sum(), inputs))


def test_truth_of_given_logits_is_the_reference(monkeypatch):
    monkeypatch.setattr("benchmarks.truth.TILE_CELLS", 5)  # 58 cells: many tiles, one not full
    shape = TINY.shape
    logits = TINY.logits().double().requires_grad_()
    lengths = shape.logit_lengths, shape.target_lengths
    expected = reference_loss(shape.unpack(logits), TINY.targets(), *lengths, 0, reduction="sum")
    truth = loss_truth(TINY)
    gradient = torch.cat([tile for _, tile in truth.gradient_tiles()])
    torch.testing.assert_close(truth.losses.sum(), expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0])


def test_cells_are_numbered_as_they_are_packed():
    b, t, u = cell_coordinates(TINY)
    grid = torch.arange(3 * 7 * 5).view(3, 7, 5)
    assert torch.equal(TINY.shape.pack(grid), grid[b, t, u])


# --- agreement ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5000, 7), (3, 4, 2), (400,)])
def test_distance_of_signatures_estimates_the_distance_of_gradients(shape):
    gradient, error = torch.randn(shape), torch.randn(shape)
    found = gradient_error([signature(gradient + 0.01 * error)], [signature(gradient)])
    exact = 0.01 * error.norm() / gradient.norm()
    assert 0.5 * exact < found < 2 * exact


def test_signature_does_not_depend_on_the_chunks():
    from benchmarks.agreement import Signature

    gradient = torch.randn(50, 3)
    made = Signature(3)
    made.add(20, gradient[20:])
    made.add(0, gradient[:20])
    assert made.values() == pytest.approx(signature(gradient))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, ""),
        ({"losses": [1.0, 2.01]}, "loss off by 5e-03"),
        ({"losses": [1.0, math.nan]}, "loss off by nan"),
        ({"signatures": [[3.0, 4.0], [1.0, 1.1]]}, "gradient off by 7e-02"),
        ({"signatures": [[3.0, math.nan], [1.0, 1.0]]}, "gradient off by nan"),
        ({"losses": [3.0]}, ""),  # only the sum is known
        ({"losses": [3.1]}, "loss off by 3e-02"),
    ],
)
def test_disagreement_names_what_is_off(change, said):
    right = {"losses": [1.0, 2.0], "signatures": [[3.0, 4.0], [1.0, 1.0]]}
    found = disagreement({**right, **change}, right)
    assert found.replace(".0e", "e").replace("7.1e", "7e").replace("3.3e", "3e") == said


# --- measurements -------------------------------------------------------------------------------


def test_memory_is_the_peak_above_what_was_there():
    size = 2**26

    def run_job(prepared):
        return torch.ones(size, dtype=torch.uint8)

    kept, result = measure(Job(run_job, lambda: torch.ones(4 * size)), 2, "cpu")
    assert result.numel() == size
    assert 0.9 * size < kept["peak_bytes"] < 1.2 * size
    assert len(kept["all_seconds"]) == 2 and kept["seconds"] > 0


@pytest.mark.parametrize(
    ("suite", "lattice"),
    [*itertools.product(("loss", "step"), ("initial", "peaky")), ("step", "trained")],
)
def test_ours_agrees_with_the_truth(suite, lattice):
    workload = Workload(**{**TINY.__dict__, "lattice": lattice})
    truth = ask(suite, "truth", workload)
    for name in ("ours: packed", "ours: packed, inplace"):
        result = ask(suite, name, workload)
        assert disagreement(result, truth) == ""
        assert result["gradient_error"] < 1e-5


def present(entry):
    try:
        require_present(entry)
    except Absent:
        return False
    return True


@pytest.mark.parametrize(
    ("name", "suite"),
    [
        (name, suite)
        for name, entry in implementations().items()
        for suite in ("loss", "step")
        if suite in entry.jobs
    ],
)
def test_whoever_is_installed_agrees_with_the_truth(name, suite):
    if not present(implementations()[name]):
        pytest.skip(f"{name} is not installed")
    assert disagreement(ask(suite, name), ask(suite, "truth")) == ""


def test_pruned_implementations_agree_with_each_other():
    entries = [entry for entry in implementations().values() if "pruned" in entry.jobs]
    names = [entry.name for entry in entries if present(entry)]
    if len(names) < 2:
        pytest.skip("fewer than two are installed")
    workload = Workload(**{**TINY.__dict__, "band_width": 3})
    first, *others = (ask("pruned", name, workload) for name in names)
    for name, other in zip(names[1:], others, strict=True):
        assert disagreement(other, first) == "", name


@pytest.mark.parametrize("suite", ["parakeet", "parakeet_tdt"])
def test_parakeet_implementations_agree_with_each_other(suite):
    pytest.importorskip("transformers", minversion=OLDEST_TRANSFORMERS)
    pytest.importorskip("torchaudio", exc_type=ImportError)
    theirs = ask(suite, "transformers: Parakeet")
    assert disagreement(ask(suite, "ours: Parakeet, fused loss"), theirs) == ""


def test_accuracy_is_the_error_of_the_gradient():
    assert max(ask("accuracy", "ours: packed")["errors"]) < 1e-6
    wrong, *_ = ask("accuracy", "wrong gradient", extra=[ODD])["errors"]
    gradient = torch.cat([tile for _, tile in loss_truth(TINY).gradient_tiles()])
    assert wrong == pytest.approx(0.1 * gradient.abs().max().item(), rel=1e-4)


def test_versions_are_those_of_the_process_that_measured():
    assert ask("loss", "ours: packed")["version"] == transducer_toolkit.__version__
    assert ask("loss", "wrong loss", extra=[ODD])["version"] == torch.__version__  # its module


@contextmanager
def processes_are_forks():
    """A process that measures need not import PyTorch again."""
    variables = {**os.environ, "PYTHONPATH": str(PROJECT_ROOT)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", python())
        patch.setattr(Session, "environment", lambda self: variables)
        yield


def odd_session(**options):
    """With every way to go wrong, and one implementation that is right."""
    every = implementations((ODD,))
    names = [name for name, entry in every.items() if entry.project == "odd"]
    chosen = {name: every[name] for name in ("ours: packed", *names)}
    return Session(chosen, rounds=1, repetitions=1, extra=(ODD,), **options)


@pytest.fixture(scope="module")
def odd_rows():
    session = odd_session(memory_limit_bytes=2**31)
    del session.implementations["hang"]
    with processes_are_forks():
        return {row["name"]: row for row in session.rows("loss", TINY)}


def test_a_process_that_hangs_is_ended():
    with processes_are_forks():
        result = odd_session(timeout_s=1.0).measure("loss", "hang", TINY)
    assert result == {"status": "timed out", "detail": "after 1 s"}


@pytest.mark.parametrize(
    ("name", "status", "detail"),
    [
        ("wrong gradient", "disagrees", "gradient off by 1.0e-01"),
        ("wrong loss", "disagrees", "loss off by"),
        ("nan loss", "disagrees", "loss off by nan, gradient off by nan"),
        ("crash", "crashed", "SIGSEGV"),
        ("leave", "crashed", "exit status 3"),
        ("fail", "failed", "ValueError: blank: expected 0 | 1"),
        ("exhaust memory", "out of memory", "allocate"),
        ("exceed the limit", "out of memory", "limit 2 GiB; RuntimeError"),
        ("not installed", "absent", "No module named 'no_such_project'"),
        ("too old", "absent", "torch has no no_such_loss"),
    ],
)
def test_what_goes_wrong_is_a_row(odd_rows, name, status, detail):
    row = odd_rows[name]
    assert row["status"] == status
    assert detail in row["detail"]
    assert "seconds" not in row or status == "disagrees"


def test_without_a_truth_the_first_that_works_is_the_reference(monkeypatch):
    session = odd_session()
    wrong = {"losses": [2.0], "signatures": [[1.0]]}
    answers = {
        "truth": {"status": "out of memory", "detail": "MemoryError: "},
        "floor": {"status": "ok"},
        "ours: packed": {"status": "ok", "losses": [1.0], "signatures": [[1.0]]},
        "wrong loss": {"status": "ok", **wrong},
    }
    timing = {"seconds": 1.0, "all_seconds": [1.0], "peak_bytes": 0}
    for name in set(session.implementations) - set(answers):
        del session.implementations[name]
    monkeypatch.setattr(
        Session, "measure", lambda self, suite, name, workload: {**timing, **answers[name]}
    )
    rows = {row["name"]: row for row in session.rows("loss", TINY)}
    assert rows["ours: packed"]["status"] == "ok"
    assert rows["ours: packed"]["reference"] == "ours: packed"
    assert rows["wrong loss"]["status"] == "disagrees"


def test_table_has_a_row_for_everything(odd_rows):
    run_of_rows = {"suite": "loss", "machine": "here", "workload": TINY.__dict__}
    table = report.table({**run_of_rows, "rows": list(odd_rows.values())})
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(odd_rows)
    assert len({line.count("|") for line in lines}) == 1  # a bar in a reason breaks no table
    (wrong,) = [line for line in lines if line.startswith("| wrong gradient")]
    assert "disagrees" in wrong and " ms" not in wrong
    assert odd_rows["ours: packed"]["status"] == odd_rows["copy of the logits"]["status"] == "ok"


# --- the command --------------------------------------------------------------------------------


def run_here(command, *, input, **options):
    """subprocess.run of benchmarks.measure, but for one case without the process."""
    request = json.loads(input)
    if (request["suite"], request["implementation"]) == ("loss", "ours: packed"):
        return subprocess.run(command, input=input, **options)
    try:
        result = {"status": "ok", **answer(request)}
    except Absent as error:
        result = {"status": "absent", "detail": str(error)}
    return subprocess.CompletedProcess(command, 0, "\n" + json.dumps(result), "")


@pytest.mark.parametrize("suite", run.SUITES)
def test_suite_runs_end_to_end(suite, tmp_path, capsys, monkeypatch):
    """With what is certain to be there: a peer more or less on a machine changes nothing."""
    every = implementations()
    special = {
        "pruned": ("ours: pruned", "k2"),
        "tdt": ("ours: TDT, fused", "plain torch"),
        "decode": ("ours: greedy, batched",),
        "parakeet": ("ours: Parakeet, fused loss",),
        "parakeet_tdt": ("ours: Parakeet, fused loss",),
    }
    if suite in ("parakeet", "parakeet_tdt"):
        pytest.importorskip("transformers", minversion=OLDEST_TRANSFORMERS)
    wanted = special.get(suite, ("ours: packed",))
    monkeypatch.setattr(run, "implementations", lambda extra: {n: every[n] for n in wanted})
    here = SimpleNamespace(run=run_here, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr("benchmarks.session.subprocess", here)
    document, picture = tmp_path / "new" / "out.json", tmp_path / "new" / "out.png"
    vocab_size, width = ("50", "256") if suite == "decode" else ("8", "8")
    sizes = ["--vocab-size", vocab_size, "--joiner-dim", width, "--rounds", "1"]
    sizes += ["--repetitions", "1"]
    frames = ["--frames", "20", "--factors", "1", "--lattice", "peaky", "--flush-denormal"]
    outputs = ["--json", str(document), "--plot", str(picture)]
    run.main(["--suite", suite, *sizes, *frames, *outputs])
    table = capsys.readouterr().out
    assert "torch" in table.splitlines()[0]
    for name in wanted:
        assert name in table
    (written,) = json.loads(document.read_text())["runs"]
    assert written["versions"]["torch"] == torch.__version__
    assert written["commit"] and written["options"]["suite"] == suite
    assert {row["name"] for row in written["rows"]} >= set(wanted)
    if suite != "pruned":
        assert written["versions"]["ours"] == transducer_toolkit.__version__
        assert all(row["status"] == "ok" for row in written["rows"])
    assert picture.stat().st_size > 1000
    assert str(tmp_path) not in document.read_text()


def test_runs_as_a_module_from_another_folder(tmp_path):
    command = [python(), "-m", "benchmarks.run", "--suite", "accuracy", "--frames", "20",
               "--peers", "no_such_peer"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(PROJECT_ROOT)}
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert process.returncode == 2
    assert "--peers: expected all, none or some of" in process.stderr
    assert "got no_such_peer" in process.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_device_is_refused(capsys):
    with pytest.raises(SystemExit):
        run.main(["--suite", "loss", "--device", "cuda"])
    assert "torch sees no CUDA device here" in capsys.readouterr().err


def test_peers_are_chosen_by_project():
    parser = run.parser()
    chosen = run.choose_implementations(["torchaudio", "k2"], (), parser)
    assert {entry.project for entry in chosen.values()} == {"torchaudio", "k2", "ours"}
    nobody = run.choose_implementations(["none"], (), parser)
    assert {entry.project for entry in nobody.values()} == {"ours"}
    assert run.choose_implementations(["all"], (), parser) == implementations()


# --- workloads ----------------------------------------------------------------------------------


def test_built_in_shapes_have_the_quantiles_of_librispeech():
    frames, symbols = utterance_shapes(None).T
    assert np.percentile(frames, 50) == pytest.approx(343, rel=0.02)
    assert (frames.min(), frames.max()) >= (31, 600)
    assert (symbols / frames).mean() == pytest.approx(0.215, rel=0.02)


def test_shapes_from_a_file(tmp_path):
    np.save(tmp_path / "good.npy", np.array([[5, 2], [9, 3]], dtype=np.int32))
    assert utterance_shapes(tmp_path / "good.npy").tolist() == [[5, 2], [9, 3]]
    np.save(tmp_path / "bad.npy", np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"shapes: expected \(N, 2\).*got \(2, 3\)"):
        utterance_shapes(tmp_path / "bad.npy")


def test_batches_keep_to_their_frames():
    shapes = utterance_shapes(None)
    neighbours = choose_batch(shapes, max_frames=10_000, batch="sorted")
    strangers = choose_batch(shapes, max_frames=10_000, batch="unsorted")
    assert np.ptp(neighbours[:, 0]) < 5 < np.ptp(strangers[:, 0])
    for batch in (neighbours, strangers):
        assert 9_000 < batch[:, 0].sum() <= 10_000
    assert len(choose_batch(shapes, max_frames=1, batch="sorted")) == 1


def test_every_search_has_to_find_the_transcript():
    workload = Workload(frames=(60, 40), symbols=(12, 9), vocab_size=50, joiner_dim=256)
    spoken = decode.transcripts(workload)
    assert [len(tokens) for tokens in spoken] == [12, 9]
    assert all(a != b for tokens in spoken for a, b in itertools.pairwise(tokens))
    found = ask("decode", "one frame at a time", workload)
    assert found["tokens"] == ask("decode", "truth", workload)["tokens"] == spoken
    missed = {"tokens": [spoken[0][:-1], spoken[1]]}
    assert disagreement(missed, {"tokens": spoken}) == "4.8% token errors"


@pytest.mark.parametrize(
    ("status", "stderr", "expected"),
    [
        (-9, "", {"status": "out of memory", "detail": "killed by SIGKILL"}),
        (-6, "std::bad_alloc\n", {"status": "out of memory", "detail": "std::bad_alloc"}),
        (-11, "", {"status": "crashed", "detail": "SIGSEGV"}),
        (3, "", {"status": "crashed", "detail": "exit status 3: nothing on stderr"}),
    ],
)
def test_a_process_that_ends_early_says_why(status, stderr, expected):
    assert ended_process(status, stderr) == expected


def test_scaling_changes_one_thing_at_a_time():
    sizes = {"cells": set(), "V": set(), "D": set(), "T": set()}
    for variable, value, workload in scaling_workloads(TINY, 80, (0.5, 1.0, 2.0)):
        (num_frames,), (num_symbols,) = set(workload.frames), set(workload.symbols)
        assert num_symbols == 4
        actual = {
            "cells": len(workload.frames) * 20 * 5,
            "V": workload.vocab_size,
            "D": workload.joiner_dim,
            "T": num_frames,
        }
        assert actual.pop(variable) == value
        middle = {"cells": 400, "V": 6, "D": 4, "T": 20}
        assert actual == {key: middle[key] for key in actual}
        sizes[variable].add(value)
    assert sizes == {"cells": {200, 400, 800}, "V": {3, 6, 12}, "D": {2, 4, 8}, "T": {10, 20, 40}}


# --- installing peers ---------------------------------------------------------------------------


def test_a_trained_lattice_knows_its_alignment():
    workload = Workload((90, 60), (20, 11), 50, 128, lattice="trained")
    losses, _ = step_truth(workload)
    untrained, _ = step_truth(replace(workload, lattice="peaky"))
    frames = torch.tensor(workload.frames)
    assert (losses / frames < 0.3).all() and (untrained / frames > 3).all()


def test_a_trained_lattice_needs_a_joiner(capsys):
    with pytest.raises(SystemExit):
        run.main(["--suite", "loss", "--lattice", "trained"])
    assert "--lattice trained: suite loss has no such joiner" in capsys.readouterr().err


def test_patch_makes_a_peer_build_without_cuda(tmp_path):
    (tmp_path / "cmake").mkdir()
    (tmp_path / "CMakeLists.txt").write_text('set(CMAKE_CXX_STANDARD 14 CACHE STRING "version")\n')
    install_peers.patch_cmake(tmp_path)
    assert (tmp_path / "CMakeLists.txt").read_text().startswith("set(CMAKE_CXX_STANDARD 17 CACHE")
    assert "find_package(Torch" not in (tmp_path / "cmake" / "torch.cmake").read_text()
    assert "FetchContent" not in (tmp_path / "cmake" / "pybind11.cmake").read_text()
    with pytest.raises(install_peers.NotBuilt, match="another version"):
        install_peers.patch_cmake(tmp_path)


def test_reason_is_what_went_wrong_without_the_noise():
    output = """  error: subprocess-exited-with-error
      File "setup.py", line 22, in <module>
      Exception: CPU version is not implemented
      [end of output]
    error: metadata-generation-failed
    note: This is an issue with the package mentioned above, not pip.
    """
    assert install_peers.reason(output) == "Exception: CPU version is not implemented"
    assert install_peers.reason("one\n\ntwo\n") == "one\ntwo"


def test_library_is_taken_out_of_a_wheel(tmp_path, monkeypatch):
    def download(*arguments, environment=None):
        folder = Path(arguments[arguments.index("--dest") + 1])
        with zipfile.ZipFile(folder / "other-2.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("other/libs/libloss.so", b"compiled")

    monkeypatch.setattr(install_peers, "pip", download)
    peer = install_peers.Peer("other==2.0", "loss_library", library="other/libs/libloss.so")
    install_peers.install_library(peer, tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("loss_library")
    assert Path(module.PATH).read_bytes() == b"compiled"
    assert module.__version__ == "2.0"


def test_what_cannot_be_built_is_said(tmp_path, capsys, monkeypatch):
    def refuse(command, environment=None):
        raise install_peers.NotBuilt("ERROR: no network\nand more")

    monkeypatch.setattr(install_peers, "run", refuse)
    monkeypatch.setattr(sys, "argv", ["install_peers.py", "--target", str(tmp_path), "k2"])
    with pytest.raises(SystemExit):
        install_peers.main()
    assert capsys.readouterr().out == "k2: not built\n    ERROR: no network\n    and more\n"
