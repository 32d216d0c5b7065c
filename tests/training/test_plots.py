# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from transducer_toolkit.decoding import Alignment
from transducer_toolkit.training.plots import draw_learning_curves, draw_utterance


@pytest.mark.parametrize("num_points", [0, 1, 2, 100])
def test_learning_curves_of_any_history(tmp_path, num_points):
    history = {
        "train/loss": [(10 * k, 1 / (1 + k)) for k in range(num_points)],
        "val/loss": [(100 * k, 1 / (1 + k)) for k in range(num_points // 10)],
        "val/wer": [(100 * k, 1 / (1 + k)) for k in range(num_points // 10)],
    }
    draw_learning_curves(history).savefig(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


@pytest.mark.parametrize("symbols", [[], ["a"], list("three\u2581seven\u2581one")])
def test_utterance(tmp_path, symbols):
    alignment = Alignment([min(k, 24) for k in range(len(symbols))], -1.0)
    figure = draw_utterance(
        torch.randn(100, 80),
        torch.rand(25, len(symbols) + 1),
        alignment,
        symbols,
        title="id: 'text'",
        feature_frame_s=0.01,
    )
    figure.savefig(tmp_path / "utterance.png")
    assert (tmp_path / "utterance.png").stat().st_size > 10_000


def test_utterance_names_what_disagrees():
    with pytest.raises(ValueError, match="expected the same U, got 2, 1 and 2"):
        draw_utterance(
            torch.randn(100, 80),
            torch.rand(25, 3),
            Alignment([0], -1.0),
            ["a", "b"],
            title="",
            feature_frame_s=0.01,
        )
