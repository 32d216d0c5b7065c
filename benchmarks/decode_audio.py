# SPDX-License-Identifier: Apache-2.0
"""Time from audio to text, ours and sherpa-onnx on the same exported model, one thread.

python -m benchmarks.decode_audio best.ckpt MANIFEST

Prints processor seconds for 100 seconds of audio, features and encoder included, as the median of
several rounds; and the word error rate. Export and start are not measured.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from transducer_toolkit.data.audio import SAMPLE_RATE, read_audio
from transducer_toolkit.data.manifest import read_manifest
from transducer_toolkit.decoding import BeamSearch
from transducer_toolkit.export import export_for_sherpa
from transducer_toolkit.export.sherpa import default_type
from transducer_toolkit.inference import Recognizer
from transducer_toolkit.training.scoring import Transcript, count_word_errors

BATCH_SIZE = 16

Decode = Callable[[list[Tensor]], list[str]]


def ours(recognizer: Recognizer, batch_size: int, waveforms: list[Tensor]) -> list[str]:
    texts = []
    for begin in range(0, len(waveforms), batch_size):
        texts += recognizer.transcribe(waveforms[begin : begin + batch_size])
    return texts


def sherpa(recognizer: Recognizer, folder: Path) -> Decode:
    """Exports a model; returns a function that decodes with it, an utterance at a time."""
    import sherpa_onnx

    export_for_sherpa(recognizer, folder)
    names = {name: str(folder / f"{name}.onnx") for name in ("encoder", "decoder", "joiner")}
    client = sherpa_onnx.OfflineRecognizer.from_transducer(
        **names, tokens=str(folder / "tokens.txt"), num_threads=1, dither=0.0, model_type=""
    )

    def decode(waveforms: list[Tensor]) -> list[str]:
        texts = []
        for waveform in waveforms:
            stream = client.create_stream()
            stream.accept_waveform(SAMPLE_RATE, waveform.numpy())
            client.decode_stream(stream)
            texts.append(" ".join(stream.result.text.split()))
        return texts

    return decode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("manifest")
    parser.add_argument("--max-utterances", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    utterances = list(islice(read_manifest(args.manifest), args.max_utterances))
    waveforms = [
        read_audio(utterance.audio, offset_s=utterance.offset_s, duration_s=utterance.duration_s)
        for utterance in utterances
    ]
    audio_s = sum(len(waveform) for waveform in waveforms) / SAMPLE_RATE
    greedy = Recognizer.from_checkpoint(args.checkpoint)
    beam = Recognizer.from_checkpoint(args.checkpoint, search=partial(BeamSearch, beam=4))
    with tempfile.TemporaryDirectory() as folder:
        rows: dict[str, Decode] = {
            f"greedy, batches of {BATCH_SIZE}": partial(ours, greedy, BATCH_SIZE),
            "greedy, one by one": partial(ours, greedy, 1),
            f"beam of 4, batches of {BATCH_SIZE}": partial(ours, beam, BATCH_SIZE),
            "beam of 4, one by one": partial(ours, beam, 1),
            f"sherpa-onnx, greedy, {default_type(greedy)}, one by one": sherpa(
                greedy, Path(folder)
            ),
        }
        seconds: dict[str, list[float]] = {name: [] for name in rows}
        texts: dict[str, list[str]] = {}
        for _ in range(args.rounds):
            for name, decode in rows.items():
                begun_s = time.process_time()
                texts[name] = decode(waveforms)
                seconds[name].append(time.process_time() - begun_s)
    print(f"{len(waveforms)} utterances, {audio_s:.1f} s of audio\n")
    print("| search | s for 100 s of audio | WER % |\n|---|---|---|")
    for name, all_s in seconds.items():
        pairs = zip(utterances, texts[name], strict=True)
        errors = count_word_errors(Transcript("", said.text, text) for said, text in pairs)
        print(f"| {name} | {100 * median(all_s) / audio_s:.2f} | {100 * errors.wer:.2f} |")


if __name__ == "__main__":
    main()
