# SPDX-License-Identifier: Apache-2.0
"""Every YAML that ships is composed and instantiated."""

import contextlib
import importlib
import re
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from transducer_toolkit.cli import auto_loss, run_folder
from transducer_toolkit.cli.component_arguments import check_arguments, with_signs
from transducer_toolkit.cli.hints import _keys, find_hints
from transducer_toolkit.cli.train import train
from transducer_toolkit.optional import OLDEST_TRANSFORMERS

run_folder.register()
CONF = files("transducer_toolkit.conf")
GROUPS = {  # without _common.yaml, which is part of its group's options and none itself
    group.name: sorted(
        path.name.removesuffix(".yaml")
        for path in group.iterdir()
        if path.name.endswith(".yaml") and not path.name.startswith("_")
    )
    for group in CONF.iterdir()
    if group.is_dir() and not group.name.startswith("_")
}
CHOICES = [(group, option) for group, options in GROUPS.items() for option in options]
NEEDED = {
    "data": {
        "manifest": ["data.corpus.train=train.jsonl", "data.corpus.val=val.jsonl"],
        "lhotse": ["data.corpus.train=train.jsonl.gz", "data.corpus.val=val.jsonl.gz"],
        "librispeech": ["data.corpus.root=corpora"],
    },
}
LATER_ARGUMENTS = {
    "model": {"vocab_size": 10, "blank": 0},
    "loss": {"blank": 0},
    "data": {},
    "trainer": {"accelerator": "cpu", "logger": False, "devices": 1},
}


def composed(config_name, *overrides):
    with initialize_config_module("transducer_toolkit.conf", version_base="1.3"):
        return compose(config_name, overrides=list(overrides), return_hydra_config=True)


def test_the_groups_are_those_of_the_documentation():
    expected = {"data", "model", "loss", "optimizer", "scheduler", "trainer", "logger"}
    groups = {
        "adapters",
        "averaging",
        "callbacks",
        "cluster",
        "experiment",
        "hydra",
        "scoring",
        "search",
    }
    assert set(GROUPS) == expected | groups
    assert [path.name for path in CONF.iterdir() if path.name.endswith(".yaml")]


def skip_without_transformers(option):
    if option.startswith(("fastconformer", "huggingface")):
        pytest.importorskip("transformers", minversion=OLDEST_TRANSFORMERS)


@pytest.mark.parametrize(("group", "option"), CHOICES)
def test_every_option_instantiates(group, option, tmp_path):
    skip_without_transformers(option)
    overrides = [f"{group}={option}", f"run_dir={tmp_path}"]
    if group == "search":
        cfg = composed("evaluate", *overrides, "checkpoint=best.ckpt")
    else:
        cfg = composed("train", *overrides, *NEEDED.get(group, {}).get(option, []))
        auto_loss.settle(cfg, None, {})
        check_arguments(cfg)
    OmegaConf.resolve(cfg.hydra.run)
    assert cfg.hydra.run.dir.startswith("outputs/")
    if group not in ("cluster", "experiment", "hydra"):
        # Of a larger size only the shapes differ; to draw its weights takes a second.
        is_large = group == "model" and option.endswith(("_m", "_l"))
        with torch.device("meta") if is_large else contextlib.nullcontext():
            made = instantiate(cfg[group], **LATER_ARGUMENTS.get(group, {}), _convert_="all")
        assert made is not None


@pytest.mark.parametrize(
    ("group", "option"),
    [
        choice
        for choice in CHOICES
        if choice[0] in ("averaging", "callbacks", "data", "loss", "model")
    ],
)
def test_what_should_be_a_number_is_named(group, option, tmp_path):
    skip_without_transformers(option)
    needed = [f"{group}={option}", f"run_dir={tmp_path}", *NEEDED.get(group, {}).get(option, [])]
    cfg = composed("train", "~experiment", *needed)
    auto_loss.settle(cfg, None, {})
    config = OmegaConf.to_container(cfg[group], resolve=True)
    for parent, name in _numbers(config or {}):
        right, parent[name] = parent[name], "x"
        with pytest.raises(InstantiationException, match=rf"\b{name}\b"):
            instantiate(config, **LATER_ARGUMENTS.get(group, {}), _convert_="all")
        parent[name] = right


def _numbers(config):
    """Places of numbers in what is made of our classes at once, not later (``_partial_``)."""
    if "_partial_" in config or not config.get("_target_", "transducer").startswith("transducer"):
        return
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _numbers(value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield config, name


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=x", "seed: expected an int, got str"),
        ("num_threads=0", "num_threads: expected at least 1, got 0"),
        ("flush_denormal=x", "flush_denormal: expected a bool, got str"),
        ("test=1", "test: expected a bool, got int"),
        ("trainer.max_epochs=x", "trainer.max_epochs: expected an int, got str"),
        ("+trainer.max_steps=1.5", "trainer.max_steps: expected an int, got float"),
        (
            "trainer.accumulate_grad_batches=0",
            "trainer.accumulate_grad_batches: expected at least 1",
        ),
        ("loss.topology=null", "loss.topology: expected one of .* got None"),
        ("loss.topology=linear", "loss.topology: expected one of .* got 'linear'"),
        (
            "callbacks.checkpoint.monitor=val/cerr",
            "checkpoint.monitor: expected one of val/wer, val/cer, val/loss, got val/cerr",
        ),
    ],
)
def test_options_that_no_class_would_name_as_they_are_spelt(override, message, tmp_path):
    cfg = composed("train", f"run_dir={tmp_path}", override)
    with pytest.raises((TypeError, ValueError), match=message):
        train(cfg)


@pytest.mark.parametrize("option", GROUPS["data"])
def test_all_data_follow_seed_and_loss(option):
    common = OmegaConf.load(CONF / "data" / "_common.yaml")
    text = OmegaConf.load(CONF / "data" / f"{option}.yaml")
    needed = [f"data={option}", *NEEDED["data"].get(option, [])]
    for name, overrides, seed, topology in (
        (
            "train",
            ["~experiment", "seed=7", "loss=packed", "loss.topology=modified"],
            7,
            "modified",
        ),
        ("train", ["~experiment", "loss=torchaudio"], 1, "regular"),  # has no topology
        ("evaluate", ["checkpoint=best.ckpt", "seed=3"], 3, "regular"),
        ("prepare", [], 0, "regular"),
    ):
        data = composed(name, *needed, *overrides).data
        assert (data.seed, data.topology) == (seed, topology)
        assert data.spec_augment._target_ == common.spec_augment._target_
        assert data.tokenizer._partial_ and "corpus" in data and data.max_utterances > 0
        # An option says what differs, and nothing else.
        assert not {"seed", "topology"} & set(text)
        repeated = [key for key in common if key in text and text[key] == common[key]]
        assert not repeated
        left = [key for key in common if key not in text and key != "spec_augment"]
        assert all(data._get_node(key)._value() == common._get_node(key)._value() for key in left)


@pytest.mark.parametrize("kind", ["conformer", "fastconformer"])
@pytest.mark.parametrize("size", ["s", "m", "l"])
@pytest.mark.parametrize("predictor", ["stateless", "lstm"])
def test_sizes_of_the_conformers_are_those_of_the_documentation(kind, size, predictor):
    skip_without_transformers(kind)
    cfg = composed("train", f"model={kind}_{size}", f"model/predictor={predictor}", "~experiment")
    with torch.device("meta"):
        model = instantiate(cfg.model, vocab_size=1024, blank=0, _convert_="all")
    assert type(model.predictor).__name__ == f"{predictor.title()}Predictor"
    millions = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (model.encoder, model)]
    rows = (Path(__file__).parents[2] / "docs" / "models.md").read_text().splitlines()
    (row,) = [row for row in rows if row.startswith(f"| `{kind}_{size}` |")]
    cells = [cell.strip() for cell in row.split("|")]
    assert f"{millions[0]:.1f}" in cells
    assert f"{millions[1]:.1f}" == cells[-4 if predictor == "stateless" else -3]


@pytest.mark.parametrize("data", GROUPS["data"])
def test_every_tokenizer_suits_every_data(data):
    options = sorted(path.name for path in (CONF / "data" / "tokenizer").iterdir())
    names = ("characters", "checkpoint", "sentencepiece", "sentencepiece_model")
    assert options == [f"{name}.yaml" for name in names]
    needed = NEEDED["data"].get(data, [])
    for option, given, expected in (
        ("characters", "unknown=true", "<unk>"),
        ("sentencepiece", "vocab_size=12", "tw"),
    ):
        overrides = [f"data/tokenizer={option}", f"data.tokenizer.{given}"]
        cfg = composed("train", f"data={data}", *needed, *overrides)
        make = instantiate(cfg.data.tokenizer)
        assert expected in make(["one two", "two ones"]).symbols
    cfg = composed("train", f"data={data}", *needed, "data/tokenizer=sentencepiece_model",
                   "data.tokenizer.path=none.model")  # fmt: skip
    with pytest.raises(InstantiationException, match=r"no SentencePiece model at none\.model"):
        instantiate(cfg.data.tokenizer)
    for given, message in (
        ([], r"data/tokenizer=checkpoint: expected a checkpoint, got null; set init_from="),
        (["init_from=none.ckpt"], r"no checkpoint at none\.ckpt"),
        (["data.tokenizer.path=other.ckpt"], r"no checkpoint at other\.ckpt"),
    ):
        cfg = composed("train", f"data={data}", *needed, "data/tokenizer=checkpoint", *given)
        with pytest.raises(InstantiationException, match=message):
            instantiate(cfg.data.tokenizer)


@pytest.mark.parametrize("config_name", ["train", "evaluate"])
def test_top_level_configs_compose(config_name, tmp_path):
    overrides = [f"run_dir={tmp_path}"]
    if config_name == "evaluate":
        overrides.append("checkpoint=best.ckpt")
    cfg = composed(config_name, *overrides).copy()
    OmegaConf.set_struct(cfg, False)
    del cfg["hydra"]
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)


@pytest.mark.parametrize(
    ("group", "option"), [choice for choice in CHOICES if choice[0] in ("cluster", "experiment")]
)
def test_experiments_and_clusters_show_their_command(group, option):
    first = (CONF / group / f"{option}.yaml").read_text().splitlines()[:2]
    commands = [line for line in first if line.startswith("# transducer-train ")]
    assert len(commands) == 1
    overrides = commands[0].split()[2:]
    assert f"{group}={option}" in overrides
    composed("train", *(text.split(",")[0] for text in overrides if text != "--multirun"))


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("train", set(GROUPS) - {"hydra"}),
        ("evaluate", {"data", "scoring", "search", "trainer", "callbacks"}),
        ("prepare", {"data"}),
    ],
)
def test_help_names_what_there_is(command, expected, capsys, monkeypatch):
    main = importlib.import_module(f"transducer_toolkit.cli.{command}").main
    monkeypatch.setattr(sys, "argv", [f"transducer-{command}", "--help"])
    main()
    out = capsys.readouterr().out
    assert out.startswith(f"transducer-{command}: ")
    listed = dict(re.findall(r"^([\w/]+): (\w+(?:, \w+)*)$", out, re.MULTILINE))
    assert {group for group in listed if "/" not in group} == expected
    # transducer-evaluate takes the checkpoint's tokenizer.
    assert ("data/tokenizer" in listed) == (command != "evaluate") and "_common" not in out
    # Each option that is listed can be chosen. (test_every_option_instantiates chooses some.)
    needed = ["checkpoint=best.ckpt"] if command == "evaluate" else []
    for group, options in listed.items():
        if group in GROUPS:
            assert options.split(", ") == GROUPS[group]
        if command == "train" and group in GROUPS:
            continue
        for option in options.split(", "):
            more = ["model=conformer_s"] if group == "model/predictor" else []
            composed(command, *needed, *more, f"{group}={option}")
    # Its examples are commands that work.
    examples = re.findall(rf"(?:transducer-{command}|cli.train) (.*)$", out, re.MULTILINE)
    for example in examples:
        if "[" not in example and "..." not in example and "\\" not in example:
            words = re.split(r"\s{2,}", example)[0].split()
            overrides = (word.split(",")[0] for word in words if not word.startswith("--"))
            composed(command, *with_signs(command, list(overrides)))
    assert len(examples) >= 2


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["optimzer.lr=1"], "optimzer.lr: did you mean optimizer.lr?"),
        (["trainer.max_epoch=1"], "trainer.max_epoch: did you mean trainer.max_epochs?"),
        (["max_epochs=1"], "max_epochs: did you mean trainer.max_epochs?"),
        (["loss=pruned", "loss.prune_rnge=3"], "loss.prune_rnge: did you mean loss.prune_range?"),
        (["--multirun", "loss=packed,fusd"], "loss=fusd: did you mean loss=fused?"),
        (["modle=x"], "modle: did you mean model?"),
        (["~experimnt"], "experimnt: did you mean experiment?"),
        (
            ["hydra/launcher=submitit_locl"],
            "hydra/launcher=submitit_locl: did you mean hydra/launcher=submitit_local?",
        ),
    ],
)
def test_a_misspelt_override_names_the_nearest(arguments, hint):
    assert find_hints("train", arguments) == [hint]


def test_no_hints_without_a_mistake():
    right = ["loss=packed", "seed=1", "+trainer.max_steps=3", "~experiment", "loss.clamp=1.0"]
    assert find_hints("train", right) == []
    assert find_hints("train", ["xyzzy=1", "[="]) == find_hints("train", ["xyzzy=1"]) == []


def test_hints_follow_hydras_message(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["transducer-train", "trainer.max_epoch=1"])
    with pytest.raises(SystemExit) as error:
        importlib.import_module("transducer_toolkit.cli.train").main()
    lines = capsys.readouterr().err.splitlines()
    assert error.value.code == 1
    assert lines[0].startswith("transducer-train: Could not override 'trainer.max_epoch'.")
    assert len(lines) == 2 and lines[-1] == "trainer.max_epoch: did you mean trainer.max_epochs?"


def test_slurm_asks_for_one_task_a_gpu():
    cfg = composed("train", "cluster=slurm", "trainer.num_nodes=4", "trainer.devices=8")
    launcher = cfg.hydra.launcher
    assert (launcher.nodes, launcher.tasks_per_node, launcher.gpus_per_node) == (4, 8, 8)
    assert launcher._target_.endswith("SlurmLauncher") and cfg.trainer.strategy == "ddp"


def test_the_sweep_is_optunas():
    sweeper = composed("train", "experiment=digits_sweep").hydra.sweeper
    assert sweeper._target_.endswith("OptunaSweeper") and sweeper.direction == "minimize"
    assert set(sweeper.params) <= set(_keys(composed("train", "experiment=digits_sweep")))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"TRANSDUCER_TOOLKIT_RUN_ID": "mine", "SLURM_JOB_ID": "7"}, "mine"),
        ({"TORCHELASTIC_RUN_ID": "job", "SLURM_JOB_ID": "7"}, "torchrun-job-"),
        (
            {"TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "node", "MASTER_PORT": "29500"},
            "torchrun-node-29500-",
        ),
        ({"SLURM_JOB_ID": "7"}, "slurm-7-"),
    ],
)
def test_run_id(monkeypatch, environment, expected):
    for name in ("TRANSDUCER_TOOLKIT_RUN_ID", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = {}
    for arguments in ("a=1 b=2", "b=2 a=1", "a=1", "a=1 b=3"):
        monkeypatch.setattr(sys, "argv", ["train", *arguments.split()])
        found[arguments] = run_folder.run_id()
        assert run_folder.run_id() == found[arguments]
        if expected != "mine":
            monkeypatch.delenv("TRANSDUCER_TOOLKIT_RUN_ID")
    assert all(name.startswith(expected) for name in found.values())
    assert found["a=1 b=2"] == found["b=2 a=1"]
    # Another config gets another folder, unless the user has named the folder.
    assert len(set(found.values())) == (1 if expected == "mine" else 3)
