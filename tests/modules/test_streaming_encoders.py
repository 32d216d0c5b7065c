# SPDX-License-Identifier: Apache-2.0
"""Encoders that stream: the same frames whole, in a batch, and in pieces of any size."""

import random

import pytest
import torch

from transducer_toolkit.modules import ConvLstmEncoder, EmformerEncoder

LENGTHS = [1, 3, 4, 5, 16, 31, 57, 83]
# segment_length, left_context, right_context, memory_size
EMFORMERS = [(4, 8, 1, 0), (4, 8, 1, 3), (3, 0, 0, 0), (5, 3, 7, 2), (1, 4, 2, 0)]


def conv_lstm(**changes):
    return ConvLstmEncoder(
        num_features=20, conv_channels=4, hidden_dim=16, normalization="global", **changes
    )


def emformer(segment_length=4, left_context=8, right_context=1, memory_size=0, factor=4, **changes):
    return EmformerEncoder(
        num_features=20,
        conv_channels=4,
        dim=16,
        num_heads=2,
        ffn_dim=32,
        num_layers=2,
        segment_length=segment_length,
        left_context=left_context,
        right_context=right_context,
        memory_size=memory_size,
        subsampling_factor=factor,
        **changes,
    )


@pytest.fixture(params=["lstm", "lstm 2x", "lstm 8x", *EMFORMERS, (3, 4, 1, 0, 8)], ids=str)
def encoder(request):
    name = request.param
    if isinstance(name, str):
        encoder = conv_lstm(subsampling_factor=int(name[5]) if len(name) > 4 else 4)
    else:
        encoder = emformer(*name)
    encoder.normalizer.set_statistics(torch.full((20,), 3.0), torch.full((20,), 2.0))
    return encoder.eval()


def in_pieces(encoder, features, sizes):
    """Frames of a stream that is cut into pieces of ``sizes``, and the largest state on the way."""
    state, frames, largest, position = encoder.initial_state(), [], 0, 0
    for size in sizes:
        piece = features[position : position + size]
        position += size
        out, state = encoder.stream(piece, state)
        frames.append(out)
        largest = max(largest, sum(t.numel() for t in tensors_of(state.features, state.layers)))
    out, _ = encoder.stream(features[position:], state, final=True)
    return torch.cat([*frames, out]), largest


def tensors_of(*values):
    for value in values:
        if isinstance(value, torch.Tensor):
            # What is kept alive, not what is seen of it.
            yield value.new_empty(value.untyped_storage().size() // value.element_size())
        elif isinstance(value, (list, tuple)):
            yield from tensors_of(*value)


@torch.inference_mode()
def test_streamed_equals_whole(encoder):
    choices = random.Random(0)
    for length in LENGTHS:
        features = 3 + 2 * torch.randn(length, 20)
        whole, _ = encoder(features[None], torch.tensor([length]))
        cuts = [
            [],  # everything at the end
            [length],  # everything before it
            [1] * length,
            [0, *choices.choices(range(9), k=12), 0],
            [*choices.choices((1, 13, 40), k=3)],
        ]
        for sizes in cuts:
            streamed, _ = in_pieces(encoder, features, sizes)
            assert streamed.shape == whole[0].shape
            torch.testing.assert_close(streamed, whole[0], rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_state_does_not_grow(encoder):
    _, short = in_pieces(encoder, torch.randn(400, 20), [7] * 57)
    _, long = in_pieces(encoder, torch.randn(1600, 20), [7] * 228)
    assert long <= short


@torch.inference_mode()
def test_a_frame_waits_for_no_more_than_it_says(encoder):
    """And for no less, or latency_frames would be too large."""
    features, waited = torch.randn(240, 20), []
    state, num_known = encoder.initial_state(), 0
    factor = encoder.subsampling_factor
    for fed in range(factor, 241, factor):
        out, state = encoder.stream(features[fed - factor : fed], state)
        waited += [fed // factor - frame for frame in range(num_known, num_known + len(out))]
        num_known += len(out)
    assert max(waited) == encoder.latency_frames


@torch.inference_mode()
def test_the_future_beyond_it_changes_nothing(encoder):
    num_frames, changed = 20 * encoder.subsampling_factor, 10 * encoder.subsampling_factor
    features = torch.randn(1, num_frames, 20)
    other = features.clone()
    other[:, changed:] = torch.randn(1, num_frames - changed, 20)
    (a, _), (b, _) = (encoder(x, torch.tensor([num_frames])) for x in (features, other))
    num_same = 10 - encoder.latency_frames + 1
    assert num_same < 1 or torch.equal(a[:, :num_same], b[:, :num_same])
    assert not torch.allclose(a[:, 10:], b[:, 10:])


def test_stream_leaves_the_state_as_it_is(encoder):
    first, second = torch.randn(2, 30, 20)
    _, state = encoder.stream(first, encoder.initial_state())
    once, _ = encoder.stream(second, state)
    again, _ = encoder.stream(second, state)
    assert torch.equal(once, again)


@pytest.mark.parametrize("padding", [0.0, 1e6, float("nan"), float("inf")])
@pytest.mark.parametrize("sizes", EMFORMERS, ids=str)
def test_emformer_batched_equals_single_whatever_stands_in_padding(sizes, padding):
    encoder = emformer(*sizes).eval()
    encoder.normalizer.set_statistics(torch.full((20,), 3.0), torch.full((20,), 2.0))
    features = 3 + torch.randn(len(LENGTHS), max(LENGTHS), 20)
    for row, length in enumerate(LENGTHS):
        features[row, length:] = padding
    batched, batched_lengths = encoder(features, torch.tensor(LENGTHS))
    assert batched.isfinite().all()
    for row, length in enumerate(LENGTHS):
        alone, alone_length = encoder(features[row : row + 1, :length], torch.tensor([length]))
        assert batched_lengths[row] == alone_length[0] == alone.size(1)
        torch.testing.assert_close(batched[row, : alone.size(1)], alone[0], rtol=1e-4, atol=1e-5)


def test_emformer_padding_gets_no_gradient_and_gives_none():
    encoder = emformer(normalization="utterance").eval()
    features = torch.randn(2, 12, 20)
    features[1, 7:] = float("nan")
    features.requires_grad_()
    out, lengths = encoder(features, torch.tensor([12, 7]))
    out = out * torch.randn_like(out)  # a plain sum over the layer norm's channels has no gradient
    (out[0].sum() + out[1, : int(lengths[1])].sum()).backward()
    assert (features.grad[1, 7:] == 0).all()
    assert features.grad[1, :7].abs().sum() > 0
    assert all(p.grad.isfinite().all() for p in encoder.parameters() if p.grad is not None)


@pytest.mark.parametrize("make", [conv_lstm, emformer])
def test_errors_of_streaming(make):
    encoder = make().eval()
    with pytest.raises(RuntimeError, match="has no statistics yet"):
        encoder.stream(torch.zeros(8, 20), encoder.initial_state())
    encoder.normalizer.set_statistics(torch.zeros(20), torch.ones(20))
    for shape in ((20,), (4, 7), (1, 4, 20)):
        with pytest.raises(ValueError, match=r"features must have shape \(n, 20\), got"):
            encoder.stream(torch.zeros(shape), encoder.initial_state())
    utterance = ConvLstmEncoder(num_features=20, normalization="utterance")
    with pytest.raises(ValueError, match="normalization='global', got 'utterance'"):
        utterance.initial_state()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"segment_length": 0}, "segment_length must be at least 1"),
        ({"right_context": -1}, "at least 0, got 4, 8, -1, 0"),
        ({"left_context": -1}, "at least 0, got 4, -1, 1, 0"),
        ({"memory_size": -2}, "at least 0, got 4, 8, 1, -2"),
    ],
)
def test_errors_of_sizes(changes, message):
    with pytest.raises(ValueError, match=message):
        emformer(**changes)
    with pytest.raises(ValueError, match="dim must be a multiple of num_heads=3, got 16"):
        EmformerEncoder(dim=16, num_heads=3)
