# SPDX-License-Identifier: Apache-2.0
"""A corpus whose manifests are made once and cached in a folder of the user."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transducer_toolkit.data.cache import build_once, default_cache_dir, fingerprint
from transducer_toolkit.data.corpus import CorpusManifests
from transducer_toolkit.data.manifest import Utterance, write_manifest

__all__ = ["PreparedCorpus", "write_sets"]

TEST_PREFIX = "test-"


class PreparedCorpus(ABC):
    """A corpus whose manifests one process makes and all processes find, see :class:`Corpus`.

    A subclass returns the values that its manifests depend on, and writes the manifests.

    Args:
        cache_dir: folder for prepared corpora; None is the user's cache folder.

    Attributes:
        name: first part of the folder's name.
    """

    name: str

    def __init__(self, *, cache_dir: str | os.PathLike[str] | None = None) -> None:
        self.cache_dir = default_cache_dir() if cache_dir is None else Path(cache_dir)

    @abstractmethod
    def key(self) -> Any:
        """Return the JSON values that the manifests depend on.

        Raises:
            FileNotFoundError: the corpus is not in its folder.
        """

    @abstractmethod
    def make(self, folder: Path) -> None:
        """Write the manifests into an empty folder, with :func:`write_sets`."""

    def prepare(self) -> None:
        """Make the manifests unless the cache has them."""
        build_once(self._folder(), self.make)

    def manifests(self) -> CorpusManifests:
        """Return the manifests; call ``prepare`` first."""
        folder = self._folder()
        test = {path.stem[len(TEST_PREFIX) :]: path for path in folder.glob(f"{TEST_PREFIX}*")}
        return CorpusManifests(
            train=folder / "train.jsonl",
            val=folder / "val.jsonl",
            test=dict(sorted(test.items())),
        )

    def _folder(self) -> Path:
        return self.cache_dir / f"{self.name}-{fingerprint(self.key())}"


def write_sets(
    folder: Path,
    *,
    train: Sequence[Utterance],
    val: Sequence[Utterance],
    test: Mapping[str, Sequence[Utterance]],
) -> None:
    """Write the manifests of a corpus where :class:`PreparedCorpus` finds them.

    Args:
        folder: as given to ``make``.
        train: rows for training.
        val: rows for validation.
        test: rows by name of the test set.
    """
    write_manifest(folder / "train.jsonl", train)
    write_manifest(folder / "val.jsonl", val)
    for name, utterances in test.items():
        write_manifest(folder / f"{TEST_PREFIX}{name}.jsonl", utterances)
