# SPDX-License-Identifier: Apache-2.0
"""The table of topologies: the same in Python and in the compiled stages; feasibility."""

import pytest
import torch

import transducer_toolkit as tt
from transducer_toolkit.losses.reference import duration_paths, lattice_paths
from transducer_toolkit.ops import native
from transducer_toolkit.ops.topology import (
    K2_TOPOLOGIES,
    MAX_BIG_BLANKS,
    MAX_DURATIONS,
    TOPOLOGIES,
    Topology,
    get_topology,
    is_feasible,
    multi_blank_topology,
    tdt_topology,
)


def test_the_compiled_stages_have_the_same_limits():
    assert native.extension.MAX_DURATIONS == MAX_DURATIONS
    assert native.extension.MAX_BIG_BLANKS == MAX_BIG_BLANKS


def test_the_compiled_stages_have_the_same_table():
    compiled = native.extension.Topology.__members__
    assert list(compiled) == list(TOPOLOGIES)
    for name, value in compiled.items():
        row = TOPOLOGIES[name]
        assert native.extension.topology_traits(value) == {
            "blank_frames": row.blank_durations[0],
            "label_frames": row.label_durations[0],
            "label_takes_blank": row.label_takes_blank,
            "ends_with_label": row.ends_with_label,
        }
        assert len(row.blank_durations) == len(row.label_durations) == 1


@pytest.mark.parametrize("column", ["label_takes_blank", "ends_with_label"])
@pytest.mark.parametrize("durations", [(0,), (0, 1), (2,)])
def test_a_row_that_no_stage_implements_is_an_error(column, durations):
    options = {"ends_with_label": False} | {column: True}
    with pytest.raises(ValueError, match=f"{column}: expected False with label_durations"):
        Topology("mine", label_durations=durations, **options)


def test_the_functions_with_names_of_k2_refuse_a_topology_that_does_not_say_is_k2():
    assert not Topology("mine").is_k2


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_a_lattice_is_feasible_if_it_has_a_path(topology):
    for num_frames in range(1, 5):
        for num_targets in range(5):
            has_path = next(lattice_paths(num_frames, num_targets, topology), None) is not None
            assert is_feasible(num_frames, num_targets, topology=topology) == has_path
    assert not is_feasible(0, 0, topology=topology)


@pytest.mark.parametrize(
    "topology",
    [
        tdt_topology((0, 1, 2)),
        tdt_topology((2, 3)),
        tdt_topology((0, 2)),
        tdt_topology((3,)),
        multi_blank_topology((4, 2)),
    ],
)
def test_durations_are_feasible_if_there_is_a_path(topology):
    assert get_topology(topology.name) == topology
    for num_frames in range(1, 12):
        for num_targets in range(4):
            has_path = next(duration_paths(num_frames, num_targets, topology), None) is not None
            assert is_feasible(num_frames, num_targets, topology=topology.name) == has_path


@pytest.mark.parametrize(
    "name", ["tdt", "tdt-", "tdt-0", "tdt-1-0", "tdt-a", "multi_blank-1", "multi_blank--2", "x-1"]
)
def test_wrong_names_with_durations(name):
    with pytest.raises(ValueError, match="expected"):
        get_topology(name)


@pytest.mark.parametrize("name", ["linear", None, 3, "one_sym_per_frame"])
def test_an_unknown_name_is_an_error(name):
    with pytest.raises(ValueError, match=r"rnnt_type: expected one of .*'regular'.*, got"):
        get_topology(name, "rnnt_type", k2=True)
    assert "one_sym_per_frame" in TOPOLOGIES and "one_sym_per_frame" not in K2_TOPOLOGIES


@pytest.mark.parametrize(("modified", "remedy"), [(True, "'modified'"), (False, "'regular'")])
def test_the_bool_of_older_k2_names_its_successor(modified, remedy):
    message = f"rnnt_type: expected one of .* got {modified}; pass {remedy} for modified={modified}"
    am, lm, symbols = torch.zeros(1, 4, 5), torch.zeros(1, 3, 5), torch.tensor([[1, 2]])
    logits = am[:, :, None] + lm[:, None]
    ranges = torch.arange(3).expand(1, 4, 3)
    for call in (
        lambda: tt.rnnt_loss(logits, symbols, 0, None, modified),
        lambda: tt.rnnt_loss_simple(lm, am, symbols, 0, None, modified),
        lambda: tt.rnnt_loss_smoothed(lm, am, symbols, 0, 0.0, 0.0, None, modified),
        lambda: tt.rnnt_loss_pruned(logits, symbols, ranges, 0, None, modified),
        lambda: tt.get_rnnt_logprobs_joint(logits, symbols, 0, None, modified),
        lambda: tt.get_rnnt_logprobs_pruned(logits, symbols, ranges, 0, None, modified),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_k2_and_fast_rnnt_agree_by_keyword():
    logits, symbols = torch.randn(2, 4, 3, 5), torch.tensor([[1, 2], [3, 4]])
    boundary = torch.tensor([[0, 0, 2, 4], [0, 0, 1, 3]])
    options = {"rnnt_type": "modified", "boundary": boundary}
    by_place = tt.get_rnnt_logprobs_joint(logits, symbols, 0, boundary, "modified")
    by_name = tt.get_rnnt_logprobs_joint(logits, symbols, 0, **options)
    for one, other in zip(by_place, by_name, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(TypeError, match=r"boundary: expected a torch\.Tensor, got str"):
        tt.get_rnnt_logprobs_joint(logits, symbols, 0, "modified", boundary)  # k2's order


@pytest.mark.parametrize("am_only_scale", [0.0, 0.2])
def test_padding_and_the_smoothed_loss(am_only_scale):
    """k2 averages the padding, too; here it changes nothing, but a valid row of another does."""
    torch.manual_seed(0)
    am, lm, symbols = torch.randn(2, 4, 5), torch.randn(2, 3, 5), torch.tensor([[1, 2], [3, 0]])
    boundary = torch.tensor([[0, 0, 2, 4], [0, 0, 1, 3]])

    def losses():
        options = {"boundary": boundary, "reduction": "none"}
        return tt.rnnt_loss_smoothed(lm, am, symbols, 0, 0.1, am_only_scale, **options)

    first = losses()
    lm[1, 2] += torch.arange(5)  # padding
    assert torch.equal(losses(), first)
    lm[1, 0] += torch.arange(5)
    assert torch.equal(losses()[0], first[0]) == (am_only_scale == 0)


@pytest.mark.parametrize("durations", [(0, 10_001), (0, 2**40), (0, 1.5), ("x",), (0, True)])
def test_durations_that_are_none(durations):
    with pytest.raises(ValueError, match="durations: expected integers of at most 10000, got"):
        tdt_topology(durations)
    with pytest.raises(ValueError, match="big_blank_durations: expected integers of at most 10000"):
        multi_blank_topology(durations)


def test_names_with_long_durations():
    with pytest.raises(ValueError, match="topology: expected one of"):
        get_topology("tdt-0-" + "1" * 5000)
    with pytest.raises(ValueError, match="durations: expected integers of at most 10000"):
        get_topology("tdt-0-10001")
