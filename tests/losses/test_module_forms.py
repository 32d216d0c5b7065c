# SPDX-License-Identifier: Apache-2.0
"""The module forms of the losses, and the loss stages, pass on every option."""

import inspect
from dataclasses import fields

import pytest

import transducer_toolkit as tt
from transducer_toolkit.ops.options import FusedOptions, LossOptions
from transducer_toolkit.training.stages import FusedLoss, PackedLoss

TENSORS = {
    "logits", "enc", "pred", "weight", "bias", "targets", "logit_lengths", "target_lengths",
    "shape", "ranges", "alignment",
}  # fmt: skip
# Options with another default value, as far as one loss takes all of them together.
OTHER = {
    "blank": 1, "topology": "modified", "normalization": "hat", "fastemit_lambda": 0.1,
    "delay_penalty": 0.2, "clamp": 0.3, "left": 4, "right": 5, "reduction": "none",
    "inplace": True, "validate": True, "activation": "relu", "dropped_mass": 0.25,
    "tile_cells": 7, "precision": "full", "return_kept": True,
}  # fmt: skip
PAIRS = [
    (tt.transducer_loss, tt.TransducerLoss, ()),
    (tt.fused_joiner_loss, tt.FusedJoinerLoss, ()),
    (tt.tdt_loss, tt.TDTLoss, ((0, 1),)),
    (tt.multi_blank_loss, tt.MultiBlankLoss, ((2,),)),
]


@pytest.mark.parametrize(("function", "module", "durations"), PAIRS)
def test_a_module_form_takes_and_keeps_the_options_of_its_function(function, module, durations):
    options = set(inspect.signature(function).parameters) - TENSORS
    taken = set(inspect.signature(module).parameters)
    assert taken == options
    others = {name: OTHER[name] for name in taken & OTHER.keys()}
    if durations:
        others.pop("blank")
    kept = module(*([1, *durations] if durations else []), **others).options
    assert {name: kept[name] for name in others} == others


@pytest.mark.parametrize(
    ("stage", "options"), [(PackedLoss, LossOptions), (FusedLoss, FusedOptions)]
)
def test_a_stage_keeps_every_option(stage, options):
    taken = inspect.signature(stage).parameters
    others = {field.name: OTHER[field.name] for field in fields(options) if field.name in OTHER}
    others = {name: value for name, value in others.items() if name in taken}
    kept = stage(**others).options
    assert {name: getattr(kept, name) for name in others} == others
    computed = {"activation", "tile_cells", "from_log_softmax", "validate", "blank_may_be_target"}
    assert {field.name for field in fields(options)} - computed <= set(taken)
