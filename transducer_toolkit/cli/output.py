# SPDX-License-Identifier: Apache-2.0
"""Output of the commands: tables, transcripts and log messages."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from transducer_toolkit.data.tokenizer import Tokenizer
from transducer_toolkit.training.scoring import (
    CharacterErrors,
    SymbolDelay,
    Transcript,
    WordErrors,
    count_character_errors,
    find_unwritable,
    normalize_transcripts,
    real_time_factor,
)

MAX_SHOWN = 20  # characters of a message


def quiet_lightning() -> None:
    """Print Lightning's messages once, in the format of Hydra's logging."""
    # Lightning adds a handler of its own when it is imported.
    import lightning

    logging.getLogger(lightning.__name__).handlers.clear()
    # Caused by Lightning's use of torch; a user cannot change it.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")
    # Every process computes the results of the whole set.
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*")
    # A run that resumes in its folder: the metrics were renamed, the checkpoints are its own.
    warnings.filterwarnings("ignore", message=".*directory .* exists and is not empty")


def print_word_errors(
    errors: Mapping[str, WordErrors],
    character_errors: Mapping[str, CharacterErrors],
    delays: Mapping[str, SymbolDelay | None] | None = None,
) -> None:
    """Print a table of word errors, one line per test set.

    Args:
        errors: word errors by name of the test set.
        character_errors: character errors by name of the test set.
        delays: symbol delays by name of the test set; their columns appear if a set has one.
    """
    delays = delays or {}
    with_delays = any(delays.values())
    width = max(len("test set"), *map(len, errors))
    header = f"{'test set':{width}s}   WER %   CER %    sub    del    ins   words   utterances"
    print(f"\n{header}{'   delay ms   median' if with_delays else ''}")
    for name, counts in errors.items():
        line = (
            f"{name:{width}s} {100 * counts.wer:7.2f} {100 * character_errors[name].cer:7.2f} "
            f"{counts.substitutions:6d} {counts.deletions:6d} {counts.insertions:6d} "
            f"{counts.num_words:7d} "
            f"{counts.num_utterances:12d}"
        )
        if with_delays:
            delay = delays.get(name)
            mean, median = (f"{delay.mean_ms:.0f}", f"{delay.median_ms:.0f}") if delay else "--"
            line += f"{mean:>11s}{median:>9s}"
        print(line)
    print()


def print_character_errors(transcripts: Mapping[str, Sequence[Transcript]]) -> None:
    """Print a table of character errors and speed, one line per test set.

    Args:
        transcripts: transcripts by name of the test set.
    """
    width = max(len("test set"), *map(len, transcripts))
    header = f"{'test set':{width}s}   CER %    sub    del    ins   chars      audio s      RTF"
    print(header)
    for name, rows in transcripts.items():
        counts, factor = count_character_errors(rows), real_time_factor(rows)
        print(
            f"{name:{width}s} {100 * counts.cer:7.2f} {counts.substitutions:6d} "
            f"{counts.deletions:6d} {counts.insertions:6d} {counts.num_characters:7d} "
            f"{sum(row.duration_s for row in rows):12.1f} "
            f"{'-' if factor is None else f'{factor:.4f}':>8s}"
        )
    print()


def print_unwritable(
    transcripts: Mapping[str, Sequence[Transcript]],
    tokenizer: Tokenizer,
    normalize: Callable[[str], str] | None,
) -> None:
    """Print how many references have characters that the model cannot write, and which.

    Args:
        transcripts: transcripts by name of the test set.
        tokenizer: tokenizer of the symbols that the model emits.
        normalize: normalization of references and hypotheses, or None.
    """
    for name, rows in transcripts.items():
        found = find_unwritable(normalize_transcripts(rows, normalize), tokenizer, normalize)
        if not found.ids:
            continue
        shown = [f"{character!r} in {count}" for character, count in found.characters.items()]
        more = f" and {len(shown) - MAX_SHOWN} more" if len(shown) > MAX_SHOWN else ""
        print(
            f"{name}: {len(found.ids)} of {len(rows)} references have characters that the model "
            f"cannot write, which count as errors: {', '.join(shown[:MAX_SHOWN])}{more}; e.g. "
            f"{', '.join(found.ids[:3])}. data.text and scoring normalize texts.\n"
        )


def write_transcripts(folder: Path, transcripts: Mapping[str, Sequence[Transcript]]) -> None:
    """Write ``NAME.tsv`` for each test set: id, reference and hypothesis, tab-separated.

    Args:
        folder: output folder, made if it does not exist.
        transcripts: transcripts by name of the test set.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in transcripts.items():
        lines = [f"{row.id}\t{row.reference}\t{row.hypothesis}\n" for row in rows]
        header = "id\treference\thypothesis\n"
        (folder / f"{name}.tsv").write_text(
            header + "".join(lines), encoding="utf-8", errors="surrogateescape"
        )
