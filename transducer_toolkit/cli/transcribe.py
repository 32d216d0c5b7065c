# SPDX-License-Identifier: Apache-2.0
"""``transducer-transcribe --checkpoint PATH FILE...``: audio files to text."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transducer_toolkit.training.recognizer import Recognizer


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; prints ``file<TAB>text`` for each file.

    Args:
        argv: arguments, those of the command line by default.

    Returns:
        The exit status: 0, or 1 if a file could not be read (the others are still transcribed).
    """
    args = _parser().parse_args(argv)
    # Late imports: --help stays quick.
    import torch

    from transducer_toolkit.training.recognizer import TRUSTED_PACKAGES, Recognizer

    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    try:
        recognizer = Recognizer.from_checkpoint(
            args.checkpoint,
            device=args.device,
            trusted_packages=(*TRUSTED_PACKAGES, *args.trust_package),
        )
    except (OSError, ValueError) as error:
        print(f"transducer-transcribe: {error}", file=sys.stderr)
        return 1

    status = 0
    for path, text, problem in transcribe_files(recognizer, args.files):
        if problem is None:
            print(f"{path}\t{text}", flush=True)
        else:
            print(f"transducer-transcribe: {path}: {problem}", file=sys.stderr)
            status = 1
    return status


def transcribe_files(
    recognizer: Recognizer, paths: Sequence[str]
) -> Iterator[tuple[str, str, Exception | None]]:
    """Transcribe files one after the other.

    Args:
        recognizer: a trained recognizer.
        paths: audio files that soundfile reads; any sample rate, any number of channels.

    Yields:
        Path, text, and what went wrong or None.
    """
    from transducer_toolkit.data.audio import read_audio

    for path in paths:
        try:
            waveform = read_audio(path, sample_rate=recognizer.fbank.sample_rate)
            yield path, recognizer.transcribe([waveform])[0], None
        except (OSError, ValueError) as error:
            yield path, "", error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="transducer-transcribe",
        description="Transcribe audio files (wav, flac, ogg, mp3, opus; any sample rate) with a "
        "checkpoint of transducer-train. Prints one line a file: its path, a tab, the text.",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="audio file")
    parser.add_argument(
        "--checkpoint", required=True, metavar="PATH", help="checkpoint of transducer-train"
    )
    parser.add_argument("--device", default="cpu", help="torch device, such as cpu or cuda:0")
    parser.add_argument("--num-threads", type=int, metavar="N", help="CPU threads of torch")
    parser.add_argument(
        "--trust-package",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="also instantiate model classes of this Python package; may be repeated",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
