# SPDX-License-Identifier: Apache-2.0
"""``transducer-transcribe --checkpoint PATH FILE...``: audio files and folders to text."""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transducer_toolkit.cli import console
from transducer_toolkit.cli.arguments import add_device, add_trust_package, channel, make_parser
from transducer_toolkit.cli.transcript_formats import FORMATS, SUFFIXES

if TYPE_CHECKING:
    from transducer_toolkit.decoding import Fusion, Search
    from transducer_toolkit.inference.long_audio import AudioSource

# The defaults of transcribe_file, whose module imports torch, which would make --help slow.
WINDOW_S = 20.0
OVERLAP_S = 4.0
BEAM_SEARCHES = ("beam", "modified_beam")
# Options of a Fusion, each with the one that it needs.
FUSION_OPTIONS = {
    "lm": None,
    "lm_weight": "lm",
    "internal_lm": None,
    "internal_lm_weight": "internal_lm",
    "hotwords": None,
    "hotwords_score": "hotwords",
    "hotwords_depth_score": "hotwords",
    "hotwords_case": "hotwords",
}
BATCH_SIZE = 8
AUDIO_SUFFIXES = (
    *(".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3"),
    *(".aif", ".aiff", ".au", ".caf", ".w64", ".rf64", ".sph"),
)


@console.command("transducer-transcribe")
def main(argv: Sequence[str] | None = None) -> int:
    """Write the transcript of each file.

    Args:
        argv: arguments; None takes those of the command line.

    Returns:
        The exit status: 0, or 1 if a file could not be read (the others are still transcribed).
    """
    parser = _parser()
    args = parser.parse_args(argv)
    _check(parser, args)
    # Late imports keep --help fast.
    import torch

    from transducer_toolkit.inference.long_audio import transcribe_files
    from transducer_toolkit.inference.recognizer import Recognizer

    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    duration_s = 0.0
    with ExitStack() as stack:
        files = find_audio(args.files)
        write = _open_output(args, files, stack)
        recognizer = Recognizer.from_checkpoint(
            args.checkpoint,
            device=args.device,
            trusted_packages=args.trust_package,
            search=_search(args),
            fusion=_fusion(args),
        )
        started_s = time.perf_counter()
        progress = stack.enter_context(_progress_bar(list(files)))
        try:
            results = transcribe_files(
                recognizer,
                _sources(list(files), args.channel),
                cut=args.cut,
                window_s=args.window_s,
                overlap_s=args.overlap_s,
                batch_size=args.batch_size,
                on_progress=progress,
            )
        except ValueError as error:  # the voice-activity detector is missing
            print(f"transducer-transcribe: {error}", file=sys.stderr)
            return 1
        failed: set[str] = set()
        for source, found in results:
            path = str(source.path)
            if isinstance(found, Exception):
                # The message of a library may have many lines and may not name the file.
                problem = str(found).partition("\n")[0]
                named = problem if path in problem else f"{path}: {problem}"
                print(f"transducer-transcribe: {named}", file=sys.stderr)
                failed.add(path)
                continue
            name = path
            if args.channel == "each" and args.format == "text":
                name = f"{path}\t{found.channel}"
            write(path, found.channel, FORMATS[args.format](name, found))
            duration_s += found.duration_s
        took_s = time.perf_counter() - started_s
    summary = f"{len(files) - len(failed)} of {len(files)} files, {duration_s:.1f} s of audio"
    if duration_s > 0:
        summary += f" in {took_s:.1f} s, real-time factor {took_s / duration_s:.4f}"
    print(summary, file=sys.stderr)
    return 1 if failed else 0


def find_audio(paths: Sequence[str]) -> dict[str, Path]:
    """Find audio files, in folders and in all folders below them too.

    Args:
        paths: files, with any name, and folders, which are searched for names of audio files.

    Returns:
        For the path of each file, its path relative to the folder that was searched.

    Raises:
        FileNotFoundError: a folder holds no audio files.
    """
    found: dict[str, Path] = {}
    for path in paths:
        if not os.path.isdir(path):
            found[path] = Path(Path(path).name)
            continue
        inside = sorted(p for p in Path(path).rglob("*") if p.suffix.lower() in AUDIO_SUFFIXES)
        if not inside:
            raise FileNotFoundError(f"no audio files in the folder {path}")
        found |= {str(p): p.relative_to(path) for p in inside if p.is_file()}
    return found


def _sources(paths: Sequence[str], channel: int | str) -> Iterator[AudioSource]:
    """Yield the files, with ``channel="each"`` once for each of their channels."""
    from transducer_toolkit.inference.long_audio import AudioSource, channels_of

    for path in paths:
        channels: list[int | str] = [channel]
        if channel == "each":
            channels = ["mix"]  # of an unreadable file, which is reported in its turn
            with suppress(OSError, ValueError):
                channels = [*channels_of(path)]
        for number in channels:
            yield AudioSource(path, number)


def _open_output(
    args: argparse.Namespace, files: dict[str, Path], stack: ExitStack
) -> Callable[[str, int | str, str], Any]:
    """Return a function that writes the transcript of a file to the place that --output names."""
    folder = Path(args.output or "")
    if args.output is None or not (folder.is_dir() or args.output.endswith(os.sep)):
        if args.format == "srt" and (len(files) > 1 or args.channel == "each"):
            several = f"{len(files)} of them" if len(files) > 1 else "--channel each"
            raise ValueError(
                f"an SRT file holds one recording: with {several} --output must be a folder, such "
                f"as subtitles{os.sep}"
            )
        if args.output is None:
            return lambda path, channel, text: print(text, end="", flush=True)
        file = stack.enter_context(folder.open("w", encoding="utf-8", errors="surrogateescape"))
        return lambda path, channel, text: file.write(text)

    targets = {
        path: folder / name.with_suffix(SUFFIXES[args.format]) for path, name in files.items()
    }
    of_target: dict[Path, str] = {}
    for path, target in targets.items():
        if of_target.setdefault(target, path) != path:
            raise ValueError(f"{of_target[target]} and {path} would both be written to {target}")

    def write(path: str, channel: int | str, text: str) -> None:
        target = targets[path]
        if args.channel == "each":
            target = target.with_suffix(f".channel{channel}{target.suffix}")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8", errors="surrogateescape")

    folder.mkdir(parents=True, exist_ok=True)
    return write


@contextmanager
def _progress_bar(paths: Sequence[str]) -> Iterator[Callable[[AudioSource, float], None]]:
    """Show a bar on standard error if that is a terminal; yield a function that updates it.

    The function is called with a source and the seconds of it that are done.
    """
    if not sys.stderr.isatty():
        yield lambda source, done_s: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    from transducer_toolkit.data.audio import audio_duration_s

    durations_s = {}
    for path in paths:
        durations_s[path] = 0.0
        with suppress(OSError, ValueError):  # unreadable files are reported later
            durations_s[path] = audio_duration_s(path)
    progress = Progress(
        *(
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        ),
        console=Console(stderr=True),
        redirect_stdout=sys.stdout.isatty(),  # prints above the bar; not if stdout is a pipe
        transient=True,
    )
    done: dict[AudioSource, float] = {}

    def update(source: AudioSource, done_s: float) -> None:
        done[source] = done_s
        progress.update(task, completed=sum(done.values()), description=os.fspath(source.path))

    with progress:
        task = progress.add_task("", total=sum(durations_s.values()))
        yield update


def _search(args: argparse.Namespace) -> Callable[..., Search] | None:
    from transducer_toolkit.decoding import BeamSearch, GreedySearch

    options = {"beam": args.beam, "max_symbols_per_frame": args.max_symbols_per_frame}
    options = {name: value for name, value in options.items() if value is not None}
    if args.beam is not None or args.search in BEAM_SEARCHES:
        return partial(BeamSearch, **options)
    return partial(GreedySearch, **options) if options else None  # None: as trained


def _fusion(args: argparse.Namespace) -> Fusion:
    from transducer_toolkit.decoding import Fusion

    return Fusion(**{name: getattr(args, name) for name in FUSION_OPTIONS})


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Choose the format; end with a usage message if the arguments do not fit each other."""
    if args.format is None:
        suffix = Path(args.output or "").suffix.lower()
        args.format = {".json": "json", ".jsonl": "json", ".srt": "srt", ".ctm": "ctm"}.get(
            suffix, "text"
        )
    for name, owner in FUSION_OPTIONS.items():
        if owner is not None and getattr(args, name) is not None and getattr(args, owner) is None:
            parser.error(f"{_option(name)} is an option of {_option(owner)}")
    if args.beam is not None and args.search == "greedy":
        parser.error("--beam is an option of --search beam")
    for name in ("beam", "max_symbols_per_frame", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"{_option(name)} must be at least 1, got {value}")
    if not 0 <= 2 * args.overlap_s <= args.window_s or not 1 <= args.window_s < math.inf:
        parser.error(
            "--window-s must be at least 1 and --overlap-s at most half of it, got "
            f"{args.window_s:g} and {args.overlap_s:g}"
        )


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "transducer-transcribe",
        "Transcribe audio files (wav, flac, ogg, mp3, opus and others; any sample "
        "rate, any length) with a checkpoint of transducer-train. Prints one line per file: its "
        "path, a tab, the text. A file that cannot be read is reported and skipped; the exit "
        "status is then 1.",
    )
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="audio file, or folder that is searched for audio files",
    )
    parser.add_argument(
        "--checkpoint", required=True, metavar="PATH", help="checkpoint of transducer-train"
    )
    parser.add_argument(
        "--format",
        choices=tuple(FORMATS),
        help="text, JSON lines with word times and confidences, SRT subtitles, or CTM; by default "
        "that of the suffix of --output (.json, .jsonl, .srt, .ctm), otherwise text",
    )
    parser.add_argument(
        "--output",
        metavar="PATH",
        help="write to this file instead of standard output; if PATH is a folder or ends in "
        f"{os.sep}, write one file for each audio file",
    )
    parser.add_argument(
        "--search",
        choices=("greedy", *BEAM_SEARCHES),
        help="default: beam if --beam is given, otherwise greedy; modified_beam is the former name "
        "of beam",
    )
    parser.add_argument(
        "--beam", type=int, metavar="K", help="hypotheses of the beam search (default: 4)"
    )
    parser.add_argument(
        "--max-symbols-per-frame",
        type=int,
        metavar="N",
        help="bound on the symbols of an encoder frame (default: as in training; beam: 10)",
    )
    parser.add_argument(
        "--hotwords",
        metavar="FILE",
        help="words and phrases to prefer, one a line, optionally with a tab and a weight",
    )
    parser.add_argument(
        "--hotwords-score",
        type=float,
        metavar="S",
        help="bonus of each symbol of a hotword (default: 0.2 for each letter)",
    )
    parser.add_argument(
        "--hotwords-depth-score",
        type=float,
        metavar="S",
        help="bonus that grows along a hotword (default: 0)",
    )
    parser.add_argument(
        "--hotwords-case",
        choices=("as_is", "variants"),
        help="match hotwords as they are, or in upper and lower case, too (default: as_is)",
    )
    parser.add_argument(
        "--lm",
        metavar="FILE",
        help="n-gram language model: an ARPA file of the model's symbols or of words; words need "
        "a beam search",
    )
    parser.add_argument(
        "--lm-weight", type=float, metavar="W", help="weight of --lm (default: 0.3)"
    )
    parser.add_argument(
        "--internal-lm",
        metavar="FILE",
        help="language model to subtract: model, for the internal one of the transducer, or an "
        "ARPA file of its training texts",
    )
    parser.add_argument(
        "--internal-lm-weight",
        type=float,
        metavar="W",
        help="weight of --internal-lm (default: 0.2)",
    )
    parser.add_argument(
        "--window-s",
        type=float,
        default=WINDOW_S,
        metavar="S",
        help="seconds of the longest piece; longer files are cut (default: %(default)g)",
    )
    parser.add_argument(
        "--overlap-s",
        type=float,
        default=OVERLAP_S,
        metavar="S",
        help="seconds of overlap between windows (default: %(default)g)",
    )
    parser.add_argument(
        "--cut",
        choices=("pauses", "windows"),
        help="where longer files are cut: in pauses (needs the extra vad) or into overlapping "
        "windows (default: pauses if silero-vad is installed)",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=BATCH_SIZE,
        metavar="N",
        help="files of --window-s that are recognized together, or more shorter ones; a GPU takes "
        "more (default: %(default)d)",
    )
    parser.add_argument(
        "--channel",
        type=channel,
        default="mix",
        metavar="CHANNEL",
        help="number of a channel, from 0; mix, the average of all; or each: every channel "
        "separately (default: mix)",
    )
    add_device(parser)
    add_trust_package(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
