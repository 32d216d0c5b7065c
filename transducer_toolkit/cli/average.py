# SPDX-License-Identifier: Apache-2.0
"""``transducer-average --output PATH CHECKPOINT...``: write the mean of checkpoints."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from transducer_toolkit.cli import console
from transducer_toolkit.cli.arguments import make_parser


@console.command("transducer-average")
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point.

    Args:
        argv: arguments; None takes those of the command line.

    Returns:
        The exit status: 0, or 1 if the checkpoints cannot be read or do not belong together.
    """
    args = _parser().parse_args(argv)
    import torch  # late, so that --help is fast

    try:
        mean = average_checkpoints(args.checkpoints)
    except (OSError, ValueError) as error:
        print(f"transducer-average: {error}", file=sys.stderr)
        return 1
    try:
        torch.save(mean, args.output)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError without the path
        print(f"transducer-average: {args.output} cannot be written: {error}", file=sys.stderr)
        return 1
    print(f"{args.output}: mean of {len(args.checkpoints)} checkpoints")
    return 0


def average_checkpoints(paths: Sequence[str]) -> dict[str, Any]:
    """Return the mean of checkpoints of one training, or of trainings of the same model.

    Args:
        paths: checkpoints of ``transducer-train``, at least one.

    Returns:
        A checkpoint for ``Recognizer.from_checkpoint`` and ``init_from``. It has no optimizer
        state, so a training cannot be resumed from it. Values that are not floating point come from
        the last checkpoint.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if one is not such a checkpoint, or has another model or other symbols.
    """
    from transducer_toolkit.cli.changes import CONFIG_KEY
    from transducer_toolkit.inference.recognizer import CHECKPOINT_KEY, load_checkpoint

    if not paths:
        raise ValueError("paths must hold at least one checkpoint, got none")
    sums: dict[str, Any] = {}
    recipe: dict[str, Any] = {}
    for path in paths:
        checkpoint = load_checkpoint(path)
        weights = checkpoint["state_dict"]
        if not recipe:
            recipe, sums = checkpoint[CHECKPOINT_KEY], dict.fromkeys(weights, 0)
        different = [key for key in recipe if checkpoint[CHECKPOINT_KEY].get(key) != recipe[key]]
        if different or weights.keys() != sums.keys():
            what = ", ".join(different) or "names of the weights"
            raise ValueError(f"{path} differs from {paths[0]} in: {what}")
        for name, value in weights.items():
            if hasattr(sums[name], "shape") and sums[name].shape != value.shape:
                raise ValueError(
                    f"{path} differs from {paths[0]} in the size of {name}: {tuple(value.shape)} "
                    f"and {tuple(sums[name].shape)}"
                )
            # float64, because a sum of many float32 loses the last digits.
            sums[name] = sums[name] + value.double() if value.is_floating_point() else value
    # All checkpoints have the same dtypes as the last one.
    means = {
        name: (total / len(paths)).to(weights[name].dtype)
        if weights[name].is_floating_point()
        else total
        for name, total in sums.items()
    }
    # transducer-evaluate takes the test sets of the training from it.
    configs = {CONFIG_KEY: checkpoint[CONFIG_KEY]} if CONFIG_KEY in checkpoint else {}
    return {CHECKPOINT_KEY: recipe, "state_dict": means} | configs


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "transducer-average",
        "Write a checkpoint whose weights are the mean of those of others. A training "
        "keeps its best five checkpoints with callbacks.checkpoint.save_top_k=5 "
        "'callbacks.checkpoint.filename=\"{step}\"'.",
    )
    parser.add_argument(
        "checkpoints", nargs="+", metavar="CHECKPOINT", help="checkpoint of transducer-train"
    )
    parser.add_argument("--output", required=True, metavar="PATH", help="file to write")
    return parser


if __name__ == "__main__":
    sys.exit(main())
