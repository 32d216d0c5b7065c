# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.soak.sherpa_agreement CHECKPOINT MANIFEST``: exports beside their model.

Exports a trained checkpoint, float32 and int8, lets sherpa-onnx recognise the utterances of a
manifest, and counts those with the very text of our greedy search, with the client's limit of
symbols on a frame. With ``--streaming`` both sides stream, ours in pieces of random sizes. Fails if
a float32 text differs, or the word error rate of int8 is off by more than half a point. With
``--type nemo`` the client computes other features, which the graph converts: ours are also
recognized from those (``client_features``), and it is their texts that must not differ.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import sherpa_onnx
import torch
from torch import Tensor

from tests.export.client_features import ClientFeatures
from transducer_toolkit.data.audio import SAMPLE_RATE, read_audio
from transducer_toolkit.data.manifest import read_manifest
from transducer_toolkit.export import export_for_sherpa
from transducer_toolkit.export.nemo import client_max_symbols
from transducer_toolkit.inference.recognizer import Recognizer
from transducer_toolkit.inference.streaming import StreamingRecognizer
from transducer_toolkit.training.scoring import Transcript, count_word_errors

MAX_INT8_WER_DIFFERENCE = 0.005
PIECE_SIZES = (1, 100, 160, 1600, 3200, 20000)
SILENCE_S = 1.0  # the streaming client decodes whole chunks only


def main() -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("manifest")
    parser.add_argument("--streaming", action="store_true")
    parser.add_argument("--type", choices=("icefall", "nemo"), default="icefall")
    parser.add_argument("--max-utterances", type=int)
    args = parser.parse_args()
    torch.set_num_threads(1)

    recognizer = Recognizer.from_checkpoint(args.checkpoint)
    utterances = list(islice(read_manifest(args.manifest), args.max_utterances))
    references = [utterance.text for utterance in utterances]
    waveforms = [
        read_audio(utterance.audio, offset_s=utterance.offset_s, duration_s=utterance.duration_s)
        for utterance in utterances
    ]
    if args.streaming:
        silence = torch.zeros(round(SILENCE_S * SAMPLE_RATE))
        waveforms = [torch.cat((waveform, silence)) for waveform in waveforms]

    def wer(texts: list[str]) -> float:
        pairs = zip(references, texts, strict=True)
        return count_word_errors(Transcript("", *pair) for pair in pairs).wer

    regular = [recognizer.transcribe([waveform])[0] for waveform in waveforms]
    print(f"ours, {recognizer.max_symbols_per_frame:2d} symbols a frame: WER {wer(regular):.4f}")
    limit = client_max_symbols(recognizer) if args.type == "nemo" else 1
    recognizer = Recognizer(
        recognizer.model,
        recognizer.tokenizer,
        recognizer.fbank,
        max_symbols_per_frame=limit,
        topology=recognizer.topology,
    )
    ours = [recognizer.transcribe([waveform])[0] for waveform in waveforms]
    print(f"ours, {limit:2d} symbols a frame: WER {wer(ours):.4f}")
    failed = False
    if args.streaming:
        streamed = stream(recognizer, waveforms)
        num_same = sum(map(str.__eq__, streamed, ours))
        print(f"ours, streamed in pieces:  {num_same} of {len(ours)} the same as whole")
        failed |= num_same < len(ours)
    with tempfile.TemporaryDirectory() as folder:
        export_for_sherpa(
            recognizer, folder, model_type=args.type, streaming=args.streaming, int8=True
        )
        if args.type == "nemo":
            features = recognizer.fbank
            recognizer.fbank = ClientFeatures(features)
            converted = [recognizer.transcribe([waveform])[0] for waveform in waveforms]
            recognizer.fbank = features
            num_same = sum(map(str.__eq__, converted, ours))
            print(
                f"ours, converted features: WER {wer(converted):.4f}, "
                f"{num_same} of {len(ours)} the same as with our own"
            )
            ours = converted
        run = run_streaming_client if args.streaming else run_client
        for name, suffix in (("float32", ""), ("int8", ".int8")):
            texts = run(Path(folder), suffix, waveforms)
            num_same = sum(map(str.__eq__, texts, ours))
            print(
                f"sherpa-onnx, {name:8s}      WER {wer(texts):.4f}, "
                f"{num_same} of {len(ours)} the same as ours"
            )
            if suffix:
                failed |= abs(wer(texts) - wer(ours)) > MAX_INT8_WER_DIFFERENCE
            else:
                failed |= num_same < len(ours)
    return 1 if failed else 0


def stream(recognizer: Recognizer, waveforms: list[Tensor]) -> list[str]:
    """Texts of a StreamingRecognizer that gets pieces of random sizes."""
    recogniser, choices, texts = StreamingRecognizer(recognizer), random.Random(0), []
    for waveform in waveforms:
        text, position = "", 0
        while position < len(waveform):
            size = choices.choice(PIECE_SIZES)
            text += recogniser.accept(waveform[position : position + size])
            position += size
        texts.append(text + recogniser.finish())
    return texts


def run_client(folder: Path, suffix: str, waveforms: list[Tensor]) -> list[str]:
    """Texts of sherpa-onnx's offline recognizer."""
    client = _client(sherpa_onnx.OfflineRecognizer.from_transducer, folder, suffix)
    texts = []
    for waveform in waveforms:
        stream = client.create_stream()
        stream.accept_waveform(SAMPLE_RATE, waveform.numpy())
        client.decode_stream(stream)
        texts.append(" ".join(stream.result.text.split()))
    return texts


def run_streaming_client(folder: Path, suffix: str, waveforms: list[Tensor]) -> list[str]:
    """Texts of sherpa-onnx's streaming recognizer, fed 100 ms at a time."""
    client = _client(sherpa_onnx.OnlineRecognizer.from_transducer, folder, suffix)
    texts = []
    for waveform in waveforms:
        stream = client.create_stream()
        for piece in waveform.split(SAMPLE_RATE // 10):
            stream.accept_waveform(SAMPLE_RATE, piece.numpy())
            while client.is_ready(stream):
                client.decode_stream(stream)
        texts.append(" ".join(client.get_result(stream).split()))
    return texts


def _client(make: Callable, folder: Path, suffix: str):
    files = {
        part: str(folder / f"{part}{suffix}.onnx") for part in ("encoder", "decoder", "joiner")
    }
    options = {"tokens": str(folder / "tokens.txt"), "num_threads": 1}
    if (folder / "encoder.onnx").read_bytes().count(b"EncDecRNNTBPEModel"):
        options["model_type"] = "nemo_transducer"
    return make(**files, **options)


if __name__ == "__main__":
    sys.exit(main())
