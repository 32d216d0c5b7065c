# SPDX-License-Identifier: Apache-2.0
import sys

import pytest
import torch

from transducer_toolkit.modules import ConformerEncoder

LENGTHS = [1, 4, 5, 33, 50, 9]


def make_encoder(**options):
    torch.manual_seed(0)
    sizes = {"num_features": 20, "conv_channels": 4, "hidden_dim": 16, "num_layers": 2}
    encoder = ConformerEncoder(**{**sizes, "kernel_size": 5, "dropout": 0.0, **options})
    if encoder.normalizer.mode == "global":
        encoder.normalizer.set_statistics(torch.full((20,), 3.0), torch.full((20,), 2.0))
    return encoder


def make_batch(padding):
    features = 3 + torch.randn(len(LENGTHS), max(LENGTHS) + 3, 20)
    for row, length in enumerate(LENGTHS):
        features[row, length:] = padding
    return features, torch.tensor(LENGTHS)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("normalization", ["utterance", "global"])
@pytest.mark.parametrize("padding", [0.0, 1e6, float("nan"), float("inf")])
def test_batched_equals_single_whatever_stands_in_padding(padding, normalization, training):
    encoder = make_encoder(normalization=normalization).double().train(training)
    features, lengths = make_batch(padding)
    features = features.double()
    batched, batched_lengths = encoder(features, lengths)
    assert batched.isfinite().all()
    for row, length in enumerate(LENGTHS):
        alone, alone_length = encoder(features[row : row + 1, :length], torch.tensor([length]))
        assert batched_lengths[row] == alone_length[0] == alone.size(1) == (length + 3) // 4
        torch.testing.assert_close(batched[row, : alone.size(1)], alone[0], rtol=1e-9, atol=1e-9)


def test_the_gradient_of_a_batch_is_the_sum_of_its_utterances():
    encoder = make_encoder().double().train()
    features, lengths = make_batch(float("nan"))
    features = features.double()
    weights = torch.randn(len(LENGTHS), 14, 16, dtype=torch.float64)

    def gradients(rows):
        encoder.zero_grad()
        for batch in rows:
            out, out_lengths = encoder(features[batch], lengths[batch])
            for row, length in zip(batch, out_lengths.tolist(), strict=True):
                index = batch.index(row)
                (out[index, :length] * weights[row, :length]).sum().backward(retain_graph=True)
        return [p.grad.clone() for p in encoder.parameters()]

    together, alone = gradients([[0, 1, 2, 3, 4, 5]]), gradients([[row] for row in range(6)])
    for whole, parts in zip(together, alone, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-9, atol=1e-9)


def test_a_frame_sees_the_whole_utterance():
    encoder = make_encoder(kernel_size=1).eval()
    features, lengths = torch.randn(1, 80, 20, requires_grad=True), torch.tensor([80])
    encoder(features, lengths)[0][0, 0].square().sum().backward()
    assert (features.grad[0].abs().amax(1) > 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision(dtype):
    encoder = make_encoder().train()
    features, lengths = make_batch(float("nan"))
    exact, _ = encoder(features, lengths)
    with torch.autocast("cpu", dtype=dtype):
        mixed, _ = encoder(features, lengths)
        loss = mixed.float().square().sum()
    loss.backward()
    torch.testing.assert_close(mixed.float(), exact, rtol=0.1, atol=0.1)
    assert all(p.grad.isfinite().all() for p in encoder.parameters())


def test_the_mask_does_not_outlive_the_call():
    encoder = make_encoder().eval()
    encoder(torch.randn(2, 9, 20), torch.tensor([9, 4]))
    layer = encoder.layers[0]
    with pytest.raises(AssertionError):
        layer(torch.randn(3, 1, 16), None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_dim": 18}, "hidden_dim must be a multiple of num_heads=4, got 18"),
        ({"kernel_size": 4}, "kernel_size must be odd, got 4"),
        ({"kernel_size": -1}, "kernel_size must be odd, got -1"),
        ({"normalization": "speaker"}, "normalization must be one of"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make_encoder(**options)


def test_a_missing_torchaudio_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchaudio.models", None)
    with pytest.raises(
        ImportError, match="ConformerEncoder needs torchaudio: pip install torchaudio"
    ):
        make_encoder()
