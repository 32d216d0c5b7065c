# SPDX-License-Identifier: Apache-2.0
"""How commands start and end: fast help, errors of one sentence, any terminal, any file name."""

import importlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import transducer_toolkit
from tests.fork_server import python
from transducer_toolkit.cli import console
from transducer_toolkit.cli.evaluate import main as evaluate
from transducer_toolkit.cli.train import main as train
from transducer_toolkit.cli.transcribe import main as transcribe
from transducer_toolkit.inference import long_audio

ROOT = Path(__file__).parents[2]
HYDRA = ("prepare", "train", "evaluate")
COMMANDS = (*HYDRA, "transcribe", "align", "average", "export")


def process(command, *arguments, executable=None, **options):
    """Run a command in a process of its own, a fork unless an executable is given."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    executable = executable or python()
    return subprocess.run(
        [executable, "-m", f"transducer_toolkit.cli.{command}", *map(os.fspath, arguments)],
        env=environment | options.pop("env", {}),
        capture_output=True,
        timeout=300,
        **options,
    )


@pytest.mark.parametrize("option", ["--help", "--version"])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_and_version_are_fast(command, option):
    took_s = []
    for _ in range(3):  # the machine may be busy for one of them
        started_s = time.perf_counter()
        result = process(command, option, executable=sys.executable)
        took_s.append(time.perf_counter() - started_s)
        assert result.returncode == 0 and not result.stderr
        if min(took_s) < 1.5:
            break
    assert min(took_s) < 1.5
    out = result.stdout.decode()
    if option == "--version":
        assert out == f"transducer_toolkit {transducer_toolkit.__version__}\n"
    else:
        assert f"transducer-{command}" in out and "--version" in out and "--debug" in out


def test_help_lists_the_configs_of_a_folder(tmp_path, console, capsys):
    (tmp_path / "mine" / "model" / "encoder").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "encoder" / "wide.yaml").write_text("hidden_dim: 8\n")
    for option in (["--config-dir", "mine"], ["--config-dir=mine"], ["-cd", "mine"]):
        console(train, tmp_path, *option, "--help")
        (line,) = [
            x for x in capsys.readouterr().out.splitlines() if x.startswith("model/encoder:")
        ]
        assert "wide" in line


def test_the_defaults_of_windows_are_those_of_python():
    from transducer_toolkit.cli import transcribe as command

    sizes = long_audio.WINDOW_S, long_audio.OVERLAP_S, long_audio.BATCH_SIZE
    assert sizes == (command.WINDOW_S, command.OVERLAP_S, command.BATCH_SIZE)


# --- errors -------------------------------------------------------------------------------------

MISSING = {
    "prepare": ("hydra", "hydra-core", "train"),
    "train": ("lightning", "lightning", "train"),
    "evaluate": ("omegaconf", "hydra-core", "train"),
    "transcribe": ("soundfile", "soundfile", "train"),
    "align": ("hydra", "hydra-core", "train"),
    "average": ("soundfile", "soundfile", "train"),
    "export": ("onnxruntime", "onnxruntime", "export"),
}


COMMAND_LINES = {
    "prepare": [],
    "train": [],
    "evaluate": ["checkpoint=a.ckpt"],
    "transcribe": ["--checkpoint", "a.ckpt", "a.wav"],
    "align": ["--checkpoint", "a.ckpt", "--text", "a", "a.wav"],
    "average": ["a.ckpt", "--output", "b.ckpt"],
    "export": ["a.ckpt", "--output", "b"],
}
# Forks of a process that has imported only PyTorch, which no command works without.
WITHOUT_AN_EXTRA = """
import atexit, gc, importlib, os, sys
import torch
from tests.fork_server import leak
loaded = set(sys.modules)
gc.freeze()  # else a collection in a fork copies every page
for command, (module, arguments) in eval(sys.argv[1]).items():
    sys.stderr.flush()
    if os.fork() == 0:
        atexit.register(leak, loaded)
        os.dup2(os.open(f"{command}.err", os.O_CREAT | os.O_WRONLY), 2)
        sys.modules[module] = None
        sys.argv[1:] = arguments
        sys.exit(importlib.import_module(f"transducer_toolkit.cli.{command}").main())
    print(command, os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


@pytest.fixture(scope="module")
def without_an_extra(tmp_path_factory):
    """{command: (exit status, standard error)} where a package of the command is missing."""
    folder = tmp_path_factory.mktemp("extras")
    given = {command: (MISSING[command][0], COMMAND_LINES[command]) for command in COMMANDS}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_AN_EXTRA, repr(given)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    statuses = dict(line.split() for line in done.stdout.splitlines())
    assert statuses.keys() == set(COMMANDS), done.stderr
    return {
        command: (int(status), (folder / f"{command}.err").read_text())
        for command, status in statuses.items()
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_a_missing_extra_is_named(command, without_an_extra):
    _, distribution, extra = MISSING[command]
    assert without_an_extra[command] == (
        1,
        f"transducer-{command}: {distribution} is not installed: "
        f"pip install 'transducer_toolkit[{extra}]'\n",
    )


@pytest.mark.parametrize(
    ("options", "distribution", "extra"),
    [
        (["cluster=slurm", "seed=1,2"], "hydra-submitit-launcher", "slurm"),
        (["cluster=local", "seed=1,2"], "hydra-submitit-launcher", "slurm"),
        (["experiment=digits_sweep"], "hydra-optuna-sweeper", "sweep"),
    ],
)
def test_a_missing_plugin_of_hydra_is_named(options, distribution, extra, tmp_path):
    code = (
        "import sys, hydra_plugins; hydra_plugins.__path__ = []\n"
        f"sys.argv[1:] = ['--multirun', *{options!r}]\n"
        "from transducer_toolkit.cli.train import main; sys.exit(main())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    message = f"{distribution} is not installed: pip install 'transducer_toolkit[{extra}]'"
    assert result.stderr.splitlines()[0] == f"transducer-train: {message}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["seed=x"], "seed: expected an int, got str"),
        (["data.corpus.train=none.jsonl"], "no manifest at none.jsonl"),
        (["model.encoder.dropout=2"], "encoder: dropout: expected a number in [0, 1], got 2"),
        (["model.encoder._target_=nowhere.Encoder"], "encoder: No module named 'nowhere'"),
        (["+model.joiner.speed=2"], "joiner of model=conv_lstm_stateless takes no argument speed"),
        (["data=manifest"], "data.corpus.train: no value given; add data.corpus.train=VALUE"),
        (["optimizer.betas=[0.9"], "'[0.9' is no value of Hydra's grammar"),
        (["optimizer.lr=ä"], "write a text in quotes, optimizer.lr='ä'"),
        (["init_from=a=b.ckpt"], "no checkpoint at a=b.ckpt"),
        (["+x=${nothing}", "name=${x}"], "Interpolation key 'nothing' not found"),
        (["name=a${b}"], "name=a${b}: Interpolation key 'b' not found; the name of a run can have"),
        (["name=a${"], "the name of a run can have no ${ but that of an interpolation of Hydra"),
    ],
)
def test_errors_are_one_sentence(options, message, console, train_overrides, tmp_path, capsys):
    given = options if "data=manifest" in options else [*train_overrides, *options]
    with pytest.raises(SystemExit) as end:
        console(train, tmp_path, *given)
    assert end.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("transducer-train: ")
    assert message.lower() in line.lower()


@pytest.mark.parametrize("way", ["--debug", "HYDRA_FULL_ERROR"])
def test_the_trace_is_shown_on_demand(way, console, train_overrides, tmp_path, monkeypatch):
    monkeypatch.setenv(
        console_variable := "HYDRA_FULL_ERROR", "1" if way == console_variable else "0"
    )
    options = ["seed=-1", *(["--debug"] if way == "--debug" else [])]
    with pytest.raises(ValueError, match="seed: expected at least 0, got -1"):
        console(train, tmp_path, *train_overrides, *options)
    with pytest.raises(FileNotFoundError):
        importlib.import_module("transducer_toolkit.cli.average").average_checkpoints(["none.ckpt"])


def test_a_fault_of_ours_is_shown_with_its_kind(trained, tones, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise KeyError("tail")

    monkeypatch.setattr("transducer_toolkit.inference.recognizer.Recognizer.from_checkpoint", fail)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    arguments = ["--checkpoint", "best.ckpt", str(tones / "test-0.wav")]
    assert transcribe(arguments) == 1
    assert capsys.readouterr().err == (
        "transducer-transcribe: KeyError: 'tail' (--debug shows where)\n"
    )
    with pytest.raises(KeyError):
        transcribe([*arguments, "--debug"])


def test_a_sweep_goes_on_after_a_job_that_fails(console, train_overrides, tmp_path, capsys):
    options = ["--multirun", "seed=-1,1", "+trainer.fast_dev_run=true", "test=false"]
    with pytest.raises(SystemExit):
        console(train, tmp_path, *train_overrides, *options)
    err = capsys.readouterr().err
    assert "transducer-train: seed: expected at least 0, got -1" in err and "Traceback" not in err
    logs = sorted(tmp_path.rglob("train.log"))
    assert len(logs) == 2 and "M parameters" in logs[1].read_text()


def test_an_interrupted_command_says_so(trained, tones, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    name = "transducer_toolkit.inference.recognizer.Recognizer.from_checkpoint"
    monkeypatch.setattr(name, interrupt)
    with pytest.raises(SystemExit) as end:
        transcribe(["--checkpoint", "best.ckpt", str(tones / "test-0.wav")])
    assert end.value.code == console.INTERRUPTED
    assert capsys.readouterr().err == "transducer-transcribe: interrupted\n"


# --- output -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(trained):
    return trained / "checkpoints" / "best.ckpt"


def closed_pipe(command, *arguments, cwd):
    """Exit status and standard error of a command whose output nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    with subprocess.Popen(
        [python(), "-m", f"transducer_toolkit.cli.{command}", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "TRANSDUCER_TOOLKIT_RUN_ID": "run"},
        cwd=cwd,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        os.close(writer)
        return child.communicate(timeout=300)[1], child.returncode


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_closed_pipe_ends_a_transcription(form, checkpoint, tones, tmp_path):
    waves = [tones / f"test-{index}.wav" for index in range(3)]
    options = ["--checkpoint", checkpoint, "--format", form, *waves]
    assert closed_pipe("transcribe", *options, cwd=tmp_path) == ("", 1)


def test_a_closed_pipe_ends_an_alignment(checkpoint, tones, tmp_path):
    options = ["--checkpoint", checkpoint, "--manifest", tones / "val.jsonl"]
    assert closed_pipe("align", *options, cwd=tmp_path) == ("", 1)


def test_a_training_survives_a_closed_pipe(train_overrides, tmp_path):
    err, status = closed_pipe("train", *train_overrides, "name=pipe", cwd=tmp_path)
    assert status == 0 and "rror" not in err
    run = tmp_path / "outputs" / "pipe" / "run"
    assert json.loads((run / "results.json").read_text())["optimizer_steps"] == 8
    assert "epoch 1, step 8" in (run / "train.log").read_text()


@pytest.mark.parametrize(
    ("environment", "shown"),
    [
        ({"PYTHONIOENCODING": "ascii"}, b"\\u65e5\\xe9.wav\t"),
        ({"LC_ALL": "C"}, "日é.wav\t".encode()),
    ],
)
def test_any_terminal(environment, shown, checkpoint, tones, tmp_path):
    shutil.copy(tones / "test-0.wav", tmp_path / "日é.wav")
    options = ["--checkpoint", checkpoint, "日é.wav"]
    result = process("transcribe", *options, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(shown)


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("latin-1", b"\\u65e5\xe9.wav\t"), ("UTF8", "日é.wav\t".encode())],
)
def test_any_encoding(encoding, shown, checkpoint, tones, tmp_path, monkeypatch):
    """A terminal, but for what Python does when it starts."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(tones / "test-0.wav", "日é.wav")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    assert transcribe(["--checkpoint", str(checkpoint), "日é.wav"]) == 0
    sys.stdout.flush()
    assert sys.stdout.buffer.getvalue().startswith(shown)


# --- names of files -----------------------------------------------------------------------------

NAMES = [
    "step=8.ckpt",
    "ünï 日本.ckpt",
    " a b.ckpt",
    'it\'s "q".ckpt',
    "'q'.ckpt",
    "[x],{y: z},(1).ckpt",
    "1e5",
    "2024",
    "true",
    "d${x}.ckpt",
    r"\${x}.ckpt",
    "back\\slash.ckpt",
    "ends in \\",
    "#h:~&;*?.ckpt",
    os.fsdecode(b"\xff\xfe.ckpt"),
]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_of_a_checkpoint(name, checkpoint, console, data_overrides, tmp_path):
    shutil.copy(checkpoint, tmp_path / name)
    options = ["trainer.accelerator=cpu", "run_dir=evaluated", "~callbacks.utterance_picture"]
    console(evaluate, tmp_path, f"checkpoint={name}", *data_overrides, *options)
    results = json.loads((tmp_path / "evaluated" / "results.json").read_text())
    assert results["checkpoint"] == name


@pytest.mark.parametrize("key", ["checkpoint", "init_from", "ckpt_path"])
@pytest.mark.parametrize("name", ["none=1.ckpt", "[none", "nö,ne.ckpt", "1e5"])
def test_any_name_that_does_not_exist(
    key, name, console, data_overrides, train_overrides, tmp_path, capsys
):
    main, options = (evaluate, data_overrides) if key == "checkpoint" else (train, train_overrides)
    with pytest.raises(SystemExit):
        console(main, tmp_path, *options, f"{key}={name}")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(name) and " at " in line


def test_any_name_of_a_folder(checkpoint, tones, train_overrides, console, tmp_path, capsys):
    folder = tmp_path / 'ä = (1),[2] {3} it\'s "q" $5'
    shutil.copytree(tones, folder / "tones")
    rows = [json.loads(line) for line in (tones / "test.jsonl").read_text().splitlines()]
    for name in ("train", "val", "test"):
        for row in rows:
            row["audio"] = str(folder / "tones" / Path(row["audio"]).name)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "tones" / f"{name}.jsonl").write_text(text)
    options = [text.replace(str(tones), f"{folder}/tones") for text in train_overrides]
    options += [f"name={folder.name}", "trainer.max_epochs=1"]
    shutil.copy(checkpoint, folder / "a=b.ckpt")
    console(train, tmp_path, *options, f"init_from={folder}/a=b.ckpt")
    assert "try it:" in (out := capsys.readouterr().out) and "'\"'\"'" in out  # quoted for a shell
    last = tmp_path / "outputs" / folder.name / "run" / "checkpoints" / "last.ckpt"
    console(train, tmp_path, *options[:-1], f"ckpt_path={last}", f"run_dir={folder}/on")
    assert json.loads((folder / "on" / "results.json").read_text())["optimizer_steps"] == 2
    wave = str(folder / "tones" / "test-0.wav")
    commands = {
        "transcribe": ["--checkpoint", last, wave, "--output", f"{folder}/text=1.txt"],
        "align": ["--checkpoint", last, wave, "--text", "a", "--output-dir", f"{folder}/al"],
        "average": [last, f"{folder}/a=b.ckpt", "--output", f"{folder}/mean=1.ckpt"],
        "export": [f"{folder}/mean=1.ckpt", "--output", f"{folder}/exported"],
    }
    for name, arguments in commands.items():
        main = importlib.import_module(f"transducer_toolkit.cli.{name}").main
        assert main([str(argument) for argument in arguments]) == 0, name
    assert (folder / "text=1.txt").read_text().startswith(f"{wave}\t")


def test_a_sweep_over_names(checkpoint, console, train_overrides, tmp_path):
    for name in ("a=1.ckpt", "b c.ckpt"):
        shutil.copy(checkpoint, tmp_path / name)
    options = ["init_from=a=1.ckpt,b c.ckpt", "+trainer.fast_dev_run=true", "test=false"]
    console(train, tmp_path, *train_overrides, "--multirun", *options)
    logs = sorted(tmp_path.rglob("train.log"))
    assert ["a=1.ckpt" in logs[0].read_text(), "b c.ckpt" in logs[1].read_text()] == [True] * 2


@pytest.mark.parametrize("form", ["text", "json", "ctm", "srt"])
def test_names_that_are_not_utf8(form, checkpoint, tones, tmp_path, monkeypatch, capfdbinary):
    monkeypatch.chdir(tmp_path)
    name = b"\xff\xfe.wav"
    shutil.copy(tones / "test-1.wav", os.fsdecode(name))
    options = ["--checkpoint", str(checkpoint), "--format", form]
    result = process("transcribe", *options, name, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    if form == "json":
        assert os.fsencode(json.loads(result.stdout)["audio"]) == name
    elif form != "srt":
        assert result.stdout.startswith(name)
    assert transcribe([*options, os.fsdecode(name), "--output", "texts/"]) == 0
    (written,) = (tmp_path / "texts").iterdir()
    assert os.fsencode(written.name).startswith(b"\xff\xfe.")
    assert transcribe([*options, os.fsdecode(name), "--output", "one"]) == 0
    assert (tmp_path / "one").read_bytes() == written.read_bytes()


def test_an_alignment_of_a_name_that_is_not_utf8(checkpoint, tones, tmp_path):
    name = os.fsdecode(b"\xff.wav")
    shutil.copy(tones / "test-1.wav", tmp_path / name)
    options = ["--checkpoint", checkpoint, "--text", "a", name, "--output-dir", "aligned"]
    result = process("align", *options, cwd=tmp_path, executable=sys.executable)
    assert result.returncode == 0, result.stderr
    written = sorted(path.suffix for path in (tmp_path / "aligned").iterdir())
    assert written == [".ctm", ".json", ".png"]


# --- arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize("main", [train, evaluate])
@pytest.mark.parametrize(
    ("arguments", "place"),
    [([""], "argument 1 is empty"), (["seed=2", " "], "argument 2 after 'seed=2' is empty")],
)
def test_an_empty_argument_is_named(main, arguments, place, console, tmp_path, capsys):
    with pytest.raises(SystemExit):
        console(main, tmp_path, *arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{place}; remove it, or set the variable of the shell" in line


@pytest.mark.parametrize("key", ["name", "init_from", "ckpt_path", "data.corpus.train"])
def test_an_empty_path_is_named(key, console, train_overrides, tmp_path, capsys):
    with pytest.raises(SystemExit):
        console(train, tmp_path, *train_overrides, f"{key}=")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"transducer-train: {key}= has no value: expected a path or a name;")


@pytest.mark.parametrize("name", ["best.ckpt", "outputs/a b/best.ckpt", "max_steps"])
def test_an_argument_without_a_key_is_named(name, console, tmp_path, capsys):
    for main in (train, evaluate):
        with pytest.raises(SystemExit):
            console(main, tmp_path, "seed=2", name)
        (line,) = capsys.readouterr().err.splitlines()
        assert f"'{name}' is no option: expected KEY=VALUE, such as checkpoint=PATH" in line


@pytest.mark.parametrize("num_workers", [0, 1])
def test_unreadable_audio_is_named_also_by_a_worker(
    num_workers, tones, train_overrides, console, tmp_path, capsys
):
    rows = [json.loads(line) for line in (tones / "train.jsonl").read_text().splitlines()]
    for row in rows:
        row["audio"] = str(tones / Path(row["audio"]).name.replace("train-3.wav", "gone.wav"))
    (tmp_path / "gone.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [f"data.corpus.train={tmp_path}/gone.jsonl", f"data.num_workers={num_workers}"]
    with pytest.raises(SystemExit):
        console(train, tmp_path, *train_overrides, *options)
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("transducer-")]
    path = tones / "gone.wav"
    assert line == f"transducer-train: utterance 'train-3': no audio file at {path}"


def test_hydras_options_may_stand_anywhere(checkpoint, console, tmp_path, capsys):
    console(train, tmp_path, "seed=2", "--cfg", "job", "name=x", "--package", "optimizer", "test=0")
    assert capsys.readouterr().out.startswith("# @package optimizer\n")
    console(evaluate, tmp_path, f"checkpoint={checkpoint}", "--cfg", "job")
    assert "ManifestCorpus" in capsys.readouterr().out
