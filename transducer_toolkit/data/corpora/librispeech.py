# SPDX-License-Identifier: Apache-2.0
"""LibriSpeech: 960 hours of read English books."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from transducer_toolkit.data.audio import audio_duration_s
from transducer_toolkit.data.corpora.prepared import PreparedCorpus, write_sets
from transducer_toolkit.data.manifest import Utterance
from transducer_toolkit.ops.checks import check_flag
from transducer_toolkit.optional import import_torchaudio

__all__ = ["LibriSpeechCorpus"]

ARCHIVE_FOLDER = "LibriSpeech"
# Part of the cache key: increase it when the same files give other manifests.
RECIPE_VERSION = 1


class LibriSpeechCorpus(PreparedCorpus):
    """LibriSpeech as its archives unpack: ``ROOT/LibriSpeech/dev-clean/1272/128104/*.flac``.

    The manifests refer to the original files; transcripts are kept as they are, in capitals.

    Args:
        root: the folder that holds ``LibriSpeech``.
        train: subsets for training, "train-clean-100" and so on.
        val: subsets for validation.
        test: subsets for testing; each is a test set.
        download: whether ``prepare`` downloads subsets that are missing, from openslr.org.
        cache_dir: folder for the manifests; None is the user's cache folder.

    Raises:
        FileNotFoundError: a subset is missing.
        ValueError: (by ``prepare``) there is no such subset, or it is empty.

    Example:
        >>> corpus = LibriSpeechCorpus(root="/corpora", train=["train-clean-100"])
        >>> corpus.prepare()  # doctest: +SKIP
        >>> read_manifest(corpus.manifests().val)[0].text[:22]  # doctest: +SKIP
        'MISTER QUILTER IS THE '
    """

    name = "librispeech"

    def __init__(
        self,
        *,
        root: str | os.PathLike[str],
        train: Sequence[str] = ("train-clean-100", "train-clean-360", "train-other-500"),
        val: Sequence[str] = ("dev-clean", "dev-other"),
        test: Sequence[str] = ("test-clean", "test-other"),
        download: bool = False,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(cache_dir=cache_dir)
        check_flag(download, "download")
        self.root = Path(root).absolute()
        self.subsets = {"train": list(train), "val": list(val), "test": list(test)}
        self.download = download

    def prepare(self) -> None:
        """Download missing subsets if ``download`` is set; make the manifests if not cached."""
        if self.download:
            datasets = import_torchaudio("datasets", "data/corpus=librispeech")
            self.root.mkdir(parents=True, exist_ok=True)
            for subset in self._all_subsets():
                datasets.LIBRISPEECH(self.root, url=subset, download=True)
        super().prepare()

    def key(self) -> list[Any]:
        """Return the version of the recipe, the corpus' folder and the speakers of each subset."""
        speakers = {}
        for subset in self._all_subsets():
            folder = self.root / ARCHIVE_FOLDER / subset
            if not folder.is_dir():
                raise FileNotFoundError(
                    f"no LibriSpeech subset at {folder}: unpack https://www.openslr.org/resources/"
                    f"12/{subset}.tar.gz in {self.root}, or set download=true"
                )
            speakers[subset] = sorted(os.listdir(folder))
        return [RECIPE_VERSION, str(self.root), self.subsets, speakers]

    def make(self, folder: Path) -> None:
        """Write the manifests, which takes minutes: 281,000 headers are read."""
        rows = {subset: self._utterances(subset) for subset in self._all_subsets()}
        write_sets(
            folder,
            train=[row for subset in self.subsets["train"] for row in rows[subset]],
            val=[row for subset in self.subsets["val"] for row in rows[subset]],
            test={subset: rows[subset] for subset in self.subsets["test"]},
        )

    def _all_subsets(self) -> list[str]:
        return sorted({subset for subsets in self.subsets.values() for subset in subsets})

    def _utterances(self, subset: str) -> list[Utterance]:
        datasets = import_torchaudio("datasets", "data/corpus=librispeech")
        dataset = datasets.LIBRISPEECH(self.root, url=subset)
        archive = self.root / ARCHIVE_FOLDER

        def utterance(index: int) -> Utterance:
            path, _, text, speaker, _, _ = dataset.get_metadata(index)
            audio = archive / path
            return Utterance(
                id=audio.stem,
                audio=str(audio),
                duration_s=audio_duration_s(audio),
                text=text,
                speaker=str(speaker),
            )

        with ThreadPoolExecutor() as pool:  # waiting for files, mostly
            utterances = list(pool.map(utterance, range(len(dataset))))
        if not utterances:
            raise ValueError(f"the LibriSpeech subset {archive / subset} holds no utterances")
        return utterances
