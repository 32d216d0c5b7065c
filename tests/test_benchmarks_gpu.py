# SPDX-License-Identifier: Apache-2.0
"""The GPU benchmark's Python, on the CPU and tiny."""

import re

import pytest
import torch

from benchmarks.gpu import benchmark, extra, peers
from benchmarks.jobs import pruned_job
from benchmarks.workloads import Workload


def test_a_dry_run_measures_every_row(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "VOCAB_SIZE", 12)
    monkeypatch.setattr(benchmark, "JOINER_DIM", 8)
    monkeypatch.setattr(benchmark, "timed", lambda run, prepare=tuple: (run(*prepare()), 1.0)[1])
    shapes = benchmark.utterance_shapes(None)
    monkeypatch.setattr(benchmark, "utterance_shapes", lambda path: shapes // 12 + 1)
    benchmark.main(["--device", "cpu", "--frames", "60"])
    table = capsys.readouterr().out.partition("a dry run")[2]
    losses = {}
    for line in table.splitlines():
        if match := re.match(r"(\S+ \S+) +(\w+) +(\w+) +(.*?) {2,}.* (-?\d+\.\d{3})$", line):
            losses.setdefault((match[1], match[2], match[3]), {})[match[4]] = float(match[5])
    for batch in ("sorted 10k", "unsorted 30"):
        for mode in benchmark.MODES:
            step, pruned = losses[batch, "step", mode], losses[batch, "pruned", mode]
            assert {"ours: packed", "ours: fused", "ours: full"} <= step.keys()
            expected = {"ours: pruned", "ours: fused, pruned", "plain torch (k2's steps)"}
            assert expected <= pruned.keys()
            tolerance = 2e-2 if mode == "bfloat16" else 1e-4
            for values in (step, pruned):
                assert max(values.values()) - min(values.values()) < tolerance * max(
                    values.values()
                )
    assert len(re.findall(r"stage +(?:float32|bfloat16)", table)) == 20
    assert "Error" not in table


def test_the_pruned_step_in_plain_torch_has_our_gradients():
    import transducer_toolkit

    workload = Workload(frames=(9, 6), symbols=(5, 3), vocab_size=11, joiner_dim=7, band_width=3)
    ours = pruned_job(workload, transducer_toolkit).run(None)
    plain = extra.make_plain_pruned(workload).run(None)
    torch.testing.assert_close(plain[0], ours[0], rtol=1e-5, atol=1e-5)
    for actual, expected in zip(plain[1], ours[1], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_a_peer_that_is_not_there_is_said_to_be(tmp_path, capsys):
    peers.main(["build", "--sources", str(tmp_path), "--target", str(tmp_path / "built")])
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(peers.SOURCES)
    assert all("no source distribution" in line for line in said)


def test_sources_are_patched_for_a_newer_toolkit(tmp_path):
    (tmp_path / "cmake").mkdir()
    listing = tmp_path / "CMakeLists.txt"
    listing.write_text(
        'set(CMAKE_CXX_STANDARD 14 CACHE STRING "")\n'
        "set(FT_COMPUTE_ARCH_CANDIDATES 35 50 60)\n"
        "list(APPEND FT_COMPUTE_ARCH_CANDIDATES 80 86)\n"
    )
    peers.patch_cuda(tmp_path, architecture="90")
    text = listing.read_text()
    assert "CMAKE_CXX_STANDARD 17" in text and "COMPUTE_ARCH_CANDIDATES 90)" in text
    assert "80" not in text
    assert "libc10_cuda.so" in (tmp_path / "cmake" / "torch.cmake").read_text()
    listing.write_text("nothing of this")
    with pytest.raises(peers.NotBuilt, match="another version"):
        peers.patch_cuda(tmp_path, architecture="90")
