# SPDX-License-Identifier: Apache-2.0
"""Against the projects ours replaces."""

import pytest
import torch

from tests.losses.helpers import ragged_batch
from transducer_toolkit import transducer_loss

torchaudio = pytest.importorskip("torchaudio", exc_type=ImportError)


def both(batch):
    """(loss, gradient) of torchaudio and of ours, same padded float32 logits."""
    results = []
    for loss_of in (torchaudio.functional.rnnt_loss, transducer_loss):
        targets, *lengths = (tensor.int() for tensor in batch.index_arguments[:3])
        loss = loss_of(batch.logits, targets, *lengths, batch.blank, reduction="none")
        results.append((loss, torch.autograd.grad(loss.sum(), batch.logits)[0]))
    return results


@pytest.mark.parametrize("seed", range(195))
def test_equals_torchaudio_on_small_ragged_batches(seed):
    torch.manual_seed(seed)
    size = int(torch.randint(1, 6, ()))
    frames = torch.randint(1, 11, (size,)).tolist()
    symbols = torch.randint(0, 6, (size,)).tolist()
    vocab_size = int(torch.randint(2, 70, ()))
    blank = int(torch.randint(0, vocab_size, ()))
    batch = ragged_batch(frames, symbols, vocab_size, dtype=torch.float32, blank=blank, padding=0.0)
    theirs, ours = both(batch)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_equals_torchaudio_on_long_batches_to_its_own_error(seed):
    torch.manual_seed(seed)
    frames = torch.randint(300, 400, (2,)).tolist()
    symbols = torch.randint(40, 80, (2,)).tolist()
    batch = ragged_batch(frames, symbols, 20, dtype=torch.float32, padding=0.0)
    theirs, ours = both(batch)
    torch.testing.assert_close(ours, theirs, rtol=5e-3, atol=5e-3)
    # The difference is theirs: ours is a thousand times closer to float64.
    exact = batch.logits.detach().double().requires_grad_()
    transducer_loss(exact, *batch.index_arguments, reduction="sum").backward()
    assert (ours[1] - exact.grad).abs().max() < 1e-5


def test_usage_example_of_optimized_transducer():
    """The two listings of its README; only the import differs."""
    import transducer_toolkit as optimized_transducer

    N, T, U, D = 3, 7, 5, 8  # there U counts the columns of the lattice
    blank_id = 0
    linear = torch.nn.Linear(D, 11)
    targets = torch.randint(1, 11, (N, U - 1), dtype=torch.int32)
    logit_lengths = torch.tensor([7, 5, 6], dtype=torch.int32)
    target_lengths = torch.tensor([2, 4, 0], dtype=torch.int32)

    # fmt: off
    encoder_out = torch.rand(N, T, D) # from the encoder
    decoder_out = torch.rand(N, U, D) # from the decoder, i.e., the prediction network

    encoder_out_list = [encoder_out[i, :logit_lengths[i], :] for i in range(N)]
    decoder_out_list = [decoder_out[i, :target_lengths[i]+1, :] for i in range(N)]

    x = [e.unsqueeze(1) + d.unsqueeze(0) for e, d in zip(encoder_out_list, decoder_out_list)]
    x = [p.reshape(-1, D) for p in x]
    x = torch.cat(x)

    activation = torch.tanh(x)
    logits = linear(activation) # linear is an instance of `nn.Linear`.

    loss = optimized_transducer.transducer_loss(
        logits=logits,
        targets=targets,
        logit_lengths=logit_lengths,
        target_lengths=target_lengths,
        blank=blank_id,
        reduction="mean",
        from_log_softmax=False,
    )

    packed_loss, packed_grad = loss, torch.autograd.grad(loss, linear.weight)[0]

    encoder_out = encoder_out.unsqueeze(2) # Now encoder out is (N, T, 1, D)
    decoder_out = decoder_out.unsqueeze(1) # Now decoder out is (N, 1, U, D)

    x = encoder_out + decoder_out # x is of shape (N, T, U, D)
    activation = torch.tanh(x)

    logits = linear(activation) # linear is an instance of `nn.Linear`.

    loss = torchaudio.functional.rnnt_loss(
        logits=logits,
        targets=targets,
        logit_lengths=logit_lengths,
        target_lengths=target_lengths,
        blank=blank_id,
        reduction="mean",
    )
    # fmt: on

    torch.testing.assert_close(packed_loss, loss, rtol=1e-5, atol=1e-5)
    padded_grad = torch.autograd.grad(loss, linear.weight)[0]
    torch.testing.assert_close(packed_grad, padded_grad, rtol=1e-5, atol=1e-5)
