# SPDX-License-Identifier: Apache-2.0
"""``python -m transducer_toolkit.data.digits``: make the digits corpus and print its path."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from transducer_toolkit.data.cache import default_cache_dir
from transducer_toolkit.data.digits.corpus import DigitsCorpus
from transducer_toolkit.data.manifest import read_manifest


def main() -> None:
    """Parse the command line, prepare the corpus, list its sets."""
    parser = argparse.ArgumentParser(
        prog="python -m transducer_toolkit.data.digits",
        description="Synthesize the digits corpus (once; later calls find it in the cache).",
        argument_default=argparse.SUPPRESS,  # DigitsCorpus has the defaults
    )
    parser.add_argument(
        "--cache-dir",
        type=Path,
        help=f"folder for prepared corpora (default: {default_cache_dir()})",
    )
    for name in ("train", "val", "test", "excluded", "held-out"):
        parser.add_argument(f"--num-{name}", type=int, metavar="N", help="utterances")
    parser.add_argument("--seed", type=int, help="of the training set (default: 0)")
    parser.add_argument("--num-workers", type=int, help="processes (default: one per CPU)")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    corpus = DigitsCorpus(**vars(options))
    corpus.prepare()
    manifests = corpus.manifests()
    for name in ("train", "val", *manifests.test):
        path = manifests.path(name)
        utterances = read_manifest(path)
        minutes = sum(utterance.duration_s for utterance in utterances) / 60
        print(f"{name:9}{len(utterances):6} utterances {minutes:6.1f} min  {path}")


if __name__ == "__main__":
    main()
