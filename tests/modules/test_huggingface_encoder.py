# SPDX-License-Identifier: Apache-2.0
import copy
import json
import math
import pathlib
import pickle

import pytest
import torch
from safetensors.torch import save_file

from tests.compat.hugging_face import ENCODER, save_folder, transformers
from transducer_toolkit.data.audio import SAMPLE_RATE
from transducer_toolkit.data.features import FRAME_SHIFT_MS, Fbank
from transducer_toolkit.modules import huggingface_features
from transducer_toolkit.modules.huggingface import HuggingFaceEncoder
from transducer_toolkit.modules.huggingface_features import KINDS, WAVEFORM, HuggingFaceFeatures

COMMON = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
OF_WAVES = {
    **COMMON,
    "conv_dim": [16] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
CONFIGS = {
    "parakeet": {"model_type": "parakeet_encoder", **ENCODER},
    "nemotron": {"model_type": "nemotron_asr_streaming_encoder", **ENCODER},
    "wav2vec2": {"model_type": "wav2vec2", **OF_WAVES},
    "wav2vec2 large": {
        "model_type": "wav2vec2",
        **OF_WAVES,
        "feat_extract_norm": "layer",
        "do_stable_layer_norm": True,
    },
    "hubert": {"model_type": "hubert", **OF_WAVES},
    "wavlm": {"model_type": "wavlm", **OF_WAVES},
    "w2v-bert": {"model_type": "wav2vec2-bert", **COMMON},
    "whisper": {
        "model_type": "whisper",
        "d_model": 32,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 48,
        "decoder_layers": 1,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 48,
    },
}


def encoder_of(name, **options):
    torch.manual_seed(0)
    return HuggingFaceEncoder(config=CONFIGS[name], **options)


def batch_of(encoder, durations_s=(1.3, 0.7)):
    generator = torch.Generator().manual_seed(0)
    waveforms = [0.1 * torch.randn(round(16000 * s), generator=generator) for s in durations_s]
    features = [encoder.make_features()(waveform) for waveform in waveforms]
    lengths = torch.tensor([len(f) for f in features])
    return torch.nn.utils.rnn.pad_sequence(features, batch_first=True), lengths


@pytest.mark.parametrize("name", CONFIGS)
def test_an_utterance_does_not_depend_on_its_batch(name):
    encoder = encoder_of(name).eval()
    features, lengths = batch_of(encoder)
    with torch.no_grad():
        alone, _ = encoder(features[1:, : lengths[1]], lengths[1:])
        features[1, lengths[1] :] = torch.nan
        encoded, encoded_lengths = encoder(features, lengths)
    encoder.check_output(lengths, encoded, encoded_lengths)
    assert encoded.isfinite().all()
    torch.testing.assert_close(encoded[1, : encoded_lengths[1]], alone[0], rtol=1e-4, atol=1e-5)
    assert encoded[0].std(0).mean() > 1e-4  # frames differ


@pytest.mark.parametrize("name", CONFIGS)
def test_lengths_of_every_duration(name):
    encoder = encoder_of(name).eval()
    for num_frames in (*range(3, 40), 101):
        lengths = torch.tensor([num_frames])
        features = torch.randn(1, num_frames, encoder.num_features)
        with torch.no_grad():
            encoded, encoded_lengths = encoder(features, lengths)
        encoder.check_output(lengths, encoded, encoded_lengths)
        assert encoded.size(1) == encoded_lengths[0] == encoder.num_output_frames(num_frames)
    factor = {"parakeet": 8, "nemotron": 8}.get(name, 2)
    assert encoder.subsampling_factor == factor


@pytest.mark.parametrize("name", ["parakeet", "wav2vec2 large", "hubert", "w2v-bert", "whisper"])
def test_the_result_is_that_of_transformers(name):
    encoder = encoder_of(name).eval()
    waveform = 0.1 * torch.randn(16000)
    extractor = encoder.make_features()._extractor
    inputs = extractor(waveform.numpy(), sampling_rate=16000, return_tensors="pt")
    features = encoder.make_features()(waveform)
    with torch.no_grad():
        expected = encoder.model(**inputs).last_hidden_state[0]
        encoded, lengths = encoder(features[None], torch.tensor([len(features)]))
    # The features of Whisper end here with the audio, and a frame later there.
    num_frames = int(lengths[0]) - (name == "whisper")
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if name == "whisper" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(encoded[0, :num_frames], expected[:num_frames], **tolerance)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_plain_config_makes_the_same_encoder(name):
    encoder = encoder_of(name).eval()
    config = encoder.plain_config
    target = config.pop("_target_")
    assert target == "transducer_toolkit.modules.huggingface.HuggingFaceEncoder"
    other = HuggingFaceEncoder(**config).eval()
    other.load_state_dict(encoder.state_dict())
    features, lengths = batch_of(encoder)
    with torch.no_grad():
        assert torch.equal(encoder(features, lengths)[0], other(features, lengths)[0])


@pytest.mark.parametrize("name", CONFIGS)
def test_frozen_encoders_stay_as_they_are(name):
    encoder = encoder_of(name, frozen=True).train()
    before = copy.deepcopy(encoder.state_dict())
    features, lengths = batch_of(encoder)
    one, _ = encoder(features, lengths)
    two, _ = encoder(features, lengths)
    assert torch.equal(one, two) and not one.requires_grad
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())


@pytest.mark.parametrize("name", CONFIGS)
def test_gradient_checkpointing_has_the_same_gradients(name):
    torch.manual_seed(0)
    no_dropout = dict.fromkeys(
        (
            "dropout",
            "hidden_dropout",
            "attention_dropout",
            "activation_dropout",
            "feat_proj_dropout",
            "conformer_conv_dropout",
        ),
        0.0,
    )
    config = {**CONFIGS[name], **no_dropout}
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        encoder = HuggingFaceEncoder(config=config, gradient_checkpointing=checkpointing).train()
        encoded, lengths = encoder(*batch_of(encoder))
        valid = torch.arange(encoded.size(1)) < lengths[:, None]
        (encoded * valid[..., None]).square().sum().backward()
        gradients.append({key: p.grad for key, p in encoder.named_parameters()})
    plain, checkpointed = gradients
    assert sum(gradient is not None for gradient in plain.values()) > 20
    for key, gradient in plain.items():
        if gradient is None:  # of the mask embedding, which is not used
            assert checkpointed[key] is None
        else:
            torch.testing.assert_close(checkpointed[key], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "class_name"),
    [
        ("parakeet", "ParakeetEncoder"),
        ("wav2vec2", "Wav2Vec2Model"),
        ("wavlm", "WavLMModel"),
        ("hubert", "HubertModel"),
        ("w2v-bert", "Wav2Vec2BertModel"),
        ("whisper", "WhisperForConditionalGeneration"),
        ("wav2vec2", "Wav2Vec2ForCTC"),
    ],
)
def test_weights_of_a_folder(name, class_name, tmp_path):
    options = {key: value for key, value in CONFIGS[name].items() if key != "model_type"}
    kind = getattr(transformers, class_name)
    model = kind(kind.config_class(**options))
    model.save_pretrained(tmp_path)
    encoder = HuggingFaceEncoder(folder=str(tmp_path))
    theirs = model.state_dict()
    for key, value in encoder.model.state_dict().items():
        (own,) = [k for k in theirs if k == key or (k.endswith(f".{key}") and "decoder" not in k)]
        assert torch.equal(value, theirs[own]), key
    assert encoder.make_features().kind == encoder_of(name).make_features().kind
    config = encoder.plain_config
    config.pop("_target_")
    assert "folder" not in config and HuggingFaceEncoder(**config).output_dim == 32


def test_the_encoder_of_a_transducer_folder(tmp_path):
    model = save_folder(tmp_path)
    encoder = HuggingFaceEncoder(folder=str(tmp_path))
    for key, value in model.encoder.state_dict().items():
        assert torch.equal(encoder.model.state_dict()[key], value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected a folder or a config, got neither; set model.encoder.folder=FOLDER"),
        ({"folder": "x", "config": {"model_type": "hubert"}}, "got both"),
        ({"config": {"model_type": "bert"}}, "expected a model_type of parakeet_encoder.*'bert'"),
        ({"config": {**CONFIGS["wav2vec2"], "add_adapter": True}}, "add_adapter of the config to"),
        (
            {"config": CONFIGS["hubert"], "features": {"kind": "EncodecFeatureExtractor"}},
            "features: expected one of ParakeetFeatureExtractor.*'EncodecFeatureExtractor'",
        ),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        HuggingFaceEncoder(**options)


def test_folders_whose_weights_do_not_fit(tmp_path):
    options = {key: value for key, value in CONFIGS["hubert"].items() if key != "model_type"}
    model = transformers.HubertModel(transformers.HubertConfig(**options))
    model.save_pretrained(tmp_path)
    for changes, message in (
        ({"num_hidden_layers": 3}, "its weights cannot be used: they lack encoder.layers.2"),
        ({"intermediate_size": 47}, "its weights cannot be used: "),
    ):
        transformers.HubertConfig(**{**options, **changes}).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=message):
            HuggingFaceEncoder(folder=str(tmp_path))


class Code:
    """A pickle of it makes a file where it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_code_of_a_folder_is_not_run(tmp_path):
    folder, canary = tmp_path / "folder", tmp_path / "canary"
    options = {key: value for key, value in CONFIGS["hubert"].items() if key != "model_type"}
    model = transformers.HubertModel(transformers.HubertConfig(**options))
    model.save_pretrained(folder)
    expected = model.state_dict()
    for name in (".metadata", "pytorch_model.bin", "adapter_model.bin"):
        (folder / name).write_bytes(pickle.dumps(Code(canary)))
    # from_pretrained of transformers reads this file instead of model.safetensors.
    zeros = {key: torch.zeros_like(value) for key, value in expected.items()}
    save_file(zeros, folder / "shard-00001-model-00001-of-00001.safetensors")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    path = folder / "config.json"
    config = json.loads(path.read_text())
    names = {"transformers_weights": "adapter_model.bin", "_attn_implementation": "user/repo"}
    path.write_text(json.dumps(config | names | {"trust_remote_code": True}))
    found = HuggingFaceEncoder(folder=str(folder)).model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())
    assert not canary.exists()
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors in the folder"):
        HuggingFaceEncoder(folder=str(folder))
    assert not canary.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn_implementation": "user/repo"}, "expected 'eager' or 'sdpa', got 'user/repo'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "the weights are quantized"),
        ({"hidden_size": 2**40}, "hidden_size=1099511627776, and weights of 24112 numbers"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers=1000000, and 51 weights"),
        (
            {"num_hidden_layers": 40},
            "json asks for .* numbers, and the weights are 24112",
        ),
        ({"hidden_size": "x"}, "config.json: .*hidden_size"),
        ({"layer_norm_eps": math.nan}, "the encoded frames of noise are NaN"),
        ({"conv_stride": [5, 2, 2, 2, 2, 2, 0]}, "cannot be used: "),
        ({"model_type": ["hubert"]}, "expected a model_type"),
    ],
)
def test_configs_of_folders(tmp_path, changes, message):
    options = {key: value for key, value in CONFIGS["hubert"].items() if key != "model_type"}
    transformers.HubertModel(transformers.HubertConfig(**options)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message) as raised:
        HuggingFaceEncoder(folder=str(tmp_path))
    assert str(tmp_path) in str(raised.value)


def test_weights_that_are_nan(tmp_path):
    options = {key: value for key, value in CONFIGS["hubert"].items() if key != "model_type"}
    model = transformers.HubertModel(transformers.HubertConfig(**options))
    model.encoder.layer_norm.weight.data[3] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"its weight encoder.layer_norm.weight holds NaN"):
        HuggingFaceEncoder(folder=str(tmp_path))


def test_whisper_takes_no_longer_utterances():
    encoder = encoder_of("whisper")
    with pytest.raises(ValueError, match=r"takes 3000 feature frames \(30 s\), got 3001"):
        encoder(torch.zeros(1, 3001, 80), torch.tensor([3001]))


@pytest.mark.parametrize("kind", KINDS)
def test_features_have_the_frames_that_they_say(kind):
    features = HuggingFaceFeatures(kind)
    least = next(number for number in range(1000) if features.num_frames(number) > 0)
    for num_samples in (*range(0, 1000, 37), 4000, 16000, 16001, 16159, 48000):
        num_frames = features.num_frames(num_samples)
        waveform = 0.1 * torch.randn(num_samples)
        if num_frames == 0:
            with pytest.raises(
                ValueError, match=rf"at least {least} samples for {kind}, got {num_samples}"
            ):
                features(waveform)
            continue
        found = features(waveform)
        assert found.shape == (num_frames, features.num_mel_bins)
        assert found.dtype == torch.float32 and found.isfinite().all()
        assert abs(num_frames - Fbank().num_frames(num_samples)) <= 3
    with pytest.raises(ValueError, match=r"waveform must be \(num_samples,\)"):
        features(torch.zeros(1, 16000))
    with pytest.raises(TypeError, match="waveform must be float32"):
        features(torch.zeros(16000).double())
    assert features.is_waveform == (kind == WAVEFORM)


def test_frames_of_a_waveform_are_its_samples():
    features = HuggingFaceFeatures(WAVEFORM, {"do_normalize": False})
    waveform = torch.randn(1000)
    frames = features(waveform)
    assert torch.equal(frames.flatten()[:1000], waveform) and not frames.flatten()[1000:].any()


def test_rate_and_frames_are_those_of_the_data():
    assert huggingface_features.SAMPLE_RATE == SAMPLE_RATE
    assert huggingface_features.FRAME_SAMPLES == SAMPLE_RATE * FRAME_SHIFT_MS / 1000
