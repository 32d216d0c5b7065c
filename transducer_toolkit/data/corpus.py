# SPDX-License-Identifier: Apache-2.0
"""What a corpus is to the data module: something to prepare, and manifests."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

__all__ = ["Corpus", "CorpusManifests", "ManifestCorpus"]


@dataclass(frozen=True)
class CorpusManifests:
    """Where the manifests of a corpus are; each test set has a name."""

    train: Path
    val: Path
    test: Mapping[str, Path] = field(default_factory=dict)


class Corpus(Protocol):
    """A corpus: made (downloaded, synthesised, ...) by one process, read by all."""

    def prepare(self) -> None:
        """Make the corpus if need be; safe to call again and from several processes."""

    def manifests(self) -> CorpusManifests:
        """Return the manifests of a prepared corpus; cheap, and the same in every process."""


class ManifestCorpus:
    """A corpus that exists already: your own manifests.

    Args:
        train: manifest for training.
        val: manifest for validation.
        test: manifests by name of the test set.

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
