# SPDX-License-Identifier: Apache-2.0
"""Every YAML that ships is composed and instantiated."""

from importlib.resources import files
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from omegaconf import OmegaConf

from transducer_toolkit.cli import run_folder

run_folder.register()
CONF = files("transducer_toolkit.conf")
GROUPS = {
    group.name: sorted(
        path.name.removesuffix(".yaml") for path in group.iterdir() if path.is_file()
    )
    for group in CONF.iterdir()
    if group.is_dir() and not group.name.startswith("_")
}
CHOICES = [(group, option) for group, options in GROUPS.items() for option in options]
NEEDED = {
    "data": {"manifest": ["data.corpus.train=train.jsonl", "data.corpus.val=val.jsonl"]},
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
    assert set(GROUPS) == expected | {"averaging", "callbacks", "experiment", "hydra"}
    assert [path.name for path in CONF.iterdir() if path.name.endswith(".yaml")]


@pytest.mark.parametrize(("group", "option"), CHOICES)
def test_every_option_instantiates(group, option, tmp_path):
    overrides = [f"{group}={option}", f"run_dir={tmp_path}"]
    cfg = composed("train", *overrides, *NEEDED.get(group, {}).get(option, []))
    OmegaConf.resolve(cfg.hydra.run)
    assert cfg.hydra.run.dir.startswith("outputs/")
    if group not in ("experiment", "hydra"):
        made = instantiate(cfg[group], **LATER_ARGUMENTS.get(group, {}), _convert_="all")
        assert made is not None


@pytest.mark.parametrize("size", ["s", "m", "l"])
@pytest.mark.parametrize("predictor", ["stateless", "lstm"])
def test_sizes_of_the_conformers_are_those_of_the_documentation(size, predictor):
    cfg = composed(
        "train", f"model=conformer_{size}", f"model/predictor={predictor}", "~experiment"
    )
    with torch.device("meta"):
        model = instantiate(cfg.model, vocab_size=1024, blank=0, _convert_="all")
    assert type(model.predictor).__name__ == f"{predictor.title()}Predictor"
    millions = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (model.encoder, model)]
    rows = (Path(__file__).parents[2] / "docs" / "models.md").read_text().splitlines()
    (row,) = [row for row in rows if row.startswith(f"| `conformer_{size}` |")]
    cells = [cell.strip() for cell in row.split("|")]
    assert f"{millions[0]:.1f}" in cells
    assert f"{millions[1]:.1f}" == cells[-4 if predictor == "stateless" else -3]


@pytest.mark.parametrize("config_name", ["train", "evaluate"])
def test_top_level_configs_compose(config_name, tmp_path):
    overrides = [f"run_dir={tmp_path}"]
    if config_name == "evaluate":
        overrides.append("checkpoint=best.ckpt")
    cfg = composed(config_name, *overrides).copy()
    OmegaConf.set_struct(cfg, False)
    del cfg["hydra"]
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)


@pytest.mark.parametrize("option", GROUPS["experiment"])
def test_experiments_show_their_command(option):
    text = (CONF / "experiment" / f"{option}.yaml").read_text()
    assert f"# transducer-train experiment={option}" in text.splitlines()[:2]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"TRANSDUCER_TOOLKIT_RUN_ID": "mine", "SLURM_JOB_ID": "7"}, "mine"),
        ({"TORCHELASTIC_RUN_ID": "job", "SLURM_JOB_ID": "7"}, "torchrun-job"),
        (
            {"TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "node", "MASTER_PORT": "29500"},
            "torchrun-node-29500",
        ),
        ({"SLURM_JOB_ID": "7"}, "slurm-7"),
    ],
)
def test_run_id(monkeypatch, environment, expected):
    for name in ("TRANSDUCER_TOOLKIT_RUN_ID", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert run_folder.run_id() == expected
    assert run_folder.run_id() == expected
