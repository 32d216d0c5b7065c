# SPDX-License-Identifier: Apache-2.0
"""Encoders and models of Hugging Face from the command line: train, resume, use, export."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.cli.conftest import tone_waveform
from tests.compat.hugging_face import ENCODER, save_folder, transformers
from tests.modules.test_huggingface_encoder import CONFIGS
from transducer_toolkit.cli import export, transcribe
from transducer_toolkit.cli.evaluate import main as evaluate
from transducer_toolkit.cli.train import main as train
from transducer_toolkit.inference import Recognizer

ROOT = Path(__file__).parents[2]


def plain(config):
    """A dict as Hydra's command line writes it."""
    pairs = (
        f"{key}:{plain(value) if isinstance(value, dict) else value}"
        for key, value in config.items()
    )
    return "{" + ",".join(pairs).replace("True", "true").replace(" ", "") + "}"


COMMON = [
    "~experiment",
    "model/encoder=huggingface",
    "model.predictor.embedding_dim=8",
    "model.joiner.joiner_dim=16",
    "trainer.max_epochs=4",
    "trainer.log_every_n_steps=1",
    "trainer.accelerator=cpu",
    "scheduler=constant",
    "optimizer.lr=2e-2",
]


def losses(run_dir):
    with open(run_dir / "metrics" / "metrics.csv") as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory, console, data_overrides):
    """The run folder of a training that starts with the encoder of a folder, which is gone."""
    folder = tmp_path_factory.mktemp("huggingface")
    config = transformers.ParakeetEncoderConfig(**ENCODER)
    torch.manual_seed(0)
    transformers.ParakeetEncoder(config).save_pretrained(folder / "encoder")
    options = [f"model.encoder.folder={folder / 'encoder'}", "optimizer=adamw_layer_decay"]
    console(train, folder, *data_overrides, *COMMON, *options)
    shutil.rmtree(folder / "encoder")
    return folder / "outputs" / "transducer" / "run"


def test_the_loss_falls(fine_tuned):
    found = losses(fine_tuned)
    assert len(found) == 16 and np.mean(found[-4:]) < 0.9 * np.mean(found[:4])
    assert json.loads((fine_tuned / "results.json").read_text())["optimizer_steps"] == 16


def test_the_checkpoint_needs_no_folder(fine_tuned, tones, tmp_path, console, capfd):
    best = fine_tuned / "checkpoints" / "best.ckpt"
    recognizer = Recognizer.from_checkpoint(best)
    assert recognizer.fbank.kind == "ParakeetFeatureExtractor" and recognizer.frame_s == 0.08
    assert transcribe.main(["--checkpoint", str(best), str(tones / "test-0.wav")]) == 0
    capfd.readouterr()
    options = [f"checkpoint={best}", "data=manifest", "data.num_workers=0"]
    console(evaluate, tmp_path, *options, f"data.corpus.test={tones}/test.jsonl")
    (results,) = tmp_path.rglob("results.json")
    trained = json.loads((fine_tuned / "results.json").read_text())["test_wer"]["tones"]
    assert json.loads(results.read_text())["test_sets"]["test"]["words"]["rate"] == trained


def test_resume(fine_tuned, tmp_path, console, data_overrides):
    checkpoint = fine_tuned / "checkpoints" / "last.ckpt"
    config = torch.load(checkpoint, weights_only=True)["recognizer"]["model"]["encoder"]["config"]
    transformers.ParakeetEncoder(transformers.ParakeetEncoderConfig(**config)).save_pretrained(
        tmp_path / "encoder"  # its weights are replaced by those of the checkpoint
    )
    options = [f"model.encoder.folder={tmp_path / 'encoder'}", "optimizer=adamw_layer_decay"]
    options += ["trainer.max_epochs=5", f"ckpt_path={checkpoint}", "test=false"]
    console(train, tmp_path, *data_overrides, *COMMON, *options)
    run_dir = tmp_path / "outputs" / "transducer" / "run"
    last = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 20
    assert losses(run_dir)[0] < losses(fine_tuned)[0]


def test_export_says_what_it_cannot_do(fine_tuned, tmp_path, capfd):
    best = str(fine_tuned / "checkpoints" / "best.ckpt")
    assert export.main([best, "--output", str(tmp_path / "exported")]) == 1
    assert "features of ParakeetFeatureExtractor" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["wav2vec2", "wavlm", "w2v-bert"])
def test_other_encoders_by_config(name, tmp_path, console, data_overrides):
    options = [f"model.encoder.config={plain(CONFIGS[name])}", "test=false"]
    options += ["model.encoder.frozen=true", "data.spec_augment=null", "trainer.max_epochs=1"]
    console(train, tmp_path, *data_overrides, *COMMON, *options)
    (best,) = tmp_path.rglob("best.ckpt")
    recognizer = Recognizer.from_checkpoint(best)
    assert recognizer.frame_s == 0.02 and recognizer.model.encoder.frozen
    waveform = torch.from_numpy(tone_waveform("ab c", np.random.default_rng(0)))
    assert len(recognizer.transcribe([waveform])) == 1


def test_spec_augment_of_waveforms_is_refused(tmp_path, console, data_overrides, capfd):
    options = [f"model.encoder.config={plain(CONFIGS['hubert'])}"]
    with pytest.raises(SystemExit):
        console(train, tmp_path, *data_overrides, *COMMON, *options)
    message = capfd.readouterr().err.splitlines()[-1]
    assert "data.spec_augment: expected null, because the encoder reads waveforms" in message


def test_layer_decay_needs_layers(tmp_path, console, train_overrides, capfd):
    with pytest.raises(SystemExit):
        console(train, tmp_path, *train_overrides, "optimizer=adamw_layer_decay")
    message = capfd.readouterr().err.splitlines()[-1]
    assert "layer-wise decay needs an encoder with layers" in message


@pytest.mark.parametrize(
    ("kind", "more", "topology"),
    [
        ("ParakeetForRNNT", ["model.encoder.frozen=true"], "regular"),
        ("ParakeetForTDT", [], "tdt-0-1-2-3-4"),
    ],
)
def test_a_whole_parakeet(kind, more, topology, tmp_path, console, tones, capfd):
    """The recipe: all weights come from a folder, and so does the tokenizer."""
    save_folder(tmp_path / "folder", kind)
    manifest = tmp_path / "train.jsonl"
    rows = [json.loads(line) for line in (tones / "train.jsonl").read_text().splitlines()]
    words = ("one", "two", "three", "four")
    for number, row in enumerate(rows):
        row["text"] = words[number % 4]
        row["audio"] = str(tones / row["audio"])
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = [
        "--config-dir",
        str(ROOT / "recipes" / "parakeet" / "conf"),
        "experiment=parakeet",
        "data=manifest",
    ]
    options = [f"data.corpus.train={manifest}", f"data.corpus.val={manifest}", "data.num_workers=0"]
    options += [f"init_from={tmp_path / 'folder'}", "trainer.max_epochs=2", "test=false"]
    options += ["trainer.accelerator=cpu", "trainer.precision=32", "optimizer.lr=1e-3"]
    options += ["trainer.log_every_n_steps=1"]
    console(train, tmp_path, *recipe, *options, *more)
    assert "was trained with the topology" not in "".join(capfd.readouterr())
    shutil.rmtree(tmp_path / "folder")
    (best,) = tmp_path.rglob("best.ckpt")
    recognizer = Recognizer.from_checkpoint(best)
    assert recognizer.topology == topology
    assert recognizer.tokenizer.symbols[-1] == "<blank>" and recognizer.fbank.num_mel_bins == 80
    (run_dir,) = {path.parent.parent for path in tmp_path.rglob("last.ckpt")}
    found = losses(run_dir)
    assert found[-1] < found[0]
    arguments = [str(best), "--type", "transformers", "--output", str(tmp_path / "tuned")]
    assert export.main(arguments) == 0
    getattr(transformers, kind).from_pretrained(tmp_path / "tuned")
    tuned = Recognizer.from_pretrained(tmp_path / "tuned")
    for name, value in recognizer.model.state_dict().items():
        assert torch.equal(tuned.model.state_dict()[name], value), name
