# SPDX-License-Identifier: Apache-2.0
"""What the commands print and write."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from transducer_toolkit.training.scoring import Transcript, WordErrors


def quiet_lightning() -> None:
    """Let Hydra's logging print Lightning's messages, once and in its format."""
    # Lightning adds a handler of its own as it is imported.
    import lightning

    logging.getLogger(lightning.__name__).handlers.clear()
    # Raised by Lightning's own use of torch; nothing that a user can mend.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")


def print_word_errors(errors: Mapping[str, WordErrors]) -> None:
    """Print a table, one test set a line.

    Args:
        errors: word errors by name of the test set.
    """
    width = max(len("test set"), *map(len, errors))
    print(f"\n{'test set':{width}s}   WER %    sub    del    ins   words   utterances")
    for name, counts in errors.items():
        print(
            f"{name:{width}s} {100 * counts.wer:7.2f} {counts.substitutions:6d} "
            f"{counts.deletions:6d} {counts.insertions:6d} {counts.num_words:7d} "
            f"{counts.num_utterances:12d}"
        )
    print()


def write_transcripts(folder: Path, transcripts: Mapping[str, Sequence[Transcript]]) -> None:
    """Write ``NAME.tsv`` for each test set: id, reference and hypothesis, tab-separated.

    Args:
        folder: made if need be.
        transcripts: by name of the test set.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in transcripts.items():
        lines = [f"{row.id}\t{row.reference}\t{row.hypothesis}\n" for row in rows]
        header = "id\treference\thypothesis\n"
        (folder / f"{name}.tsv").write_text(header + "".join(lines), encoding="utf-8")
