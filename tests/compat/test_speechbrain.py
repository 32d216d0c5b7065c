# SPDX-License-Identifier: Apache-2.0
"""The adapters of SpeechBrain. Those that need no SpeechBrain are compared with torchaudio."""

import functools
import inspect
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from transducer_toolkit.compat import speechbrain as ours
from transducer_toolkit.compat.common import JointInputs

torchaudio = pytest.importorskip("torchaudio", exc_type=ImportError)

SIZES = 3, 6, 4, 7  # B, T, U, V
RELATIVE = torch.tensor([1.0, 0.67, 0.5]), torch.tensor([1.0, 0.5, 0.26])
LENGTHS = torch.tensor([6, 4, 3]), torch.tensor([4, 2, 1])


def arguments():
    batch, frames, labels, size = SIZES
    random = np.random.RandomState(0)
    logits = torch.from_numpy(random.randn(batch, frames, labels + 1, size).astype(np.float32))
    targets = torch.from_numpy(random.randint(1, size, (batch, labels)))
    return logits.requires_grad_(), targets


def value_and_gradient(loss, logits):
    return loss.detach(), torch.autograd.grad(loss.sum(), logits)[0]


def expected(reduction):
    logits, targets = arguments()
    indices = targets.int(), *(lengths.int() for lengths in LENGTHS)
    loss = torchaudio.functional.rnnt_loss(logits, *indices, blank=0, reduction=reduction)
    return value_and_gradient(loss, logits)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_default_is_torchaudio(reduction):
    logits, targets = arguments()
    loss = ours.transducer_loss(logits, targets, *RELATIVE, blank_index=0, reduction=reduction)
    torch.testing.assert_close(value_and_gradient(loss, logits), expected(reduction))
    loss = ours.TransducerLoss(0, reduction)(logits, targets, *LENGTHS)
    torch.testing.assert_close(value_and_gradient(loss, logits), expected(reduction))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_speechbrain_with_torchaudio(reduction):
    losses = pytest.importorskip("speechbrain.nnet.losses", exc_type=ImportError)
    if "use_torchaudio" not in inspect.signature(losses.transducer_loss).parameters:
        pytest.skip("SpeechBrain 1.1 has no use_torchaudio")
    logits, targets = arguments()
    found = [
        value_and_gradient(
            module.transducer_loss(logits, targets, *RELATIVE, 0, reduction, True), logits
        )
        for module in (losses, ours)
    ]
    torch.testing.assert_close(found[1], found[0])


SIMULATION = """
import sys
import numpy as np
import torch
from speechbrain.nnet.losses import transducer_loss
from tests.compat.test_speechbrain import RELATIVE, arguments, value_and_gradient
options = {} if "1.1" in sys.argv else {"use_torchaudio": False}
results = []
for reduction in ("none", "mean", "sum"):
    logits, targets = arguments()
    loss = transducer_loss(logits, targets, *RELATIVE, 0, reduction, **options)
    results += (x.numpy() for x in value_and_gradient(loss, logits))
np.savez(sys.argv[1], *results)
"""


def test_speechbrain_with_numba(tmp_path):
    """Numba's simulator runs SpeechBrain's CUDA kernels on the CPU."""
    losses = pytest.importorskip("speechbrain.nnet.losses", exc_type=ImportError)
    pytest.importorskip("numba")
    has_option = "use_torchaudio" in inspect.signature(losses.transducer_loss).parameters
    command = [
        sys.executable,
        "-c",
        SIMULATION,
        tmp_path / "a.npz",
        *([] if has_option else ["1.1"]),
    ]
    subprocess.run(command, env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"}, check=True)
    theirs = list(np.load(tmp_path / "a.npz").values())
    for index, reduction in enumerate(("none", "mean", "sum")):
        value, gradient = (torch.from_numpy(x) for x in theirs[2 * index : 2 * index + 2])
        logits, targets = arguments()
        options = {"reduction": reduction, "use_torchaudio": False}
        loss = ours.transducer_loss(logits, targets, *RELATIVE, 0, **options)
        torch.testing.assert_close(loss.detach(), value, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient, expected("sum")[1], rtol=1e-5, atol=1e-5)


def test_numba_convention_divides_by_frames():
    logits, targets = arguments()
    losses = expected("none")[0] / LENGTHS[0]
    for loss in (
        ours.transducer_loss(logits, targets, *RELATIVE, 0, use_torchaudio=False),
        ours.TransducerLoss(use_torchaudio=False)(logits, targets, *LENGTHS),
    ):
        torch.testing.assert_close(loss, losses.mean())
    scale = 3 * LENGTHS[0][:, None, None, None]
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0] * scale, expected("sum")[1])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("nonlinearity", [torch.nn.Tanh, torch.nn.GELU, torch.nn.ReLU])
def test_joint_and_output_layer_are_fused(nonlinearity, bias):
    torch.manual_seed(0)
    joint = ours.Transducer_joint(joint="sum", nonlinearity=nonlinearity)
    output = ours.Linear(n_neurons=SIZES[3], input_size=8, bias=bias)
    enc = torch.randn(3, 6, 8, requires_grad=True)
    pred = torch.randn(3, 5, 8, requires_grad=True)
    inputs = enc, pred, *output.parameters()
    made = output(joint(enc.unsqueeze(2), pred.unsqueeze(1)))
    assert isinstance(made, JointInputs)
    logits = output(nonlinearity()(enc.unsqueeze(2) + pred.unsqueeze(1)))
    _, targets = arguments()
    results = []
    for each in (made, logits):
        loss = ours.transducer_loss(each, targets, *RELATIVE, blank_index=0)
        results.append((loss, *torch.autograd.grad(loss, inputs)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_a_recipe_of_speechbrain():
    """Its classes and ours, in a hyperparameter file, in the steps of its train.py."""
    pytest.importorskip("speechbrain")
    from hyperpyyaml import load_hyperpyyaml

    text = """
activation: !name:torch.nn.GELU
blank_index: 0
enc: !new:speechbrain.nnet.linear.Linear {{input_size: 5, n_neurons: 8}}
emb: !new:speechbrain.nnet.embedding.Embedding
    num_embeddings: 7
    consider_as_one_hot: True
    blank_id: 0
dec: !new:speechbrain.nnet.RNN.LSTM {{input_shape: [null, null, 6], hidden_size: 8}}
Tjoint: !new:{joint} {{joint: sum, nonlinearity: !ref <activation>}}
transducer_lin: !new:{linear} {{input_size: 8, n_neurons: 7, bias: False}}
transducer_cost: !name:transducer_toolkit.compat.speechbrain.transducer_loss
    blank_index: !ref <blank_index>
Greedysearcher: !new:speechbrain.decoders.transducer.TransducerBeamSearcher
    decode_network_lst: [!ref <emb>, !ref <dec>]
    tjoint: !ref <Tjoint>
    classifier_network: [!ref <transducer_lin>]
    blank_id: !ref <blank_index>
    beam_size: 1
"""
    names = [
        (
            "speechbrain.nnet.transducer.transducer_joint.Transducer_joint",
            "speechbrain.nnet.linear.Linear",
        ),
        (
            "transducer_toolkit.compat.speechbrain.Transducer_joint",
            "transducer_toolkit.compat.speechbrain.Linear",
        ),
    ]
    features, (_, targets) = torch.randn(3, 6, 5), arguments()
    results, weights = [], None
    for joint, linear in names:
        hparams = load_hyperpyyaml(text.format(joint=joint, linear=linear))
        modules = {name: hparams[name] for name in ("enc", "dec", "transducer_lin")}
        model = torch.nn.ModuleDict(modules)
        if weights is None:
            weights = model.state_dict()
        model.load_state_dict(weights)
        x = hparams["enc"](features)
        with_bos = torch.nn.functional.pad(targets, (1, 0))
        h, _ = hparams["dec"](hparams["emb"](with_bos))
        logits = hparams["transducer_lin"](hparams["Tjoint"](x.unsqueeze(2), h.unsqueeze(1)))
        loss = hparams["transducer_cost"](logits, targets, *RELATIVE)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            hypotheses = hparams["Greedysearcher"](x)[0]
        results.append((loss, gradients, hypotheses))
    assert isinstance(logits, JointInputs) and any(map(len, results[0][2]))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=0)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-4, atol=1e-5)
    assert results[1][2] == results[0][2]


def test_bad_arguments():
    for options, message in (
        ({}, r"nonlinearity: expected one of .*, got LeakyReLU"),
        ({"nonlinearity": functools.partial(torch.nn.PReLU)}, "nonlinearity: .*PReLU"),
        ({"nonlinearity": functools.partial(torch.nn.GELU, "tanh")}, "nonlinearity: .*GELU"),
        ({"joint": "concat"}, r"joint: expected one of \('sum',\), got 'concat'"),
        ({"joint_network": torch.nn.Tanh()}, "joint_network: expected null, got Tanh"),
    ):
        with pytest.raises(ValueError, match=message):
            ours.Transducer_joint(**options)
    with pytest.raises(ValueError, match="input_size: expected an int, or input_shape"):
        ours.Linear(3)
    output = ours.Linear(3, input_shape=[None, None, 4])
    assert output.w.in_features == 4
    output.w = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"w: expected a plain torch.nn.Linear, got Identity"):
        output(JointInputs(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4), "tanh"))
    with pytest.raises(ValueError, match=r"reduction: .*'batchmean'"):
        ours.TransducerLoss(reduction="batchmean")
    logits, targets = arguments()
    with pytest.raises(TypeError, match=r"input_lens and target_lens: expected a torch.Tensor"):
        ours.transducer_loss(logits, targets, 1.0, RELATIVE[1], 0)
