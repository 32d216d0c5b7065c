# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

from transducer_toolkit.modules import ConformerEncoder, ConvLstmEncoder, EmformerEncoder
from transducer_toolkit.modules.encoder_frontend import (
    ConvSubsampling,
    FeatureNormalizer,
    subsampled_length,
)

LENGTHS = [1, 2, 3, 4, 5, 9, 33, 50]


@pytest.fixture(params=[("utterance", 4), ("speech", 4), ("global", 4), ("global", 8)], ids=str)
def encoder(request):
    torch.manual_seed(0)
    normalization, factor = request.param
    encoder = ConvLstmEncoder(
        num_features=20,
        conv_channels=4,
        hidden_dim=16,
        normalization=normalization,
        subsampling_factor=factor,
    )
    if normalization == "global":
        encoder.normalizer.set_statistics(torch.full((20,), 3.0), torch.full((20,), 2.0))
    return encoder.eval()


@pytest.mark.parametrize("padding", [0.0, 1e6, float("nan"), float("inf")])
def test_batched_equals_single_whatever_stands_in_padding(encoder, padding):
    features = 3 + torch.randn(len(LENGTHS), max(LENGTHS), 20)
    for row, length in enumerate(LENGTHS):
        features[row, length:] = padding
    batched, batched_lengths = encoder(features, torch.tensor(LENGTHS))
    assert batched.isfinite().all()
    for row, length in enumerate(LENGTHS):
        alone, alone_length = encoder(features[row : row + 1, :length], torch.tensor([length]))
        assert batched_lengths[row] == alone_length[0] == alone.size(1)
        torch.testing.assert_close(batched[row, : alone.size(1)], alone[0], rtol=1e-4, atol=1e-5)


def test_padding_gets_no_gradient_and_gives_none(encoder):
    features = torch.randn(2, 12, 20)
    features[1, 7:] = float("nan")
    features.requires_grad_()
    out, lengths = encoder(features, torch.tensor([12, 7]))
    out = out * torch.randn_like(out)  # a plain sum over the layer norm's channels has no gradient
    (out[0].sum() + out[1, : int(lengths[1])].sum()).backward()
    assert (features.grad[1, 7:] == 0).all()
    assert features.grad[1, :7].abs().sum() > 0
    assert all(p.grad.isfinite().all() for p in encoder.parameters())


def test_utterance_normalization_removes_a_constant_per_bin():
    torch.manual_seed(0)
    encoder = ConvLstmEncoder(num_features=20, conv_channels=4, hidden_dim=16).eval()
    features, lengths = torch.randn(2, 30, 20), torch.tensor([30, 22])
    out, _ = encoder(features, lengths)
    shifted, _ = encoder(features + torch.randn(20), lengths)
    torch.testing.assert_close(out[0], shifted[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pause", [-11.0, -16.0, -40.0])  # log energies, 43 dB being 9.9
@pytest.mark.parametrize("num_pause_frames", [0, 1, 90])
def test_speech_normalization_does_not_depend_on_pauses_or_level(pause, num_pause_frames):
    speech = torch.randn(30, 20)
    speech[4, 7] = 9.0  # the loudest value
    padded = torch.cat([speech, speech.new_full((num_pause_frames, 20), 9 + pause)])
    normalizer = FeatureNormalizer(20, "speech")
    for level in (0.0, -5.0):
        mask = torch.ones(1, len(padded), dtype=torch.bool)
        centered = normalizer(padded[None] + level, mask)[0]
        assert torch.allclose(centered[:30].mean(0), torch.zeros(20), atol=1e-5)
        alone = normalizer(speech[None], mask[:, :30])[0]
        torch.testing.assert_close(centered[:30], alone, rtol=1e-5, atol=1e-5)
        floor = 9 - 4.3 * math.log(10)
        expected = (floor - speech.clamp_min(floor).mean(0)).expand(num_pause_frames, 20)
        torch.testing.assert_close(centered[30:], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("factor", [2, 4, 8, 16])
@pytest.mark.parametrize("num_frames", [*range(1, 40), 1001])
def test_num_output_frames(num_frames, factor):
    encoder = ConvLstmEncoder(
        num_features=20, conv_channels=2, hidden_dim=4, subsampling_factor=factor
    )
    out, lengths = encoder(torch.randn(1, num_frames, 20), torch.tensor([num_frames]))
    expected = -(-num_frames // factor)
    assert out.size(1) == expected == int(lengths)
    assert (
        encoder.num_output_frames(num_frames) == subsampled_length(num_frames, factor) == expected
    )
    assert encoder.num_output_frames(torch.tensor([num_frames])).tolist() == [expected]
    assert encoder.subsampling_factor == factor


def test_an_encoder_frame_depends_on_the_features_that_are_documented():
    for factor in (4, 8):
        subsampling = ConvSubsampling(20, channels=2, output_dim=8, factor=factor).double()
        features = torch.randn(1, 8 * factor, 20, dtype=torch.float64, requires_grad=True)
        out = subsampling(features, torch.tensor([8 * factor]))
        (grad,) = torch.autograd.grad(out[0, 3] @ torch.randn(8).double(), features)
        used = grad[0].abs().sum(1).nonzero().flatten().tolist()
        assert (used[0], used[-1]) == (2 * factor + 1, 4 * factor - 1)


# Names and shapes in checkpoints that were written before the encoders shared a front end.
OLD_FRONT_END = {
    "normalizer.mean": (20,),
    "normalizer.std": (20,),
    "normalizer.has_statistics": (),
    "subsampling.conv1.weight": (4, 1, 3, 3),
    "subsampling.conv1.bias": (4,),
    "subsampling.conv2.weight": (4, 4, 3, 3),
    "subsampling.conv2.bias": (4,),
    "subsampling.projection.weight": (16, 20),
    "subsampling.projection.bias": (16,),
    "subsampling.norm.weight": (16,),
    "subsampling.norm.bias": (16,),
}


@pytest.mark.parametrize(
    ("make", "options", "layers"),
    [
        (ConvLstmEncoder, {"hidden_dim": 16}, "lstm."),
        (ConformerEncoder, {"hidden_dim": 16, "num_layers": 1}, "layers."),
        (EmformerEncoder, {"dim": 16, "ffn_dim": 16, "num_layers": 1}, "emformer."),
    ],
)
def test_state_dicts_of_older_versions_are_loaded(make, options, layers):
    encoder = make(num_features=20, conv_channels=4, normalization="global", **options)
    own = encoder.state_dict()
    old = {name: torch.full(shape, 0.5) for name, shape in OLD_FRONT_END.items()}
    old["normalizer.has_statistics"] = torch.tensor(True)
    old |= {name: value for name, value in own.items() if name.startswith((layers, "norm."))}
    encoder.load_state_dict(old)  # strict: every name is known, none is missing
    assert not encoder.normalizer.needs_statistics
    assert float(encoder.state_dict()["subsampling.conv2.weight"].mean()) == 0.5


def test_bad_subsampling_is_named():
    for factor in (0, 1, 3, 6, -4):
        with pytest.raises(
            ValueError, match=f"subsampling_factor: expected a power of 2.*{factor}"
        ):
            ConvLstmEncoder(subsampling_factor=factor)
    with pytest.raises(TypeError, match="subsampling_factor: expected an int, got float"):
        ConvLstmEncoder(subsampling_factor=4.0)


def test_global_statistics_are_needed_and_travel_with_the_state_dict():
    def fresh():
        return ConvLstmEncoder(num_features=20, conv_channels=2, normalization="global").eval()

    encoder, features, lengths = fresh(), torch.randn(1, 8, 20), torch.tensor([8])
    assert encoder.normalizer.needs_statistics
    with pytest.raises(RuntimeError, match="has no statistics yet"):
        encoder(features, lengths)
    encoder.normalizer.set_statistics(torch.ones(20), torch.full((20,), 2.0))
    restored = fresh()
    restored.load_state_dict(encoder.state_dict())
    assert not restored.normalizer.needs_statistics
    torch.testing.assert_close(encoder(features, lengths)[0], restored(features, lengths)[0])


@pytest.mark.parametrize(
    ("features", "lengths", "message"),
    [
        (torch.zeros(2, 5, 7), [5, 5], r"features must have shape \(B, T_in, 20\)"),
        (torch.zeros(5, 20), [5], r"features must have shape"),
        (torch.zeros(2, 5, 20), [5], r"feature_lengths must have shape \(2,\), got \(1,\)"),
        (torch.zeros(2, 5, 20), [5, 0], r"feature_lengths\[1\] must be in \[1, 5\], got 0"),
        (torch.zeros(2, 5, 20), [6, 5], r"feature_lengths\[0\] must be in \[1, 5\], got 6"),
    ],
)
def test_bad_input_is_named(features, lengths, message):
    encoder = ConvLstmEncoder(num_features=20, conv_channels=2, hidden_dim=4)
    with pytest.raises(ValueError, match=message):
        encoder(features, torch.tensor(lengths))


def test_bad_normalization_is_named():
    with pytest.raises(ValueError, match="normalization must be one of"):
        FeatureNormalizer(20, "speaker")
    with pytest.raises(ValueError, match="statistics are used with normalization='global'"):
        FeatureNormalizer(20).set_statistics(torch.zeros(20), torch.ones(20))
    normalizer = FeatureNormalizer(20, "global")
    with pytest.raises(ValueError, match=r"mean must have shape \(20,\), got \(3,\)"):
        normalizer.set_statistics(torch.zeros(3), torch.ones(20))
    with pytest.raises(ValueError, match="std must be positive"):
        normalizer.set_statistics(torch.zeros(20), torch.zeros(20))


@pytest.mark.parametrize("make", [ConvLstmEncoder, ConformerEncoder, EmformerEncoder])
def test_bad_sizes_are_named(make):
    for options, error, message in (
        ({"num_layers": 0}, ValueError, "num_layers: expected at least 1, got 0"),
        ({"conv_channels": -1}, ValueError, "conv_channels: expected at least 1, got -1"),
        ({"num_features": "80"}, TypeError, "num_features: expected an int, got str"),
        ({"dropout": float("nan")}, ValueError, r"dropout: expected a number in \[0, 1\], got nan"),
        ({"dropout": "x"}, TypeError, "dropout: expected a number, got str"),
    ):
        with pytest.raises(error, match=message):
            make(**options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        (
            {"encoder_lengths": torch.tensor([9, 5])},
            r"'b': ConvLstmEncoder.forward makes 5 encoder",
        ),
        (
            {"encoder_lengths": torch.tensor([8, 6])},
            r"'a': .* makes 8 encoder frames of 33 feature",
        ),
        ({"encoder_out": torch.zeros(2, 8, 16)}, "'a': .* length 9, and encoder_out has 8 frames"),
        ({"encoder_out": torch.zeros(2, 9, 15)}, r"shape \(2, T, 16\), output_dim last, got"),
        ({"encoder_out": torch.zeros(9, 2, 16)}, r"shape \(2, T, 16\), output_dim last, got"),
        ({"encoder_out": torch.zeros(2, 16)}, r"shape \(2, T, 16\), output_dim last, got"),
        ({"encoder_out": (torch.zeros(1),)}, "expected a tensor encoder_out, got tuple"),
        ({"encoder_lengths": torch.tensor([9.0, 6.0])}, "of dtype int64, got torch.float32"),
        ({"encoder_lengths": torch.tensor([[9], [6]])}, r"of shape \(2,\), got \(2, 1\)"),
        ({"encoder_lengths": None}, "expected a tensor encoder_lengths, got NoneType"),
    ],
)
def test_the_output_is_that_of_the_interface(change, message):
    encoder = ConvLstmEncoder(conv_channels=2, hidden_dim=16)
    results = {"encoder_out": torch.zeros(2, 9, 16), "encoder_lengths": torch.tensor([9, 6])}
    arguments = torch.tensor([33, 21]), *(results | change).values()
    if message is None:
        encoder.check_output(*arguments, ["a", "b"])
        encoder.check_output(*(x.to("meta") for x in arguments))  # lengths elsewhere are not read
        return
    with pytest.raises((TypeError, ValueError), match=message):
        encoder.check_output(*arguments, ["a", "b"])
    with pytest.raises(
        (TypeError, ValueError), match=message.replace("'a'", "0").replace("'b'", "1")
    ):
        encoder.check_output(*arguments)
