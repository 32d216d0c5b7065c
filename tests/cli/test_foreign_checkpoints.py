# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that would run code: no command runs it, each says what is wrong."""

import importlib
import pickle
import re
import zipfile
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate

from transducer_toolkit.inference.recognizer import Recognizer, load_checkpoint
from transducer_toolkit.training.checkpoints import AtomicCheckpointIO

HERE = __name__


def explode(marker="exploded", **ignored):
    """What must not run."""
    Path(marker).touch()


class Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return explode, (str(self.marker),)


def as_pickle(content, path):
    path.write_bytes(pickle.dumps(content))


def as_torch(content, path):
    torch.save(content, path)


def as_old_torch(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def command(name, folder, checkpoint, tones, data_overrides, train_overrides):
    """Arguments that would use a checkpoint, by command."""
    wave = tones / "test-0.wav"
    return {
        "transcribe": ["--checkpoint", checkpoint, wave],
        "align": ["--checkpoint", checkpoint, "--text", "a", wave],
        "export": [checkpoint, "--output", folder / "exported"],
        "average": [checkpoint, "--output", folder / "mean.ckpt"],
        "evaluate": [f"checkpoint={checkpoint}", *data_overrides],
        "train": [*train_overrides, f"init_from={checkpoint}"],
        "resume": [*train_overrides, f"ckpt_path={checkpoint}"],
    }[name]


COMMANDS = ("transcribe", "align", "export", "average", "evaluate", "train", "resume")


@pytest.fixture
def refused(console, tones, data_overrides, train_overrides, tmp_path, capsys):
    """Give a checkpoint to a command; returns what it says on its way to exit status 1."""

    def run(name, checkpoint):
        arguments = command(name, tmp_path, checkpoint, tones, data_overrides, train_overrides)
        module = "train" if name == "resume" else name
        main = importlib.import_module(f"transducer_toolkit.cli.{module}").main
        if module in ("train", "evaluate"):
            with pytest.raises(SystemExit) as ended:
                console(main, tmp_path, *arguments)
            status = ended.value.code
        else:
            status = main(list(map(str, arguments)))
        assert status == 1
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize("save", [as_pickle, as_torch, as_old_torch])
@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_unpickles_code(name, save, trained, refused, tmp_path):
    marker, path = tmp_path / "exploded", tmp_path / "bomb.ckpt"
    content = torch.load(trained / "checkpoints" / "best.ckpt", weights_only=True)
    content["recognizer"]["symbols"] = Bomb(marker)
    save(content, path)
    pickle.loads(pickle.dumps(Bomb(marker)))
    assert marker.exists()  # it would
    marker.unlink()

    said = refused(name, path)
    assert "bomb.ckpt is not a checkpoint of transducer-train" in said
    assert not marker.exists()


CONFIGS = {
    "target": {"_target_": f"{HERE}.explode"},
    "in a list": [{"_target_": f"{HERE}.explode"}],
    "in a tuple": ({"_target_": f"{HERE}.explode"},),
    "in a tuple in a list": [({"x": {"_target_": f"{HERE}.explode"}},)],
    "made by an interpolation": f"${{oc.create:{{_target_:{HERE}.explode}}}}",
    "a target interpolated": {"_target_": f"${{oc.decode:{HERE}.explode}}"},
}


@pytest.fixture
def with_config(trained, tmp_path):
    """Write a good checkpoint with a part of its model config changed."""

    def write(value, key="encoder"):
        content = torch.load(trained / "checkpoints" / "best.ckpt", weights_only=True)
        content["recognizer"]["model"][key] = value
        torch.save(content, tmp_path / "foreign.ckpt")
        return tmp_path / "foreign.ckpt"

    return write


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_no_config_names_code(config, with_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    instantiate({"part": config}, _convert_="all")
    assert Path("exploded").exists()  # it would
    Path("exploded").unlink()
    with pytest.raises(ValueError, match=r"foreign\.ckpt"):
        Recognizer.from_checkpoint(with_config(config))
    assert not Path("exploded").exists()


@pytest.mark.parametrize("name", ["transcribe", "align", "export", "evaluate"])
def test_commands_say_what_a_config_wants(name, with_config, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = refused(name, with_config(CONFIGS["in a tuple"]))
    assert "the model config must consist of dict, list, str, numbers and None, got tuple" in said
    assert "wants to instantiate" in refused(name, with_config(CONFIGS["target"]))
    assert not Path("exploded").exists()


def test_what_is_no_config_is_refused(with_config):
    def complaint(value, key="encoder"):
        with pytest.raises(ValueError) as error:
            Recognizer.from_checkpoint(with_config(value, key))
        return str(error.value)

    assert "must not interpolate, got '${oc.env:HOME}'" in complaint("${oc.env:HOME}")
    assert "a key of the model config must be str, got 1" in complaint({1: 2})
    assert "got Tensor: " in complaint(torch.zeros(1))
    assert "got bytes: " in complaint(b"x")
    assert "wants to instantiate ['os']" in complaint({"_target_": ["os"]})


def test_a_trusted_package_is_code(with_config, tones, tmp_path, monkeypatch, capsys):
    """What --trust-package means, as docs/reliability.md has it."""
    from transducer_toolkit.cli.transcribe import main

    monkeypatch.chdir(tmp_path)
    path = str(with_config(CONFIGS["target"]))
    arguments = ["--checkpoint", path, str(tones / "test-0.wav")]
    assert main(arguments) == 1
    assert not Path("exploded").exists()
    assert main([*arguments, "--trust-package", HERE]) == 1
    assert "'NoneType' object has no attribute" in capsys.readouterr().err  # it gives no encoder
    assert Path("exploded").exists()


@pytest.mark.parametrize("command", ["transcribe", "align", "export", "evaluate"])
def test_the_refusal_names_the_option_of_the_command(
    command, with_config, tones, console, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    path = str(with_config(CONFIGS["target"]))
    main = importlib.import_module(f"transducer_toolkit.cli.{command}").main
    wave, package = str(tones / "test-0.wav"), HERE.partition(".")[0]
    arguments = {
        "transcribe": ["--checkpoint", path, wave],
        "align": ["--checkpoint", path, wave, "--text", "a"],
        "export": [path, "--output", "exported"],
        "evaluate": [f"checkpoint={path}", "data=manifest", f"data.corpus.test={tones}/test.jsonl"],
    }[command]
    if command == "evaluate":
        for given, needed in (([], package), (["trusted_packages=[mine]"], f"mine,{package}")):
            with pytest.raises(SystemExit):
                console(main, tmp_path, *arguments, *given)
            err = capsys.readouterr().err
            assert err.endswith(f"class, add 'trusted_packages=[{needed}]'\n")
            assert err.count("\n") == 1 and "--trust-package" not in err
    else:
        assert main(arguments) == 1
        err = capsys.readouterr().err
        assert err.startswith(f"transducer-{command}: {path} wants to instantiate {HERE}")
        assert err.endswith(f"class, add --trust-package {package}\n")
    assert not Path("exploded").exists()


def test_damaged_checkpoints_are_refused(trained, tmp_path):
    """Cut off, or with bytes changed: a ValueError that names the file, or the same weights."""
    path = tmp_path / "damaged.ckpt"
    whole = (trained / "checkpoints" / "best.ckpt").read_bytes()
    weights = load_checkpoint(trained / "checkpoints" / "best.ckpt")["state_dict"]
    refused = 0
    random = torch.Generator().manual_seed(0)
    for trial in range(200):
        damaged = bytearray(whole)
        if trial % 4 == 0:
            del damaged[int(torch.randint(len(whole), (), generator=random)) :]
        else:
            # The pickle, which says what is where, comes first in the file.
            size = len(whole) if trial % 4 == 1 else min(len(whole), 6000)
            places = torch.randint(size, (1 + trial % 8,), generator=random)
            for place in places.tolist():
                damaged[place] = int(torch.randint(256, (), generator=random))
        path.write_bytes(damaged)
        try:
            loaded = load_checkpoint(path)["state_dict"]
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
        else:  # it hit what stands between the entries
            assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())
    assert refused > 150


@pytest.mark.parametrize("is_compressed", [False, True])
def test_a_checkpoint_with_another_weight_is_refused_by_everyone(trained, tmp_path, is_compressed):
    """One bit of a weight: torch would load it. Compressed: torch would, and swell."""
    source = trained / "checkpoints" / "best.ckpt"
    path = tmp_path / "damaged.ckpt"
    with zipfile.ZipFile(source) as archive:
        weights = [entry for entry in archive.infolist() if "/data/" in entry.filename]
        largest = max(weights, key=lambda entry: entry.file_size)
        content = archive.read(largest)
        if is_compressed:
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as other:
                for entry in archive.infolist():
                    other.writestr(entry.filename, archive.read(entry))
        else:
            whole = bytearray(source.read_bytes())
            whole[whole.index(content) + len(content) // 2] ^= 1
            path.write_bytes(whole)
            torch.load(path, weights_only=True)
    message = f"{path} is damaged: its entry "
    with pytest.raises(ValueError, match=re.escape(message)):
        load_checkpoint(path)
    with pytest.raises(ValueError, match=re.escape(message)):
        AtomicCheckpointIO().load_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(recognizer=[1]), "it holds no 'recognizer' entry"),
        (lambda c: c["recognizer"].pop("model"), "its recognizer lacks model"),
        (lambda c: c.pop("state_dict"), "its state_dict is no dict of tensors"),
        (lambda c: c.update(state_dict=[1]), "its state_dict is no dict of tensors"),
    ],
)
def test_what_is_missing_is_named(change, message, trained, tmp_path):
    content = torch.load(trained / "checkpoints" / "best.ckpt", weights_only=True)
    change(content)
    torch.save(content, tmp_path / "part.ckpt")
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path / "part.ckpt")
