# SPDX-License-Identifier: Apache-2.0
"""``transducer-export CHECKPOINT --output DIR``: write files for sherpa-onnx or transformers."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from transducer_toolkit.cli import console
from transducer_toolkit.cli.arguments import add_trust_package, make_parser

NEEDED_PACKAGES = ("onnx", "onnxruntime")


@console.command("transducer-export")
def main(argv: Sequence[str] | None = None) -> int:
    """Write the files of an export and print their paths and sizes.

    Args:
        argv: arguments; None takes those of the command line.

    Returns:
        The exit status: 0, or 1 if the checkpoint could not be exported.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    given = [path for path in (args.checkpoint, args.checkpoint_option) if path is not None]
    if len(given) != 1:
        parser.error("give one CHECKPOINT")
    if args.chunk_frames is not None and not args.streaming:
        parser.error("--chunk-frames needs --streaming")
    if args.type == "transformers":
        return _export_for_transformers(parser, args, given[0])
    missing = [name for name in NEEDED_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(name=missing[0])
    # Late imports keep --help fast.
    from transducer_toolkit.export import export_for_sherpa
    from transducer_toolkit.export.nemo import client_max_symbols
    from transducer_toolkit.export.sherpa import default_type
    from transducer_toolkit.inference.recognizer import Recognizer
    from transducer_toolkit.ops.topology import get_topology

    recognizer = Recognizer.from_checkpoint(given[0], trusted_packages=args.trust_package)
    files = export_for_sherpa(
        recognizer,
        args.output,
        model_type=args.type,
        hotwords=[] if args.hotwords is None else _lines(args.hotwords),
        streaming=args.streaming,
        int8=args.int8,
        **({} if args.chunk_frames is None else {"chunk_frames": args.chunk_frames}),
    )
    for path in files:
        print(f"{path.stat().st_size:12,d}  {path}")
    model_type = args.type or default_type(recognizer, streaming=args.streaming)
    topology = get_topology(recognizer.topology)
    ours = recognizer.max_symbols_per_frame if topology.labels_share_frames else 1
    theirs = client_max_symbols(recognizer) if model_type == "nemo" else 1
    if ours != theirs:
        print(
            f"note: this model was trained to emit up to {ours} symbols on one frame; sherpa-onnx "
            f"emits at most {theirs}. transducer-evaluate search.max_symbols_per_frame={theirs} "
            "measures the difference in accuracy.",
            file=sys.stderr,
        )
    if model_type == "nemo":
        print('note: load these files with model_type="nemo_transducer"', file=sys.stderr)
    return 0


def _export_for_transformers(
    parser: argparse.ArgumentParser, args: argparse.Namespace, checkpoint: str
) -> int:
    from transducer_toolkit.export.transformers_folder import export_for_transformers
    from transducer_toolkit.inference.recognizer import Recognizer

    for name in ("int8", "streaming", "hotwords"):
        if getattr(args, name) not in (None, False):
            parser.error(f"--{name} is for sherpa-onnx, not for --type transformers")
    recognizer = Recognizer.from_checkpoint(checkpoint, trusted_packages=args.trust_package)
    for path in export_for_transformers(recognizer, args.output):
        print(f"{path.stat().st_size:12,d}  {path}")
    return 0


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"--hotwords: {path} is not UTF-8: {error.reason}") from error


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "transducer-export",
        "Write a checkpoint of transducer-train as encoder.onnx, decoder.onnx (the "
        "predictor), joiner.onnx and tokens.txt for sherpa-onnx. onnxruntime runs each file, and "
        "its result is compared with the model's.",
    )
    parser.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT", help="of transducer-train")
    parser.add_argument(
        "--checkpoint", dest="checkpoint_option", metavar="PATH", help="the same as CHECKPOINT"
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder for the files"
    )
    parser.add_argument(
        "--type",
        choices=("icefall", "nemo", "transformers"),
        help="interface of sherpa-onnx: icefall (stateless predictor, one symbol a frame, the "
        "toolkit's own features) or nemo (several symbols a frame, LSTM predictors, durations); "
        "default: icefall where its text is that of the model, otherwise nemo. transformers writes "
        "a fine-tuned Parakeet model as a folder for from_pretrained",
    )
    parser.add_argument(
        "--hotwords",
        type=Path,
        metavar="FILE",
        help="phrases for the client's hotwords, one a line, possibly with a score, as in "
        '"nine one :2.5"; they are checked and written beside the model',
    )
    parser.add_argument(
        "--int8", action="store_true", help="also write NAME.int8.onnx, with weights in int8"
    )
    parser.add_argument(
        "--streaming",
        action="store_true",
        help="for sherpa-onnx's streaming recognizer; the encoder must stream",
    )
    parser.add_argument(
        "--chunk-frames",
        type=int,
        metavar="N",
        help="with --streaming: encoder frames of 40 ms per call of an LSTM encoder (default: 4); "
        "an Emformer takes one segment per call",
    )
    add_trust_package(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
