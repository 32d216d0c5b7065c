# SPDX-License-Identifier: Apache-2.0
"""The texts of ``--help`` of the commands that Hydra configures.

Hydra would load every config to list the groups, which takes longer than a second.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path

import yaml

CONFIGS = "transducer_toolkit.conf"
TEXTS = {
    "train": """\
transducer-train: train a transducer, validate it, and test the best checkpoint.

  transducer-train [GROUP=OPTION ...] [KEY=VALUE ...]

Groups, with one option each. The default experiment is digits for data=digits, none for other data;
~experiment removes it.

{groups}

Frequent keys

  data.max_cells=60_000         maximum lattice cells of a batch, which decide memory and time
  data.max_utterances=64        maximum utterances of a batch
  data.num_workers=4            processes that read and augment data
  optimizer.lr=1e-3             peak learning rate
  trainer.max_epochs=10         or trainer.max_steps=100_000, of any number of epochs
  trainer.devices=8             GPUs, with trainer=ddp; trainer.num_nodes=N
  trainer.precision=bf16-mixed  or 16-mixed; any argument of lightning.Trainer
  ckpt_path=auto                resume in this run's folder; last: from the newest run; or a path
  init_from=PATH                start with the weights of a checkpoint trained with any loss
  data/tokenizer=checkpoint     with init_from: keep the symbols of the checkpoint
  callbacks.checkpoint.monitor=val/cer  select the best checkpoint by another metric than val/wer
  name=NAME seed=1              the run folder is outputs/NAME/TIME

Examples

  transducer-train
  transducer-train data=manifest data.corpus.train=train.jsonl data.corpus.val=dev.jsonl
  transducer-train loss=pruned trainer.max_epochs=3 name=pruned
  transducer-train ckpt_path=last
  transducer-train --multirun seed=1,2,3
  transducer-train --multirun experiment=digits_sweep
  torchrun --nproc-per-node=8 -m transducer_toolkit.cli.train trainer=ddp trainer.devices=8
  transducer-train --multirun cluster=slurm trainer.num_nodes=4 trainer.devices=8

Check before a run

  transducer-train ... --cfg job        print the whole config
  transducer-train ... --info defaults  print the files that it comes from
  transducer-train ... trainer.fast_dev_run=true    run one batch of each stage
  transducer-train --hydra-help         print Hydra's own options
""",
    "evaluate": """\
transducer-evaluate: compute word and character error rates of a checkpoint on test sets, without
data= on those of the corpus that it was trained on.

  transducer-evaluate checkpoint=PATH [data=OPTION] [KEY=VALUE ...]

Groups, with one option each

{groups}

Examples

  transducer-evaluate checkpoint=RUN/checkpoints/best.ckpt
  transducer-evaluate checkpoint=best.ckpt data=manifest data.corpus.test=test.jsonl
  transducer-evaluate checkpoint=best.ckpt scoring.case=lower scoring.punctuation=remove

Check before a run

  transducer-evaluate ... --cfg job        print the whole config
""",
    "prepare": """\
transducer-prepare: download or synthesize a corpus before a training, and list its sets.

  transducer-prepare data=OPTION [KEY=VALUE ...]

Groups, with one option each

{groups}

Examples

  transducer-prepare
  transducer-prepare data=digits data.corpus.num_train=100

Check before a run

  transducer-prepare ... --cfg job        print the whole config
""",
}
COMMON = """
All commands

  --version    print the version of transducer_toolkit
  --debug      show the trace of an error; HYDRA_FULL_ERROR=1 does the same
"""


def text(config_name: str, arguments: Sequence[str]) -> str:
    """Return the help of a command.

    Args:
        config_name: the primary config.
        arguments: arguments of the command line; ``--config-dir`` adds a folder of configs.

    Example:
        >>> "\\nsearch: beam, greedy, modified_beam\\n" in text("evaluate", [])
        True
    """
    groups = _groups(config_name, [Path(str(files(CONFIGS))), *config_dirs(arguments)])
    listing = "\n".join(f"{group}: {', '.join(options)}" for group, options in groups.items())
    return TEXTS[config_name].format(groups=listing) + COMMON


def _groups(config_name: str, folders: Sequence[Path]) -> dict[str, list[str]]:
    """Return the options of the groups that a command takes, and of the groups below them.

    Groups below a group without a default can only be chosen together with it.
    """
    primary = yaml.safe_load((folders[0] / f"{config_name}.yaml").read_text(encoding="utf-8"))
    defaults = [entry for entry in primary["defaults"] if isinstance(entry, dict)]
    taken = {
        name: option
        for entry in defaults
        for name, option in entry.items()
        if not name.startswith("override ") and name != "hydra"
    }
    found: dict[str, set[str]] = {}
    for folder in folders:
        for group, option in _options(folder):
            top, _, below = group.partition("/")
            if top in taken and not (below and taken[top] is None):
                found.setdefault(group, set()).add(option)
    return {group: sorted(found[group]) for group in sorted(found)}


def _options(folder: Path, group: str = "") -> Iterator[tuple[str, str]]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _options(entry, f"{group}/{entry.name}" if group else entry.name)
        elif group and entry.name.endswith(".yaml") and not entry.name.startswith("_"):
            yield group, entry.name.removesuffix(".yaml")


def config_dirs(arguments: Sequence[str]) -> Iterator[Path]:
    for name in ("--config-dir", "-cd"):
        for index, argument in enumerate(arguments):
            if argument == name and index + 1 < len(arguments):
                yield Path(arguments[index + 1])
            elif argument.startswith(f"{name}="):
                yield Path(argument.partition("=")[2])
