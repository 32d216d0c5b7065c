# SPDX-License-Identifier: Apache-2.0
"""Exports, run by onnxruntime and by sherpa-onnx itself, beside the model they were made of."""

import pytest
import torch
from torch import nn

from transducer_toolkit.data.features import Fbank
from transducer_toolkit.data.tokenizer import CharTokenizer
from transducer_toolkit.export import export_for_sherpa
from transducer_toolkit.export.onnx_files import Graph, write_graph
from transducer_toolkit.inference.recognizer import Recognizer
from transducer_toolkit.inference.streaming import StreamingRecognizer
from transducer_toolkit.modules import (
    AdditiveJoiner,
    ConformerEncoder,
    ConvLstmEncoder,
    EmformerEncoder,
    Joiner,
    LstmPredictor,
    StatelessPredictor,
    Transducer,
)

pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")

SYMBOLS = ["<blk>", "\u2581", "a", "b", "c", "d"]


def conv_lstm(normalization="global", **changes):
    encoder = ConvLstmEncoder(
        conv_channels=2, hidden_dim=16, normalization=normalization, **changes
    )
    if normalization == "global":
        encoder.normalizer.set_statistics(torch.full((80,), -8.0), torch.full((80,), 3.0))
    return encoder


def emformer(**changes):
    sizes = {"conv_channels": 2, "dim": 16, "num_heads": 2, "ffn_dim": 32, "num_layers": 2}
    encoder = EmformerEncoder(**(sizes | changes))
    encoder.normalizer.set_statistics(torch.full((80,), -8.0), torch.full((80,), 3.0))
    return encoder


def random_recognizer(encoder, joiner="tanh", context_size=2):
    """A model of random weights that emits many symbols, at most one a frame."""
    predictor = StatelessPredictor(len(SYMBOLS), embedding_dim=12, context_size=context_size)
    if joiner == "additive":
        joiner = AdditiveJoiner(encoder.output_dim, 12, len(SYMBOLS))
    else:
        joiner = Joiner(encoder.output_dim, 12, 16, len(SYMBOLS), activation=joiner)
    with torch.no_grad():
        for weight in joiner.parameters():
            weight.mul_(4.0)
    model = Transducer(encoder, predictor, joiner)
    return Recognizer(model, CharTokenizer(SYMBOLS), Fbank(), max_symbols_per_frame=1)


def paths(folder, suffix=""):
    files = {
        name: str(folder / f"{name}{suffix}.onnx") for name in ("encoder", "decoder", "joiner")
    }
    return files | {"tokens": str(folder / "tokens.txt"), "num_threads": 1}


def waveforms():
    # Loud and quiet, so that not every frame is like every other.
    return [
        0.3 * torch.randn(length) * torch.rand(length // 1600 + 1).repeat_interleave(1600)[:length]
        for length in (500, 8000, 30000, 16001)
    ]


def symbols(hypothesis):
    return "".join(SYMBOLS[token] for token in hypothesis.tokens).replace("\u2581", " ")


def conformer():
    sizes = {"conv_channels": 2, "hidden_dim": 16, "num_layers": 2, "num_heads": 2}
    return ConformerEncoder(**sizes, kernel_size=7)


def test_a_model_in_place_of_a_recognizer_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"recognizer: expected a Recognizer, got Linear; use"):
        export_for_sherpa(nn.Linear(2, 2), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize(
    ("make_encoder", "joiner", "context_size"),
    [
        (lambda: conv_lstm("utterance"), "tanh", 2),
        (lambda: conv_lstm("speech"), "tanh", 2),
        (conv_lstm, "additive", 3),
        (conformer, "relu", 1),
    ],
    ids=["utterance", "speech", "additive", "conformer"],
)
def test_sherpa_recognizes_what_we_recognize(tmp_path, make_encoder, joiner, context_size):
    sherpa_onnx = pytest.importorskip("sherpa_onnx")
    recognizer = random_recognizer(make_encoder(), joiner, context_size)
    files = export_for_sherpa(recognizer, tmp_path / "new" / "folder", int8=True)
    names = [
        f"{part}{kind}.onnx" for kind in ("", ".int8") for part in ("encoder", "decoder", "joiner")
    ]
    assert [path.name for path in files] == [*names, "tokens.txt", "bpe.vocab"]
    # Told what it is, and left to find out.
    for options in ({}, {"model_type": ""}):
        client = sherpa_onnx.OfflineRecognizer.from_transducer(**paths(files[0].parent), **options)
        streams, expected = [], []
        for waveform in waveforms():
            streams.append(client.create_stream())
            streams[-1].accept_waveform(16000, waveform.numpy())
            expected.append(symbols(recognizer.recognize([waveform])[0]))
        client.decode_streams(streams)  # a batch, padded
        assert [stream.result.text for stream in streams] == [text.strip() for text in expected]
    assert sum(map(len, expected)) > 20


@pytest.mark.parametrize("name", ["lstm", "emformer"])
def test_sherpa_streams_what_we_stream(tmp_path, name):
    sherpa_onnx = pytest.importorskip("sherpa_onnx")
    if name == "lstm":
        recognizer = random_recognizer(conv_lstm())
    else:
        recognizer = random_recognizer(emformer(segment_length=3, left_context=5, right_context=2))
    export_for_sherpa(recognizer, tmp_path, streaming=True, chunk_frames=5, int8=True)
    client = sherpa_onnx.OnlineRecognizer.from_transducer(**paths(tmp_path))
    ours = StreamingRecognizer(recognizer)
    streams, expected = [], []
    for waveform in waveforms():
        streams.append(client.create_stream())
        streams[-1].accept_waveform(16000, waveform.numpy())
        # The client leaves what does not fill a chunk: what comes at the end is not compared.
        num_samples = len(waveform) - 16 * 4 * 10 * 12
        ours.accept(waveform[: max(0, num_samples)])
        expected.append(symbols(ours.added))
        ours.finish()
    while ready := [stream for stream in streams if client.is_ready(stream)]:
        client.decode_streams(ready)
    results = ["".join(client.tokens(stream)).replace("\u2581", " ") for stream in streams]
    for result, text in zip(results, expected, strict=True):
        assert result.startswith(text)
    assert sum(map(len, expected)) > 20


def test_metadata_and_tokens(tmp_path):
    recognizer = random_recognizer(conv_lstm(num_layers=3))
    export_for_sherpa(recognizer, tmp_path, streaming=True, chunk_frames=8)

    def metadata(name):
        return {p.key: p.value for p in onnx.load(tmp_path / f"{name}.onnx").metadata_props}

    expected = {"model_type": "lstm", "T": "32", "decode_chunk_len": "32"}
    expected |= {"num_encoder_layers": "3", "d_model": "16", "rnn_hidden_size": str(16 + 320 + 1)}
    assert metadata("encoder").items() >= expected.items()
    assert metadata("decoder").items() >= {"vocab_size": "6", "context_size": "2"}.items()
    assert CharTokenizer.load(tmp_path / "tokens.txt").symbols == tuple(SYMBOLS)


def test_what_sherpa_cannot_drive_is_refused(tmp_path):
    recognizer = random_recognizer(conv_lstm("utterance"))
    with pytest.raises(ValueError, match="normalization='global', got 'utterance'"):
        export_for_sherpa(recognizer, tmp_path, streaming=True)
    with pytest.raises(ValueError, match="EmformerEncoder is exported with streaming=True"):
        export_for_sherpa(random_recognizer(emformer()), tmp_path)
    with pytest.raises(ValueError, match="chunk_frames must be at least 1, got 0"):
        export_for_sherpa(recognizer, tmp_path, chunk_frames=0)
    with pytest.raises(ValueError, match="with memory_size=0, got EmformerEncoder"):
        export_for_sherpa(random_recognizer(emformer(memory_size=2)), tmp_path, streaming=True)
    as_icefall = {"model_type": "icefall"}
    recognizer.model.predictor = LstmPredictor(len(SYMBOLS), 12, 12)
    with pytest.raises(ValueError, match=r"got LstmPredictor.*use model_type='nemo' .--type nem"):
        export_for_sherpa(recognizer, tmp_path, **as_icefall)
    recognizer.model.predictor = StatelessPredictor(len(SYMBOLS), 12, blank=1)
    with pytest.raises(ValueError, match="blank must be 0, as in icefall's models, got 1; use mod"):
        export_for_sherpa(recognizer, tmp_path, **as_icefall)
    for topology in ("tdt-0-1-2", "multi_blank-2-4"):
        recognizer = random_recognizer(conv_lstm())
        recognizer.topology = topology
        with pytest.raises(ValueError, match=f"topology must be .* got '{topology}'; use model_t"):
            export_for_sherpa(recognizer, tmp_path, **as_icefall)
        with pytest.raises(ValueError, match=f"got '{topology}'; use the model with transducer-t"):
            export_for_sherpa(recognizer, tmp_path, streaming=True)
    recognizer = random_recognizer(conv_lstm())
    recognizer.model.encoder.num_output_frames = lambda num_frames: num_frames // 2
    with pytest.raises(ValueError, match="subsampling must be 4, as in icefall's models, got 2"):
        export_for_sherpa(recognizer, tmp_path, **as_icefall)
    with pytest.raises(ValueError, match=r"model_type.*'icefall', 'nemo'.*got 'wenet'"):
        export_for_sherpa(recognizer, tmp_path, model_type="wenet")
    assert list(tmp_path.iterdir()) == []


class FrozenSize(nn.Module):
    def forward(self, x):
        return x.unflatten(1, (2, -1)).sum(1)[: int(x.size(0))]


class FrozenValue(nn.Module):
    def forward(self, x):
        return x * (2.0 if float(x.sum()) > 0 else 1.0)


@pytest.mark.parametrize(
    ("module", "message"),
    [(FrozenSize(), "does not run|froze a size"), (FrozenValue(), "gives another y than torch")],
)
def test_a_graph_that_froze_is_not_kept(tmp_path, module, message):
    examples = [(torch.ones(2, 4),), (-torch.ones(5, 4),)]
    graph = Graph("frozen", module, examples, {"x": {0: "N"}}, {"y": {0: "N"}}, {})
    with pytest.raises(RuntimeError, match=message):
        write_graph(graph, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("model_type", ["icefall", "nemo"])
def test_a_joiner_of_another_formula_is_an_error(model_type, tmp_path):
    recognizer = random_recognizer(conv_lstm())
    recognizer.model.joiner = nn.Bilinear(16, 12, len(SYMBOLS))
    message = "joiner must be a Joiner or an AdditiveJoiner with unmodified forward, got Bilinear"
    with pytest.raises(ValueError, match=message):
        export_for_sherpa(recognizer, tmp_path, model_type=model_type)
