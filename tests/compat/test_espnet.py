# SPDX-License-Identifier: Apache-2.0
"""The adapters of ESPnet: its models, with torchaudio's loss in the place of warp-transducer."""

import copy
import pickle
import sys

import pytest
import torch

pytest.importorskip("torchaudio", exc_type=ImportError)
pytest.importorskip("espnet2.asr_transducer.espnet_transducer_model", exc_type=ImportError)

import torchaudio
from espnet2.asr_transducer.activation import get_activation
from espnet2.asr_transducer.decoder.stateless_decoder import StatelessDecoder
from espnet2.asr_transducer.encoder.encoder import Encoder
from espnet2.asr_transducer.espnet_transducer_model import ESPnetASRTransducerModel
from espnet2.asr_transducer.joint_network import JointNetwork

from transducer_toolkit.compat import espnet as ours
from transducer_toolkit.compat import warprnnt_pytorch
from transducer_toolkit.compat.common import JointInputs
from transducer_toolkit.ops.native import ACTIVATIONS

TOKENS = ["<blank>", "<unk>", *"abcdefg", "<sos/eos>"]


class TorchaudioLoss(torch.nn.Module):
    """What warprnnt_pytorch.RNNTLoss(reduction="mean") computes: the mean over utterances."""

    def forward(self, acts, labels, act_lens, label_lens):
        tensors = acts, labels, act_lens, label_lens
        return torchaudio.functional.rnnt_loss(*tensors, blank=0)


@pytest.fixture(autouse=True)
def _warprnnt_pytorch(monkeypatch):
    monkeypatch.setitem(sys.modules, "warprnnt_pytorch", warprnnt_pytorch)


def transducer_model(activation="tanh", **options):
    torch.manual_seed(0)
    block = {
        "block_type": "conformer",
        "hidden_size": 16,
        "linear_size": 16,
        "conv_mod_kernel_size": 3,
        "heads": 2,
    }
    encoder = Encoder(8, [block], {"conv_size": 8})
    decoder = StatelessDecoder(len(TOKENS), embed_size=12)
    joint = JointNetwork(len(TOKENS), encoder.output_size, decoder.output_size, 16, activation)
    return ESPnetASRTransducerModel(
        len(TOKENS), TOKENS, None, None, None, encoder, decoder, joint, **options
    )


def asr_model(tokens=TOKENS, **options):
    """The other class of transducers, from whose task a search of another kind comes."""
    from espnet2.asr.ctc import CTC
    from espnet2.asr.decoder.transducer_decoder import TransducerDecoder
    from espnet2.asr.encoder.rnn_encoder import RNNEncoder
    from espnet2.asr.espnet_model import ESPnetASRModel

    torch.manual_seed(0)
    encoder = RNNEncoder(8, hidden_size=16, output_size=16, num_layers=1, subsample=None)
    decoder = TransducerDecoder(len(tokens), hidden_size=12, embed_pad=0)
    joint = JointNetwork(len(tokens), 16, 12, 16)
    ctc = CTC(len(tokens), 16)
    parts = None, None, None, None, encoder, None, decoder, ctc, joint
    return ESPnetASRModel(len(tokens), tokens, *parts, ctc_weight=0.0, **options)


def batch():
    generator = torch.Generator().manual_seed(0)
    return {
        "speech": torch.randn(3, 40, 8, generator=generator),
        "speech_lengths": torch.tensor([40, 36, 32]),
        "text": torch.tensor([[4, 2, 3, 4], [8, 2, 7, -1], [5, 6, -1, -1]]),
        "text_lengths": torch.tensor([4, 3, 2]),
    }


def step(model):
    model.zero_grad()
    loss, stats, weight = model(**batch())
    loss.sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return loss, stats, weight, gradients


@pytest.mark.parametrize("make", [transducer_model, asr_model])
def test_a_step_is_that_of_torchaudio(make, monkeypatch):
    model = make()
    model.criterion_transducer = TorchaudioLoss()
    theirs = step(model)
    for fused in (False, True):
        model.criterion_transducer = (
            None if make is transducer_model else warprnnt_pytorch.RNNTLoss()
        )
        if fused:
            ours.use_fused_loss(model)
            monkeypatch.setattr(JointNetwork, "forward", None)  # nothing may compute logits
        found = step(model)
        torch.testing.assert_close(found[0], theirs[0], rtol=1e-5, atol=0)
        torch.testing.assert_close(found[3], theirs[3], rtol=1e-4, atol=1e-5)
        assert found[1].keys() == theirs[1].keys() and found[2] == theirs[2]
    assert len(found[3]) > 6


def test_autocast():
    model = transducer_model()
    expected = step(model)[0]
    ours.use_fused_loss(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss, *_ = model(**batch())
    assert loss.dtype == torch.float32 and loss != expected
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0)


def test_fastemit_of_the_config():
    model = transducer_model(fastemit_lambda=0.5)
    expected = step(model)
    ours.use_fused_loss(model)
    found = step(model)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(found[3], expected[3], rtol=1e-4, atol=1e-5)
    plain = transducer_model()
    assert not torch.allclose(
        step(plain)[3]["joint_network.lin_out.bias"], found[3]["joint_network.lin_out.bias"]
    )


def test_multi_blank():
    pytest.importorskip("numba")
    tokens = ["<blank4>", "<blank2>", *TOKENS]
    options = {"transducer_multi_blank_durations": [2, 4], "transducer_multi_blank_sigma": 0.1}
    model = asr_model(tokens, **options)
    encoded, decoded = torch.randn(2, 9, 16), torch.randn(2, 3, 12)
    indices = torch.tensor([[4, 5], [6, 0]]), torch.tensor([9, 7]), torch.tensor([2, 1])
    logits = model.joint_network(encoded[:, :, None], decoded[:, None])
    loss = warprnnt_pytorch.RNNTLoss(2, big_blank_durations=[2, 4], sigma=0.1)
    ours.use_fused_loss(model)
    joint = model.joint_network(encoded[:, :, None], decoded[:, None])
    found = model.criterion_transducer(joint, *indices)
    torch.testing.assert_close(found, loss(logits, *indices), rtol=1e-5, atol=0)
    assert found != warprnnt_pytorch.RNNTLoss(2)(logits, *indices)


@pytest.mark.parametrize("make", [transducer_model, asr_model])
def test_searches_get_logits(make):
    model = make(report_cer=True, report_wer=True).eval()
    with torch.no_grad():
        _, theirs, _ = model(**batch())
        ours.use_fused_loss(model)
        _, found, _ = model(**batch())
    assert theirs["cer_transducer"] is not None
    for name in ("cer_transducer", "wer_transducer"):
        assert found[name] == theirs[name]


def test_shapes_of_the_joint_network():
    model = transducer_model()
    joint, enc, pred = model.joint_network, torch.randn(2, 5, 16), torch.randn(2, 4, 12)
    calls = [  # frames of a search, a single cell, a band
        ((enc[0], pred[0, :1]), {}),
        ((enc[:, :1, None], pred[:, None, :1]), {}),
        ((torch.randn(2, 5, 3, 16), torch.randn(2, 5, 3, 16)), {"no_projection": True}),
    ]
    expected = [joint(*arguments, **options) for arguments, options in calls]
    logits = joint(enc[:, :, None], pred[:, None])
    ours.use_fused_loss(model)
    for (arguments, options), tensor in zip(calls, expected, strict=True):
        assert torch.equal(joint(*arguments, **options), tensor)
    made = joint(enc[:, :, None], pred[:, None])
    assert isinstance(made, JointInputs) and made.float() is made
    hidden = (made.enc[:, :, None] + made.pred[:, None]).tanh()
    torch.testing.assert_close(hidden @ made.weight.T + made.bias, logits)


def test_one_frame_without_labels():
    loss = warprnnt_pytorch.RNNTLoss()
    model = transducer_model()
    ours.use_fused_loss(model)
    logits = model.joint_network(torch.randn(2, 1, 1, 16), torch.randn(2, 1, 1, 12))
    lengths = torch.ones(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    found = loss(logits, torch.zeros(2, 0, dtype=torch.int64), *lengths)
    torch.testing.assert_close(found, -logits.log_softmax(-1)[..., 0].mean())


@pytest.mark.parametrize("name", ["relu", "tanh", "swish", "identity"])
def test_activations(name):
    model = transducer_model(name)
    model.criterion_transducer = TorchaudioLoss()
    theirs = step(model)[0]
    ours.use_fused_loss(model)
    torch.testing.assert_close(step(model)[0], theirs, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("hardtanh", {}),
        ("leaky_relu", {}),
        ("mish", {}),
        ("selu", {}),
        ("smish", {}),
        ("ftswish", {}),
        ("swish", {"swish_beta": 1.1}),
    ],
)
def test_other_activations_are_refused(name, options):
    model = transducer_model()
    model.joint_network.joint_activation = get_activation(name, **options)
    with pytest.raises(
        ValueError, match=f"joint_activation_type: expected one of .*{ACTIVATIONS[0]}"
    ):
        ours.use_fused_loss(model)


def test_copies_and_state_dicts():
    model = transducer_model()
    names = list(model.state_dict())
    ours.use_fused_loss(model)
    ours.use_fused_loss(model, precision="full")  # a second call changes options
    assert model.criterion_transducer.fused_options["precision"] == "full"
    assert list(model.state_dict()) == names
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    expected = step(model)[0]
    for other in copies:
        assert torch.equal(step(other)[0], expected)


def test_bad_models():
    with pytest.raises(TypeError, match=r"model.joint_network: expected espnet2.* got NoneType"):
        ours.use_fused_loss(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="use_k2_pruned_loss: expected false, got true"):
        ours.use_fused_loss(transducer_model(use_k2_pruned_loss=True))
    model = transducer_model()
    model.joint_network.lin_out = torch.nn.Bilinear(2, 2, 2)
    with pytest.raises(ValueError, match=r"lin_out: expected a plain .*Linear, got Bilinear"):
        ours.use_fused_loss(model)
    with pytest.raises(ValueError, match="precision"):
        ours.use_fused_loss(transducer_model(), precision="half")
