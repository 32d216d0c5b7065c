# SPDX-License-Identifier: Apache-2.0
"""Figures of a training: the learning curves, and one utterance with its lattice."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any
from unicodedata import east_asian_width

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

from transducer_toolkit.decoding import Alignment

# The points (optimizer step, value) of each quantity.
History = dict[str, list[tuple[int, float]]]

INK, BLUE, ORANGE, GRAY = "#22303c", "#2a6f97", "#e07a1f", "#8a97a3"
# Figure objects instead of pyplot: no global state, no display, safe in any thread.
DPI = 140
MAX_LABELS = 75  # beside one another above the features
MAX_PIXELS = 1200  # columns and rows of an image
ROW_HEIGHT = 0.19  # of a symbol of the lattice, inches
MAX_LATTICE_HEIGHT = 10.0  # inches
MAX_UPRIGHT = 2  # width of labels that are not turned, in half-width characters
SPACE = "\u2581"  # begins a word


def draw_learning_curves(history: History) -> Figure:
    """Draws the losses, the word error rate and the learning rate over the optimizer steps.

    Args:
        history: points of ``train/loss``, ``val/loss``, ``val/wer`` (a fraction) and
            ``learning rate``. Each of them is optional.

    Returns:
        The figure.

    Example:
        >>> figure = draw_learning_curves({"val/wer": [(100, 0.5), (200, 0.1)]})
    """
    figure = Figure(figsize=(8, 7), dpi=DPI, layout="constrained")
    loss, wer, rate = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 1.2))

    _curve(loss, history, "train/loss", color=BLUE, alpha=0.3, linewidth=1)
    if len(history.get("train/loss", [])) > 2:
        steps, smoothed = _smoothed(history["train/loss"])
        loss.plot(steps, smoothed, color=BLUE, label="train, smoothed")
    _curve(loss, history, "val/loss", color=ORANGE, marker="o", markersize=4, label="validation")
    loss.set_yscale("log")
    loss.set_ylabel("loss (nats a frame)")

    percent = {"val/wer": [(step, 100 * value) for step, value in history.get("val/wer", [])]}
    _curve(wer, percent, "val/wer", color=ORANGE, marker="o", markersize=4, label="validation")
    wer.set_ylabel("word error rate (%)")
    wer.set_ylim(bottom=0)
    if percent["val/wer"]:
        step, best = min(percent["val/wer"], key=lambda point: point[1])
        wer.annotate(
            f"best {best:.2f} %",
            (step, best),
            xytext=(-8, 18),
            textcoords="offset points",
            ha="right",
            color=INK,
            arrowprops={"arrowstyle": "-", "color": GRAY},
        )

    _curve(rate, history, "learning rate", color=GRAY)
    rate.set_ylabel("learning rate")
    rate.set_xlabel("optimizer steps")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-3, -3))
    for axes in (loss, wer, rate):
        _tidy(axes)
        axes.grid(color=GRAY, alpha=0.25, linewidth=0.6)
    if loss.get_legend_handles_labels()[1]:
        loss.legend(frameon=False)
    return figure


def draw_utterance(
    features: Tensor,
    occupancy: Tensor,
    alignment: Alignment,
    symbols: Sequence[str],
    *,
    title: str,
    feature_frame_s: float,
) -> Figure:
    """Draws the features of an utterance above the occupancy of its lattice and the best path.

    The picture has a bounded size. If the symbols are word pieces, or if there are many, whole
    words stand above the features. If there is no room for all labels, every n-th is shown.
    Several frames or symbols share a pixel of a long utterance, which shows the largest occupancy
    and the mean of the features.

    Args:
        features: (T_in, F) float, on the CPU.
        occupancy: (T, U + 1) posterior of each cell in [0, 1], on the CPU.
        alignment: best path, with a frame for each symbol.
        symbols: the U target symbols.
        title: title of the figure; a long one is cut.
        feature_frame_s: shift of the feature frames in seconds.

    Returns:
        The figure.

    Raises:
        ValueError: if ``symbols``, ``alignment`` and ``occupancy`` have different U.
    """
    num_frames, num_columns = occupancy.shape
    num_targets = num_columns - 1
    if not len(symbols) == len(alignment.frames) == num_targets:
        raise ValueError(
            f"symbols, alignment, occupancy: expected the same U, got {len(symbols)}, "
            f"{len(alignment.frames)} and {num_targets}"
        )
    duration_s = len(features) * feature_frame_s
    frame_s = duration_s / num_frames
    times_s = (np.array(alignment.frames) + 0.5) * frame_s

    lattice_height = _lattice_height(num_columns)
    labels = _labels(times_s, symbols)
    widest = _widest(labels)
    label_height = 0.1 if widest <= MAX_UPRIGHT else 0.09 * widest
    figure = Figure(
        figsize=(11, 3.2 + label_height + lattice_height), dpi=DPI, layout="constrained"
    )
    mel, lattice = figure.subplots(2, 1, sharex=True, height_ratios=(2.4, lattice_height))
    printable = title.encode("utf-8", "replace").decode()  # an id can be a name that is not UTF-8
    figure.suptitle(_cut(printable, 110), color=INK, fontsize=12)

    _draw_features(mel, features, labels, times_s, duration_s)
    image = _draw_lattice(lattice, occupancy, symbols, times_s, duration_s)
    figure.colorbar(image, ax=lattice, label="occupancy", pad=0.01)
    _tidy(mel)
    _tidy(lattice)
    return figure


def _draw_features(
    axes: Axes,
    features: Tensor,
    labels: Sequence[tuple[float, str]],
    times_s: np.ndarray,
    duration_s: float,
) -> None:
    """Draws the features, a line at the time of each symbol, and the labels above."""
    widest = _widest(labels)
    is_upright = widest <= MAX_UPRIGHT
    values = features.numpy().T
    axes.imshow(
        _pooled(values, (len(values), MAX_PIXELS), mean=True),
        origin="lower",
        aspect="auto",
        cmap="magma",
        interpolation="nearest",
        extent=(0, duration_s, 0, len(values)),
        vmin=np.percentile(values, 5),
        vmax=np.percentile(values, 99.8),
    )
    axes.set_ylabel("mel bin")
    for time_s in times_s if len(times_s) <= MAX_LABELS else [time_s for time_s, _ in labels]:
        axes.axvline(time_s, color="white", alpha=0.35, linewidth=0.7)
    gap_s = duration_s / MAX_LABELS * (widest if is_upright else 1)
    spread_s = _spread(np.array([time_s for time_s, _ in labels]), gap_s, duration_s)
    for shown_s, (time_s, label) in zip(spread_s, labels, strict=True):
        top = len(values)
        if not is_upright:
            # From the time of the word to its label, which may have moved.
            axes.plot(
                [time_s, shown_s], [top, 1.05 * top], color=GRAY, linewidth=0.7, clip_on=False
            )
        axes.text(
            shown_s,
            1.025 * top if is_upright else 1.07 * top,
            label,
            ha="center",
            va="bottom",
            rotation=0 if is_upright else 90,
            fontsize=10 if is_upright else 8,
            color=INK,
        )
    axes.set_ylim(0, len(values))
    axes.set_xlim(0, duration_s)


def _draw_lattice(
    axes: Axes, occupancy: Tensor, symbols: Sequence[str], times_s: np.ndarray, duration_s: float
) -> AxesImage:
    """Draws the occupancy and the best path, with the names of the symbols beside the rows."""
    num_columns, num_targets = len(symbols) + 1, len(symbols)
    is_dense = num_targets > MAX_LABELS
    image = axes.imshow(
        _pooled(np.maximum(occupancy.numpy().T, 1e-6), (MAX_PIXELS, MAX_PIXELS)),
        origin="lower",
        aspect="auto",
        cmap=LinearSegmentedColormap.from_list("occupancy", ["white", "#a9cfe4", BLUE, INK]),
        norm="log",
        interpolation="nearest",
        extent=(0, duration_s, -0.5, num_targets + 0.5),
        vmin=1e-6,
        vmax=1.0,
    )
    # The path is in column u from the frame of symbol u to that of symbol u + 1.
    path_s = np.concatenate(([0.0], times_s, [duration_s]))
    axes.step(
        path_s,
        [*range(num_targets + 1), num_targets],
        where="post",
        color=ORANGE,
        linewidth=0.6 if is_dense else 1.5,
        label="best path" if is_dense else None,
    )
    if not is_dense:
        axes.plot(
            times_s,
            np.arange(1, num_targets + 1),
            "o",
            color=ORANGE,
            markersize=3.5,
            label="best path, one dot a symbol",
        )
    every = math.ceil(num_columns / (_lattice_height(num_columns) / ROW_HEIGHT))
    rows = range(0, num_columns, every)
    names = [_cut(name, 20) for name in ["start", *symbols]]
    axes.set_yticks(rows, [names[row] for row in rows])
    axes.tick_params(axis="y", labelsize=8, length=0 if every == 1 else 2)
    axes.set_ylabel("symbols so far" if every == 1 else f"symbols so far (one of {every} is named)")
    axes.set_xlabel("time (s)")
    axes.legend(loc="lower right", frameon=False)
    return image


def _lattice_height(num_columns: int) -> float:
    """Returns the height of the picture of a lattice in inches."""
    return min(MAX_LATTICE_HEIGHT, max(2.6, ROW_HEIGHT * num_columns))


def _widest(labels: Sequence[tuple[float, str]]) -> int:
    return max((_width(label) for _, label in labels), default=1)


def _labels(times_s: np.ndarray, symbols: Sequence[str]) -> list[tuple[float, str]]:
    """Returns times and texts of the labels above the features, at most MAX_LABELS."""
    labels = list(zip(times_s.tolist(), symbols, strict=True))
    is_crowded = len(symbols) > MAX_LABELS or any(len(it.lstrip(SPACE)) > 1 for it in symbols)
    if is_crowded and any(symbol.startswith(SPACE) for symbol in symbols[1:]):
        words: list[tuple[float, str]] = []
        for time_s, symbol in labels:
            if symbol.startswith(SPACE) or not words:
                words.append((time_s, symbol.removeprefix(SPACE)))
            else:
                words[-1] = (words[-1][0], words[-1][1] + symbol)
        # Of a word after a space that is a symbol by itself, the time is that of the space.
        labels = [(time_s, word) for time_s, word in words if word]
    limit = MAX_LABELS // 2 if max(map(_width, symbols), default=1) == 2 else MAX_LABELS
    every = max(1, math.ceil(len(labels) / limit))
    return [(time_s, _cut(label, 16)) for time_s, label in labels[::every]]


def _width(text: str) -> int:
    """Returns the columns that a text takes; a character of East Asian scripts takes two."""
    return sum(1 + (east_asian_width(it) in "WF") for it in text)


def _cut(text: str, width: int) -> str:
    length = sum(column <= width for column in itertools.accumulate(map(_width, text)))
    return text if length == len(text) else text[: length - 1] + "\u2026"


def _pooled(values: np.ndarray, limits: tuple[int, int], *, mean: bool = False) -> np.ndarray:
    """Returns the maxima, or means, of blocks, at most ``limits`` of them along each axis."""
    for axis, limit in enumerate(limits):
        size = values.shape[axis]
        if size > limit:
            first = np.linspace(0, size, limit, endpoint=False).astype(int)
            if mean:
                sizes = np.diff(first, append=size).reshape(-1, *[1] * (values.ndim - 1 - axis))
                values = np.add.reduceat(values, first, axis=axis) / sizes
            else:
                values = np.maximum.reduceat(values, first, axis=axis)
    return values


def _curve(axes: Axes, history: History, name: str, **style: Any) -> None:
    if history.get(name):
        steps, values = zip(*history[name], strict=True)
        axes.plot(steps, values, **style)


def _smoothed(points: Sequence[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps and a centered running mean over a twentieth of the points."""
    steps, values = (np.array(column) for column in zip(*points, strict=True))
    half = max(1, len(points) // 40)
    sums = np.concatenate(([0.0], np.cumsum(values)))
    first = np.maximum(np.arange(len(points)) - half, 0)
    last = np.minimum(np.arange(len(points)) + half + 1, len(points))
    return steps, (sums[last] - sums[first]) / (last - first)


def _spread(times_s: np.ndarray, gap_s: float, duration_s: float) -> np.ndarray:
    """Returns the positions of labels, moved until they are apart and within the picture."""
    spread = times_s.astype(float)
    for index in range(1, len(spread)):
        spread[index] = max(spread[index], spread[index - 1] + gap_s)
    limit_s = duration_s
    for index in reversed(range(len(spread))):
        spread[index] = min(spread[index], limit_s)
        limit_s = spread[index] - gap_s
    return spread


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)
    for text in (axes.xaxis.label, axes.yaxis.label):
        text.set_color(INK)
