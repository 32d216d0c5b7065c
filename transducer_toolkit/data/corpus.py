# SPDX-License-Identifier: Apache-2.0
"""The interface of a corpus: it can be prepared, and it has manifests."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

__all__ = ["Corpus", "CorpusManifests", "ManifestCorpus"]


@dataclass(frozen=True)
class CorpusManifests:
    """Paths of the manifests of a corpus; test sets have names.

    A corpus that is only for tests has no ``train`` and no ``val``.
    """

    train: Path | None
    val: Path | None
    test: Mapping[str, Path] = field(default_factory=dict)

    def path(self, name: str) -> Path:
        """Return the manifest of "train", "val" or "test/NAME".

        Raises:
            ValueError: the corpus has no such manifest.
        """
        path = {"train": self.train, "val": self.val}.get(name)
        path = self.test.get(name.removeprefix("test/")) if path is None else path
        if path is None:
            raise ValueError(f"the corpus has no manifest for {name}: give data.corpus.{name}=PATH")
        return path


class Corpus(Protocol):
    """A corpus: one process makes it (downloads or synthesizes it), all processes read it."""

    def prepare(self) -> None:
        """Make the corpus if it does not exist; several processes may call this at a time."""

    def manifests(self) -> CorpusManifests:
        """Return the manifests of a prepared corpus, the same in every process."""


class ManifestCorpus:
    """A corpus of existing manifests.

    Args:
        train: path of the manifest for training; None if the corpus is only for tests.
        val: path of the manifest for validation, or None.
        test: paths of the manifests of the test sets, by name; one path is a test set that is named
            after its file.

    Raises:
        FileNotFoundError: (by ``prepare``) a manifest is missing.

    Example:
        >>> corpus = ManifestCorpus(train="train.jsonl", val="dev.jsonl", test={"clean": "t.jsonl"})
        >>> sorted(corpus.manifests().test)
        ['clean']
        >>> ManifestCorpus(test="other.jsonl").manifests().test
        {'other': PosixPath('other.jsonl')}
    """

    def __init__(
        self,
        *,
        train: str | os.PathLike[str] | None = None,
        val: str | os.PathLike[str] | None = None,
        test: Mapping[str, str | os.PathLike[str]] | str | os.PathLike[str] | None = None,
    ) -> None:
        if isinstance(test, str | os.PathLike):
            test = {Path(test).name.partition(".")[0] or "test": test}
        paths = {"train": train, "val": val, **(test or {})}
        for name, value in paths.items():
            is_optional = value is None and name in ("train", "val")
            if not is_optional and not isinstance(value, str | os.PathLike):
                raise TypeError(f"{name}: expected the path of a manifest, got {value!r}")
        self._manifests = CorpusManifests(
            train=None if train is None else Path(train),
            val=None if val is None else Path(val),
            test={name: Path(path) for name, path in (test or {}).items()},
        )

    def prepare(self) -> None:
        """Check that the manifests exist."""
        manifests = self._manifests
        for path in (manifests.train, manifests.val, *manifests.test.values()):
            if path is not None and not path.exists():  # a folder holds shards
                raise FileNotFoundError(f"no manifest at {path}")

    def manifests(self) -> CorpusManifests:
        """Return the manifests."""
        return self._manifests
