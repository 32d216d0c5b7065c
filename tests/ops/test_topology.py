# SPDX-License-Identifier: Apache-2.0
"""The table of topologies: the same in Python and in the compiled stages; feasibility."""

import pytest

from transducer_toolkit.losses.reference import lattice_paths
from transducer_toolkit.ops import native
from transducer_toolkit.ops.topology import (
    K2_TOPOLOGIES,
    TOPOLOGIES,
    get_topology,
    is_feasible,
)


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


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_a_lattice_is_feasible_if_it_has_a_path(topology):
    for num_frames in range(1, 5):
        for num_targets in range(5):
            has_path = next(lattice_paths(num_frames, num_targets, topology), None) is not None
            assert is_feasible(num_frames, num_targets, topology=topology) == has_path
    assert not is_feasible(0, 0, topology=topology)


@pytest.mark.parametrize("name", ["linear", None, 3, "one_sym_per_frame"])
def test_an_unknown_name_is_an_error(name):
    with pytest.raises(ValueError, match=r"rnnt_type: expected one of .*'regular'.*, got"):
        get_topology(name, "rnnt_type", k2=True)
    assert "one_sym_per_frame" in TOPOLOGIES and "one_sym_per_frame" not in K2_TOPOLOGIES
