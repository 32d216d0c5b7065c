# SPDX-License-Identifier: Apache-2.0
"""The built-in corpus: connected digits spoken by espeak-ng, synthesized on first use."""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import os
import time
from pathlib import Path

from transducer_toolkit.data.cache import build_once, default_cache_dir, fingerprint
from transducer_toolkit.data.corpus import CorpusManifests
from transducer_toolkit.data.digits.held_out import AsteriskDigits, Flite
from transducer_toolkit.data.digits.recipe import load_voices, perturbation, plan_set
from transducer_toolkit.data.digits.synthesis import SHARD_UTTERANCES, synthesize_plans
from transducer_toolkit.data.manifest import write_manifest
from transducer_toolkit.ops.checks import check_at_least, check_int

__all__ = ["DigitsCorpus"]

logger = logging.getLogger(__name__)

# Part of the cache key: increase it when the same options give other audio or other manifests.
RECIPE_VERSION = 5
# Validation and test sets do not depend on the seed, so results of all seeds are comparable.
TEST_SEED = 0
MANIFEST_NAME = "manifest.jsonl"


class DigitsCorpus:
    """Strings of one to eight digits in many synthetic voices, and test sets from elsewhere.

    Test sets: ``test`` (unseen voices, unseen accent), ``excluded`` (voices kept out of training
    with a stated reason, see ``voices.yaml``), and, where the Debian packages are installed,
    ``flite`` (another synthesis engine) and ``asterisk`` (strings of recorded human digits).

    Args:
        cache_dir: folder for prepared corpora; None is the user's cache folder.
        num_train: utterances for training.
        num_val: utterances for validation: other voices, accents of training.
        num_test: utterances of ``test``.
        num_excluded: utterances of ``excluded``.
        num_held_out: utterances of ``flite`` and ``asterisk`` each.
        seed: seed of the training set's texts, speaking styles and distortions. The other sets do
            not depend on it, so results of all seeds are comparable.
        num_workers: processes that synthesize; None is one per CPU. No effect on the result.
        asterisk_digits_dir: folder of the recorded digits; None is the Debian package's.

    Raises:
        ValueError: a count is not positive.
        ImportError: (by ``prepare``) espeakng-loader is not installed.

    Example:
        >>> corpus = DigitsCorpus(num_train=200)
        >>> corpus.prepare()  # doctest: +SKIP
        >>> read_manifest(corpus.manifests().train)[0].text  # doctest: +SKIP
        'eight zero one'
    """

    def __init__(
        self,
        *,
        cache_dir: str | os.PathLike[str] | None = None,
        num_train: int = 8000,
        num_val: int = 200,
        num_test: int = 420,
        num_excluded: int = 140,
        num_held_out: int = 200,
        seed: int = 0,
        num_workers: int | None = None,
        asterisk_digits_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        self.cache_dir = default_cache_dir() if cache_dir is None else Path(cache_dir)
        self.num_utterances = {
            "train": num_train,
            "val": num_val,
            "test": num_test,
            "excluded": num_excluded,
        }
        self.num_held_out = num_held_out
        for name, number in {**self.num_utterances, "held_out": num_held_out}.items():
            check_at_least(1, **{f"num_{name}": number})
        check_int(seed, "seed")
        self.seed = seed
        self.num_workers = num_workers
        self._held_out = (Flite(), AsteriskDigits(sounds_dir=asterisk_digits_dir))

    def prepare(self) -> None:
        """Synthesize what the cache lacks: a minute on two cores for the default sizes."""
        build_once(self._espeak_folder(), self._synthesize)
        for source in self._held_out:
            folder = self._held_out_folder(source)
            if folder is None:
                logger.info(
                    "no test set %r: Debian package %s is not installed",
                    source.name,
                    source.debian_package,
                )
            else:
                build_once(folder, functools.partial(self._make_held_out, source))

    def manifests(self) -> CorpusManifests:
        """Return the manifests; call ``prepare`` first."""
        folder = self._espeak_folder()
        test = {name: folder / f"{name}.jsonl" for name in ("test", "excluded")}
        for source in self._held_out:
            held_out = self._held_out_folder(source)
            if held_out is not None:
                test[source.name] = held_out / MANIFEST_NAME
        return CorpusManifests(train=folder / "train.jsonl", val=folder / "val.jsonl", test=test)

    def _espeak_folder(self) -> Path:
        try:
            engine = importlib.metadata.version("espeakng-loader")
        except importlib.metadata.PackageNotFoundError as error:
            raise ImportError(
                "the digits corpus is spoken by espeak-ng: install transducer_toolkit with the "
                "extra 'demo', or espeakng-loader alone"
            ) from error
        key = [
            RECIPE_VERSION,
            SHARD_UTTERANCES,
            engine,
            self.seed,
            self.num_utterances,
            {name: load_voices().of_set(name) for name in self.num_utterances},
            vars(perturbation()),
        ]
        return self.cache_dir / f"digits-{fingerprint(key)}"

    def _held_out_folder(self, source: Flite | AsteriskDigits) -> Path | None:
        audio = source.fingerprint()
        if audio is None:
            return None
        key = [RECIPE_VERSION, audio, self.num_held_out]
        return self.cache_dir / f"digits-{source.name}-{fingerprint(key)}"

    def _synthesize(self, folder: Path) -> None:
        started = time.monotonic()
        sizes = self.num_utterances
        train = plan_set("train", sizes["train"], seed=self.seed)
        others = [
            plan
            for name in ("val", "test", "excluded")
            for plan in plan_set(name, sizes[name], seed=TEST_SEED)
        ]
        logger.info(
            "synthesizing %d utterances of digits, once, in %s",
            len(train) + len(others),
            self.cache_dir,
        )
        audio = folder / "audio"
        audio.mkdir()
        utterances = synthesize_plans([train, others], audio, num_workers=self.num_workers)
        for name in sizes:
            rows = [utterance for utterance in utterances if utterance.id.startswith(f"{name}-")]
            write_manifest(folder / f"{name}.jsonl", rows)
        logger.info("digits are ready after %.0f s", time.monotonic() - started)

    def _make_held_out(self, source: Flite | AsteriskDigits, folder: Path) -> None:
        audio = folder / "audio"
        audio.mkdir()
        write_manifest(folder / MANIFEST_NAME, source.make(audio, self.num_held_out))
