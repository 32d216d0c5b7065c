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
    """Paths of the manifests of a corpus; test sets have names."""

    train: Path
    val: Path
    test: Mapping[str, Path] = field(default_factory=dict)


class Corpus(Protocol):
    """A corpus: one process makes it (downloads or synthesizes it), all processes read it."""

    def prepare(self) -> None:
        """Make the corpus if it does not exist; several processes may call this at a time."""

    def manifests(self) -> CorpusManifests:
        """Return the manifests of a prepared corpus, the same in every process."""


class ManifestCorpus:
    """A corpus of existing manifests.

    Args:
        train: path of the manifest for training.
        val: path of the manifest for validation.
        test: paths of the manifests of the test sets, by name.

    Raises:
        FileNotFoundError: (by ``prepare``) a manifest is missing.

    Example:
        >>> corpus = ManifestCorpus(train="train.jsonl", val="dev.jsonl", test={"clean": "t.jsonl"})
        >>> sorted(corpus.manifests().test)
        ['clean']
    """

    def __init__(
        self,
        *,
        train: str | os.PathLike[str],
        val: str | os.PathLike[str],
        test: Mapping[str, str | os.PathLike[str]] | None = None,
    ) -> None:
        for name, value in {"train": train, "val": val, **(test or {})}.items():
            if not isinstance(value, str | os.PathLike):
                raise TypeError(f"{name}: expected the path of a manifest, got {value!r}")
        tests = {name: Path(path) for name, path in (test or {}).items()}
        self._manifests = CorpusManifests(train=Path(train), val=Path(val), test=tests)

    def prepare(self) -> None:
        """Check that the manifests exist."""
        manifests = self._manifests
        for path in (manifests.train, manifests.val, *manifests.test.values()):
            if not path.exists():  # a folder holds shards
                raise FileNotFoundError(f"no manifest at {path}")

    def manifests(self) -> CorpusManifests:
        """Return the manifests."""
        return self._manifests
