# SPDX-License-Identifier: Apache-2.0
"""A fork of the server cannot be told from a process of its own, apart from its speed."""

import json
import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from tests.fork_server import ROOT, folder, python

PATHS = ("a", str(ROOT))


def command(folder, code, *arguments, executable=None, options=(), **variables):
    """Arguments of subprocess.run that run the code as ``-m program`` in a folder."""
    (folder / "program.py").write_text(code)
    return {
        "args": [executable or python(), *options, "-m", "program", *arguments],
        "cwd": folder,
        "env": {**os.environ, "PYTHONPATH": os.pathsep.join(PATHS), **variables},
    }


def is_a_fork(folder, **variables):
    code = "import sys; print('torch' in sys.modules)"
    done = subprocess.run(**command(folder, code, **variables), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout == "True\n"


SAME = {
    "success": "print(1)",
    "status": "import sys; print(2); sys.exit(3)",
    "message": "import sys; sys.exit('a sentence')",
    "no flush": "import os; print('lost'); os._exit(5)",
    "after the end": "import atexit; atexit.register(print, 'last'); print('first')",
    "a thread": "import threading as t, time\n"
    "t.Thread(target=lambda: (time.sleep(0.1), print('thread'))).start()",
    "SIGKILL": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "SIGTERM": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "SIGABRT": "import os; os.abort()",
    "an exception": "print('before'); 1 / 0",
    "both outputs": "import sys\nfor i in range(3): print(i); print(i, file=sys.stderr)",
    "arguments": "import sys; print(sys.argv, __name__, __spec__.name)",
    "the module": "import __main__; print(__main__.__file__, __main__.__spec__.name)",
    "the place": "import os, sys; print(os.getcwd(), [bool(path) for path in sys.path[:1]])\n"
    "print([path for path in sys.path if not path.startswith(sys.prefix)])",
    # Lightning, when it is imported, sets the two that are left out.
    "the environment": "import os; print(sorted((name, value) for name, value in os.environ.items()"
    " if name not in ('PYTORCH_NVML_BASED_CUDA_CHECK', 'TORCHINDUCTOR_CACHE_DIR')))",
    "input": "import sys; print(sys.stdin.read().upper(), sys.stdin.isatty())",
    "descriptors": "import os; print(sorted(os.listdir('/proc/self/fd')))",
    "streams": "import sys\nfor stream in (sys.stdin, sys.stdout, sys.stderr):\n"
    "    print(stream.name, stream.encoding, stream.errors, stream.line_buffering, stream.mode)",
    "bytes": "import os, sys; print(os.fsencode(sys.argv[2]), os.environb[b'BYTES'])",
    "signals": "import signal\nfor number in signal.valid_signals(): print(number, "
    "signal.getsignal(number))\nprint(signal.pthread_sigmask(signal.SIG_BLOCK, []))",
}


@pytest.mark.parametrize("name", SAME)
def test_equals_a_process_of_its_own(name, tmp_path):
    ends = []
    for executable in (sys.executable, python()):
        options = command(tmp_path, SAME[name], "x=1 2", b"\xff", executable=executable)
        options["env"] = dict(map(lambda it: tuple(map(os.fsencode, it)), options["env"].items()))
        options["env"] |= {b"BYTES": b"\xfe", b"RLIMIT_CORE": b"0"}
        done = subprocess.run(**options, input=b"text", capture_output=True)
        ends.append((done.returncode, done.stdout, done.stderr.splitlines()[-1:]))
    assert ends[0] == ends[1]


def test_no_output_is_buffered_if_asked(tmp_path):
    code = "import os; print(1); os._exit(0)"
    options = command(tmp_path, code, options=["-u"])
    assert subprocess.run(**options, capture_output=True, check=True).stdout == b"1\n"


def test_a_module_that_does_not_exist(tmp_path):
    options = command(tmp_path, "")
    options["args"] = [python(), "-m", "programm"]
    done = subprocess.run(**options, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.endswith("No module named programm\n")


def test_a_closed_pipe_is_an_error_of_the_flush(tmp_path):
    ends = []
    for executable in (sys.executable, python()):
        reader, writer = os.pipe()
        os.close(reader)
        options = command(tmp_path, "print(1)", executable=executable)
        done = subprocess.run(**options, stdout=writer, stderr=subprocess.PIPE, text=True)
        os.close(writer)
        ends.append((done.returncode, done.stderr.splitlines()[-1]))
    assert ends[0] == ends[1] and "BrokenPipeError" in ends[0][1]


def test_outputs_to_one_file_keep_their_order(tmp_path):
    code = "import sys\nfor i in range(3): print(i, flush=True); print(-i, file=sys.stderr)"
    with (tmp_path / "out").open("w") as out:
        subprocess.run(**command(tmp_path, code), stdout=out, stderr=out, check=True)
    assert (tmp_path / "out").read_text().split() == ["0", "0", "1", "-1", "2", "-2"]


def test_a_terminal_is_one(tmp_path):
    code = "import sys\n"
    code += "print(*((s.isatty(), s.line_buffering) for s in (sys.stdin, sys.stdout, sys.stderr)))"
    said = []
    for executable in (sys.executable, python()):
        main, side = pty.openpty()
        options = command(tmp_path, code, executable=executable)
        subprocess.run(**options, stdin=side, stdout=side, stderr=side, check=True)
        said.append(os.read(main, 200))
        os.close(main)
        os.close(side)
    assert said[0] == said[1] and said[0].count(b"(True") == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_signals_arrive(number, tmp_path):
    code = "import signal, sys, time\n"
    code += f"signal.signal({int(number)}, lambda *_: sys.exit(7))\n"
    code += "print(flush=True); time.sleep(60)"
    with subprocess.Popen(**command(tmp_path, code), stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        process.send_signal(number)
        assert process.wait(20) == 7
    code = code.replace("lambda *_: sys.exit(7)", "signal.SIG_DFL")
    with subprocess.Popen(
        **command(tmp_path, code), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        process.stdout.readline()
        process.send_signal(number)
        assert process.wait(20) == -number


def test_a_kill_reaches_the_fork_and_its_processes(tmp_path):
    code = "import os, time; os.fork(); os.write(1, b'x'); time.sleep(60)"
    with subprocess.Popen(**command(tmp_path, code), stdout=subprocess.PIPE) as process:
        assert os.read(process.stdout.fileno(), 1) + os.read(process.stdout.fileno(), 1) == b"xx"
        process.kill()
        assert process.wait(20) == -signal.SIGKILL
        started_s = time.monotonic()
        assert process.stdout.read() == b""  # all that could write have ended
        assert time.monotonic() - started_s < 20


def test_a_client_that_is_killed_early_harms_no_other(tmp_path):
    code = "import time; time.sleep(60)"
    for delay_ms in range(0, 100, 5):
        with subprocess.Popen(**command(tmp_path, code)) as process:
            time.sleep(delay_ms / 1000)
            process.kill()
    assert is_a_fork(tmp_path)


STATE = """
import gc, logging, os, random, sys, threading, warnings
import matplotlib, numpy, torch
from hydra.core.global_hydra import GlobalHydra
loggers = [logging.root, *map(logging.getLogger, sorted(logging.root.manager.loggerDict))]
print([(it.name, it.level, len(it.handlers)) for it in loggers])
print(warnings.filters, matplotlib.rcParams["backend"], matplotlib.rcParams["font.size"])
print(torch.get_num_threads(), torch.initial_seed(), torch.rand(1), torch.get_default_dtype())
print(torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(), gc.get_threshold())
print(GlobalHydra.instance().is_initialized(), sorted(os.environ), os.getcwd(), sys.path)
print(threading.active_count(), sorted(sys.modules), os.umask(0o22))
print(random.random(), numpy.random.random(), file=sys.stderr)
"""
SPOIL = """
logging.basicConfig(level=1); warnings.simplefilter("error"); matplotlib.use("svg")
matplotlib.rcParams["font.size"] = 33; torch.set_num_threads(2); torch.manual_seed(3)
torch.set_default_dtype(torch.float64); torch.use_deterministic_algorithms(True)
from hydra import initialize_config_module
initialize_config_module("transducer_toolkit.conf", version_base="1.3")
os.environ["LEFT"] = "1"; os.chdir("/"); sys.path.append("/left"); os.umask(0)
torch.ones(1000, 1000) @ torch.ones(1000, 1000)
"""


def test_no_state_goes_from_one_command_to_the_next(tmp_path):
    first, second = (
        subprocess.run(**command(tmp_path, code), capture_output=True, text=True)
        for code in (STATE + SPOIL, STATE)
    )
    assert first.returncode == second.returncode == 0, first.stderr
    assert first.stdout == second.stdout and "'transducer_toolkit.training'" in first.stdout
    numbers = [number for done in (first, second) for number in done.stderr.split()[:2]]
    assert len(set(numbers)) == 4, numbers  # those that have no seed differ


def test_workers_share_a_server(tmp_path):
    """It is there after the end of one of them."""
    started = python()  # here, as it keeps the standard streams of the process that starts it
    code = f"from tests import fork_server; fork_server.shared_folder = {folder()!r}\n"
    code += "print(fork_server.python(), end='')"
    options = command(tmp_path, code, executable=sys.executable)
    assert subprocess.run(**options, capture_output=True, text=True).stdout == started
    assert is_a_fork(tmp_path)


def test_what_a_start_reads_needs_a_start(tmp_path):
    assert is_a_fork(tmp_path) and is_a_fork(tmp_path, TRANSDUCER_TOOLKIT_RUN_ID="a")
    for name in ("PYTHONIOENCODING", "LC_ALL", "OMP_NUM_THREADS", "HOME", "PYTHONPATH"):
        value = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "OMP_NUM_THREADS": "3"}
        assert not is_a_fork(tmp_path, **{name: value.get(name, str(tmp_path))})
    code = "import json, sys; print(json.dumps([sys.argv[1:], sys.flags.isolated]))"
    done = subprocess.run([python(), "-I", "-c", code, "x"], capture_output=True, check=True)
    assert json.loads(done.stdout) == [["x"], 1]


@pytest.mark.parametrize(
    "name", ["align", "average", "evaluate", "export", "prepare", "train", "transcribe"]
)
def test_no_command_is_imported_before_it_runs(name, tmp_path):
    code = f"import sys; sys.exit('transducer_toolkit.cli.{name}' in sys.modules)"
    subprocess.run(**command(tmp_path, code), check=True)
