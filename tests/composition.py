# SPDX-License-Identifier: Apache-2.0
"""Hydra composes a choice of config groups once.

A composition takes 0.13 s, and the tests compose about a thousand configs of few different
choices. Hydra still applies all other overrides to a copy. Configs of folders are never kept.
"""

import copy
import pickle
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import yaml
from hydra import compose, initialize_config_module
from hydra._internal import config_loader_impl, config_repository
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.defaults_list import DefaultsList, Overrides
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra

from transducer_toolkit.cli.component_arguments import CONFIG_MODULE


@contextmanager
def composed_once() -> Iterator[None]:
    """Let Hydra use what it has read, listed and merged before."""
    load, store = yaml.load, ConfigStore.store
    list_defaults = config_loader_impl.create_defaults_list
    merge = ConfigLoaderImpl._compose_config_from_defaults_list
    read: dict[str, object] = {}
    lists: dict[Hashable, DefaultsList] = {}
    merged: dict[Hashable, bytes] = {}

    def load_once(stream, Loader):
        if Loader.__name__ != "OmegaConfLoader" or not hasattr(stream, "seek"):
            return load(stream, Loader)
        text = stream.read()
        if text not in read:
            stream.seek(0)
            read[text] = load(stream, Loader)
        return read[text]  # OmegaConf copies it

    def list_once(repo, config_name, overrides_list, prepend_hydra, skip_missing):
        chosen = Overrides(repo, overrides_list)
        groups = chosen.override_choices, chosen.append_group_defaults, chosen.deletions
        key = sources_of(repo), config_name, prepend_hydra, skip_missing, repr(groups)
        if key[0] is None or key not in lists:
            made = list_defaults(repo, config_name, overrides_list, prepend_hydra, skip_missing)
            if key[0] is None:
                return made
            lists[key] = made
        kept = lists[key]
        return DefaultsList(
            kept.defaults, kept.defaults_tree, chosen.config_overrides, kept.overrides
        )

    def merge_once(self, defaults, repo):
        key = sources_of(repo), repr(defaults)
        if key[0] is None:
            return merge(self, defaults, repo)
        if key not in merged:
            merged[key] = pickle.dumps(merge(self, defaults, repo))
        return pickle.loads(merged[key])

    def store_and_forget(self, *args, **kwargs):
        lists.clear()
        merged.clear()
        store(self, *args, **kwargs)

    with (
        mock.patch.object(yaml, "load", load_once),
        mock.patch.object(config_loader_impl, "create_defaults_list", list_once),
        mock.patch.object(ConfigLoaderImpl, "_compose_config_from_defaults_list", merge_once),
        mock.patch.object(ConfigStore, "store", store_and_forget),
        # A repository of configs copies the whole store of configs, which it does not change.
        mock.patch.object(config_repository, "copy", SimpleNamespace(deepcopy=copy.copy)),
    ):
        yield


def compose_for_forks(config_name: str, *overrides: str) -> None:
    """Inside of composed_once(), compose what forks of this process need not compose again."""
    with initialize_config_module(CONFIG_MODULE, version_base="1.3"):
        compose(config_name, list(overrides))
        GlobalHydra.instance().hydra.get_mode(config_name, list(overrides))  # as for a sweep


def sources_of(repo) -> tuple[str, ...] | None:
    """Return the places of configs; None if a folder is among them, whose files may change."""
    sources = repo.get_sources()
    if any(source.scheme() not in ("pkg", "structured") for source in sources):
        return None
    return tuple(source.full_path() for source in sources)
