# SPDX-License-Identifier: Apache-2.0
"""What the README shows in Python runs as it stands there."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_python_blocks_run(index):
    names = {}
    exec(BLOCKS[index], names)
    assert torch.isfinite(names["loss"])


def test_fused_and_packed_agree_and_the_loop_learns():
    first, loop = {}, {}
    exec(BLOCKS[0], first)
    torch.testing.assert_close(first["fused"], first["loss"])
    assert first["enc"].grad.abs().sum() > 0
    torch.manual_seed(0)
    exec(BLOCKS[1].replace("range(30)", "range(1)"), loop)
    at_first = loop["loss"].item()
    torch.manual_seed(0)
    exec(BLOCKS[1], loop)
    assert loop["loss"].item() < 0.7 * at_first


def test_the_plain_loop_is_short():
    statements = [line for line in BLOCKS[1].splitlines() if line and "import" not in line]
    assert len(statements) <= 20
