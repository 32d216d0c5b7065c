# SPDX-License-Identifier: Apache-2.0
"""The functions under k2's names take the arguments of icefall's recipes.

The signatures are those of k2 in July 2025.
"""

import inspect

import pytest
import torch

import transducer_toolkit

LOSS = {"boundary": None, "rnnt_type": "regular", "delay_penalty": 0.0, "reduction": "mean"}
SMOOTHING = {"lm_only_scale": 0.1, "am_only_scale": 0.1}
SIGNATURES = {
    "rnnt_loss_simple": (
        ["lm", "am", "symbols", "termination_symbol"],
        LOSS | {"return_grad": False},
    ),
    "rnnt_loss_smoothed": (
        ["lm", "am", "symbols", "termination_symbol"],
        SMOOTHING | LOSS | {"return_grad": False},
    ),
    "rnnt_loss": (["logits", "symbols", "termination_symbol"], LOSS),
    "rnnt_loss_pruned": (
        ["logits", "symbols", "ranges", "termination_symbol"],
        LOSS | {"use_hat_loss": False},
    ),
    "get_rnnt_prune_ranges": (["px_grad", "py_grad", "boundary", "s_range"], {}),
    "do_rnnt_pruning": (["am", "lm", "ranges"], {}),
    "get_rnnt_logprobs": (
        ["lm", "am", "symbols", "termination_symbol"],
        {"rnnt_type": "regular", "boundary": None},
    ),
    "get_rnnt_logprobs_pruned": (
        ["logits", "symbols", "ranges", "termination_symbol", "boundary"],
        {"rnnt_type": "regular"},
    ),
    "get_rnnt_logprobs_smoothed": (
        ["lm", "am", "symbols", "termination_symbol"],
        SMOOTHING | {"boundary": None, "rnnt_type": "regular"},
    ),
    "mutual_information_recursion": (["px", "py"], {"boundary": None, "return_grad": False}),
    "joint_mutual_information_recursion": (["px", "py"], {"boundary": None}),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_arguments_are_those_of_k2(name):
    required, optional = SIGNATURES[name]
    ours = list(inspect.signature(getattr(transducer_toolkit, name)).parameters.values())
    assert [p.name for p in ours[: len(required) + len(optional)]] == [*required, *optional]
    for parameter in ours[len(required) :]:
        assert parameter.default is not parameter.empty, parameter
    for parameter in ours[len(required) : len(required) + len(optional)]:
        assert parameter.default == optional[parameter.name], parameter
        assert parameter.kind == parameter.POSITIONAL_OR_KEYWORD


class Joiner(torch.nn.Module):
    """The joiner of icefall's Zipformer recipe."""

    def __init__(self, encoder_dim, decoder_dim, joiner_dim, vocab_size):
        super().__init__()
        self.encoder_proj = torch.nn.Linear(encoder_dim, joiner_dim)
        self.decoder_proj = torch.nn.Linear(decoder_dim, joiner_dim)
        self.output_linear = torch.nn.Linear(joiner_dim, vocab_size)

    def forward(self, encoder_out, decoder_out):
        return self.output_linear(torch.tanh(encoder_out + decoder_out))


def test_a_step_of_the_zipformer_recipe():
    torch.manual_seed(0)
    joiner = Joiner(6, 5, 8, 10)
    simple_am, simple_lm = torch.nn.Linear(6, 10), torch.nn.Linear(5, 10)
    encoder_out = torch.randn(2, 12, 6, requires_grad=True)
    decoder_out = torch.randn(2, 6, 5, requires_grad=True)
    y_padded, blank_id = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 0, 0]]), 0
    boundary = torch.tensor([[0, 0, 5, 12], [0, 0, 3, 9]])

    simple_loss, (px_grad, py_grad) = transducer_toolkit.rnnt_loss_smoothed(
        lm=simple_lm(decoder_out).float(),
        am=simple_am(encoder_out).float(),
        symbols=y_padded,
        termination_symbol=blank_id,
        lm_only_scale=0.25,
        am_only_scale=0.0,
        boundary=boundary,
        reduction="sum",
        return_grad=True,
    )
    ranges = transducer_toolkit.get_rnnt_prune_ranges(
        px_grad=px_grad, py_grad=py_grad, boundary=boundary, s_range=5
    )
    enc, pred = joiner.encoder_proj(encoder_out), joiner.decoder_proj(decoder_out)
    am_pruned, lm_pruned = transducer_toolkit.do_rnnt_pruning(am=enc, lm=pred, ranges=ranges)
    pruned_loss = transducer_toolkit.rnnt_loss_pruned(
        logits=joiner(am_pruned, lm_pruned).float(),
        symbols=y_padded,
        ranges=ranges,
        termination_symbol=blank_id,
        boundary=boundary,
        reduction="sum",
    )
    fused_loss = transducer_toolkit.fused_joiner_loss(
        enc,
        pred,
        joiner.output_linear.weight,
        joiner.output_linear.bias,
        y_padded,
        boundary[:, 3],
        boundary[:, 2],
        blank_id,
        ranges=ranges,
        reduction="sum",
    )
    inputs = encoder_out, decoder_out, *joiner.parameters()
    results = [
        (loss, *torch.autograd.grad(loss, inputs, retain_graph=True))
        for loss in (pruned_loss, fused_loss)
    ]
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    assert simple_loss > 0 and simple_loss.isfinite()
