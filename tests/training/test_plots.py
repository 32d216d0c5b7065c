# SPDX-License-Identifier: Apache-2.0
import itertools

import numpy as np
import pytest
import torch

from transducer_toolkit.decoding import Alignment
from transducer_toolkit.training import plots
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


PIECES = ["▁the", "▁qu", "ick", "▁understand", "ing", "▁communication", "s", "▁a", "▁", "你好"]
TALL = {
    "letters": (3.0, list("three▁seven▁one")),
    "many letters": (20.0, list("three▁seven▁one▁") * 10),
    "word pieces": (9.0, [PIECES[k % len(PIECES)] for k in range(40)]),
    "pieces at one time": (2.0, [PIECES[k % len(PIECES)] for k in range(49)]),
    "no spaces": (30.0, list("零一二三四五六七八九") * 12),
    "one long word": (4.0, ["▁donau" + "dampfschiff" * 12]),
    "ten minutes": (600.0, [PIECES[k % len(PIECES)] for k in range(2400)]),
    "ten minutes of letters": (600.0, list("three▁seven▁one▁") * 500),
}


@pytest.mark.filterwarnings("error", "ignore:Glyph .* missing from font")
@pytest.mark.parametrize("name", TALL)
def test_labels_do_not_overlap_and_the_picture_has_a_bounded_size(tmp_path, name):
    duration_s, symbols = TALL[name]
    num_frames = round(duration_s / 0.04)
    frames = sorted(torch.randint(num_frames, (len(symbols),)).tolist())
    if name == "pieces at one time":
        frames = [num_frames - 1] * len(symbols)
    figure = draw_utterance(
        torch.randn(4 * num_frames, 80),
        torch.rand(num_frames, len(symbols) + 1),
        Alignment(frames, -1.0),
        symbols,
        title=f"id: {' '.join(symbols)!r}",
        feature_frame_s=0.01,
    )
    figure.savefig(tmp_path / "utterance.png")
    mel, lattice = figure.axes[:2]
    width, height = figure.canvas.get_width_height()
    assert height < 2500
    boxes = [text.get_window_extent() for text in mel.texts]
    assert len(boxes) >= min(len(symbols), 1)
    # Neighbors may touch by a pixel.
    assert all(one.x1 <= two.x0 + 1 for one, two in itertools.pairwise(boxes))
    assert all(box.x0 >= 0 and box.x1 <= width and box.y1 <= height for box in boxes)
    title = figure._suptitle.get_window_extent()
    assert title.x0 >= 0 and title.x1 <= width and title.y0 >= max(box.y1 for box in boxes)
    names = [text.get_window_extent() for text in lattice.get_yticklabels()]
    assert all(one.y1 <= two.y0 + 1 for one, two in itertools.pairwise(names))
    assert min(box.x0 for box in names) >= 0


def test_a_block_of_pixels_shows_the_highest_occupancy():
    values = np.zeros((1000, 2401))
    values[:, 7] = 1.0
    pooled = plots._pooled(values, (100, 1200))
    assert pooled.shape == (100, 1200) and set(pooled.sum(1)) == {1.0}
    mean = plots._pooled(np.arange(12.0).reshape(2, 6), (2, 3), mean=True)
    assert mean.tolist() == [[0.5, 2.5, 4.5], [6.5, 8.5, 10.5]]
    assert plots._pooled(values, (1000, 5000)) is values


def test_words_stand_above_the_features_and_moved_labels_stay_inside():
    times = np.arange(7.0)
    assert plots._labels(times, ["▁th", "ree", "▁", "one", "▁", "t", "wo"]) == [
        (0.0, "three"), (2.0, "one"), (4.0, "two")
    ]  # fmt: skip
    assert plots._labels(times[:3], list("a▁b")) == [(0.0, "a"), (1.0, "▁"), (2.0, "b")]
    gap = 10 / plots.MAX_LABELS
    spread = plots._spread(np.array([9.9, 9.9, 10.0]), gap, 10.0)
    assert spread == pytest.approx([10 - 2 * gap, 10 - gap, 10.0])


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
