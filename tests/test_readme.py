# SPDX-License-Identifier: Apache-2.0
"""The README: its example runs, its figures are those that were measured, and it stays short."""

import re
from pathlib import Path

import torch

from benchmarks import results

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
MIB = 2**20


def blocks(path):
    return re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(), flags=re.DOTALL)


def test_the_example_runs_and_is_short():
    (block,) = blocks("README.md")
    names = {}
    exec(block, names)
    assert torch.isfinite(names["loss"]) and names["enc"].grad.abs().sum() > 0
    assert len([line for line in block.splitlines() if line]) <= 10
    logits = torch.randn(2, 40, 8, 500)
    (call,) = re.findall(r"`(transducer_loss\(.*?\))`", README)
    exec(f"from transducer_toolkit import transducer_loss; again = {call}", names | locals())


def test_it_is_one_screen_or_three_in_the_agreed_order():
    assert len(README.splitlines()) <= 150
    assert re.findall(r"^## (.*)$", README, flags=re.MULTILINE) == [
        "Install",
        "The loss in ten lines",
        "Train a recognizer in two commands",
        "Which loss?",
        "Coming from another library",
        "Documentation",
        "Contributing, citing, license",
    ]


def test_its_figures_are_those_of_the_committed_run():
    run = results.read(ROOT / "benchmarks" / "results" / "cpu_step.json")[0]
    rows = {row["name"]: row for row in run["rows"]}
    assert set(run["workload"]["frames"]) == {343} and run["options"]["threads"] == 1

    def figures(name):
        return f"{rows[name]['peak_bytes'] / MIB:.0f}", f"{rows[name]['seconds']:.1f}"

    mib, seconds = figures("ours: fused")
    peer_mib, peer_seconds = figures("torchaudio")
    words = " ".join(README.split())
    assert f"takes {mib} MiB and {seconds} s a step" in words
    assert f"torchaudio's takes {peer_mib} MiB and {peer_seconds} s" in words
    assert f"fused {seconds} s and {mib} MiB, torchaudio {peer_seconds} s" in words
    ratio = rows["torchaudio"]["gradient_error"] / rows["ours: fused"]["gradient_error"]
    assert f"{round(ratio, -1):.0f} times closer to float64" in words
    others = [row for name, row in rows.items() if name != "torchaudio" and "fused" not in name]
    others = [row for row in others if row["project"] != "floor"]
    low, high = (float(x) for x in re.search(r"between ([\d.]+) and ([\d.]+) s", words).groups())
    assert all(low - 0.05 <= row["seconds"] <= high + 0.05 for row in others)
    low, high = (int(x) for x in re.search(r"between (\d+) and (\d+) MiB", words).groups())
    assert all(low - 1 <= row["peak_bytes"] / MIB <= high + 1 for row in others)


def test_fused_and_packed_agree_on_the_first_page():
    names = {}
    exec(blocks("docs/index.md")[0], names)
    torch.testing.assert_close(names["fused"], names["loss"])
    assert names["enc"].grad.abs().sum() > 0


def test_the_plain_loop_learns_and_is_short():
    (loop,) = blocks("docs/training.md")
    losses = []
    for num_steps in (1, 30):
        names = {}
        torch.manual_seed(0)
        exec(loop.replace("range(30)", f"range({num_steps})"), names)
        losses.append(names["loss"].item())
    assert losses[1] < 0.7 * losses[0]
    statements = [line for line in loop.splitlines() if line and "import" not in line]
    assert len(statements) <= 20
