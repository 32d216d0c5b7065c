# SPDX-License-Identifier: Apache-2.0
"""The model of the digits recipe as files for a release."""

import hashlib
import importlib.util
import json
from pathlib import Path

import torch
from hydra.utils import instantiate

from tests.inference.test_recognizer import MODEL
from transducer_toolkit.data.features import Fbank
from transducer_toolkit.data.tokenizer import CharTokenizer
from transducer_toolkit.inference import Recognizer
from transducer_toolkit.inference.recognizer import recognizer_recipe

SCRIPT = Path(__file__).resolve().parents[1] / "recipes" / "digits" / "release_assets.py"
spec = importlib.util.spec_from_file_location("release_assets", SCRIPT)
release_assets = importlib.util.module_from_spec(spec)
spec.loader.exec_module(release_assets)


def test_release_assets_are_a_whole_recognizer(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    model = instantiate(MODEL, _convert_="all")
    tokenizer = CharTokenizer(["<blk>", "\u2581", "a", "b"])
    recipe = recognizer_recipe(MODEL, tokenizer, Fbank(), max_symbols_per_frame=3)
    weights = {f"model.{name}": value for name, value in model.state_dict().items()}
    weights["loss.am.weight"] = torch.zeros(3)  # of a loss stage: decoding does not need it
    checkpoint = {"recognizer": recipe, "state_dict": weights, "optimizer_states": [1]}
    for name in ("best", "last"):
        torch.save(checkpoint, run / "checkpoints" / f"{name}.ckpt")
    results = {"optimizer_steps": 7, "training_s": 12.3, "test_wer": {"clean": 0.045}}
    (run / "results.json").write_text(json.dumps(results))
    output = tmp_path / "release"
    release_assets.main(["--run", str(run), "--output", str(output)])
    assert sorted(path.name for path in output.iterdir()) == [
        "SHA256SUMS", "digits.ckpt", "digits.md"
    ]  # fmt: skip
    sums = dict(line.split("  ")[::-1] for line in (output / "SHA256SUMS").read_text().splitlines())
    for name, expected in sums.items():
        assert hashlib.sha256((output / name).read_bytes()).hexdigest() == expected
    saved = torch.load(output / "digits.ckpt", weights_only=True)
    assert (
        set(saved) == {"recognizer", "state_dict"} and "loss.am.weight" not in saved["state_dict"]
    )
    card = (output / "digits.md").read_text()
    assert "| clean | 4.50% |" in card and sums["digits.ckpt"] in card and "{" not in card
    recognizer = Recognizer.from_pretrained(output / "digits.ckpt", sha256=sums["digits.ckpt"])
    for name, value in model.state_dict().items():
        assert torch.equal(recognizer.model.state_dict()[name], value)
    address = f"{(output / 'digits.ckpt').as_uri()}#sha256={sums['digits.ckpt']}"
    assert Recognizer.from_pretrained(address).tokenizer.vocab_size == 4
    kib = (output / "digits.ckpt").stat().st_size / 1024
    assert f"digits.ckpt: {kib:,.1f} KiB" in capsys.readouterr().out
