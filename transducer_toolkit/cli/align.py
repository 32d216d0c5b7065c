# SPDX-License-Identifier: Apache-2.0
"""``transducer-align --checkpoint PATH --text TEXT FILE``: times at which a model emits symbols."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transducer_toolkit.cli import console
from transducer_toolkit.cli.arguments import add_device, add_trust_package, make_parser
from transducer_toolkit.cli.transcript_formats import dump_json

if TYPE_CHECKING:
    from transducer_toolkit.data.manifest import Utterance
    from transducer_toolkit.inference.aligner import AlignedUtterance

FORMATS = ("json", "ctm", "png")
CTM_NAME = "alignment.ctm"
TIME_DECIMALS = 4  # of seconds in JSON
PROBABILITY_DIGITS = 6  # significant digits: early and late frames can be very unlikely


@console.command("transducer-align")
def main(argv: Sequence[str] | None = None) -> int:
    """Write the alignment of each utterance to files or standard output.

    Args:
        argv: arguments; None takes those of the command line.

    Returns:
        The exit status: 0, or 1 if an utterance could not be aligned (the others still are).
    """
    parser = _parser()
    args = parser.parse_args(argv)
    formats = _check(parser, args)
    # Late imports keep --help fast.
    import torch

    from transducer_toolkit.data.alignments import file_names
    from transducer_toolkit.inference.recognizer import Recognizer

    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    utterances = _utterances(args)
    names = file_names([utterance.id for utterance in utterances])
    recognizer = Recognizer.from_checkpoint(
        args.checkpoint,
        device=args.device,
        trusted_packages=args.trust_package,
    )
    from transducer_toolkit.decoding.search import check_extra
    from transducer_toolkit.ops.topology import get_topology

    if args.topology is not None:  # before the first of many utterances
        check_extra(recognizer.model.joiner, get_topology(args.topology))
    if args.output_dir is not None:
        args.output_dir.mkdir(parents=True, exist_ok=True)

    from transducer_toolkit.data.audio import read_audio
    from transducer_toolkit.inference.aligner import align_text

    num_failed = 0
    ctm: list[str] = []
    for utterance, name in zip(utterances, names, strict=True):
        try:
            waveform = read_audio(
                utterance.audio,
                offset_s=utterance.offset_s,
                # A file from the command line is read to its end.
                duration_s=None if args.manifest is None else utterance.duration_s,
                sample_rate=recognizer.fbank.sample_rate,
                channel=utterance.channel,
            )
            aligned = align_text(recognizer, waveform, utterance.text, topology=args.topology)
        except (OSError, ValueError) as error:
            print(f"transducer-align: {utterance.id}: {error}", file=sys.stderr)
            num_failed += 1
            continue
        lines = ctm_lines(name, aligned)
        if args.output_dir is None:
            shown = lines if formats == ["ctm"] else [dump_json(to_json(utterance, aligned))]
            print(*shown, sep="\n", end="\n" if shown else "", flush=True)
            continue
        ctm += lines
        if "json" in formats:
            text = dump_json(to_json(utterance, aligned), indent=2)
            (args.output_dir / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        if "png" in formats:
            _draw(args.output_dir / f"{name}.png", utterance, aligned)
    if args.output_dir is not None:
        if "ctm" in formats:
            content = "".join(f"{line}\n" for line in ctm)
            (args.output_dir / CTM_NAME).write_text(
                content, encoding="utf-8", errors="surrogateescape"
            )
        num_aligned = len(utterances) - num_failed
        print(f"{num_aligned} of {len(utterances)} utterances aligned, see {args.output_dir}")
    return 1 if num_failed else 0


def to_json(utterance: Utterance, aligned: AlignedUtterance) -> dict[str, Any]:
    """Return an alignment as plain values: times in seconds, natural logarithms.

    Args:
        utterance: the aligned utterance.
        aligned: the result.
    """

    def rounded(time_s: float) -> float:
        return round(time_s, TIME_DECIMALS)

    return {
        "id": utterance.id,
        "audio": utterance.audio,
        "text": aligned.text,
        "topology": aligned.topology,
        "frame_s": rounded(aligned.frame_s),
        "num_frames": len(aligned.occupancy),
        "path_log_prob": aligned.path.log_prob,
        "log_likelihood": aligned.log_likelihood,
        "tokens": [
            {
                "symbol": token.symbol,
                "frame": token.frame,
                "time_s": rounded(token.time_s),
                "posterior": float(f"{token.posterior:.{PROBABILITY_DIGITS}g}"),
                "expected_time_s": rounded(token.expected_time_s),
            }
            for token in aligned.tokens
        ],
        "words": [
            {"word": word.word, "start_s": rounded(word.start_s), "end_s": rounded(word.end_s)}
            for word in aligned.words
        ],
    }


def ctm_lines(name: str, aligned: AlignedUtterance) -> list[str]:
    """Return lines ``name 1 start duration word`` of NIST's CTM format, times in seconds.

    Args:
        name: name of the utterance, without white space.
        aligned: the result.

    Example:
        >>> from types import SimpleNamespace
        >>> word = SimpleNamespace(word="three", start_s=0.2, end_s=0.48)
        >>> ctm_lines("a1", SimpleNamespace(words=[word]))
        ['a1 1 0.200 0.280 three']
    """
    return [
        f"{name} 1 {word.start_s:.3f} {word.end_s - word.start_s:.3f} {word.word}"
        for word in aligned.words
    ]


def _utterances(args: argparse.Namespace) -> list[Utterance]:
    from transducer_toolkit.data.manifest import Utterance, read_manifest

    if args.manifest is not None:
        utterances = read_manifest(args.manifest)
        if not utterances:
            raise ValueError(f"{args.manifest} holds no utterances")
        return utterances
    from transducer_toolkit.data.audio import audio_duration_s

    if not args.file.is_file():
        raise FileNotFoundError(f"no audio file at {args.file}")
    duration_s = audio_duration_s(args.file)
    return [
        Utterance(id=args.file.stem, audio=str(args.file), duration_s=duration_s, text=args.text)
    ]


def _draw(path: Path, utterance: Utterance, aligned: AlignedUtterance) -> None:
    from transducer_toolkit.data.features import FRAME_SHIFT_MS
    from transducer_toolkit.training.plots import draw_utterance

    figure = draw_utterance(
        aligned.features,
        aligned.occupancy,
        aligned.path,
        [token.symbol for token in aligned.tokens],
        title=f"{utterance.id}: {utterance.text!r}",
        feature_frame_s=FRAME_SHIFT_MS / 1000,
    )
    figure.savefig(path)


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[str]:
    """End with a usage message if the arguments do not fit each other; returns the formats."""
    if args.manifest is None and (args.text is None or args.file is None):
        parser.error("give either --text TEXT and one audio FILE, or --manifest PATH")
    if args.manifest is not None and (args.text is not None or args.file is not None):
        parser.error("--manifest has audio and text: give neither FILE nor --text with it")
    default = "ctm" if args.output_dir is None else ",".join(FORMATS)
    formats = (default if args.format is None else args.format).split(",")
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        parser.error(
            f"--format: expected some of {', '.join(FORMATS)}; got {', '.join(map(repr, unknown))}"
        )
    if args.output_dir is None and formats not in (["json"], ["ctm"]):
        parser.error(f"--format {args.format} needs --output-dir: only json or ctm can be printed")
    return formats


def _topology(name: str) -> str:
    # Imported here: it imports torch, which would make --help slow.
    from transducer_toolkit.ops.topology import get_topology

    try:
        return get_topology(name).name
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("topology: ")) from error


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "transducer-align",
        "Align text to audio with a checkpoint of transducer-train: the most probable "
        "path through the lattice, and posteriors over all paths. A time is the start of the "
        "encoder frame that emits a symbol. Without --output-dir the words are printed as CTM.",
    )
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="audio file, any rate")
    parser.add_argument("--text", help="the text that is spoken in FILE")
    parser.add_argument(
        "--manifest",
        type=Path,
        metavar="PATH",
        help="JSON lines with audio and text; id, duration_s, offset_s and channel may be missing",
    )
    parser.add_argument(
        "--checkpoint", required=True, metavar="PATH", help="checkpoint of transducer-train"
    )
    parser.add_argument(
        "--output-dir",
        type=Path,
        metavar="DIR",
        help=f"write ID.json and ID.png for each utterance and one {CTM_NAME} here",
    )
    parser.add_argument(
        "--format",
        metavar="FORMATS",
        help=f"some of {','.join(FORMATS)} (default: all; ctm without --output-dir)",
    )
    parser.add_argument(
        "--topology",
        type=_topology,
        metavar="NAME",
        help="topology of the lattice (default: that of the loss that trained the model)",
    )
    add_device(parser)
    add_trust_package(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
