# SPDX-License-Identifier: Apache-2.0
"""The GPU benchmark's Python, on the CPU and tiny."""

import gc
import json

import pytest
import torch

from benchmarks.gpu import benchmark, extra, kernel_times, peers, tables
from benchmarks.gpu.timing import Kernel
from benchmarks.jobs import pruned_job
from benchmarks.workloads import Workload

SMALL = ["--device", "cpu", "--frames", "60", "--shorten", "12"]
SMALL += ["--vocab-size", "12", "--joiner-dim", "8"]


@pytest.fixture(autouse=True)
def _garbage():
    yield
    gc.unfreeze()


def test_a_dry_run_measures_every_row(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(benchmark, "timed", lambda run, prepare=tuple: (run(*prepare()), 1.0)[1])
    monkeypatch.setattr(benchmark, "kernels_of", lambda run: (run(), [Kernel("k", 1.0, 1)])[1])
    path = tmp_path / "rows.json"
    chosen = ["--batches", "sorted", "peaky", "unsorted", "--projects", "ours", "torchaudio"]
    benchmark.main([*SMALL, "--json", str(path), *chosen])
    document = json.loads(path.read_text())
    assert {"device", "torch", "driver", "command", "date", "commit"} <= document.keys()
    rows = document["rows"]
    assert [row for row in rows if "problem" in row] == []
    losses = {}
    for row in rows:
        if "loss_sum" in row:
            key = row["batch"], row["suite"], row["mode"]
            losses.setdefault(key, {})[row["name"]] = row["loss_sum"]
    for mode in benchmark.MODES:
        assert losses["peaky", "step", mode].keys() == {
            "ours: fused",
            "ours: fused, full precision",
        }
    for row in rows:
        if row["suite"] == "step":
            limit = {"float32": 5e-3, "tf32": 5e-3, "bfloat16": 5e-2}[row["mode"]]
            assert 0 < row["gradient_error"] < limit
    for batch in ("sorted", "unsorted"):
        for mode in benchmark.MODES:
            step, pruned = losses[batch, "step", mode], losses[batch, "pruned", mode]
            assert {"ours: packed", "ours: fused", "ours: full"} <= step.keys()
            assert ("torchaudio" in step) == (mode != "bfloat16")
            expected = {"ours: pruned", "ours: fused, pruned", "plain torch (k2's steps)"}
            assert expected <= pruned.keys()
            tolerance = 2e-2 if mode == "bfloat16" else 1e-4
            for values in (step, pruned):
                spread = max(values.values()) - min(values.values())
                assert spread < tolerance * max(values.values())
    assert sum(row["suite"] == "stage" for row in rows) == 20
    table = capsys.readouterr().out
    tables.main([str(path)])
    assert capsys.readouterr().out.strip() in table
    assert "figures: ms: fused float32 1000.00" in table


def test_logits_are_drawn_once():
    lengths = {"frames": (9, 6), "symbols": (5, 3), "vocab_size": 11, "joiner_dim": 7}
    workload = benchmark.DeviceWorkload(**lengths)
    leaf = workload.logits().requires_grad_()
    assert leaf.data_ptr() == workload.logits().data_ptr()
    assert not workload.logits().requires_grad
    assert leaf.shape == (workload.shape.num_cells, 11) and 0.8 < leaf.std() < 1.2


def test_rows_after_the_deadline_say_so(capsys, tmp_path):
    path = tmp_path / "rows.json"
    benchmark.main([*SMALL, "--json", str(path), "--batches", "sorted", "--seconds", "0"])
    rows = json.loads(path.read_text())["rows"]
    assert rows and all("out of time" in row["problem"] for row in rows)
    assert "out of time" in capsys.readouterr().out


def test_a_profile_names_the_kernels(capsys, tmp_path):
    path = tmp_path / "profile.json"
    kernel_times.main([*SMALL, "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    steps = [(batch, name, mode) for batch, _, name, mode in kernel_times.STEPS]
    assert [(row["batch"], row["name"], row["mode"]) for row in rows] == steps
    assert all(call["calls"] > 0 for row in rows for call in row["host"])
    assert all(row["host"] for row in rows)
    for row in rows:
        times = [kernel["ms"] for kernel in row["kernels"]]
        assert len(times) > 3 and times == sorted(times, reverse=True)
        # The shortest are left out of a long list; on a CPU they are many (every small operation).
        assert 0.5 * row["device_ms"] < sum(times) < 1.000001 * row["device_ms"]
        assert len(times) <= kernel_times.KERNELS
    table = capsys.readouterr().out
    assert (
        "sorted, ours: fused, bfloat16" in table and "figures: device ms: fused bfloat16" in table
    )


@pytest.mark.parametrize(
    "name, short",
    [
        ("void transducer::(anonymous namespace)::WalkKernel<float, 2>(int, float*)", "WalkKernel"),
        ("void transducer::<unnamed>::UsesKernel<float>(float *, int)", "UsesKernel"),
        ("sm90_xmma_gemm_f32f32_tf32f32_f32_tn_n_tilesize64x64x32_warpgroupsize1x1x1",
         "sm90_xmma_gemm_f32f32_tf32f32_f32_tn_n_tilesize64x64x32_warp"),
        ("Memcpy HtoD (Pinned -> Device)", "Memcpy HtoD"),
    ],
)  # fmt: skip
def test_short_names_of_kernels(name, short):
    assert tables.short_name(name) == short


def test_the_pruned_step_in_plain_torch_has_our_gradients():
    import transducer_toolkit

    workload = Workload(frames=(9, 6), symbols=(5, 3), vocab_size=11, joiner_dim=7, band_width=3)
    ours = pruned_job(workload, transducer_toolkit).run(None)
    plain = extra.make_plain_pruned(workload).run(None)
    torch.testing.assert_close(plain[0], ours[0], rtol=1e-5, atol=1e-5)
    for actual, expected in zip(plain[1], ours[1], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_a_peer_that_is_not_there_is_said_to_be(tmp_path, capsys):
    folders = {"sources": tmp_path, "target": tmp_path / "target", "built": tmp_path / "built"}
    (tmp_path / "built" / "fast_rnnt" / "fast_rnnt").mkdir(parents=True)
    peers.main(["build", *(part for n, path in folders.items() for part in (f"--{n}", str(path)))])
    said = capsys.readouterr().out.splitlines()
    said = [line for line in said if not line.startswith("figures: ")]
    assert [line.split(":")[0] for line in said] == ["warprnnt_numba", "warp_rnnt", "fast_rnnt"]
    assert all("no source distribution" in line for line in said[:2])
    assert said[2] == "fast_rnnt: brought along" and (tmp_path / "target" / "fast_rnnt").is_dir()


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
