# SPDX-License-Identifier: Apache-2.0
import csv
import json
import subprocess
import sys

import pytest
import torch
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from transducer_toolkit.cli.train import main
from transducer_toolkit.data.manifest import read_manifest, write_manifest
from transducer_toolkit.inference.recognizer import Recognizer

MODES = ("packed", "full", "fused", "simple", "smoothed", "pruned", "fused_pruned", "torchaudio")

EXPECTED_FILES = [
    "checkpoints/best.ckpt",
    "checkpoints/last.ckpt",
    "pictures/learning_curves.png",
    "pictures/utterance.png",
    "transcripts/tones.tsv",
    "metrics/metrics.csv",
    "results.json",
    "train.log",
    ".hydra/config.yaml",
]


def loss_of(run_dir):
    """Training loss by step, as logged."""
    with open(run_dir / "metrics" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    return {int(row["step"]): float(row["train/loss"]) for row in rows if row["train/loss"]}


def test_a_run_leaves_everything_behind(trained, tones):
    for name in EXPECTED_FILES:
        assert (trained / name).stat().st_size > 0, name
    assert list((trained / "tensorboard").glob("events.*"))
    results = json.loads((trained / "results.json").read_text())
    assert results["optimizer_steps"] == 8
    assert set(results["test_wer"]) == {"tones"}
    delay = results["symbol_delay_ms"]["tones"]
    words = [row.text.split() for row in read_manifest(tones / "test.jsonl")]
    assert delay["words"] == sum(map(len, words))
    assert all(-1000 < delay[name] < 1500 for name in ("mean", "median"))
    with open(trained / "metrics" / "metrics.csv") as file:
        logged = [row["test/symbol_delay_ms/tones"] for row in csv.DictReader(file)]
    assert [float(value) for value in logged if value] == [pytest.approx(delay["mean"])]
    rows = (trained / "transcripts" / "tones.tsv").read_text().splitlines()
    assert rows[0] == "id\treference\thypothesis" and len(rows) == 7
    log = (trained / "train.log").read_text()
    assert "validation WER" in log and "  ref " in log and "  hyp " in log


def test_tensorboard_shows_how_the_training_goes(trained):
    shown = EventAccumulator(str(trained / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert set(shown.Tags()["images"]) == {"learning_curves", "utterance"}
    values = {
        name: [(event.step, event.value) for event in shown.Scalars(name)]
        for name in shown.Tags()["scalars"]
    }
    expected = {f"train/{name}" for name in ("loss", "learning_rate", "gradient_norm",
                                             "seconds_per_step")}  # fmt: skip
    assert expected | {"val/loss", "val/wer", "val/cer", "test/wer/tones"} <= values.keys()
    for name in expected - {"train/seconds_per_step"}:
        assert [step for step, _ in values[name]] == list(range(8))
    # Not for the first batch of an epoch, which has none before it.
    assert [step for step, _ in values["train/seconds_per_step"]] == [1, 2, 3, 5, 6, 7]
    assert all(value > 0 for name in expected for _, value in values[name])
    assert max(value for _, value in values["train/learning_rate"]) == pytest.approx(1e-3, rel=1e-3)
    content = shown.PluginTagToContent("hparams")
    assert b"optimizer.lr" in content["_hparams_/session_start_info"]
    assert b"val/cer" in content["_hparams_/experiment"]
    for folder in ("tensorboard", "metrics"):
        options = OmegaConf.load(trained / folder / "hparams.yaml")
        assert options["optimizer.lr"] == 1e-3 and options["model.encoder.hidden_dim"] == 16
    with (trained / "metrics" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/gradient_norm"]]
    assert [float(row["train/gradient_norm"]) for row in rows] == pytest.approx(
        [value for _, value in values["train/gradient_norm"]]
    )


def test_checkpoints_load_with_weights_only(trained):
    for name in ("best", "last"):
        checkpoint = torch.load(trained / "checkpoints" / f"{name}.ckpt", weights_only=True)
        assert checkpoint["recognizer"]["symbols"] == ["<blk>", "\u2581", "a", "b", "c"]


def test_the_same_seed_gives_the_same_training(tmp_path, console, train_overrides, trained):
    console(main, tmp_path, *train_overrides, "test=false")
    again = tmp_path / "outputs" / "transducer" / "run"
    assert loss_of(again) == loss_of(trained)
    assert not (again / "transcripts").exists()


def test_resume_continues_where_it_stopped(tmp_path, console, train_overrides, trained):
    options = [text for text in train_overrides if text != "~callbacks.learning_curves"]
    options += ["scheduler=constant", "test=false"]
    console(main, tmp_path, *options, "name=whole")
    console(main, tmp_path, *options, "name=first", "trainer.max_epochs=1")
    outputs = tmp_path / "outputs"
    console(
        main, tmp_path, *options, "name=second", "ckpt_path=outputs/first/run/checkpoints/last.ckpt"
    )
    whole, first, second = (
        loss_of(outputs / name / "run") for name in ("whole", "first", "second")
    )
    assert list(first) == [0, 1, 2, 3] and list(second) == [4, 5, 6, 7]
    assert {**first, **second} == pytest.approx(whole, rel=1e-4)
    # The learning curves are those of the whole training.
    last = torch.load(outputs / "second/run/checkpoints/last.ckpt", weights_only=True)
    history = last["callbacks"]["LearningCurves"]["history"]
    assert len(history["train/loss"]) == 8 and len(history["val/wer"]) == 2


def test_a_training_without_validation(tmp_path, console, train_overrides, capsys):
    options = [text for text in train_overrides if not text.startswith("data.corpus.val=")]
    with pytest.raises(SystemExit):
        console(main, tmp_path, *options)
    message = "data.corpus.val: no value given; add data.corpus.val=VALUE, or null for a training "
    assert message in capsys.readouterr().err
    console(main, tmp_path, *options, "data.corpus.val=null")
    out = capsys.readouterr().out
    assert "data.corpus.val is null: no validation" in out and "test set" in out
    run = tmp_path / "outputs" / "transducer" / "run"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["last.ckpt"]
    report = json.loads((run / "results.json").read_text())
    assert report["optimizer_steps"] == 8 and report["best_validation_score"] is None
    assert report["test_wer"]["tones"] >= 0


def test_fast_dev_run(tmp_path, console, train_overrides, capsys):
    console(main, tmp_path, *train_overrides, "+trainer.fast_dev_run=true")
    out = capsys.readouterr().out
    assert "test set" in out and "tones" in out


def test_checkpoints_carry_the_topology_of_the_loss(tmp_path, console, train_overrides, trained):
    options = ["loss.topology=one_sym_per_frame", "test=false", "trainer.max_epochs=1"]
    console(main, tmp_path, *train_overrides, *options)
    paths = [trained, tmp_path / "outputs" / "transducer" / "run"]
    topologies = [
        torch.load(path / "checkpoints/last.ckpt", weights_only=True)["recognizer"]["topology"]
        for path in paths
    ]
    assert topologies == ["regular", "one_sym_per_frame"]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_trains_decodes_and_starts_from_another(mode, tmp_path, console, train_overrides,
                                                           trained):  # fmt: skip
    start = f"init_from={trained}/checkpoints/best.ckpt"
    options = [f"loss={mode}", start]
    if mode != "torchaudio":
        options.append("loss.delay_penalty=0.01")
    console(main, tmp_path, *train_overrides, *options)
    folder = tmp_path / "outputs" / "transducer" / "run"
    report = json.loads((folder / "results.json").read_text())
    assert report["test_wer"]["tones"] >= 0 and 0 < report["loss_part_of_step"] < 1
    assert report["peak_memory_mib"] >= 0
    # The checkpoint restores the joiner that was trained, and what was not found is named.
    recognizer = Recognizer.from_checkpoint(folder / "checkpoints" / "best.ckpt")
    is_additive = mode in ("simple", "smoothed")
    assert type(recognizer.model.joiner).__name__ == ("AdditiveJoiner" if is_additive else "Joiner")
    log = (folder / "train.log").read_text()
    assert "weights taken over from" in log
    assert ("not in the checkpoint: " in log) == (is_additive or "pruned" in mode)
    assert ("in the checkpoint, but not used: model.joiner" in log) == is_additive


def test_start_from_needs_a_checkpoint_that_fits(
    tmp_path, console, train_overrides, trained, capsys
):
    with pytest.raises(SystemExit):
        console(main, tmp_path, *train_overrides, "init_from=nowhere.ckpt")
    assert "no checkpoint at nowhere.ckpt" in capsys.readouterr().err


def test_fine_tuning_on_texts_that_lack_a_letter(
    tmp_path, console, train_overrides, trained, tones
):
    for name in ("train", "val"):
        rows = [row for row in read_manifest(tones / f"{name}.jsonl") if "a" not in row.text]
        write_manifest(tmp_path / f"{name}.jsonl", rows)
    best = trained / "checkpoints/best.ckpt"
    options = [
        *train_overrides,
        *(f"data.corpus.{name}={tmp_path}/{name}.jsonl" for name in ("train", "val")),
        "~data.corpus.test.tones",
        f"init_from={best}",
        "optimizer.lr=0",
        "trainer.max_epochs=1",
    ]
    before = torch.load(best, weights_only=True)
    weight = "model.joiner.output.weight"
    for name, option, kept in (
        ("own", [], [0, 1, 3, 4]),
        ("kept", ["data/tokenizer=checkpoint"], [0, 1, 2, 3, 4]),
    ):
        console(main, tmp_path, *options, *option, f"name={name}")
        after = torch.load(
            tmp_path / f"outputs/{name}/run/checkpoints/last.ckpt", weights_only=True
        )
        symbols = before["recognizer"]["symbols"]
        assert after["recognizer"]["symbols"] == [symbols[row] for row in kept]
        assert torch.equal(after["state_dict"][weight], before["state_dict"][weight][kept])
        log = (tmp_path / f"outputs/{name}/run/train.log").read_text()
        assert "25 of 25 weights taken over" in log
        assert ("texts lack them: a; data/tokenizer=checkpoint keeps" in log) == (name == "own")


def test_multirun_gives_each_job_a_folder(tmp_path, console, train_overrides):
    console(main, tmp_path, "--multirun", *train_overrides, "loss=packed,torchaudio", "test=false")
    folders = [tmp_path / "outputs" / "transducer" / "run" / job for job in ("0", "1")]
    packed, torchaudio = map(loss_of, folders)
    assert packed == pytest.approx(torchaudio, rel=1e-3)
    assert packed != torchaudio


def test_multirun_refuses_to_start_processes(tmp_path, console, train_overrides, capsys):
    with pytest.raises(SystemExit):
        options = ["trainer=ddp", "trainer.devices=2"]
        console(main, tmp_path, "--multirun", *train_overrides, *options)
    assert "--multirun cannot start the processes of trainer=ddp" in capsys.readouterr().err


def test_global_normalization_estimates_its_statistics(tmp_path, console, train_overrides):
    options = ["model.encoder.normalization=global", "test=false", "trainer.max_epochs=1"]
    console(main, tmp_path, *train_overrides, *options)
    path = tmp_path / "outputs" / "transducer" / "run" / "checkpoints" / "last.ckpt"
    weights = torch.load(path, weights_only=True)["state_dict"]
    assert bool(weights["model.encoder.normalizer.has_statistics"])
    assert (weights["model.encoder.normalizer.std"] > 0.1).all()


def test_lstm_predictor(tmp_path, console, train_overrides):
    options = [o for o in train_overrides if not o.startswith("model.predictor")]
    console(main, tmp_path, *options, "model=conv_lstm_lstm", "+trainer.fast_dev_run=true")


def test_a_loss_that_is_not_finite_ends_the_training(tmp_path, console, train_overrides):
    with pytest.raises(SystemExit), pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYDRA_FULL_ERROR", "0")
        console(main, tmp_path, *train_overrides, "optimizer.lr=1e30", "optimizer.fused=false")


def test_help_is_quick_because_it_imports_nothing_heavy(tmp_path):
    code = "import sys; import transducer_toolkit.cli.train; print('lightning' in sys.modules)"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, text=True
    )
    assert output.stdout.strip() == "False"
