# SPDX-License-Identifier: Apache-2.0
import copy
import itertools
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from transducer_toolkit import LatticeShape
from transducer_toolkit.data.dataset import Batch
from transducer_toolkit.data.tokenizer import CharTokenizer
from transducer_toolkit.modules import (
    AdditiveJoiner,
    ConvLstmEncoder,
    Joiner,
    StatelessPredictor,
    Transducer,
)
from transducer_toolkit.training import stages
from transducer_toolkit.training.ctc import CtcLoss
from transducer_toolkit.training.lightning_module import TransducerModule

TOKENIZER = CharTokenizer.from_texts(["ab c"])


def collapse(path, blank):
    """The symbols of a CTC path: repetitions merged, then blanks taken out."""
    return [symbol for symbol, _ in itertools.groupby(path) if symbol != blank]


def loss_by_enumeration(log_probs, target, blank):
    """Minus the logarithm of the summed probability of all paths that collapse to the target."""
    num_frames, vocab_size = log_probs.shape
    scores = [
        sum(log_probs[t, symbol] for t, symbol in enumerate(path))
        for path in itertools.product(range(vocab_size), repeat=num_frames)
        if collapse(path, blank) == target
    ]
    return -torch.stack(scores).logsumexp(0)


@pytest.mark.parametrize("blank", [0, 2])
@pytest.mark.parametrize("padding", [-1, 10**8, 0])
def test_the_value_is_that_of_all_paths(blank, padding):
    symbols = [symbol for symbol in range(3) if symbol != blank]
    targets = [[symbols[0], symbols[0]], [symbols[1]], [], [symbols[1], symbols[0]]]
    shape = LatticeShape.from_lengths([5, 4, 3, 2], [len(target) for target in targets])
    padded = torch.tensor([target + [padding] * (2 - len(target)) for target in targets])
    ctc = CtcLoss(6, 3, weight=0.5, blank=blank).double()
    encoder_out = torch.randn(4, 7, 6, dtype=torch.float64, requires_grad=True)
    losses = ctc(encoder_out, padded, shape)
    for row, target in enumerate(targets):
        log_probs = ctc.output(encoder_out[row, : int(shape.logit_lengths[row])]).log_softmax(-1)
        expected = loss_by_enumeration(log_probs, target, blank)
        torch.testing.assert_close(losses[row], expected, rtol=1e-12, atol=1e-12)
        parameters = (encoder_out, *ctc.parameters())
        actual = torch.autograd.grad(losses[row], parameters, retain_graph=True)
        for one, other in zip(actual, torch.autograd.grad(expected, parameters), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_an_utterance_without_a_path_counts_nothing():
    ctc = CtcLoss(6, 4, weight=1.0)
    encoder_out = torch.randn(3, 3, 6, requires_grad=True)
    targets = torch.tensor([[1, 1, 0], [1, 2, 3], [1, 2, 3]])
    # Two equal symbols need a blank between them; three symbols do not fit into two frames.
    shape = LatticeShape.from_lengths([2, 3, 2], [2, 3, 3])
    losses = ctc(encoder_out, targets, shape)
    assert losses[0] == losses[2] == 0 and losses[1] > 0
    losses.sum().backward()
    assert (encoder_out.grad[[0, 2]] == 0).all() and encoder_out.grad[1].abs().sum() > 0
    assert all(p.grad.isfinite().all() for p in ctc.parameters())


def test_targets_may_all_be_empty():
    ctc = CtcLoss(6, 4, weight=1.0)
    shape = LatticeShape.from_lengths([3, 2], [0, 0])
    encoder_out = torch.randn(2, 3, 6)
    losses = ctc(encoder_out, torch.zeros(2, 0, dtype=torch.int64), shape)
    log_probs = ctc.output(encoder_out).log_softmax(-1)[..., 0]
    expected = -torch.stack([log_probs[0].sum(), log_probs[1, :2].sum()])
    torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_sums_in_float32(dtype):
    ctc = CtcLoss(6, 4, weight=1.0)
    shape = LatticeShape.from_lengths([400, 300], [60, 50])
    encoder_out = torch.randn(2, 400, 6, requires_grad=True)
    targets = torch.randint(1, 4, (2, 60))
    exact = ctc(encoder_out, targets, shape)
    with torch.autocast("cpu", dtype=dtype):
        mixed = ctc(encoder_out, targets, shape)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, exact, rtol=1e-2, atol=0)
    mixed.sum().backward()
    assert encoder_out.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": 0.0}, "weight: expected a positive and finite number, got 0.0"),
        ({"weight": -0.3}, "weight: expected a positive and finite number, got -0.3"),
        ({"weight": float("nan")}, "weight: expected a positive and finite number, got nan"),
        ({"weight": 0.3, "blank": 4}, r"blank: expected an id in \[0, 4\), got 4"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        CtcLoss(6, 4, **options)


STAGES = {
    "packed": stages.PackedLoss(),
    "full": stages.FullLoss(),
    "fused": stages.FusedLoss(),
    "simple": stages.SimpleLoss(),
    "smoothed": stages.SmoothedLoss(),
    "pruned": stages.PrunedLoss(prune_range=2),
    "fused_pruned": stages.FusedPrunedLoss(prune_range=2),
    "torchaudio": stages.TorchaudioLoss(),
}


@pytest.mark.parametrize("name", STAGES)
def test_it_is_added_to_every_loss_stage(name):
    stage = copy.deepcopy(STAGES[name])
    vocab_size = TOKENIZER.vocab_size
    joiner = AdditiveJoiner if stage.joiner_target else partial(Joiner, joiner_dim=8)
    model = Transducer.build(
        ConvLstmEncoder(num_features=20, conv_channels=2, hidden_dim=8, dropout=0.0),
        partial(StatelessPredictor, embedding_dim=4),
        joiner,
        vocab_size=vocab_size,
        blank=TOKENIZER.blank,
    )
    module = TransducerModule(model, TOKENIZER, loss=stage, ctc=CtcLoss(8, vocab_size, weight=0.25))
    module._trainer = SimpleNamespace(
        strategy=SimpleNamespace(reduce=lambda frames, reduce_op: frames),
        accumulate_grad_batches=1,
    )
    logged = {}
    module.log = lambda name, value, **options: logged.update({name: float(value)})
    batch = Batch(
        utterance_ids=["a", "b"],
        texts=["", ""],
        features=torch.randn(2, 40, 20),
        feature_lengths=torch.tensor([40, 23]),
        targets=torch.randint(1, vocab_size, (2, 3)),
        target_lengths=torch.tensor([3, 1]),
    )
    total = module.training_step(batch, 0)
    module.zero_grad()
    total.backward()
    together = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    output, shape, encoder_out = module.compute_losses(batch)
    ctc = module.ctc(encoder_out, batch.targets, shape).sum() / shape.num_frames
    transducer = output.losses.sum() / shape.num_frames
    assert logged["train/loss"] == pytest.approx(float(transducer))
    assert logged["train/ctc"] == pytest.approx(float(ctc))
    assert float(total) == pytest.approx(float(transducer) + 0.25 * float(ctc))
    module.zero_grad()
    transducer.backward(retain_graph=True)
    (0.25 * ctc).backward()
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(together[name], parameter.grad)
    assert together["ctc.output.weight"].abs().sum() > 0
