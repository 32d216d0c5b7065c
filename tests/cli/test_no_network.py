# SPDX-License-Identifier: Apache-2.0
"""No command opens a connection or looks up a name, unless an option asks for it."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# An audit hook sees every call of the interpreter, in data workers too (they are forks).
WATCH = """
import os, sys
LOG = os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
def watch(event, args):
    address = args[1] if event == "socket.connect" else args[0] if args else ""
    if event.startswith(("socket.connect", "socket.getaddrinfo", "socket.gethostby", "urllib.")):
        if not isinstance(address, (str, bytes)) or not str(address).startswith("/"):
            os.write(LOG, f"{event} {args}\\n".encode())
sys.addaudithook(watch)
"""
COMMANDS = """
from transducer_toolkit.cli import evaluate, export, train, transcribe
*options, wave = sys.argv[2:]
def hydra_command(main, *arguments):
    sys.argv[1:] = arguments
    main()
if __name__ == "__main__":
    hydra_command(train.main, *options, "name=quiet", "trainer.max_epochs=1")
    best = "outputs/quiet/run/checkpoints/best.ckpt"
    corpus = [option for option in options if "data" in option]
    hydra_command(evaluate.main, f"checkpoint={best}", *corpus, "name=evaluated")
    assert transcribe.main(["--checkpoint", best, wave]) == 0
    assert export.main([best, "--output", "exported"]) == 0
    print("done")
"""


def run(code, folder, *arguments):
    return subprocess.run(
        [sys.executable, "-c", WATCH + code, str(folder / "log"), *map(str, arguments)],
        cwd=folder,
        env={
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "HOME": str(folder),
            "TRANSDUCER_TOOLKIT_RUN_ID": "run",
        },
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_a_connection_is_seen(tmp_path):
    code = "import socket; socket.socket().connect_ex(('127.0.0.1', 9))"
    assert run(code, tmp_path).returncode == 0
    assert "socket.connect" in (tmp_path / "log").read_text()


def test_train_evaluate_transcribe_and_export_stay_at_home(tmp_path, train_overrides, tones):
    options = [x.replace("num_workers=0", "num_workers=1") for x in train_overrides]
    result = run(COMMANDS, tmp_path, *options, tones / "test-0.wav")
    assert result.returncode == 0 and "done" in result.stdout, result.stdout + result.stderr
    assert (tmp_path / "log").read_text() == ""
