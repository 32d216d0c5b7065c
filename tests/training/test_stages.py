# SPDX-License-Identifier: Apache-2.0
import sys
import time

import pytest
import torch
from torch.nn.utils import prune

from transducer_toolkit import LatticeShape
from transducer_toolkit.losses.reference import reference_loss
from transducer_toolkit.modules import (
    AdditiveJoiner,
    ConvLstmEncoder,
    Joiner,
    StatelessPredictor,
    Transducer,
)
from transducer_toolkit.ops.logits_loss import LogitsInputs, logits_loss
from transducer_toolkit.ops.options import LossOptions
from transducer_toolkit.ops.topology import K2_TOPOLOGIES, TOPOLOGIES
from transducer_toolkit.training import stages
from transducer_toolkit.training.callbacks.clock import StepClock
from transducer_toolkit.training.stages import LossInput

RNNT_TYPES = tuple(K2_TOPOLOGIES)


@pytest.fixture
def batch():
    torch.manual_seed(0)
    # T beyond the longest length: the encoder pads its input; garbage in the targets' padding.
    encoder_out = torch.randn(3, 6, 8, requires_grad=True)
    predictor_out = torch.randn(3, 4, 6, requires_grad=True)
    targets = torch.tensor([[1, 4, 2], [6, -1, -1], [-1, -1, -1]])
    shape = LatticeShape.from_lengths([5, 4, 2], [3, 1, 0])
    return LossInput(Joiner(8, 6, 16, 7), encoder_out, predictor_out, targets, shape)


def run(stage, batch):
    losses = stage(batch).losses
    leaves = [batch.encoder_out, batch.predictor_out, *batch.joiner.parameters()]
    return losses, torch.autograd.grad(losses.sum(), leaves, retain_graph=True)


def check_same(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual[0], expected[0], rtol=tolerance, atol=tolerance)
    for grad, wanted in zip(actual[1], expected[1], strict=True):
        torch.testing.assert_close(grad, wanted, rtol=10 * tolerance, atol=10 * tolerance)


def test_all_exact_stages_agree_with_torchaudio(batch):
    pytest.importorskip("torchaudio")
    yardstick = run(stages.TorchaudioLoss(blank=0), batch)
    assert yardstick[0].shape == (3,)
    for stage in (stages.PackedLoss(), stages.FullLoss(), stages.FusedLoss()):
        check_same(run(stage, batch), yardstick)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_stages_pass_their_options_on(batch, topology):
    options = {"fastemit_lambda": 0.5, "delay_penalty": 0.1}
    clamped = options | {"clamp": 0.01}

    def expected(**options):
        shape = batch.shape
        logits = batch.joiner(batch.encoder_out, batch.predictor_out, shape)
        inputs = LogitsInputs(logits, batch.targets, *shape.lengths)
        losses = logits_loss(inputs, LossOptions(0, topology, **options)).losses
        leaves = [batch.encoder_out, batch.predictor_out, *batch.joiner.parameters()]
        return losses, torch.autograd.grad(losses.sum(), leaves)

    for stage_class in (stages.PackedLoss, stages.FusedLoss):
        stage = stage_class(topology=topology, **clamped)
        assert stage.topology == topology
        check_same(run(stage, batch), expected(**clamped))
    if topology in RNNT_TYPES:
        check_same(run(stages.FullLoss(topology=topology, **options), batch), expected(**options))
    with pytest.raises(ValueError, match="topology: expected one of"):
        stages.PackedLoss(topology="free")


@pytest.mark.parametrize("topology", RNNT_TYPES)
def test_simple_loss_is_the_loss_of_the_additive_joiner(batch, topology):
    batch = batch._replace(joiner=AdditiveJoiner(8, 6, 7))
    packed = run(stages.PackedLoss(topology=topology, delay_penalty=0.1), batch)
    simple = stages.SimpleLoss(topology=topology, delay_penalty=0.1)
    check_same(run(simple, batch), packed)
    smoothed = stages.SmoothedLoss(topology=topology, lm_only_scale=0.3, am_only_scale=0.2)
    assert not torch.allclose(run(smoothed, batch)[0], packed[0])
    with pytest.raises(TypeError, match="expected an AdditiveJoiner for SimpleLoss, got Joiner"):
        simple(batch._replace(joiner=Joiner(8, 6, 16, 7)))


def test_additive_joiner_forms_agree(batch):
    joiner = AdditiveJoiner(8, 6, 7)
    packed = joiner(batch.encoder_out, batch.predictor_out, batch.shape)
    padded = joiner.padded(batch.encoder_out, batch.predictor_out)
    torch.testing.assert_close(packed, batch.shape.pack(padded))
    step = joiner.step(batch.encoder_out[:, 2], batch.predictor_out[:, 1])
    torch.testing.assert_close(step, padded[:, 2, 1])


@pytest.mark.parametrize("topology", RNNT_TYPES)
@pytest.mark.parametrize("method", ["greedy", "optimal"])
def test_pruned_stages(batch, topology, method):
    options = {"topology": topology, "method": method, "delay_penalty": 0.1,
               "fastemit_lambda": 0.2, "simple_joiner": AdditiveJoiner(8, 6, 7)}  # fmt: skip
    wide = stages.PrunedLoss(prune_range=9, **options)  # every symbol: the full loss
    full = stages.FullLoss(topology=topology, delay_penalty=0.1, fastemit_lambda=0.2)
    smoothed = stages.SmoothedLoss(
        topology=topology, lm_only_scale=0.25, am_only_scale=0.0, delay_penalty=0.1
    )
    simple = smoothed(batch._replace(joiner=wide.simple_joiner)).losses
    torch.testing.assert_close(wide(batch).losses, 0.5 * simple + full(batch).losses)

    narrow = stages.PrunedLoss(prune_range=2, **options)
    fused = stages.FusedPrunedLoss(prune_range=2, dropped_mass=0.0, **options)
    check_same(run(fused, batch), run(narrow, batch))
    assert (narrow(batch).losses >= 0.5 * simple + full(batch).losses - 1e-5).all()
    metrics = fused(batch).metrics
    assert metrics["kept"] <= 1 and metrics["pruned_loss"] > 0
    grads = torch.autograd.grad(
        fused(batch).losses.sum(), [*fused.parameters(), *batch.joiner.parameters()]
    )
    assert all(grad.abs().sum() > 0 for grad in grads)


def test_schedule_of_the_pruned_stage(batch):
    stage = stages.PrunedLoss(simple_joiner=AdditiveJoiner(8, 6, 7))
    scales = []
    for step, num_steps in ((0, 1000), (100, 1000), (200, 1000), (900, 1000), (1000, 10**6)):
        stage.set_progress(step, num_steps)
        scales.append(stage.scales())
    assert scales == [(1.0, 0.1), (0.75, 0.55), (0.5, 1.0), (0.5, 1.0), (0.75, 0.55)]
    with pytest.raises(ValueError, match="simple_joiner: expected an AdditiveJoiner"):
        stages.PrunedLoss()(batch)
    additive = batch._replace(joiner=AdditiveJoiner(8, 6, 7))
    with pytest.raises(TypeError, match=r"joiner: expected a Joiner .* for PrunedLoss"):
        stage(additive)


@pytest.mark.parametrize(
    "kind", ["PackedLoss", "FullLoss", "FusedLoss", "PrunedLoss", "FusedPrunedLoss", "SimpleLoss"]
)
def test_delay_penalty_begins_after_the_warm_up(batch, kind):
    def make(**options):
        if "Pruned" in kind:
            torch.manual_seed(0)
            options["simple_joiner"] = AdditiveJoiner(8, 6, 7)
        return getattr(stages, kind)(**options)

    torch.manual_seed(0)
    joiner = AdditiveJoiner(8, 6, 7) if kind == "SimpleLoss" else batch.joiner
    inputs = batch._replace(joiner=joiner)
    plain, delayed = make(), make(delay_penalty=0.3)
    for step, is_penalised in ((0, False), (199, False), (200, True), (1000, True)):
        plain.set_progress(step, 1000)
        delayed.set_progress(step, 1000)
        assert torch.equal(plain(inputs).losses, delayed(inputs).losses) is not is_penalised


def test_padding_never_matters(batch):
    def poisoned(stage):
        encoder_out, predictor_out = batch.encoder_out.clone(), batch.predictor_out.clone()
        encoder_out[1, 4:] = encoder_out[2, 2:] = 1e4
        predictor_out[1, 2:] = predictor_out[2, 1:] = -1e4
        losses = stage(batch._replace(encoder_out=encoder_out, predictor_out=predictor_out)).losses
        return losses, torch.autograd.grad(losses.sum(), list(stage.parameters()))

    joiner = AdditiveJoiner(8, 6, 7)
    for stage in (
        stages.PrunedLoss(simple_joiner=joiner),
        stages.FusedPrunedLoss(simple_joiner=joiner),
    ):
        losses = stage(batch).losses
        actual, grads = poisoned(stage)
        torch.testing.assert_close(actual, losses)
        wanted = torch.autograd.grad(losses.sum(), list(stage.parameters()))
        # The padding of encoder_out meets the weight in Linear itself, outside of the stage: there
        # only a finite padding is promised. The lattice does not see it.
        assert len(grads) == len(wanted)


def test_float64_oracle_of_every_exact_stage(batch):
    joiner = Joiner(8, 6, 16, 7).double()
    double = batch._replace(
        joiner=joiner,
        encoder_out=batch.encoder_out.double(),
        predictor_out=batch.predictor_out.double(),
    )
    logits = joiner.padded(double.encoder_out, double.predictor_out)
    lengths = batch.shape.logit_lengths, batch.shape.target_lengths
    expected = reference_loss(logits, batch.targets, *lengths, blank=0, reduction="none")
    for stage in (stages.PackedLoss(), stages.FullLoss(), stages.FusedLoss()):
        torch.testing.assert_close(stage(double).losses, expected, rtol=0, atol=1e-10)


def test_fused_stages_refuse_an_output_layer_with_code_of_its_own(batch):
    class Scaled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    def with_output(change):
        joiner = Joiner(8, 6, 16, 7)
        change(joiner)
        return joiner

    joiners = [
        with_output(lambda joiner: setattr(joiner, "output", Scaled(16, 7))),
        with_output(lambda joiner: torch.nn.utils.parametrizations.weight_norm(joiner.output)),
        with_output(lambda joiner: prune.l1_unstructured(joiner.output, "weight", 0.5)),
        with_output(lambda joiner: joiner.output.register_forward_hook(lambda m, x, y: 2 * y)),
    ]
    simple_joiner = AdditiveJoiner(8, 6, 7)
    for joiner in joiners:
        odd = batch._replace(joiner=joiner)
        for stage in (stages.FusedLoss(), stages.FusedPrunedLoss(simple_joiner=simple_joiner)):
            with pytest.raises(TypeError, match=r"expected a Joiner with a plain nn\.Linear"):
                stage(odd)
        for _ in range(2):  # packed does what the layer does, as often as it is asked
            packed, full = run(stages.PackedLoss(), odd), run(stages.FullLoss(), odd)
            check_same(packed, full)


def test_stages_that_compute_from_the_layers_refuse_another_formula(batch):
    class Product(Joiner):
        def forward(self, encoder_out, predictor_out, shape):
            return shape.pack(self.padded(encoder_out, predictor_out))

        def padded(self, encoder_out, predictor_out):
            return self.step(encoder_out[:, :, None], predictor_out[:, None])

        def join_projected(self, projected_frames, projected_predictor):
            return self.output((projected_frames * projected_predictor).tanh())

        def internal_lm(self, predictor_out, *, blank=None):
            raise NotImplementedError

    odd = batch._replace(joiner=Product(8, 6, 16, 7))
    check_same(run(stages.PackedLoss(), odd), run(stages.FullLoss(), odd))
    simple_joiner = AdditiveJoiner(8, 6, 7)
    for stage in (
        stages.FusedLoss(),
        stages.PrunedLoss(simple_joiner=simple_joiner),
        stages.FusedPrunedLoss(simple_joiner=simple_joiner),
    ):
        with pytest.raises(TypeError, match="expected a Joiner with unmodified forward"):
            stage(odd)


def test_bound_joiner_is_where_and_what_the_model_is(batch):
    model = Transducer(
        ConvLstmEncoder(hidden_dim=8), StatelessPredictor(7, 6), batch.joiner
    ).double()
    stage = stages.PrunedLoss()
    stage.bind(model)
    assert {parameter.dtype for parameter in stage.parameters()} == {torch.float64}


def test_options_are_checked_at_once():
    for stage_class, options, message in (
        (stages.PrunedLoss, {"prune_range": 0}, "prune_range: expected at least 1, got 0"),
        (stages.PrunedLoss, {"method": "x"}, "method: expected one of"),
        (
            stages.PrunedLoss,
            {"lm_only_scale": -1.0},
            r"lm_only_scale: expected a number in \[0, 1\]",
        ),
        (
            stages.SmoothedLoss,
            {"am_only_scale": 2.0},
            r"am_only_scale: expected a number in \[0, 1\]",
        ),
        (stages.FusedLoss, {"dropped_mass": -1.0}, "dropped_mass: expected"),
        (stages.FusedPrunedLoss, {"dropped_mass": 2.0}, "dropped_mass: expected"),
        (stages.SimpleLoss, {"topology": "one_sym_per_frame"}, "topology: expected one of"),
    ):
        with pytest.raises(ValueError, match=message):
            stage_class(**options)


def test_clock_counts_the_loss_and_not_the_predictor(batch):
    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            time.sleep(0.3)
            return grad

    clock, stage = StepClock(), stages.PackedLoss()
    stage.register_forward_pre_hook(clock._before_loss)
    stage.register_forward_hook(clock._after_loss)
    slow = batch._replace(
        encoder_out=Slow.apply(batch.encoder_out), predictor_out=Slow.apply(batch.predictor_out)
    )
    losses = stage(slow).losses
    clock.on_before_backward()
    losses.sum().backward()
    assert 0 < clock._loss_of_step_s < 0.25


def test_torchaudio_missing_is_said_in_words(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchaudio.functional", None)
    with pytest.raises(ImportError, match="loss=torchaudio needs torchaudio: pip install"):
        stages.TorchaudioLoss()
