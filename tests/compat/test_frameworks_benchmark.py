# SPDX-License-Identifier: Apache-2.0
"""Every row of benchmarks.frameworks computes the same losses and gradients."""

import runpy
import sys

import pytest
import torch

from benchmarks import frameworks
from benchmarks.peers import Absent, require_present
from benchmarks.truth import step_truth
from benchmarks.workloads import Workload, choose_batch, utterance_shapes


@pytest.mark.parametrize("row", frameworks.IMPLEMENTATIONS, ids=lambda row: row.name)
def test_rows_agree_with_float64(row):
    pytest.importorskip("torchaudio", exc_type=ImportError)
    try:
        require_present(row)
    except Absent as reason:
        pytest.skip(str(reason))
    workload = Workload((9, 9), (4, 3), 11, 8)
    job = row.jobs["step"](workload)
    losses, gradients = job.run(job.prepare())
    true_losses, true_gradients = step_truth(workload)
    torch.testing.assert_close(losses.double(), true_losses, rtol=1e-5, atol=0)
    for found, expected in zip(gradients, true_gradients, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_lengths_make_a_batch_of_four(tmp_path, monkeypatch):
    path = tmp_path / "lengths.npy"
    monkeypatch.setattr(sys, "argv", ["frameworks.py", str(path)])
    runpy.run_path(frameworks.__file__, run_name="__main__")
    batch = choose_batch(utterance_shapes(path), max_frames=800, batch="sorted")
    assert batch.tolist() == [[200, 40]] * 4
