# SPDX-License-Identifier: Apache-2.0
"""Exports with several symbols a frame, LSTM predictors and durations, run by sherpa-onnx."""

import pytest
import torch

from tests.export.client_features import ClientFeatures
from transducer_toolkit.data.features import Fbank
from transducer_toolkit.data.tokenizer import CharTokenizer
from transducer_toolkit.export import export_for_sherpa
from transducer_toolkit.export.client_mel import client_filters, non_negative_weights
from transducer_toolkit.export.hotwords import checked_hotwords
from transducer_toolkit.export.nemo import client_max_symbols
from transducer_toolkit.export.sherpa import default_type
from transducer_toolkit.inference.recognizer import Recognizer
from transducer_toolkit.modules import (
    AdditiveJoiner,
    ConformerEncoder,
    ConvLstmEncoder,
    Joiner,
    LstmPredictor,
    Predictor,
    StatelessPredictor,
    Transducer,
)
from transducer_toolkit.ops.topology import get_topology

SYMBOLS = ["<blk>", "\u2581", "a", "b", "c", "d"]


def random_recognizer(
    topology="regular", predictor="lstm", max_symbols=10, encoder=None, **changes
):
    """A model of random weights that emits many symbols, often several a frame."""
    if encoder is None:
        encoder = ConvLstmEncoder(conv_channels=2, hidden_dim=16, **changes)
    if predictor == "lstm":
        predictor = LstmPredictor(len(SYMBOLS), 12, 12, num_layers=2)
    else:
        predictor = StatelessPredictor(len(SYMBOLS), 12, context_size=3)
    if topology == "additive":
        topology, joiner = "regular", AdditiveJoiner(encoder.output_dim, 12, len(SYMBOLS))
    else:
        num_extra = get_topology(topology).num_extra
        joiner = Joiner(encoder.output_dim, 12, 16, len(SYMBOLS), num_extra=num_extra)
    with torch.no_grad():
        for weight in joiner.parameters():
            weight.mul_(4.0)
        if topology.startswith("multi_blank"):
            joiner.output.bias[len(SYMBOLS) :] -= 4.0
    return Recognizer(
        Transducer(encoder, predictor, joiner),
        CharTokenizer(SYMBOLS),
        Fbank(),
        max_symbols_per_frame=max_symbols,
        topology=topology,
    )


def waveforms():
    # Loud and quiet, so that not every frame is like every other.
    return [
        0.3 * torch.randn(length) * torch.rand(length // 1600 + 1).repeat_interleave(1600)[:length]
        for length in (500, 8000, 30000, 16001)
    ]


def client_of(folder, suffix="", **options):
    sherpa_onnx = pytest.importorskip("sherpa_onnx")
    return sherpa_onnx.OfflineRecognizer.from_transducer(
        *(str(folder / f"{name}{suffix}.onnx") for name in ("encoder", "decoder", "joiner")),
        tokens=str(folder / "tokens.txt"),
        **{"model_type": "nemo_transducer"} | options,
    )


def conformer():
    sizes = {"conv_channels": 2, "hidden_dim": 16, "num_layers": 2, "num_heads": 2}
    return ConformerEncoder(**sizes, kernel_size=7)


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({}, 10),
        ({"predictor": "stateless", "subsampling_factor": 8}, 10),
        ({"topology": "additive"}, 10),
        ({"max_symbols": 1}, 1),
        ({"topology": "modified"}, 1),
        ({"topology": "tdt-0-1-2-3-4"}, 5),
        ({"topology": "tdt-0-2-5", "predictor": "stateless"}, 5),
        ({"topology": "tdt-1-4"}, 1),
        ({"topology": "multi_blank-2-4"}, 5),
        ({"predictor": "stateless", "encoder": "conformer"}, 10),
    ],
    ids=lambda value: ", ".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_sherpa_recognizes_what_we_recognize(tmp_path, options, most):
    pytest.importorskip("sherpa_onnx")
    if options.get("encoder"):
        options = options | {"encoder": conformer()}
    recognizer = random_recognizer(**options)
    assert default_type(recognizer) == "nemo"
    export_for_sherpa(recognizer, tmp_path)
    limited = Recognizer(
        recognizer.model,
        recognizer.tokenizer,
        ClientFeatures(recognizer.fbank),
        max_symbols_per_frame=client_max_symbols(recognizer),
        topology=recognizer.topology,
    )
    # Told what it is, and left to find out.
    for model_type in ("nemo_transducer", ""):
        client = client_of(tmp_path, model_type=model_type)
        streams, expected = [], []
        for waveform in waveforms():
            streams.append(client.create_stream())
            streams[-1].accept_waveform(16000, waveform.numpy())
            expected.extend(limited.recognize([waveform]))
        client.decode_streams(streams)  # a batch, padded
        for stream, hypothesis in zip(streams, expected, strict=True):
            symbols = [SYMBOLS[token].replace("\u2581", " ") for token in hypothesis.tokens]
            assert stream.result.tokens == symbols
            times = [frame * recognizer.frame_s for frame in hypothesis.frames]
            assert stream.result.timestamps == pytest.approx(times, abs=1e-4)
    frames = [frame for hypothesis in expected for frame in hypothesis.frames]
    assert len(frames) > 20
    counts = [hypothesis.frames.count(f) for hypothesis in expected for f in hypothesis.frames]
    assert max(counts) <= most
    if options == {}:
        assert max(counts) > 1


def test_int8_leaves_the_features_alone(tmp_path):
    recognizer = random_recognizer()
    export_for_sherpa(recognizer, tmp_path, int8=True)
    texts = []
    for suffix in ("", ".int8"):
        client = client_of(tmp_path, suffix)
        streams = [client.create_stream() for _ in range(4)]
        torch.manual_seed(0)
        for stream, waveform in zip(streams, waveforms(), strict=True):
            stream.accept_waveform(16000, waveform.numpy())
        client.decode_streams(streams)
        texts.append("".join(token for stream in streams for token in stream.result.tokens))
    import jiwer

    assert jiwer.cer(*texts) < 0.2  # 0.8 with the features' weights in int8


def test_the_clients_filters_make_ours():
    filters, wanted = client_filters(), Fbank().mel_weights.double()
    assert bool((filters.sum(0) > 0).all())  # the client refuses a filter without a bin
    weights = non_negative_weights(filters, wanted)
    assert float(weights.min()) >= 0
    errors = (filters @ weights - wanted).norm(dim=0) / wanted.sum(0)
    assert float(errors.max()) < 0.037 and float(errors.mean()) < 0.011

    torch.manual_seed(0)
    waveform, fbank = 0.1 * torch.randn(16000), Fbank()
    difference = (ClientFeatures(fbank)(waveform) - fbank(waveform)).abs()
    assert float(difference.mean()) < 0.02
    silence = torch.zeros(16000)
    assert torch.equal(ClientFeatures(fbank)(silence), fbank(silence))


def test_the_default_type():
    assert default_type(random_recognizer(predictor="stateless", max_symbols=1)) == "icefall"
    assert default_type(random_recognizer("modified", predictor="stateless")) == "icefall"
    assert default_type(random_recognizer(), streaming=True) == "icefall"
    eightfold = random_recognizer("modified", predictor="stateless", subsampling_factor=8)
    assert default_type(eightfold) == "nemo"


class OtherPredictor(Predictor):
    output_dim = 12

    def forward(self, targets):
        raise NotImplementedError

    initial_state = step = forward


def test_what_sherpa_cannot_run_is_refused(tmp_path):
    recognizer = random_recognizer()
    with pytest.raises(ValueError, match="model_type='nemo' is not for streaming=True"):
        export_for_sherpa(recognizer, tmp_path, model_type="nemo", streaming=True)
    recognizer.model.predictor = OtherPredictor(len(SYMBOLS), 0)
    with pytest.raises(ValueError, match=r"LstmPredictor, whose states .* got OtherPredictor; use"):
        export_for_sherpa(recognizer, tmp_path)
    assert list(tmp_path.iterdir()) == []


class OtherTokenizer:
    symbols = ("a", "b", "<blank>")

    def encode(self, text):
        return [0, 1]


def test_hotwords(tmp_path):
    """A bonus for "abab" brings it into texts that lack it."""
    recognizer = random_recognizer("modified", predictor="stateless")
    lines = ["ab \u2581cd :1.0", "", "  a  b"]
    with pytest.raises(ValueError, match="hotwords, line 2: character 'x' of 'axe' is not among"):
        export_for_sherpa(recognizer, tmp_path, hotwords=["ab", "axe"])
    with pytest.raises(ValueError, match="hotwords, line 1: could not convert string to float: 'h"):
        export_for_sherpa(recognizer, tmp_path, hotwords=["ab :high"])
    with pytest.raises(ValueError, match=r"sherpa-onnx spells .* has a OtherTokenizer; export w"):
        checked_hotwords(["ab"], OtherTokenizer())
    assert list(tmp_path.iterdir()) == []
    export_for_sherpa(recognizer, tmp_path, hotwords=lines)
    assert (tmp_path / "hotwords.txt").read_text() == "ab \u2581cd :1.0\na b\n"
    for model_type in ("icefall", "nemo"):
        export_for_sherpa(recognizer, tmp_path, model_type=model_type, hotwords=["abab :10.0"])
        counts = []
        for options in ({}, {"hotwords_file": str(tmp_path / "hotwords.txt")}):
            client = client_of(
                tmp_path,
                model_type="nemo_transducer" if model_type == "nemo" else "transducer",
                decoding_method="modified_beam_search",
                max_active_paths=16,
                modeling_unit="bpe",
                bpe_vocab=str(tmp_path / "bpe.vocab"),
                **options,
            )
            torch.manual_seed(1)
            streams = [client.create_stream() for _ in range(4)]
            for stream, waveform in zip(streams, waveforms(), strict=True):
                stream.accept_waveform(16000, waveform.numpy())
            client.decode_streams(streams)
            counts.append(sum(stream.result.text.count("abab") for stream in streams))
        assert counts[1] > counts[0], (model_type, counts)
