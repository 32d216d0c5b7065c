# SPDX-License-Identifier: Apache-2.0
"""``transducer-evaluate checkpoint=PATH``: word error rates of a checkpoint on test sets."""

from __future__ import annotations

from pathlib import Path

import hydra
from omegaconf import DictConfig

from transducer_toolkit.cli import hints, run_folder

run_folder.register()


@hints.nearest_keys("evaluate")
@hydra.main(version_base="1.3", config_path="pkg://transducer_toolkit.conf", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    """Entry point."""
    evaluate(cfg)


def evaluate(cfg: DictConfig) -> dict[str, float]:
    """Decode the test sets of ``cfg.data`` with a checkpoint and print their word error rates.

    Also printed are symbol delays, of the sets whose manifests have word start times.

    Model and tokenizer come from the checkpoint; the data config only says what to decode.

    Args:
        cfg: the composed config.

    Returns:
        Word error rate by name of the test set.
    """
    from hydra.utils import instantiate

    from transducer_toolkit.cli.output import print_word_errors, quiet_lightning, write_transcripts
    from transducer_toolkit.training.lightning_module import TransducerModule
    from transducer_toolkit.training.recognizer import Recognizer

    quiet_lightning()
    recognizer = Recognizer.from_checkpoint(
        cfg.checkpoint, trusted_packages=list(cfg.trusted_packages)
    )
    datamodule = instantiate(cfg.data, tokenizer=recognizer.tokenizer, _convert_="all")
    module = TransducerModule(
        recognizer.model,
        recognizer.tokenizer,
        max_symbols_per_frame=cfg.max_symbols_per_frame or recognizer.max_symbols_per_frame,
        topology=recognizer.topology,
    )
    callbacks = list(instantiate(cfg.callbacks, _convert_="all").values())
    trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=False, _convert_="all")
    trainer.test(module, datamodule=datamodule, verbose=False)
    if trainer.is_global_zero:
        write_transcripts(Path(cfg.run_dir) / "transcripts", module.test_transcripts)
        print_word_errors(module.test_errors, module.test_symbol_delays)
    return {name: errors.wer for name, errors in module.test_errors.items()}


if __name__ == "__main__":
    main()
