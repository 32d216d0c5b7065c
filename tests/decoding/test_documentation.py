# SPDX-License-Identifier: Apache-2.0
"""What docs/decoding.md shows without a checkpoint runs as it stands there."""

import re
from pathlib import Path

import torch

from transducer_toolkit.decoding import BeamSearch
from transducer_toolkit.modules import Joiner, StatelessPredictor

PAGE = Path(__file__).parents[2] / "docs" / "decoding.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)


def block(part):
    (found,) = (block for block in BLOCKS if part in block)
    return found


def test_chunks():
    names = {}
    exec(block("search.advance"), names)
    assert names["state"].num_frames.tolist() == [32, 32]


def test_language_model():
    names = {"torch": torch}
    exec(block("class Bigrams"), names)
    lm = names["Bigrams"](torch.randn(5, 5).log_softmax(-1))
    search = BeamSearch(StatelessPredictor(5, 16), Joiner(8, 16, 32, 5), lm=lm)
    assert len(search.nbest(torch.randn(2, 6, 8), torch.tensor([6, 3]))[0]) == 4
