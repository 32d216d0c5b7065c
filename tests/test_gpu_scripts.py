# SPDX-License-Identifier: Apache-2.0
"""benchmarks/gpu/all.sh without a GPU: a dry run, killed runs, and the parts of its stages."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from benchmarks.gpu import pytest_plugin, tables
from tests.backends import emulated_module
from transducer_toolkit.ops import native

ROOT = Path(__file__).resolve().parents[1]
# What the GPU machine's Python does not have of what the project uses elsewhere.
LACKING = ["hydra", "hydra_plugins", "omegaconf", "lhotse", "jiwer", "soundfile"]
LACKING += ["espeakng_loader", "sherpa_onnx", "transformers"]
BLOCKER = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {LACKING}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
"""
STAGES = ["environment", "module", "parity", "first_failure", "profile", "table", "models", "train"]
STAGES += ["ncu", "memcheck", "racecheck", "synccheck", "initcheck", "build_peers", "peers"]

# Doubles of NVIDIA's tools: they refuse unknown options, and run the command that follows. Of
# commands that are the same, the sanitizer runs the first and repeats its output.
SANITIZER = """#!/usr/bin/env bash
tool=
while [[ $1 == --* ]]; do
  case $1 in
    --tool) tool=$2 ;;
    --kernel-name) [[ $2 == kns=* ]] || exit 2 ;;
    --error-exitcode | --target-processes | --print-limit) ;;
    *) echo "unknown option $1"; exit 2 ;;
  esac
  shift 2
done
kept=$(dirname "$0")/$(printf '%s\\0' "$@" "$PYTHONPATH" "$PYTORCH_NO_CUDA_MEMORY_CACHING" |
  sha256sum | cut -d ' ' -f 1)
if ! [ -e "$kept" ]; then
  "$@" >"$kept.part" 2>&1 || { status=$?; cat "$kept.part"; exit $status; }
  mv "$kept.part" "$kept"
fi
cat "$kept"
case $tool in
  initcheck) where='at::native::fill_kernel(float*)' ;;
  racecheck) where='transducer::WalkKernel(int)' ;;
  *) echo '========= ERROR SUMMARY: 0 errors'; exit 0 ;;
esac
echo '========= Uninitialized __global__ memory read of size 4 bytes'
echo "=========     at $where+0x90 in file.cu:35"
echo '=========     Host Frame: transducer::Launch() [0x1234] in _C.so'
echo '========= ERROR SUMMARY: 1 error'
exit 9
"""
NCU = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do
  case $1 in
    --csv) shift ;;
    --clock-control) [ "$2" = none ] || exit 2; shift 2 ;;
    --profile-from-start | --kernel-name | --launch-count | --page | --section) shift 2 ;;
    *) echo "unknown option $1"; exit 2 ;;
  esac
done
echo '==PROF== Connected to process 1'
"$@" || exit $?
cat <<'END'
"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","1","WalkKernel<float>(int)","GPU Speed Of Light Throughput","DRAM Throughput","%","71.5"
"0","1","WalkKernel<float>(int)","GPU Speed Of Light Throughput","Memory Throughput","%","80.1"
"0","1","WalkKernel<float>(int)","GPU Speed Of Light Throughput","Duration","us","92.7"
"0","1","WalkKernel<float>(int)","Memory Workload Analysis","Memory Throughput","Gbyte/s","2.9"
"0","1","WalkKernel<float>(int)","Launch Statistics","Registers Per Thread","register/thread","40"
"1","1","UsesKernel(int)","GPU Speed Of Light Throughput","Duration","us","15.0"
END
"""

# A double of Python for tests of what is between the stages: what imports torch ends at once.
QUICK_PYTHON = f"""#!/usr/bin/env bash
case "$*" in
  - | "-m benchmarks.gpu.environment" | "-m benchmarks.gpu.kernel_times "*) echo 'figures: quick' ;;
  *) exec {shlex.quote(sys.executable)} "$@" ;;
esac
"""

# Starts the fork server of a tree: its Python has imported torch and lacks LACKING.
FORKS = """
import sys
from tests.fork_server import python
print(python("torch"), flush=True)
sys.stdin.read()
"""
LOOK = """
import importlib.util, sys
assert "torch" in sys.modules, "no fork"
assert importlib.util.find_spec("tests.backends").origin.startswith(sys.path[1]), "not of the tree"
try:
    import hydra
except ModuleNotFoundError:
    sys.exit()
sys.exit("the machine lacks hydra")
"""
# The stage table has measured ours and torchaudio in all modes: of peers, one mode is enough.
DRY_PYTHON = """#!/usr/bin/env bash
case "$*" in *gpu_peers.json*) set -- "$@" --modes float32 ;; esac
exec {} "$@"
"""


@pytest.fixture
def tree(tmp_path):
    """A copy of the project with its compiled module, as it would arrive on another machine."""
    root = tmp_path / "tree"
    root.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "conf", "results")
    for name in ("benchmarks", "tests", "transducer_toolkit", "csrc"):
        shutil.copytree(ROOT / name, root / name, ignore=ignored)
    shutil.copytree(ROOT / "conf", root / "conf")
    for name in ("CMakeLists.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, root / name)
    shutil.copy(native.extension.__file__, root / "transducer_toolkit")
    return root


def environment(tmp_path, tools=(), **variables):
    """Variables of a machine that lacks LACKING and has these tools, as doubles."""
    for folder in ("blocked", "tools"):
        (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / "blocked" / "sitecustomize.py").write_text(BLOCKER)
    for name, text in tools:
        path = tmp_path / "tools" / name
        path.write_text(text)
        path.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    folders = [str(tmp_path / "tools"), str(Path(sys.executable).parent), kept["PATH"]]
    return {
        **kept,
        "PATH": os.pathsep.join(folders),
        "PYTHON": sys.executable,
        "PYTHONPATH": str(tmp_path / "blocked"),
        "EMULATED_MODULE": emulated_module().__file__,
        "OUT": str(tmp_path / "out"),
        "OMP_NUM_THREADS": "1",
        "DRY": "1",
        "WORKERS": "0",
        "TESTS": "3",
        "BUDGET": "500",
        **variables,
    }


def quick(tmp_path):
    """The variable of environment() that makes Python a double."""
    path = tmp_path / "quick_python"
    path.write_text(QUICK_PYTHON)
    path.chmod(0o755)
    return {"PYTHON": str(path)}


@contextlib.contextmanager
def forks(tree, tmp_path, variables):
    """Let the Python of `variables` be forks of a process that has imported torch."""
    path = tmp_path / "dry_python"
    variables["PYTHON"] = str(path)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", FORKS]
    with subprocess.Popen(command, cwd=tree, env=variables, **pipes) as server:
        path.write_text(DRY_PYTHON.format(server.stdout.readline().strip()))
        path.chmod(0o755)
        (tmp_path / "blocked" / "look.py").write_text(LOOK)
        paths = f"{tree}{os.pathsep}{variables['PYTHONPATH']}"
        look = [path, "-m", "look"]
        subprocess.run(look, env=variables | {"PYTHONPATH": paths}, check=True)
        yield


def lines_of(text):
    """{stage: (status, seconds, figures)} of a summary."""
    found = re.findall(r"^(\w+) +(\w+(?: \w+)?) +(\d+) s  (.*)$", text, re.MULTILINE)
    assert len(found) == len(text.splitlines()), text
    return {stage: (status, int(seconds), figures) for stage, status, seconds, figures in found}


def test_a_dry_run_of_everything(tree, tmp_path):
    tools = [("compute-sanitizer", SANITIZER), ("ncu", NCU)]
    variables = environment(tmp_path, tools, WORKERS="1")
    script = ["bash", str(tree / "benchmarks/gpu/all.sh")]
    with forks(tree, tmp_path, variables):
        done = subprocess.run(script, env=variables, capture_output=True, text=True)
    out = tmp_path / "out"
    log = (out / "log.txt").read_text()
    assert done.stdout == (out / "summary.txt").read_text(), done.stderr
    summary = lines_of(done.stdout)
    assert list(summary) == STAGES, log
    expected = {"first_failure": "absent", "train": "absent", "racecheck": "failed 9"}
    assert {name: line[0] for name, line in summary.items()} == {
        name: expected.get(name, "ok") for name in STAGES
    }, log
    assert done.returncode == 1  # a finding of racecheck
    assert sum(seconds for _, seconds, _ in summary.values()) <= 500
    figures = {name: line[2] for name, line in summary.items()}
    assert "missing: nvidia-smi" in figures["environment"]
    assert re.match(r"[1-9]\d* passed, 0 failed, 0 skipped$", figures["parity"])
    assert figures["profile"].startswith("device ms: fused bfloat16")
    assert re.search(r"torchaudio step TF32 [\d.]+; 49 of 49 rows", figures["table"])
    assert re.match(r"ms: TDT TF32 [\d.]+; 18 of 40 rows", figures["models"])
    assert figures["train"] == "ModuleNotFoundError: No module named 'hydra'"
    assert figures["build_peers"] == "build: none"
    assert (
        figures["ncu"]
        == "2 launches: WalkKernel 92.7 us (DRAM 71.5 %), UsesKernel 15.0 us (DRAM ?)"
    )
    for tool, count in ("memcheck", 0), ("racecheck", 1), ("synccheck", 0), ("initcheck", 0):
        assert re.match(rf"{count} findings in our kernels; .*; 3 passed, 0 failed", figures[tool])
    assert sorted(path.name for path in out.iterdir()) == [
        "gpu_benchmark.json",
        "gpu_models.json",
        "gpu_peers.json",
        "gpu_profile.json",
        "log.txt",
        "parity.xml",
        "sanitize.txt",
        "summary.txt",
    ]
    suite = ElementTree.parse(out / "parity.xml").getroot()[0]
    assert int(suite.get("tests")) > 20 and suite.get("failures") == "0"
    rows = json.loads((out / "gpu_peers.json").read_text())["rows"]
    assert {row["batch"] for row in rows} == {"sorted", "peaky", "unsorted"}
    assert any(row.get("problem", "").startswith("absent") for row in rows)


def processes_of(session):
    """Ids of the session's processes that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def wait_for(condition, limit_s=60.0):
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def start(tree, variables, *stages):
    script = ["bash", str(tree / "benchmarks/gpu/all.sh"), *stages]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(script, env=variables, start_new_session=True, **pipes)


def lines_written(tmp_path):
    path = tmp_path / "out" / "summary.txt"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.parametrize("finished, delay_s", [(0, 0.2), (2, 1.5), (3, 0.1)])
def test_a_run_that_is_terminated_prints_what_is_finished(tree, tmp_path, finished, delay_s):
    double = quick(tmp_path) if finished == 3 else {}
    process = start(tree, environment(tmp_path, **double), "profile", "parity", "table")
    wait_for(lambda: lines_written(tmp_path) >= finished and (tmp_path / "out").exists())
    time.sleep(delay_s)
    process.terminate()
    printed, _ = process.communicate(timeout=20)
    assert process.returncode == 143
    summary = lines_of(printed)
    assert list(summary) == ["environment", "module", "profile", "parity", "table"][: len(summary)]
    statuses = [status for status, _, _ in summary.values()]
    assert statuses.count("ok") >= finished
    assert set(statuses[:-1]) <= {"ok"} and set(statuses) <= {"ok", "killed"}
    assert printed == (tmp_path / "out" / "summary.txt").read_text()
    wait_for(lambda: not processes_of(process.pid), 10)


def test_a_run_that_is_killed_leaves_its_summary(tree, tmp_path):
    """SIGKILL cannot be caught: the lines of finished stages are on disk."""
    process = start(tree, environment(tmp_path, **quick(tmp_path)), "parity")
    wait_for(lambda: lines_written(tmp_path) >= 2)
    process.kill()
    process.communicate()
    for child in processes_of(process.pid):
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(child, signal.SIGKILL)
    summary = lines_of((tmp_path / "out" / "summary.txt").read_text())
    assert [summary[name][0] for name in ("environment", "module")] == ["ok", "ok"]


def test_a_stage_that_does_not_fit_is_skipped(tree, tmp_path):
    variables = environment(tmp_path, BUDGET="14", **quick(tmp_path))
    process = start(tree, variables, "table", "profile")
    printed, errors = process.communicate(timeout=60)
    summary = lines_of(printed)
    assert summary["table"][0] == "skipped", printed + errors
    assert re.fullmatch(r"\d+ s left", summary["table"][2])


def only_test_backends(tree):
    """Leave the tests of the stage parity no other file, and nothing to import PyTorch for."""
    others = set((tree / "tests").glob("test_backends_*.py"))
    others |= set((tree / "tests/losses").glob("test_cuda*.py"))
    for path in others | {tree / "tests/conftest.py"}:
        path.write_text("")


def test_a_stage_that_takes_too_long_is_stopped(tree, tmp_path):
    """The tests that have run are in parity.xml; the stages behind it get their time."""
    test = "import time, pytest\ndef test_quick(): pass\n"
    test += "@pytest.mark.parametrize('name', ['emulated'])\ndef test_kept_rows_slow(name):\n"
    (tree / "tests/test_backends.py").write_text(test + "    time.sleep(100)\n")
    only_test_backends(tree)
    parity = tree / "benchmarks/gpu/parity.sh"
    parity.write_text(parity.read_text().replace("emulated and (kept_rows or pruned)", "test"))
    script = tree / "benchmarks/gpu/all.sh"
    text = script.read_text()
    script.write_text(text.replace("stage 20 90 bash $here/parity", "stage 5 6 bash $here/parity"))
    variables = environment(tmp_path, **quick(tmp_path))
    process = start(tree, variables, "parity", "first_failure")
    printed, _ = process.communicate(timeout=60)
    summary = lines_of(printed)
    assert summary["parity"][0] == "timed out" and summary["first_failure"][0] == "absent"
    assert summary["parity"][2].startswith("1 passed, 0 failed")
    suite = ElementTree.parse(tmp_path / "out" / "parity.xml").getroot()[0]
    assert int(suite.get("tests")) >= 1 and process.returncode == 1


def test_the_first_failure_is_run_alone(tree, tmp_path):
    failing = "def test_kept_rows_emulated(): assert 1 == 2, 'one and two'\n"
    (tree / "tests/test_backends.py").write_text(failing)
    only_test_backends(tree)
    tools = [("compute-sanitizer", SANITIZER)]
    variables = environment(tmp_path, tools, **quick(tmp_path))
    process = start(tree, variables, "parity", "first_failure")
    printed, _ = process.communicate(timeout=100)
    summary = lines_of(printed)
    test = "tests/test_backends.py::test_kept_rows_emulated"
    assert summary["parity"][0] == "failed 1"
    assert re.search(rf" 1 failed, .*first failure: {test}$", summary["parity"][2])
    assert summary["first_failure"][0] == "failed 1"
    assert summary["first_failure"][2].startswith(f"{test}: E  ")
    assert "one and two" in summary["first_failure"][2]


def test_an_unknown_stage_is_an_error(tree, tmp_path):
    process = start(tree, environment(tmp_path), "partiy")
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 2 and "got partiy" in errors


@pytest.mark.parametrize("is_current", [True, False])
def test_the_module_that_was_brought_along(tree, tmp_path, is_current):
    """It is used if it was made from these sources."""
    module = tree / "transducer_toolkit" / Path(native.extension.__file__).name
    kit = tree / ".gpu_kit"
    kit.mkdir()
    shutil.copy(module, kit)
    if is_current:
        module.unlink()
    checksum = ["bash", "-c", f"source {tree}/benchmarks/gpu/common.sh; sources_checksum"]
    found = subprocess.run(checksum, capture_output=True, text=True, check=True).stdout
    (kit / "sources.sha256").write_text(found)
    if not is_current:
        with (tree / "csrc/common.h").open("a") as file:
            file.write("// changed\n")
    variables = environment(tmp_path)
    script = ["bash", str(tree / "benchmarks/gpu/build.sh")]
    done = subprocess.run(script, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = "brought along" if is_current else "already in place"
    assert f"figures: {said}" in done.stdout and module.exists()


def test_tests_and_benchmarks_import_nothing_that_the_machine_lacks(tmp_path):
    variables = environment(tmp_path)
    variables["PYTHONPATH"] += f"{os.pathsep}{ROOT}"
    variables["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # as in common.sh: Hydra has one
    code = "import hydra"
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True)
    assert done.returncode != 0  # the blocker works
    code = (
        "import sys, pytest, benchmarks.peers, benchmarks.gpu.extra, benchmarks.gpu.kernel_times\n"
    )
    code += "sys.exit(pytest.main(sys.argv[1:]))"
    files = sorted(ROOT.glob("tests/test_backends*.py"))
    files += sorted(ROOT.glob("tests/losses/test_cuda*.py"))
    command = [sys.executable, "-c", code, "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *map(str, files)], env=variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^\d{3,} tests collected", done.stdout, re.MULTILINE)


# --- the pytest plugin --------------------------------------------------------------------------


def run_pytest(folder, test, *arguments):
    (folder / "test_it.py").write_text(textwrap.dedent(test))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.gpu.pytest_plugin"]
    command += ["-p", "xdist", "-p", "no:cacheprovider", "--rootdir", str(folder)]
    command += [*arguments, "test_it.py"]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)


def test_a_lost_context_fails_one_test(tmp_path):
    """The worker ends, and the tests that are left run in another one."""
    test = """
        import sys, types
        import pytest

        @pytest.mark.parametrize("number", range(6))
        def test_it(number):
            if number == 1:
                def synchronize():
                    raise RuntimeError("an illegal memory access was encountered")
                cuda = types.SimpleNamespace(
                    is_initialized=lambda: True, synchronize=synchronize
                )
                sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)
            if "torch" in sys.modules:
                sys.modules["torch"].cuda.synchronize()
    """
    done = run_pytest(tmp_path, test, "-n", "1", "--failures", str(tmp_path / "failed"))
    assert (tmp_path / "failed").read_text().splitlines()[0] == "test_it.py::test_it[1]"
    failed = set((tmp_path / "failed").read_text().split())
    assert failed == {"test_it.py::test_it[1]"}, done.stdout
    assert "figures: 5 passed" in done.stdout
    assert "illegal memory access" in done.stdout


def test_a_test_that_cannot_be_imported_is_a_failure(tmp_path):
    done = run_pytest(
        tmp_path, "import nothing_of_this_name", "--failures", str(tmp_path / "failed")
    )
    assert (tmp_path / "failed").read_text() == "test_it.py\n"
    assert "figures: 0 passed, 1 failed, 0 skipped; first failure: test_it.py" in done.stdout


def test_a_few_tests_of_each_function_are_kept():
    tests = [f"test_a[{i}]" for i in range(100)] + ["test_b"] + [f"test_c[{i}]" for i in range(3)]
    kept = pytest_plugin.spread(tests, 9)
    assert len(kept) == len(set(kept)) == 9 and set(kept) <= set(tests)
    by_function = {
        name: [test for test in kept if test.startswith(name)]
        for name in ("test_a", "test_b", "test_c")
    }
    assert {name: len(own) for name, own in by_function.items()} == {
        "test_a": 5,
        "test_b": 1,
        "test_c": 3,
    }
    numbers = [int(test[7:-1]) for test in by_function["test_a"]]
    assert numbers == [10, 30, 50, 70, 90]
    assert pytest_plugin.spread(tests, 1000) == tests


def test_at_most_so_many_tests_run(tmp_path):
    test = """
        import pytest

        @pytest.mark.parametrize("number", range(50))
        def test_it(number): pass
    """
    done = run_pytest(tmp_path, test, "--at-most", "7")
    assert "7 passed, 43 deselected" in done.stdout


def test_a_table_of_ncu_has_no_launch_without_a_kernel():
    text = NCU.partition("<<'END'\n")[2].rpartition("END")[0]
    rows = tables.ncu_rows(text)
    assert [name for name, _ in rows] == ["WalkKernel", "UsesKernel"]
    assert rows[0][1] == {
        "DRAM": "71.5 %",
        "memory": "80.1 %",
        "duration": "92.7 us",
        "registers": "40",
    }
    assert tables.ncu_rows("==ERROR== no permission") == []
