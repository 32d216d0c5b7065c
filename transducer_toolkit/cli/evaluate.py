# SPDX-License-Identifier: Apache-2.0
"""``transducer-evaluate checkpoint=PATH``: error rates and speed of a checkpoint on test sets."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transducer_toolkit.cli import hydra_command
from transducer_toolkit.cli.transcript_formats import dump_json

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from transducer_toolkit.data.datamodule import TransducerDataModule
    from transducer_toolkit.data.tokenizer import Tokenizer
    from transducer_toolkit.training.lightning_module import TransducerModule
    from transducer_toolkit.training.scoring import CharacterErrors, Transcript, WordErrors


def main() -> None:
    """Entry point."""
    hydra_command.run("evaluate", evaluate, prepare=_select_data)


def _select_data(arguments: list[str]) -> list[str]:
    from transducer_toolkit.cli import trained_data

    return trained_data.select(arguments)


def evaluate(cfg: DictConfig) -> dict[str, float]:
    """Decode the test sets of ``cfg.data`` with a checkpoint and count the errors.

    The command prints the word and character errors, the real-time factor (time of encoder and
    search divided by the duration of the audio; data workers compute the features) and, for sets
    whose manifests have word start times, the symbol delay. It writes ``results.json``, all
    transcripts in ``transcripts/NAME.tsv`` and the errors of each utterance in
    ``errors/NAME.jsonl`` to the run folder.

    Model and tokenizer come from the checkpoint; the data config selects the test sets. By default
    it is that of the training.

    Args:
        cfg: the composed config.

    Returns:
        Word error rate by name of the test set.

    Raises:
        ValueError: there is no test set, or the data of the checkpoint need an untrusted package.
    """
    from hydra.utils import instantiate

    from transducer_toolkit.cli.output import quiet_lightning
    from transducer_toolkit.cli.removed_keys import refuse_removed_keys
    from transducer_toolkit.cli.train import make_search
    from transducer_toolkit.inference.recognizer import Recognizer
    from transducer_toolkit.training.lightning_module import TransducerModule

    quiet_lightning()
    refuse_removed_keys(cfg)
    recognizer = Recognizer.from_checkpoint(cfg.checkpoint, trusted_packages=cfg.trusted_packages)
    datamodule = _data(cfg, recognizer.tokenizer)
    datamodule.fbank = recognizer.fbank
    datamodule.num_output_frames = recognizer.model.encoder.num_output_frames
    module = TransducerModule(
        recognizer.model,
        recognizer.tokenizer,
        search=make_search(cfg.search, recognizer.max_symbols_per_frame, recognizer.tokenizer),
        topology=recognizer.topology,
        normalize=instantiate(cfg.scoring, _convert_="all"),
    )
    callbacks = list(instantiate(cfg.callbacks, _convert_="all").values())
    trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=False, _convert_="all")
    trainer.test(module, datamodule=datamodule, verbose=False)
    if trainer.is_global_zero:
        _report(cfg, module)
    return {name: errors.wer for name, errors in module.test_errors.items()}


def _report(cfg: DictConfig, module: TransducerModule) -> None:
    """Write the results and the transcripts to the run folder, and print the errors."""
    from omegaconf import OmegaConf

    from transducer_toolkit.cli.output import (
        print_character_errors,
        print_unwritable,
        print_word_errors,
        write_transcripts,
    )
    from transducer_toolkit.training.scoring import find_unwritable, normalize_transcripts

    run_dir = Path(cfg.run_dir)
    write_transcripts(run_dir / "transcripts", module.test_transcripts)
    _write_errors(run_dir / "errors", module.test_transcripts, module.normalize)
    scored = {
        name: normalize_transcripts(rows, module.normalize)
        for name, rows in module.test_transcripts.items()
    }
    unwritable = {
        name: find_unwritable(rows, module.tokenizer, module.normalize)
        for name, rows in scored.items()
    }
    results = {
        "checkpoint": str(cfg.checkpoint),
        "search": OmegaConf.to_container(cfg.search, resolve=True),
        "test_sets": {
            name: summary(rows) | {"unwritable": dataclasses.asdict(unwritable[name])}
            for name, rows in scored.items()
        },
    }
    (run_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print_word_errors(module.test_errors, module.test_character_errors, module.test_symbol_delays)
    print_character_errors(scored)
    print_unwritable(module.test_transcripts, module.tokenizer, module.normalize)
    for name in ("results.json", "errors", "transcripts", "pictures"):
        if (run_dir / name).exists():
            print(f"{name.removesuffix('.json'):12s} {os.path.relpath(run_dir / name)}")


def _data(cfg: DictConfig, tokenizer: Tokenizer) -> TransducerDataModule:
    """Return the prepared data, with at least one test set, and print which it is."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from transducer_toolkit.cli import trained_data

    is_trained = (
        HydraConfig.initialized()
        and HydraConfig.get().runtime.choices.get("data") == trained_data.OPTION
    )
    if is_trained:
        config = OmegaConf.to_container(cfg.data)
        trained_data.check_trusted(config, list(cfg.trusted_packages), str(cfg.checkpoint))
    if cfg.get("data") is None:
        raise ValueError(f"no data: {trained_data.ADVICE}")
    corpus = cfg.data.get("corpus")
    for name in ("train", "val"):  # a test set needs neither
        if corpus is not None and OmegaConf.is_missing(corpus, name):
            corpus[name] = None
    try:
        datamodule: TransducerDataModule = instantiate(
            cfg.data, tokenizer=tokenizer, _convert_="all"
        )
        datamodule.prepare_data()
    except OSError as error:
        if not is_trained:
            raise
        raise ValueError(
            f"the corpus that {cfg.checkpoint} was trained on: {error}; {trained_data.ADVICE}"
        ) from error
    tests = datamodule.corpus.manifests().test
    if not tests:
        raise ValueError(
            "data.corpus has no test set: give data.corpus.test=PATH, or several as "
            "data.corpus.test.NAME=PATH"
        )
    for name, path in tests.items():
        print(f"testing {name}: {path}")
    return datamodule


def summary(transcripts: Sequence[Transcript]) -> dict[str, Any]:
    """Return error counts, error rates and the real-time factor of transcripts, as plain values.

    Args:
        transcripts: transcripts of a set, or of one utterance.

    Example:
        >>> from transducer_toolkit.training.scoring import Transcript
        >>> counts = summary([Transcript("a", "one two", "one too")])
        >>> counts["words"]["rate"], counts["characters"]["substitutions"]
        (0.5, 1)
    """
    from transducer_toolkit.training.scoring import (
        count_character_errors,
        count_word_errors,
        real_time_factor,
    )

    words, characters = count_word_errors(transcripts), count_character_errors(transcripts)
    by_unit = {
        "words": _rates(words, words.num_words, words.wer),
        "characters": _rates(characters, characters.num_characters, characters.cer),
    }
    duration_s = sum(transcript.duration_s for transcript in transcripts)
    speed = {"duration_s": round(duration_s, 3), "rtf": real_time_factor(transcripts)}
    return by_unit | speed


def _rates(errors: WordErrors | CharacterErrors, reference: int, rate: float) -> dict[str, Any]:
    return {
        "substitutions": errors.substitutions,
        "deletions": errors.deletions,
        "insertions": errors.insertions,
        "reference": reference,
        "rate": rate,
    }


def _write_errors(
    folder: Path,
    transcripts: dict[str, list[Transcript]],
    normalize: Callable[[str], str] | None,
) -> None:
    """Write ``NAME.jsonl`` for each test set, one utterance per line: texts as they are."""
    from transducer_toolkit.training.scoring import normalize_transcripts

    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in transcripts.items():
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for row in rows:
                texts = {"id": row.id, "reference": row.reference, "hypothesis": row.hypothesis}
                counts = summary(normalize_transcripts([row], normalize))
                file.write(dump_json(texts | counts) + "\n")


if __name__ == "__main__":
    main()
