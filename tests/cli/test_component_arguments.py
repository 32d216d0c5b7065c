# SPDX-License-Identifier: Apache-2.0
"""Options that the config does not list, and defaults that give way to the command line."""

import inspect
import json
import re
from pathlib import Path

import pytest
from lightning import Trainer

from transducer_toolkit.cli import component_arguments
from transducer_toolkit.cli.component_arguments import with_signs
from transducer_toolkit.cli.train import _fit_defaults, main

ROOT = Path(__file__).parents[2]


def configured(capsys, console, folder, *arguments):
    """The config of a training, as ``--cfg job`` prints it."""
    from omegaconf import OmegaConf

    console(main, folder, *arguments, "--cfg", "job")
    return OmegaConf.create(capsys.readouterr().out)


@pytest.mark.parametrize("sign", ["", "+", "++"])
def test_every_argument_of_the_trainer(sign, capsys, console, tmp_path):
    names = [name for name in inspect.signature(Trainer).parameters if name != "plugins"]
    assert {"max_steps", "max_time", "check_val_every_n_epoch", "max_epochs"} <= set(names)
    options = [f"{sign}trainer.{name}=7" for name in names]
    cfg = configured(capsys, console, tmp_path, *options)
    assert {str(cfg.trainer[name]) for name in names} == {"7"}


@pytest.mark.parametrize(
    ("arguments", "key", "value"),
    [
        (["optimizer.eps=1e-6"], "optimizer.eps", 1e-6),
        (["+optimizer.lr=1e-6"], "optimizer.lr", 1e-6),
        (["callbacks.checkpoint.every_n_epochs=2"], "callbacks.checkpoint.every_n_epochs", 2),
        (["data.pin_memory=false"], "data.pin_memory", False),
        (["model/encoder=conformer_s", "+model.encoder.kernel_size=3"],
         "model.encoder.kernel_size", 3),
        (["loss=pruned", "+loss.prune_range=3"], "loss.prune_range", 3),
    ],
)  # fmt: skip
def test_arguments_of_any_component(arguments, key, value, capsys, console, tmp_path):
    from omegaconf import OmegaConf

    assert OmegaConf.select(configured(capsys, console, tmp_path, *arguments), key) == value


def test_test_sets_need_no_sign(capsys, console, tmp_path):
    data = ["data=manifest", "data.corpus.train=a", "data.corpus.val=b"]
    for sets in (["data.corpus.test.x=c", "+data.corpus.test.y=d"], ["data.corpus.test=c"]):
        cfg = configured(capsys, console, tmp_path, *data, *sets)
        assert cfg.data.corpus.test == ({"x": "c", "y": "d"} if len(sets) == 2 else "c")


def test_configs_of_a_folder_count(tmp_path):
    (tmp_path / "my, conf" / "optimizer").mkdir(parents=True)
    config = "_target_: torch.optim.SGD\n_partial_: true\nlr: 0.1\n"
    (tmp_path / "my, conf" / "optimizer" / "sgd.yaml").write_text(config)
    folder = ["--config-dir", str(tmp_path / "my, conf")]
    signed = with_signs("train", [*folder, "optimizer=sgd", "optimizer.momentum=0.9"])
    assert signed == [*folder, "optimizer=sgd", "++optimizer.momentum=0.9"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["optimizer.epss=1"],  # no argument
        ["+callbacks.mine.path=x"],  # no component
        ["optimizer=none", "trainer.max_steps=3"],  # no option
        ["--config-name", "mine", "trainer.max_steps=3"],
        ["seed=3", "~trainer.max_epochs", "trainer.max_epochs=3"],
    ],
)
def test_all_else_is_left_to_hydra(arguments):
    assert with_signs("train", arguments) == arguments


def test_the_arguments_of_a_base_class_count():
    names = component_arguments.argument_names(
        "transducer_toolkit.training.best_checkpoint.BestCheckpoint"
    )
    assert {"monitor", "dirpath", "save_last"} <= set(names) and "kwargs" not in names
    assert component_arguments.argument_names("nowhere.Nothing") == []


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["trainer.max_step=5"], "trainer.max_step: did you mean trainer.max_steps?"),
        (["loss=fused", "loss.prune_range=3"],
         "loss.prune_range is a key of loss=fused_pruned, loss=pruned"),
        (["data.corpus.train=x.jsonl"],
         "data.corpus.train is a key of data=lhotse, data=librispeech, data=manifest"),
    ],
)  # fmt: skip
def test_the_error_says_what_to_write(arguments, hint, console, tmp_path, capsys):
    with pytest.raises(SystemExit):
        console(main, tmp_path, *arguments)
    first, second = capsys.readouterr().err.splitlines()
    key = arguments[-1].partition("=")[0]
    assert first == f"transducer-train: Could not override '{key}'."
    assert second == hint


# --- defaults -----------------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["manifest", "lhotse", "tuxpaint"])
def test_the_recipe_of_the_digits_is_for_the_digits(data, capsys, console, tmp_path):
    corpus = [] if data == "tuxpaint" else ["data.corpus.train=a", "data.corpus.val=b"]
    cfg = configured(capsys, console, tmp_path, f"data={data}", *corpus)
    plain = configured(capsys, console, tmp_path, f"data={data}", *corpus, "~experiment")
    assert cfg == plain and cfg.name == "transducer" and cfg.optimizer.lr == 1e-3


@pytest.mark.parametrize("arguments", [[], ["data=digits"], ["experiment=digits"]])
def test_the_digits_have_their_recipe(arguments, capsys, console, tmp_path):
    cfg = configured(capsys, console, tmp_path, *arguments)
    assert (cfg.name, cfg.optimizer.lr, cfg.trainer.max_epochs) == ("digits", 2e-3, 3)


def test_an_experiment_that_is_named_counts():
    for experiment in ("experiment=digits", "~experiment", "+experiment=mine"):
        arguments = ["data=manifest", experiment]
        assert _fit_defaults(arguments) == arguments
    assert _fit_defaults(["--config-name=x", "data=mine"]) == ["--config-name=x", "data=mine"]


def test_a_sweep_over_data_names_its_experiment():
    with pytest.raises(ValueError, match="data=digits,tuxpaint: the default experiment is for"):
        _fit_defaults(["data=digits,tuxpaint"])
    assert _fit_defaults(["data=asterisk,tuxpaint"])[-1] == "~experiment"


def test_a_number_of_steps_is_trained(console, tones, tmp_path, capsys):
    sets = [f"data.corpus.{name}={tones}/{name}.jsonl" for name in ("train", "val")]
    data = ["data=manifest", *sets, "data.num_workers=0", "data.max_utterances=8", "test=false"]
    small = ["model.encoder.conv_channels=4", "model.encoder.hidden_dim=8"]
    options = [*data, *small, "trainer.accelerator=cpu"]
    # Ten epochs, the default, have 40 steps.
    console(main, tmp_path, *options, "trainer.max_steps=45", "trainer.check_val_every_n_epoch=99")
    run = tmp_path / "outputs" / "transducer" / "run"
    assert json.loads((run / "results.json").read_text())["optimizer_steps"] == 45
    assert "Epoch 11 " in (out := capsys.readouterr().out) and "/-2" not in out
    console(main, tmp_path, *options, "trainer.max_steps=45", "trainer.max_epochs=1", "name=both")
    out = capsys.readouterr().out
    assert "ends after 1 epochs (trainer.max_epochs) or 45 steps (trainer.max_steps)" in out
    results = json.loads((tmp_path / "outputs" / "both" / "run" / "results.json").read_text())
    assert results["optimizer_steps"] == 4
    # The time of so few steps is not measured.
    assert results["seconds_per_step"] is None and results["loss_part_of_step"] is None
    assert re.search(r"^4 steps in \d+ s$", out, re.MULTILINE)


def test_no_number_of_steps_keeps_the_epochs():
    for value in ("-1", "null"):
        arguments = [f"trainer.max_steps={value}"]
        assert _fit_defaults(arguments) == arguments


RECIPE = ["--config-dir", str(ROOT / "recipes" / "parakeet" / "conf"), "experiment=parakeet"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [*RECIPE, "optimizer=adamw"],
            "optimizer.decay: torch.optim.AdamW of optimizer=adamw takes no argument decay, which "
            "experiment=parakeet may set; ~optimizer.decay removes it",
        ),
        (
            ["++model.joiner.gate=3"],
            "model.joiner.gate: transducer_toolkit.modules.joiner.Joiner of "
            "model=conv_lstm_stateless takes no argument gate; ~model.joiner.gate removes it",
        ),
    ],
)
def test_an_argument_that_no_component_takes(arguments, message, console, tmp_path, capsys):
    """An experiment sets keys of the options that it chooses; the user may choose others."""
    data = ["data=manifest", "data.corpus.train=a.jsonl", "data.corpus.val=null"]
    with pytest.raises(SystemExit):
        console(main, tmp_path, *arguments, *data, "init_from=folder")
    assert message in capsys.readouterr().err
    if "optimizer=adamw" in arguments:
        with pytest.raises(SystemExit):
            console(main, tmp_path, *arguments, *data, "init_from=folder", "~optimizer.decay")
        assert "no checkpoint at folder" in capsys.readouterr().err
