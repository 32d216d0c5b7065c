# SPDX-License-Identifier: Apache-2.0
"""Commands in processes of their own that need not import PyTorch and Lightning again.

To import them takes 4 s of CPU time; a training of a test takes 1 s. ``python()`` returns an
executable that behaves as Python does. For ``[-u] -m MODULE`` it asks a server, a process that has
imported what the commands import and composed two configs, for a fork of itself. The fork has the
arguments, the environment, the working directory and the standard streams of the caller. It ends
as any interpreter ends, with a status or by a signal, after atexit and a flush.

A fork cannot change what Python or a package reads when it starts. The executable becomes Python
where one of STARTUP differs from the server's environment, or this tree is not in PYTHONPATH. Use
``sys.executable`` to test what depends on the imports: missing packages, times of starting,
warnings, and each command once.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import io
import marshal
import os
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]
PRELOADED = (
    *("hydra", "lightning", "matplotlib.backends.backend_agg", "soundfile", "jiwer", "rich.table"),
    *("torch.utils.tensorboard", "torch.distributed.launcher.api", "torch._dynamo"),
    *("transducer_toolkit.training.lightning_module", "transducer_toolkit.data.datamodule"),
    *("transducer_toolkit.inference.recognizer", "transducer_toolkit.export"),
)
# Beginnings of the variables that are read when Python or a package starts.
STARTUP = ("PYTHON", "LC_", "LANG", "LD_", "HOME", "XDG_", "TMP", "OMP_", "MKL_", "MPL", "HF_")
STARTUP += ("PYTORCH_", "TORCH_LOGS", "TORCHINDUCTOR_")


shared_folder: str | None = None  # of a server that another process ends


@functools.cache
def folder() -> str:
    """Return the folder of the server, shared_folder or a new one.

    The server ends when the process that has made its folder ends. pytest-xdist's workers share the
    one of the process that starts them (conftest.py).
    """
    if shared_folder is not None:
        return shared_folder
    made = tempfile.mkdtemp(prefix="fork-")  # the path of a socket has at most 107 bytes
    os.mkfifo(f"{made}/alive")
    writer = os.open(f"{made}/alive", os.O_RDWR)

    @atexit.register
    def end() -> None:
        os.close(writer)
        shutil.rmtree(made)

    return made


@functools.cache
def python(*preloaded: str) -> str:
    """Return the path of an executable to start instead of ``sys.executable``.

    Args:
        preloaded: what the server imports, PRELOADED unless it is given.
    """
    executable, address = f"{folder()}/python", f"{folder()}/socket"
    with FileLock(f"{folder()}/lock"):
        if os.path.exists(executable):  # another process has started the server
            return executable
        with socket.socket(socket.AF_UNIX) as listener, open(f"{folder()}/alive", "rb") as alive:
            listener.bind(address)
            listener.listen(64)
            arguments = [executable, str(listener.fileno()), *(preloaded or PRELOADED)]
            paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
            server = subprocess.Popen(
                [sys.executable, "-m", "tests.fork_server", *arguments],
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
                stdin=alive,
                pass_fds=[listener.fileno()],
                start_new_session=True,
            )
        atexit.register(server.poll)  # keeps the object: it warns where it goes first
        client = [str(ROOT / "tests" / "fork_client.py"), address, sys.executable]
        with open(executable, "w", encoding="utf-8") as file:
            file.write(f"#!{sys.executable} -IS\nimport runpy, sys\n")
            file.write(f"sys.argv[:1] = {client!r}\nrunpy.run_path(sys.argv[0])\n")
        os.chmod(executable, 0o700)
    return executable


def serve(executable: str, descriptor: str, *names: str) -> list[str]:
    """Answer the requests of fork_client.py. Returns in each fork, with the arguments to run."""
    listener, input_ = socket.socket(fileno=int(descriptor)), os.fdopen(os.dup(0), "rb", 0)
    before, own = set(sys.modules), dict(os.environb)
    atexit.register(lambda: leak(set(preloaded) - before))  # after all others, as it is the first
    for name in names:
        with contextlib.suppress(ModuleNotFoundError):  # of an extra
            importlib.import_module(name)
    with contextlib.suppress(ModuleNotFoundError):
        from tests.composition import compose_for_forks, composed_once

        composed_once().__enter__()  # until the end of the process, and of each fork
        for name in ("train", "evaluate"):
            compose_for_forks(name, "data=manifest", *["~experiment"] * (name == "train"))
    preloaded = list(sys.modules)
    assert len(os.listdir("/proc/self/task")) == 1, "a fork has only the thread that forks"
    gc.collect()
    gc.freeze()  # else a collection in a fork copies every page
    by_imports = {name: value for name, value in os.environb.items() if own.get(name) != value}
    startup = _at_startup(own | by_imports)
    clients: dict[int, socket.socket] = {}  # those whose forks run
    selector = selectors.DefaultSelector()
    selector.register(input_, selectors.EVENT_READ)
    selector.register(listener, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is input_:
                sys.exit()  # the process that has made the folder has ended
            elif key.fileobj is listener:
                client, _ = listener.accept()
                try:
                    head, streams, _, _ = socket.recv_fds(client, 20, 4)
                    with client.makefile("rb") as rest:
                        arguments, is_unbuffered, environment = marshal.loads(rest.read(int(head)))
                except (OSError, ValueError, EOFError):  # it was killed
                    client.close()
                    continue
                environment |= by_imports
                pid = os.fork() if _at_startup(environment) == startup else None
                if pid == 0:
                    for one in list(selector.get_map().values()):
                        one.fileobj.close()
                    selector.close()
                    client.close()
                    _become(executable, is_unbuffered, environment, streams)
                    return list(arguments)
                for stream in streams:
                    os.close(stream)
                with contextlib.suppress(OSError):
                    client.sendall(b"%20d" % (pid or 0))
                if pid:
                    clients[pid] = client
                    end = os.fdopen(os.pidfd_open(pid), "rb", 0)
                    selector.register(end, selectors.EVENT_READ, pid)
                    selector.register(client, selectors.EVENT_READ, pid)
            elif key.data in clients and key.fileobj is clients[key.data]:  # it was killed
                selector.unregister(key.fileobj)
                for kill in (os.killpg, os.kill):  # it may have no group yet
                    with contextlib.suppress(ProcessLookupError):
                        kill(key.data, signal.SIGKILL)
            elif key.data in clients:
                selector.unregister(key.fileobj)
                key.fileobj.close()
                status = os.waitstatus_to_exitcode(os.waitpid(key.data, 0)[1])
                with clients.pop(key.data) as client, contextlib.suppress(OSError):
                    if client in selector.get_map():
                        selector.unregister(client)
                    client.sendall(b"%20d" % status)


def _at_startup(environment: Mapping[bytes, bytes]) -> dict[bytes, bytes | bool]:
    """Return what a process must have in common with the server."""
    names = tuple(map(os.fsencode, STARTUP))
    found: dict[bytes, bytes | bool] = {
        name: value for name, value in environment.items() if name.startswith(names)
    }
    paths = environment.get(b"PYTHONPATH", b"").split(os.fsencode(os.pathsep))
    return found | {b"PYTHONPATH": os.fsencode(ROOT) in paths}


def _become(
    executable: str, is_unbuffered: bool, environment: Mapping[bytes, bytes], streams: Sequence[int]
) -> None:
    os.setsid()
    os.fchdir(streams[0])
    for number, stream in enumerate(streams[1:]):
        os.dup2(stream, number)
    for stream in streams:
        os.close(stream)
    is_unbuffered |= sys.stdout.write_through
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        former = getattr(sys, name)  # knows whether the server's stream is a terminal or a file
        raw = io.FileIO(number, "w" if number else "r", closefd=False)
        raw.name = f"<{name}>"
        buffered = io.BufferedWriter if number else io.BufferedReader
        stream = io.TextIOWrapper(
            raw if number and is_unbuffered else buffered(raw),
            former.encoding,
            former.errors,
            newline="\n" if number else None,
            line_buffering=not is_unbuffered and (number == 2 or raw.isatty()),
            write_through=is_unbuffered,
        )
        stream.mode = "w" if number else "r"
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    of_server = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environb.clear()
    os.environb.update(environment)
    given = map(os.path.abspath, os.environ["PYTHONPATH"].split(os.pathsep))
    sys.path[:] = [os.getcwd(), *given, *(path for path in sys.path if path not in of_server)]
    sys.executable = executable
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()


def leak(names: set[str]) -> None:
    """Let the interpreter end without destructors, which take 0.5 s and copy every page."""
    libc = ctypes.CDLL(None)
    libc.fflush(None)
    libc.on_exit(libc._exit, None)  # called with the status before all handlers of C++
    for name in names & set(sys.modules):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(sys.modules.pop(name)))


if __name__ == "__main__":
    sys.argv[1:] = serve(*sys.argv[1:])
    runpy._run_module_as_main(sys.argv.pop(1))
