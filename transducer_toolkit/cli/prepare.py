# SPDX-License-Identifier: Apache-2.0
"""``transducer-prepare data=OPTION``: prepare a corpus before a training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transducer_toolkit.cli import hydra_command

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main() -> None:
    """Entry point."""
    hydra_command.run("prepare", prepare)


def prepare(cfg: DictConfig) -> None:
    """Prepare the corpus of ``cfg.data`` as ``transducer-train`` does, and list its sets.

    Args:
        cfg: the composed config.

    Raises:
        ValueError: the data have no corpus to prepare, or set a key that no longer exists.
    """
    from hydra.utils import instantiate

    from transducer_toolkit.cli.removed_keys import refuse_removed_keys
    from transducer_toolkit.data.manifest import read_manifest

    refuse_removed_keys(cfg)
    if "corpus" not in cfg.data:
        raise ValueError(f"data {cfg.data.get('_target_')} has no corpus to prepare")
    corpus = instantiate(cfg.data.corpus, _convert_="all")
    corpus.prepare()
    manifests = corpus.manifests()
    reads_cuts = str(cfg.data.get("_target_")).endswith("LhotseDataModule")
    print(f"{'set':16s} {'utterances':>10s} {'minutes':>9s} {'words':>9s}  manifest")
    sets = {"train": manifests.train, "val": manifests.val, **manifests.test}
    for name, path in sets.items():
        if path is None:  # data.corpus.val=null
            continue
        if reads_cuts:
            from transducer_toolkit.data.lhotse_datamodule import open_texts

            open_texts(path)  # raises if there are none; counting them could take long
        if reads_cuts or path.suffix != ".jsonl":
            print(f"{name:16s} {'-':>10s} {'-':>9s} {'-':>9s}  {path}")
            continue
        utterances = read_manifest(path)
        minutes = sum(utterance.duration_s for utterance in utterances) / 60
        words = sum(len(utterance.text.split()) for utterance in utterances)
        print(f"{name:16s} {len(utterances):10d} {minutes:9.1f} {words:9d}  {path}")


if __name__ == "__main__":
    main()
