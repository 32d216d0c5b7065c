# SPDX-License-Identifier: Apache-2.0
"""Every compiled CUDA stage gets the handle of torch's current stream."""

from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import torch

from tests import stage_calls as stages
from tests.pretend_cuda import CUDA, pretend_cuda, to_cuda
from tests.stage_cases import make_case
from transducer_toolkit.ops import native
from transducer_toolkit.ops.additive_stages import (
    AdditiveInputs,
    AdditiveOptions,
    AdditiveStages,
    ScoreGrads,
)
from transducer_toolkit.ops.lattice import CellScores
from transducer_toolkit.ops.options import LossOptions
from transducer_toolkit.ops.prune_windows import greedy_ranges
from transducer_toolkit.ops.stages import RowWeights

HANDLE = 0x7E57


@contextmanager
def recorded_streams():
    """Yields {stage: handles}; torch's current stream is HANDLE, of the tensors' device alone."""
    handles = {}

    def recorder(name, stage):
        def call(*args, stream, **kwargs):
            handles.setdefault(name, []).append(stream)
            return stage(*args, stream=0, **kwargs)

        return call

    def current_stream(device=None):
        return SimpleNamespace(cuda_stream=HANDLE if device == CUDA else 0)

    with pretend_cuda():
        real = native.extension.cuda
        names = [name for name in dir(real) if not name.startswith("_")]
        sizes = {name: getattr(real, name) for name in names if name.endswith("_scratch")}
        names = [name for name in names if name not in sizes]  # a size: nothing runs
        doubles = {name: recorder(name, getattr(real, name)) for name in names} | sizes
        with (
            mock.patch.object(native.extension, "cuda", SimpleNamespace(**doubles)),
            mock.patch.object(torch.cuda, "current_stream", current_stream),
        ):
            yield handles, names


def call_every_stage():
    batch = make_case("packed").batch(CUDA)
    tile = batch.all_rows()
    logits, hidden = (to_cuda(torch.randn(batch.num_rows, 7)) for _ in range(2))
    enc, pred = to_cuda(torch.randn(4, 9, 7)), to_cuda(torch.randn(4, 6, 7))
    grads = to_cuda(torch.zeros(4, 9, 7)), to_cuda(torch.zeros(4, 6, 7))
    loss_grad = to_cuda(torch.ones(4, dtype=torch.float64))
    scores = CellScores.zeros(batch, CUDA)
    stages.join_forward(enc, pred, batch, tile, activation="tanh", out=hidden)
    stages.cell_scores(logits, batch, tile, scores, blank=0)
    options = {"topology": "regular", "delay_penalty": 0.0, "fastemit_lambda": 0.0}
    _, *uses = stages.lattice(scores.blank, scores.label, batch, with_uses=True, **options)
    stages.kept_rows(*uses, batch, dropped_mass=0.1)
    places = to_cuda(torch.full((batch.num_rows,), -1))
    refined = {"places": places, "error": to_cuda(torch.zeros(4, dtype=torch.float64))}
    stages.replace_scores(scores, scores, batch, tile, first_place=0, **refined)
    uses_of_all = *uses, uses[0].new_empty(batch.num_rows, 0)
    weights = RowWeights(False, 1.0, 0.0, 0.0, 10.0, 1e-2)
    stages.row_weights(scores, uses_of_all, batch, LossOptions(0), weights, loss=None, **refined)
    arcs = (to_cuda(torch.zeros(batch.num_rows, 2, dtype=torch.float64)) for _ in range(2))
    stages.duration_lattice(*arcs, batch, durations=(1, 2))
    stages.logits_grad(
        logits, batch, tile, scores.normalizer, *uses, loss_grad, blank=0, out=logits
    )
    stages.join_backward(
        hidden,
        hidden,
        enc,
        pred,
        batch,
        tile,
        activation="tanh",
        grad_enc=grads[0],
        grad_pred=grads[1],
    )
    inputs = AdditiveInputs(
        pred, enc, *(to_cuda(torch.zeros(size, dtype=torch.int64)) for size in ((4, 5), (4, 4)))
    )
    additive = AdditiveStages(inputs, AdditiveOptions(0, 1.0, 0.0, 0.0), with_scores=True)
    blank, label, normalizer, product = additive.scores()
    additive.gradients(product, normalizer, ScoreGrads(blank, label, loss_grad))
    posteriors = (uses.transpose(1, 2).contiguous() for uses in (label[:, :, :-1], blank))
    greedy_ranges(*posteriors, inputs.boundary, 2, 1)


def test_every_stage_gets_the_current_stream():
    with recorded_streams() as (handles, names):
        call_every_stage()
    assert sorted(handles) == sorted(names)
    assert all(set(found) == {HANDLE} for found in handles.values()), handles


def test_the_double_notices_the_default_stream():
    class DefaultStream(native.Backend):
        def __init__(self, stages, device):
            super().__init__(stages, device)
            self.queue = {"stream": 0}

    patched = mock.patch.object(native, "Backend", DefaultStream)
    with patched, recorded_streams() as (handles, names):
        call_every_stage()
    assert sorted(handles) == sorted(names)
    assert all(set(found) == {0} for found in handles.values())
