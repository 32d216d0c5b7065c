# SPDX-License-Identifier: Apache-2.0
"""Configs that are composed again are those that Hydra would compose."""

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from tests.composition import composed_once


def composed(*overrides):
    with initialize_config_module("transducer_toolkit.conf", version_base="1.3"):
        return compose("train", list(overrides), return_hydra_config=True)


def test_no_override_stays():
    with composed_once():
        before = composed("loss=packed")
        changed = composed("loss=packed", "seed=7", "~callbacks.progress_bar", "+trainer.x=1")
        other = composed("loss=fused", "seed=8")
        after = composed("loss=packed")
    assert (changed.seed, changed.trainer.x, other.seed) == (7, 1, 8)
    assert "progress_bar" not in changed.callbacks and "progress_bar" in after.callbacks
    assert changed.loss == before.loss != other.loss
    assert changed.hydra.overrides.task[1] == "seed=7" and len(after.hydra.overrides.task) == 1
    assert OmegaConf.to_yaml(before) == OmegaConf.to_yaml(after)
    assert list(before.hydra.runtime.choices) == list(after.hydra.runtime.choices)


def test_a_file_of_a_folder_is_read_again(tmp_path):
    (tmp_path / "loss").mkdir()
    with composed_once():
        for value in (1, 2):
            (tmp_path / "loss" / "mine.yaml").write_text(f"value: {value}\n")
            cfg = composed(f"hydra.searchpath=[file://{tmp_path}]", "loss=mine")
            assert cfg.loss.value == value


def test_a_stored_config_is_used(monkeypatch):
    store = ConfigStore.instance()
    monkeypatch.setitem(store.repo, "scheduler", dict(store.repo.get("scheduler", {})))
    with composed_once():
        for value in (1, 2):
            store.store("mine", {"value": value}, group="scheduler")
            assert composed("scheduler=mine").scheduler.value == value
