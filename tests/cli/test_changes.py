# SPDX-License-Identifier: Apache-2.0
"""Trainings that go on with other options: applied, or refused by name."""

import csv
import shutil

import pytest
import torch

from transducer_toolkit.cli.train import main


@pytest.fixture(scope="module")
def first(tmp_path_factory, console, train_overrides):
    """The last checkpoint of a training of two epochs of four steps."""
    folder = tmp_path_factory.mktemp("first")
    console(main, folder, *train_overrides, "test=false", "scheduler=constant", "name=tones")
    return folder / "outputs/tones/run/checkpoints/last.ckpt"


@pytest.fixture
def go_on(tmp_path, console, train_overrides, first):
    def run(*options, epochs=3, ckpt_path=first):
        options = [f"ckpt_path={ckpt_path}", f"trainer.max_epochs={epochs}", *options]
        console(main, tmp_path, *train_overrides, "test=false", "scheduler=constant", *options)
        return tmp_path / "outputs/transducer/run"

    return run


@pytest.fixture
def refused(go_on, capsys):
    def run(*options, **more):
        with pytest.raises(SystemExit) as error:
            go_on(*options, **more)
        assert error.value.code == 1
        return capsys.readouterr().err

    return run


def last(run_dir):
    return torch.load(run_dir / "checkpoints/last.ckpt", weights_only=True)


@pytest.mark.parametrize("schedule", ["constant", "warmup_cosine", "noam", "one_cycle"])
def test_the_options_of_the_optimizer_are_those_of_the_config(go_on, schedule):
    run_dir = go_on(
        "optimizer.lr=1e-5",
        "optimizer.weight_decay=0.5",
        "optimizer.betas=[0.8,0.9]",
        f"scheduler={schedule}",
    )
    checkpoint = last(run_dir)
    (group,) = checkpoint["optimizer_states"][0]["param_groups"]
    assert (group["weight_decay"], list(group["betas"])) == (0.5, [0.8, 0.9])
    assert group["initial_lr"] == 1e-5 and 0 <= group["lr"] <= 1e-5
    assert checkpoint["lr_schedulers"][0]["base_lrs"] == [1e-5]
    # From the first step on.
    with (run_dir / "metrics/metrics.csv").open() as file:
        rates = {
            int(row["step"]): float(row["train/learning_rate"])
            for row in csv.DictReader(file)
            if row["train/learning_rate"]
        }
    assert [rates[step] <= 1e-5 for step in range(8, 12)] == [True] * 4
    log = (run_dir / "train.log").read_text()
    assert "changed options: " in log and "optimizer.lr 0.001 -> 1e-05" in log


def test_an_unchanged_option_keeps_its_state(go_on, first):
    checkpoint = last(go_on())
    before = torch.load(first, weights_only=True)
    assert checkpoint["lr_schedulers"][0]["last_epoch"] == 12
    states = (checkpoint["optimizer_states"][0], before["optimizer_states"][0])
    assert states[0]["param_groups"][0].keys() == states[1]["param_groups"][0].keys()
    assert float(states[0]["state"][0]["step"]) == 12


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["model.encoder.dropout=0.3"], "model.encoder.dropout 0.1 -> 0.3"),
        (["loss.fastemit_lambda=0.01"], "loss.fastemit_lambda 0.0 -> 0.01"),
        (["loss=packed"], "FusedLoss -> transducer_toolkit.training.stages.PackedLoss"),
        (["data.max_utterances=4"], "data.max_utterances 8 -> 4"),
        (["averaging=ema"], "averaging.decay nothing -> 0.999"),
        (["seed=2"], "seed 1 -> 2"),
        (["trainer.accumulate_grad_batches=2"], "trainer.accumulate_grad_batches 1 -> 2"),
    ],
)
def test_a_change_is_applied_and_logged(go_on, options, expected):
    run_dir = go_on(*options)
    assert expected in (run_dir / "train.log").read_text()
    assert last(run_dir)["global_step"] > 8


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["model.encoder.hidden_dim=32"], "changed: model.encoder.hidden_dim 16 -> 32"),
        (["model.predictor.embedding_dim=4"], "changed: model.predictor.embedding_dim 8 -> 4"),
        (["model.predictor.context_size=3"], "changed: model.predictor.context_size 2 -> 3"),
        (["loss=pruned"], "PrunedLoss"),
        (["ctc.weight=0.3"], "changed: ctc.weight 0.0 -> 0.3"),
        (["optimizer._target_=torch.optim.Adam"], "torch.optim.AdamW -> torch.optim.Adam"),
        (
            ["scheduler._target_=torch.optim.lr_scheduler.StepLR", "~scheduler.warmup_steps"],
            "scheduler._target_ transducer_toolkit.training.schedules.constant -> torch.optim",
        ),
        (["data/tokenizer=sentencepiece", "data.tokenizer.vocab_size=8"], "other symbols than"),
        (["data.tokenizer.unknown=true"], "new: <unk>); data/tokenizer=checkpoint"),
        (["init_from=other.ckpt"], "init_from None -> other.ckpt"),
    ],
)
def test_a_change_that_cannot_be_applied_is_refused_by_name(refused, options, expected):
    assert expected in refused(*options)


def test_a_scheduler_of_torch_restores_its_options(tmp_path, console, train_overrides, refused):
    cycle = [
        "scheduler._target_=torch.optim.lr_scheduler.OneCycleLR",
        "~scheduler.warmup_steps",
        "+scheduler.max_lr=0.01",
    ]
    options = [*train_overrides, "test=false", "scheduler=constant", "name=cycle"]
    console(main, tmp_path, *options, *cycle, "+trainer.max_steps=6")
    path = tmp_path / "outputs/cycle/run/checkpoints/last.ckpt"
    for changed in ("optimizer.lr=0.5", "scheduler.max_lr=0.5"):
        said = refused(*cycle, changed, ckpt_path=path)
        assert f"{changed.partition('=')[0]} 0.0" in said and " -> 0.5" in said
        assert "because the checkpoint restores the former state" in said


def test_lengths_that_are_over(refused, first):
    assert "trainer.max_epochs=1: " in refused(epochs=1)
    assert "has trained 8 steps already" in refused("+trainer.max_steps=7")


def test_a_checkpoint_without_optimizer(refused, first, tmp_path):
    from transducer_toolkit.cli.average import main as average

    assert average([str(first), str(first), "--output", str(tmp_path / "mean.ckpt")]) == 0
    said = refused(ckpt_path=tmp_path / "mean.ckpt")
    assert "contains no state of an optimizer" in said and "init_from=" in said


def test_an_average_that_is_given_up_leaves_the_present_weights(go_on, tmp_path, first):
    averaged = go_on("averaging=ema", "name=averaged").parents[1] / "averaged/run"
    checkpoint = last(averaged)
    run_dir = go_on(epochs=3, ckpt_path=averaged / "checkpoints/last.ckpt")  # no further step
    assert "averaging.decay 0.999 -> nothing" in (run_dir / "train.log").read_text()
    run_dir = go_on(
        "name=more", "optimizer.lr=0", epochs=4, ckpt_path=averaged / "checkpoints/last.ckpt"
    ).parents[1] / "more/run"  # fmt: skip
    after = last(run_dir)["state_dict"]
    present, average = checkpoint["current_model_state"], checkpoint["state_dict"]
    name = "model.joiner.output.weight"
    assert torch.equal(after[name], present[name]) and not torch.equal(after[name], average[name])


def test_the_best_checkpoint_and_its_score_go_along(go_on, first):
    best = first.with_name("best.ckpt")
    score = torch.load(best, weights_only=True)["callbacks"]
    (state,) = (it for key, it in score.items() if key.startswith("BestCheckpoint"))
    # With this rate the model gets worse at once.
    run_dir = go_on("optimizer.lr=1", "trainer.gradient_clip_val=null")
    with (run_dir / "metrics/metrics.csv").open() as file:
        wers = [float(row["val/wer"]) for row in csv.DictReader(file) if row["val/wer"]]
    assert min(wers) >= float(state["best_model_score"])
    found = torch.load(run_dir / "checkpoints/best.ckpt", weights_only=True)
    expected = torch.load(best, weights_only=True)
    assert found["global_step"] == expected["global_step"]
    assert all(torch.equal(found["state_dict"][k], v) for k, v in expected["state_dict"].items())
    (kept,) = (
        it for key, it in last(run_dir)["callbacks"].items() if key.startswith("BestCheckpoint")
    )
    assert kept["best_model_score"] == state["best_model_score"]
    assert kept["best_model_path"] == str(run_dir / "checkpoints/best.ckpt")


def test_a_moved_run_folder_keeps_its_best(go_on, first, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(first.parent, moved)
    content = torch.load(moved / "last.ckpt", weights_only=True)
    for state in content["callbacks"].values():
        if "best_k_models" in state:  # as if the first folder were gone
            state["best_k_models"] = {"/gone/best.ckpt": torch.tensor(0.9)}
    torch.save(content, moved / "last.ckpt")
    run_dir = go_on("optimizer.lr=0", ckpt_path=moved / "last.ckpt")
    (kept,) = (
        it for key, it in last(run_dir)["callbacks"].items() if key.startswith("BestCheckpoint")
    )
    # The score is that of the file.
    best = torch.load(moved / "best.ckpt", weights_only=True)["callbacks"]
    (state,) = (it for key, it in best.items() if key.startswith("BestCheckpoint"))
    assert kept["best_model_score"] == state["current_score"] != torch.tensor(0.9)
    (moved / "best.ckpt").unlink()
    run_dir = go_on("name=lost", "optimizer.lr=0", ckpt_path=moved / "last.ckpt")
    log = (run_dir.parents[1] / "lost/run/train.log").read_text()
    assert "the best checkpoint of the continued run is missing (/gone/best.ckpt)" in log


def test_several_best_checkpoints_go_along(console, tmp_path, train_overrides):
    several = ["callbacks.checkpoint.save_top_k=3", "callbacks.checkpoint.filename='{step}'"]
    plain = [*train_overrides, "test=false", "scheduler=constant", *several]
    console(main, tmp_path, *plain, "name=one", "trainer.max_epochs=3")
    folder = tmp_path / "outputs/one/run/checkpoints"
    names = {"4.ckpt", "8.ckpt", "12.ckpt", "last.ckpt"}
    assert {path.name for path in folder.iterdir()} == names  # no "step=4.ckpt"
    more = ["name=two", "trainer.max_epochs=4", f"ckpt_path={folder}/last.ckpt"]
    console(main, tmp_path, *plain, *more, "optimizer.lr=0.1")
    found = {path.name for path in (tmp_path / "outputs/two/run/checkpoints").iterdir()}
    assert len(found) == 4 and "last.ckpt" in found and len(found & names) >= 3


@pytest.mark.parametrize("monitor", ["val/cer", "val/loss"])
def test_checkpoints_are_selected_by_other_metrics(go_on, monitor):
    run_dir = go_on(f"callbacks.checkpoint.monitor={monitor}")
    checkpoint = torch.load(run_dir / "checkpoints/best.ckpt", weights_only=True)
    (state,) = (it for key, it in checkpoint["callbacks"].items() if "BestCheckpoint" in key)
    with (run_dir / "metrics/metrics.csv").open() as file:
        (value,) = (float(row[monitor]) for row in csv.DictReader(file) if row[monitor])
    assert state["monitor"] == monitor
    assert float(state["best_model_score"]) == pytest.approx(value)
    # The best by the former metric stays.
    assert (run_dir / "checkpoints/best_by_val_wer.ckpt").is_file()
    assert "checkpoints are now selected by " + monitor in (run_dir / "train.log").read_text()


def test_a_run_folder_belongs_to_one_config(console, tmp_path, train_overrides, capsys):
    plain = [*train_overrides, "test=false", "trainer.max_epochs=1"]
    console(main, tmp_path, *plain)
    run_dir = tmp_path / "outputs/transducer/run"
    before = {path: path.read_bytes() for path in (run_dir / "checkpoints").iterdir()}
    for change, said in (
        ("optimizer.lr=0.1", "belongs to a training with other options (optimizer.lr 0.001 -> 0.1"),
        ("trainer.max_epochs=2", "trainer.max_epochs 1 -> 2"),
        ("ckpt_path=null", "ckpt_path=null: "),
        ("loss=packed", "PackedLoss"),
    ):
        with pytest.raises(SystemExit):
            console(main, tmp_path, *plain, change)
        assert said in capsys.readouterr().err
        assert {path: path.read_bytes() for path in before} == before
    other = tmp_path / "other.ckpt"
    shutil.copy(run_dir / "checkpoints/last.ckpt", other)
    with pytest.raises(SystemExit):
        console(main, tmp_path, *plain, f"ckpt_path={other}")
    assert "which this training would overwrite" in capsys.readouterr().err
    # The same config goes on, whatever its workers and callbacks.
    console(main, tmp_path, *plain, "data.num_workers=1", "~callbacks.prescan")
    out = capsys.readouterr().out
    assert "no step was trained since outputs/transducer/run/checkpoints/last.ckpt" in out
    assert out.splitlines()[-1].endswith("and a larger trainer.max_epochs")
    # Killed after best.ckpt, before last.ckpt.
    (run_dir / "checkpoints/last.ckpt").unlink()
    console(main, tmp_path, *plain)
    assert "best.ckpt" in capsys.readouterr().out.splitlines()[-1]


def test_a_checkpoint_of_an_earlier_version_goes_on(go_on, first, tmp_path):
    content = torch.load(first, weights_only=True)
    del content["training_config"], content["callbacks"]["StepClock"]
    (key,) = (key for key in content["callbacks"] if key.startswith("BestCheckpoint"))
    content["callbacks"][key.replace("Best", "Model")] = content["callbacks"].pop(key)
    torch.save(content, tmp_path / "old.ckpt")
    run_dir = go_on("optimizer.lr=1e-5", ckpt_path=tmp_path / "old.ckpt")
    checkpoint = last(run_dir)
    assert checkpoint["global_step"] == 12
    assert checkpoint["optimizer_states"][0]["param_groups"][0]["initial_lr"] == 1e-5
    (state,) = (it for key, it in checkpoint["callbacks"].items() if key.startswith("BestCheck"))
    assert state["best_model_path"] == str(run_dir / "checkpoints/best.ckpt")


def test_an_error_in_the_test_comes_after_the_checkpoint(
    console, tmp_path, train_overrides, capsys
):
    # Its only line has no audio: the training does not read it.
    row = '{"id": "x", "audio": "none.wav", "duration_s": 1.0, "text": "a"}'
    (tmp_path / "bad.jsonl").write_text(row)
    bad = [f"+data.corpus.test.bad={tmp_path}/bad.jsonl", "trainer.max_epochs=1"]
    with pytest.raises(SystemExit):
        console(main, tmp_path, *train_overrides, *bad)
    out, err = capsys.readouterr()
    assert "none.wav" in err
    assert out.splitlines()[-1].startswith("step 4 is saved in outputs/transducer/run/checkpoints/")


def test_an_error_before_the_training_says_nothing_of_checkpoints(console, tmp_path, capsys):
    with pytest.raises(SystemExit):
        console(main, tmp_path, "~experiment", "data=manifest", "data.corpus.train=none.jsonl",
                "data.corpus.val=none.jsonl")  # fmt: skip
    out, err = capsys.readouterr()
    assert "no manifest at none.jsonl" in err and "checkpoint" not in out


def test_paths_of_the_last_line_can_be_pasted(console, tmp_path, train_overrides, capsys):
    folder = tmp_path / "my run"
    folder.mkdir()
    options = ["trainer.max_epochs=1", "test=false", "name='two words'"]
    console(main, folder, *train_overrides, *options)
    line = capsys.readouterr().out.splitlines()[-1]
    path = "outputs/two words/run/checkpoints/last.ckpt"
    assert line.endswith(
        f"repeat the command with 'ckpt_path={path}' and a larger trainer.max_epochs"
    )
    assert (folder / path).is_file()
