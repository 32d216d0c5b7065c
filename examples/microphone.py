# SPDX-License-Identifier: Apache-2.0
"""Text from the microphone, one line for each utterance.

``python examples/microphone.py CHECKPOINT`` needs the package sounddevice. ``--file PATH`` reads a
file instead, as if it were spoken.
"""

from __future__ import annotations

import argparse
import importlib
import queue
import sys
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from transducer_toolkit.data.audio import SAMPLE_RATE, read_audio
from transducer_toolkit.inference import EndpointRules, Recognizer, StreamingRecognizer

PIECE_S = 0.1


def main(argv: Sequence[str] | None = None) -> list[str]:
    """Print the text while it is spoken, and return the lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", help="of a model that streams")
    parser.add_argument("--file", help="audio file to read instead of the microphone")
    parser.add_argument(
        "--pause-s", type=float, default=1.2, help="pause that ends an utterance, seconds"
    )
    args = parser.parse_args(argv)
    stream = StreamingRecognizer(
        Recognizer.from_pretrained(args.checkpoint),
        endpoint_rules=EndpointRules(silence_after_text_s=args.pause_s),
    )
    if args.file is None:
        pieces = microphone()
        print("speak; Ctrl-C ends", file=sys.stderr)
    else:
        pieces = iter(read_audio(args.file).split(round(PIECE_S * SAMPLE_RATE)))

    lines: list[str] = []
    line = ""
    try:
        for samples in pieces:
            line += show(stream.accept(samples))
            if stream.is_endpoint:
                line += show(stream.finish())
                line = end(line, lines)
    except KeyboardInterrupt:
        pass
    line += show(stream.finish())
    end(line, lines)
    return lines


def show(text: str) -> str:
    """Print new text behind the text that is already there."""
    print(text, end="", flush=True)
    return text


def end(line: str, lines: list[str]) -> str:
    """End the line if it has text; the next one is empty."""
    if line:
        print()
        lines.append(line)
    return ""


def microphone() -> Iterator[Tensor]:
    """Yield pieces of 100 ms of the default microphone."""
    try:
        sounddevice = importlib.import_module("sounddevice")
    except (ImportError, OSError) as error:  # OSError: PortAudio itself is missing
        sys.exit(
            f"the microphone needs sounddevice ({error}): pip install sounddevice, or give --file"
        )
    return _pieces_of(sounddevice)


def _pieces_of(sounddevice) -> Iterator[Tensor]:
    pieces: queue.Queue[Tensor] = queue.Queue()

    def callback(data, frames, time, status) -> None:
        pieces.put(torch.from_numpy(data[:, 0].copy()))

    blocks = {"blocksize": round(PIECE_S * SAMPLE_RATE), "dtype": "float32"}
    with sounddevice.InputStream(
        samplerate=SAMPLE_RATE, channels=1, callback=callback, **blocks
    ) as source:
        while source.active or not pieces.empty():
            try:
                yield pieces.get(timeout=1.0)
            except queue.Empty:
                continue


if __name__ == "__main__":
    main()
