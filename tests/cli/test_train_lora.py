# SPDX-License-Identifier: Apache-2.0
"""Adapters in the encoder of a model folder: train, go on, use without peft."""

import json
import sys
from pathlib import Path

import pytest
import torch

from tests.compat.hugging_face import save_folder
from transducer_toolkit.cli.train import main
from transducer_toolkit.inference.recognizer import Recognizer, load_checkpoint

pytest.importorskip("peft")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def start(tmp_path_factory, tones):
    """The folder of a small model, and the options of a training that starts from it."""
    folder = tmp_path_factory.mktemp("lora")
    save_folder(folder / "folder", "ParakeetForTDT")
    rows = [json.loads(line) for line in (tones / "train.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        row["text"] = ("one", "two", "three", "four")[number % 4]
        row["audio"] = str(tones / row["audio"])
    manifest = folder / "train.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--config-dir", str(ROOT / "recipes" / "parakeet" / "conf"), "experiment=parakeet"]
    options += ["data=manifest", f"data.corpus.train={manifest}", "data.corpus.val=null"]
    options += [f"init_from={folder / 'folder'}", "data.num_workers=0", "data.max_utterances=8"]
    options += ["trainer.accelerator=cpu", "trainer.precision=32", "optimizer.lr=1e-2"]
    options += ["test=false", "scheduler=constant", "adapters=lora"]
    return folder / "folder", options


def trained(console, folder, *options):
    folder.mkdir(exist_ok=True)
    console(main, folder, *options, f"run_dir={folder}/run")
    return folder / "run" / "checkpoints" / "last.ckpt"


def test_a_checkpoint_is_one_of_the_plain_model(start, tmp_path, console, monkeypatch):
    model, options = start
    rank = ["adapters.rank=2", "adapters.alpha=4"]
    path = trained(console, tmp_path, *options, *rank, "trainer.max_steps=4")
    before, after = (load_checkpoint(it)["state_dict"] for it in (model, path))
    assert set(before) == set(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    adapted = {name for name in before if name.endswith(("q_proj.weight", "v_proj.weight"))}
    assert {
        name for name in changed if "encoder.model" in name and "running" not in name
    } - adapted <= {name for name in before if "num_batches" in name}
    assert adapted <= changed and "model.joiner.output.weight" in changed
    for name in adapted:
        singular = torch.linalg.svdvals(after[name] - before[name])
        assert singular[1] > 0 and singular[2] < 1e-4 * singular[0]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "peft", None)
        recognizer = Recognizer.from_checkpoint(path)
    assert recognizer.topology == "tdt-0-1-2-3-4"

    first = trained(console, tmp_path / "a", *options, *rank, "trainer.max_steps=2")
    again = [f"ckpt_path={first}", "trainer.max_steps=4"]
    last = trained(console, tmp_path / "b", *options, *rank, *again)
    resumed = load_checkpoint(last)["state_dict"]
    for name, value in after.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["averaging=ema"], "adapters=lora: expected averaging=none, got an average"),
        (
            ["model.encoder.frozen=true"],
            "adapters=lora: expected model.encoder.frozen=false, got true",
        ),
        (
            ["adapters.target_modules=[qq]"],
            "adapters.target_modules: Target modules {'qq'} not found",
        ),
        (["adapters.rank=0"], "adapters: rank: expected at least 1, got 0"),
    ],
)
def test_what_cannot_be_trained(start, tmp_path, console, capsys, options, message):
    with pytest.raises(SystemExit):
        trained(console, tmp_path, *start[1], "trainer.max_steps=1", *options)
    assert message in capsys.readouterr().err


def test_without_peft(start, tmp_path, console, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SystemExit):
        trained(console, tmp_path, *start[1], "trainer.max_steps=1")
    assert (
        "peft is not installed: pip install 'transducer_toolkit[lora]'" in capsys.readouterr().err
    )
