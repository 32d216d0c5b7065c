# SPDX-License-Identifier: Apache-2.0
"""The adapters of NeMo against NeMo's own losses on the CPU."""

import copy
import pickle
import random

import pytest
import torch

pytest.importorskip("nemo.collections.asr", exc_type=ImportError)

from lightning.pytorch import Callback, Trainer
from nemo.collections.asr.losses.rnnt import RNNTLoss as NemoLoss
from nemo.collections.asr.losses.rnnt_pytorch import MultiblankRNNTLossPytorch, TDTLossPytorch
from nemo.collections.asr.models import EncDecHybridRNNTCTCModel, EncDecRNNTModel
from nemo.collections.asr.modules import HATJoint, RNNTJoint
from omegaconf import DictConfig

from tests.compat.recorded import BLANK, DURATIONS, LENGTHS, logits, targets
from transducer_toolkit.compat import nemo as ours

LABELS = list("abcdefgh")


def call(loss, acts, labels=None):
    """Call a loss as the models of NeMo do; returns its value and the gradient of its sum."""
    names = "log_probs", "targets", "input_lengths", "target_lengths"
    tensors = acts, targets() if labels is None else labels, *LENGTHS
    value = loss(**dict(zip(names, tensors, strict=True)))
    return value, torch.autograd.grad(value.sum(), acts)[0]


@pytest.mark.parametrize("reduction", [None, "mean_batch", "mean_volume", "mean", "sum"])
@pytest.mark.parametrize("name", ["default", "warprnnt_numba", "pytorch"])
def test_rnnt_loss(name, reduction):
    acts = logits()
    theirs = call(NemoLoss(BLANK, reduction, name), acts)
    torch.testing.assert_close(call(ours.RNNTLoss(BLANK, reduction, name), acts), theirs)


def test_fastemit_has_their_gradient_and_reports_the_loss_itself():
    acts, options = logits(), {"fastemit_lambda": 0.3}
    value, gradient = call(NemoLoss(BLANK, loss_kwargs=dict(options)), acts)
    mine = call(ours.RNNTLoss(BLANK, loss_kwargs=options), acts)
    torch.testing.assert_close(mine, (value / 1.3, gradient))


def test_clamp():
    acts, options = logits(), {"clamp": 0.05}
    theirs = call(NemoLoss(BLANK, "sum", loss_kwargs=dict(options)), acts)
    mine = call(ours.RNNTLoss(BLANK, "sum", loss_kwargs=options), acts)
    torch.testing.assert_close(mine, theirs)
    assert theirs[1].max() == torch.tensor(0.05)
    # NeMo's kernels clamp before the reduction, and so does torchaudio. NeMo's CPU path clamps
    # behind it, which changes the result for a mean.
    mean = call(ours.RNNTLoss(BLANK, "mean_batch", loss_kwargs=options), acts)[1]
    torch.testing.assert_close(mean, theirs[1] / 3)


@pytest.mark.parametrize("sigma", [0.0, 0.05])
@pytest.mark.parametrize("durations", [DURATIONS, [1, 2, 3]])
def test_tdt_loss(durations, sigma, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)  # theirs moves to a GPU
    acts, options = logits(len(durations)), {"durations": durations, "sigma": sigma}
    for reduction in ("mean_batch", "mean_volume", "mean", "sum", None):
        theirs = call(NemoLoss(BLANK, reduction, "tdt_pytorch", dict(options)), acts)
        for name in ("tdt", "tdt_pytorch"):
            mine = call(ours.RNNTLoss(BLANK, reduction, name, DictConfig(options)), acts)
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sigma", [0.0, 0.1])
def test_multi_blank_loss(sigma):
    acts, labels = logits(), targets(BLANK - 2)
    options = {"big_blank_durations": [2, 4], "sigma": sigma}
    reference = MultiblankRNNTLossPytorch(BLANK, [2, 4], "mean_volume", sigma)
    value = reference(acts=acts, labels=labels, act_lens=LENGTHS[0], label_lens=LENGTHS[1])
    theirs = value, torch.autograd.grad(value, acts)[0]
    for name in ("multiblank_rnnt", "multiblank_rnnt_pytorch"):
        mine = call(ours.RNNTLoss(BLANK, "mean_volume", name, options), acts, labels)
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_omega_takes_the_rnnt_loss_with_its_probability():
    acts, options = logits(len(DURATIONS)), {"durations": DURATIONS, "sigma": 0.05}
    tdt = call(ours.RNNTLoss(BLANK, "sum", "tdt", options), acts)
    tokens = acts.detach()[..., : BLANK + 1].requires_grad_()
    rnnt = call(NemoLoss(BLANK, "sum"), tokens)
    always = call(ours.RNNTLoss(BLANK, "sum", "tdt", {**options, "omega": 1.0}), acts)
    torch.testing.assert_close(always[0], rnnt[0])
    torch.testing.assert_close(always[1][..., : BLANK + 1], rnnt[1])
    assert always[1][..., BLANK + 1 :].count_nonzero() == 0
    random.seed(0)
    sampled = ours.RNNTLoss(BLANK, "sum", "tdt", {**options, "omega": 0.3})
    counts = [bool(call(sampled, acts)[0] == tdt[0]) for _ in range(200)]
    random.seed(0)
    assert counts == [random.uniform(0, 1) >= 0.3 for _ in range(200)]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"loss_name": "graph_rnnt"}, ValueError, "loss_name: expected one of default, .*graph"),
        ({"reduction": "average"}, ValueError, "reduction: expected one of mean_volume"),
        ({"loss_kwargs": {"sigma": 0.1}}, ValueError, "loss_kwargs: .*fastemit_lambda.*'sigma'"),
        ({"loss_name": "tdt"}, ValueError, "durations"),
        ({"loss_name": "multiblank_rnnt"}, ValueError, "big_blank_durations"),
        (
            {"loss_name": "tdt", "loss_kwargs": {"durations": [0, 1], "omega": 2}},
            ValueError,
            "omega: expected a number in",
        ),
        ({"loss_kwargs": {"clamp": "1"}}, TypeError, "clamp"),
    ],
)
def test_bad_options_of_the_loss(arguments, error, message):
    with pytest.raises(error, match=message):
        ours.RNNTLoss(BLANK, **arguments)


# A whole model, small enough for a test.

LOSS_CONFIGS = {
    "rnnt": {"loss_name": "default", "warprnnt_numba_kwargs": {"fastemit_lambda": 0.0}},
    "tdt": {"loss_name": "tdt", "tdt_kwargs": {"durations": DURATIONS, "sigma": 0.05}},
    "multi_blank": {
        "loss_name": "multiblank_rnnt",
        "multiblank_rnnt_kwargs": {"big_blank_durations": [2, 4], "sigma": 0.05},
    },
}
NUM_EXTRA = {"rnnt": 0, "tdt": len(DURATIONS), "multi_blank": 2}


def config(kind="rnnt", joint=None, activation="relu", dropout=0.0, **options):
    return DictConfig(
        {
            "labels": LABELS,
            "sample_rate": 16000,
            "model_defaults": {"enc_hidden": 16, "pred_hidden": 12},
            "preprocessor": {
                "_target_": "nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor",
                "features": 16,
                "dither": 0.0,
                "pad_to": 0,
            },
            "encoder": {
                "_target_": "nemo.collections.asr.modules.ConformerEncoder",
                "feat_in": 16,
                "n_layers": 1,
                "d_model": 16,
                "n_heads": 2,
                "subsampling_factor": 4,
                "subsampling_conv_channels": 4,
                "dropout": 0.0,
                "dropout_pre_encoder": 0.0,
                "dropout_emb": 0.0,
                "dropout_att": 0.0,
            },
            "decoder": {
                "_target_": "nemo.collections.asr.modules.RNNTDecoder",
                "prednet": {"pred_hidden": 12, "pred_rnn_layers": 1},
            },
            "joint": {
                "_target_": "nemo.collections.asr.modules.RNNTJoint",
                "num_extra_outputs": NUM_EXTRA[kind],
                "jointnet": {"joint_hidden": 16, "activation": activation, "dropout": dropout},
                **(joint or {}),
            },
            "decoding": {
                "strategy": "greedy_batch",
                "greedy": {"max_symbols": 3},
                "model_type": "tdt" if kind == "tdt" else "rnnt",
                "durations": [],
                "big_blank_durations": [],
            },
            "loss": LOSS_CONFIGS[kind],
            "optim": {"name": "sgd", "lr": 0.01},
            **options,
        }
    )


def small_model(kind="rnnt", **options):
    torch.manual_seed(0)
    return EncDecRNNTModel(config(kind, **options))


def batches(count=1):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([16000, 12000]), torch.tensor([5, 3])
    return [
        (
            torch.randn(2, 16000, generator=generator),
            lengths[0],
            torch.randint(0, BLANK, (2, 5), generator=generator),
            lengths[1],
        )
        for _ in range(count)
    ]


class Losses(Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, module, outputs, *args):
        self.values.append(float(outputs["loss"]))


def train(model, steps=3, **options):
    losses = Losses()
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[losses],
        **options,
    )
    loader = torch.utils.data.DataLoader(batches(steps), batch_size=None)
    trainer.fit(model, train_dataloaders=loader)
    return losses.values


def fused_model(kind="rnnt", **options):
    model = small_model(kind, **options)
    ours.use_fused_loss(model)
    return model


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_training_takes_the_same_steps(activation, monkeypatch):
    theirs = train(small_model(activation=activation))
    model = fused_model(activation=activation)

    def refuse(*arguments):
        raise AssertionError("the joint network computed logits")

    monkeypatch.setattr(RNNTJoint, "joint_after_projection", refuse)
    found = train(model, log_every_n_steps=100)  # a WER would need logits of single cells
    assert len(found) == 3 and found == pytest.approx(theirs, rel=1e-5)
    assert found[-1] < found[0]


def test_hybrid_model_with_ctc():
    aux_ctc = {
        "ctc_loss_weight": 0.3,
        "decoder": {
            "_target_": "nemo.collections.asr.modules.ConvASRDecoder",
            "feat_in": 16,
            "num_classes": BLANK,
            "vocabulary": LABELS,
        },
        "decoding": {"strategy": "greedy"},
    }
    results = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = EncDecHybridRNNTCTCModel(config(aux_ctc=aux_ctc))
        if fused:
            ours.use_fused_loss(model)
        results.append(train(model))
    assert results[1] == pytest.approx(results[0], rel=1e-5)


def test_tdt_and_multi_blank_train_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    for kind in ("tdt", "multi_blank"):
        model = fused_model(kind)
        options = {**LOSS_CONFIGS[kind][f"{LOSS_CONFIGS[kind]['loss_name']}_kwargs"]}
        signal, signal_lengths, labels, label_lengths = batches()[0]
        encoded, lengths = model.forward(input_signal=signal, input_signal_length=signal_lengths)
        decoded, _, _ = model.decoder(targets=labels, target_length=label_lengths)
        inputs = {"encoder_outputs": encoded, "decoder_outputs": decoded}
        loss, *_ = model.joint(
            **inputs,
            encoder_lengths=lengths,
            transcripts=labels,
            transcript_lengths=label_lengths,
        )
        joint = small_model(kind).joint
        joint.load_state_dict(model.joint.state_dict())
        acts = joint(**inputs)
        reference = TDTLossPytorch if kind == "tdt" else MultiblankRNNTLossPytorch
        blank = BLANK if kind == "tdt" else BLANK + 2
        theirs = reference(blank=blank, reduction="mean_batch", **options)(
            acts=acts, labels=labels, act_lens=lengths, label_lens=label_lengths
        )
        torch.testing.assert_close(loss, theirs, rtol=1e-5, atol=1e-5)
        assert train(model)[-1] < loss.item()


def test_fused_omega_takes_the_rnnt_loss():
    joint = ours.JointInputs(
        torch.randn(3, 9, 8), torch.randn(3, 5, 8), "relu", torch.randn(13, 8), torch.randn(13)
    )
    hidden = (joint.enc[:, :, None] + joint.pred[:, None]).relu()
    acts = (hidden @ joint.weight.T + joint.bias).requires_grad_()
    for omega in (0.0, 1.0):
        options = {"durations": DURATIONS, "sigma": 0.05, "omega": omega}
        loss = ours.RNNTLoss(BLANK, "mean_volume", "tdt", options)
        torch.testing.assert_close(loss.fused(joint, targets(), *LENGTHS), call(loss, acts)[0])


def test_wer_and_hypotheses_are_theirs():
    inputs = {"compute_wer": True, "keep_hypotheses": True}
    results = []
    joint = {"fuse_loss_wer": True, "fused_batch_size": 1}
    for make in (small_model, fused_model):
        model = make(joint=joint).eval()
        signal, signal_lengths, labels, label_lengths = batches()[0]
        encoded, lengths = model.forward(input_signal=signal, input_signal_length=signal_lengths)
        decoded, _, _ = model.decoder(targets=labels, target_length=label_lengths)
        loss, *wers = model.joint(
            encoder_outputs=encoded,
            decoder_outputs=decoded,
            encoder_lengths=lengths,
            transcripts=labels,
            transcript_lengths=label_lengths,
            **inputs,
        )
        results.append((loss, *(w.float() for w in wers)))
        assert len(model.joint.get_hypotheses()) == 2
        none, *again = model.joint(  # as a validation with compute_eval_loss=False
            encoder_outputs=encoded,
            decoder_outputs=None,
            encoder_lengths=lengths,
            transcripts=labels,
            transcript_lengths=label_lengths,
            **inputs,
        )
        assert none is None and [float(w) for w in again] == [float(w) for w in wers]
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=0)


def test_masking_of_hainan():
    model = small_model(joint={"masking_prob": 0.5})
    encoded, decoded = torch.randn(2, 16, 6), torch.randn(2, 12, 4)
    labels, lengths = torch.randint(0, BLANK, (2, 3)), (torch.tensor([6, 5]), torch.tensor([3, 2]))
    torch.manual_seed(1)
    acts = model.joint(encoder_outputs=encoded, decoder_outputs=decoded)
    theirs = model.loss(
        log_probs=acts, targets=labels, input_lengths=lengths[0], target_lengths=lengths[1]
    )
    ours.use_fused_loss(model)
    torch.manual_seed(1)
    loss, *_ = model.joint(
        encoder_outputs=encoded,
        decoder_outputs=decoded,
        encoder_lengths=lengths[0],
        transcripts=labels,
        transcript_lengths=lengths[1],
    )
    torch.testing.assert_close(loss, theirs, rtol=1e-5, atol=0)


def test_transcription_checkpoints_and_copies(tmp_path):
    model = small_model()
    encoded, lengths = torch.randn(2, 16, 12), torch.tensor([12, 9])
    texts = [h.text for h in model.decoding.rnnt_decoder_predictions_tensor(encoded, lengths)]
    ours.use_fused_loss(model)
    assert texts == [
        h.text for h in model.decoding.rnnt_decoder_predictions_tensor(encoded, lengths)
    ]
    model.save_to(str(tmp_path / "model.nemo"))
    restored = EncDecRNNTModel.restore_from(str(tmp_path / "model.nemo"))
    assert type(restored.joint) is RNNTJoint and type(restored.loss) is NemoLoss
    copied = copy.deepcopy(model.joint)
    copied.set_wer(None)  # which pickle cannot take
    for joint in (copied, pickle.loads(pickle.dumps(copied))):
        assert type(joint) is type(model.joint) is not RNNTJoint
        assert joint.joint_net[-1].weight.equal(model.joint.joint_net[-1].weight)


def test_calls_may_be_repeated():
    model = fused_model()
    assert model.joint.fused_batch_size > 1000
    model.change_decoding_strategy(DictConfig({"strategy": "greedy_batch", "fused_batch_size": -1}))
    assert not model.joint.fuse_loss_wer  # NeMo switches it off
    ours.use_fused_loss(model, precision="full")
    assert model.joint.fuse_loss_wer and model.joint.loss.fused_options["precision"] == "full"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"dropout": 0.2},
            r"joint_net\[1\]: expected dropout 0, got 0.2.*jointnet.dropout=0",
        ),
        ({"activation": "sigmoid"}, "joint.jointnet.activation: expected one of .* got Sigmoid"),
    ],
)
def test_joint_networks_that_cannot_be_fused(options, message):
    with pytest.raises(ValueError, match=message):
        ours.use_fused_loss(small_model(**options))


def test_bad_models():
    with pytest.raises(TypeError, match=r"model.joint: expected nemo.*RNNTJoint, got NoneType"):
        ours.use_fused_loss(torch.nn.Linear(2, 2))
    model = small_model()
    model.joint = HATJoint(
        {"encoder_hidden": 4, "pred_hidden": 4, "joint_hidden": 4, "activation": "tanh"}, 3
    )
    with pytest.raises(TypeError, match="got HATJoint"):
        ours.use_fused_loss(model)
    model = small_model()
    model.loss = torch.nn.CTCLoss()
    with pytest.raises(ValueError, match=r"loss: expected NeMo's RNNTLoss .* got CTCLoss"):
        ours.use_fused_loss(model)
    for name, value, message in (
        ("temperature", 2.0, "joint.temperature: expected 1, got 2.0"),
        ("is_adapter_available", lambda: True, "joint: expected no adapter"),
    ):
        model = small_model()
        setattr(model.joint, name, value)
        with pytest.raises(ValueError, match=message):
            ours.use_fused_loss(model)
    model = small_model()
    model.joint.joint_net[-1] = torch.nn.Bilinear(2, 2, 2)
    with pytest.raises(ValueError, match=r"expected a plain torch.nn.Linear, got Bilinear"):
        ours.use_fused_loss(model)
    with pytest.raises(ValueError, match="precision"):
        ours.use_fused_loss(small_model(), precision="half")


def test_a_step_without_labels_names_them():
    tensors = {"encoder_outputs": torch.randn(1, 16, 2), "decoder_outputs": torch.randn(1, 12, 2)}
    with pytest.raises(ValueError, match=r"transcripts, .*: expected tensors, .* got None"):
        fused_model().joint(**tensors)
