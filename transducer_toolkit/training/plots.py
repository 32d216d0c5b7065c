# SPDX-License-Identifier: Apache-2.0
"""Figures of a training: the learning curves, and one utterance with its lattice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from torch import Tensor

from transducer_toolkit.decoding import Alignment

# The points (optimizer step, value) of each quantity.
History = dict[str, list[tuple[int, float]]]

INK, BLUE, ORANGE, GRAY = "#22303c", "#2a6f97", "#e07a1f", "#8a97a3"
# Figure objects instead of pyplot: no global state, no display, safe in any thread.
DPI = 140


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

    Args:
        features: (T_in, F) float, on the CPU.
        occupancy: (T, U + 1) posterior of each cell in [0, 1], on the CPU.
        alignment: best path, with a frame for each symbol.
        symbols: the U target symbols.
        title: title of the figure.
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

    height = 3.2 + max(2.6, 0.19 * num_columns)
    figure = Figure(figsize=(11, height), dpi=DPI, layout="constrained")
    mel, lattice = figure.subplots(
        2, 1, sharex=True, height_ratios=(2.4, max(2.6, 0.19 * num_columns))
    )
    printable = title.encode("utf-8", "replace").decode()  # an id can be a name that is not UTF-8
    figure.suptitle(printable, color=INK, fontsize=12)

    values = features.numpy().T
    mel.imshow(
        values,
        origin="lower",
        aspect="auto",
        cmap="magma",
        interpolation="nearest",
        extent=(0, duration_s, 0, len(values)),
        vmin=np.percentile(values, 5),
        vmax=np.percentile(values, 99.8),
    )
    mel.set_ylabel("mel bin")
    for time_s in times_s:
        mel.axvline(time_s, color="white", alpha=0.35, linewidth=0.7)
    for time_s, symbol in zip(_spread(times_s, duration_s / 75), symbols, strict=True):
        mel.text(time_s, len(values) * 1.025, symbol, ha="center", va="bottom", color=INK)

    image = lattice.imshow(
        np.maximum(occupancy.numpy().T, 1e-6),
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
    lattice.step(
        path_s, [*range(num_targets + 1), num_targets], where="post", color=ORANGE, linewidth=1.5
    )
    lattice.plot(
        times_s,
        np.arange(1, num_targets + 1),
        "o",
        color=ORANGE,
        markersize=3.5,
        label="best path, one dot a symbol",
    )
    lattice.set_yticks(range(num_columns), ["start", *symbols])
    lattice.tick_params(axis="y", labelsize=8, length=0)
    lattice.set_ylabel("symbols so far")
    lattice.set_xlabel("time (s)")
    lattice.legend(loc="lower right", frameon=False)
    figure.colorbar(image, ax=lattice, label="occupancy", pad=0.01)
    _tidy(mel)
    _tidy(lattice)
    return figure


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


def _spread(times_s: np.ndarray, gap_s: float) -> np.ndarray:
    """Returns the positions of the labels, moved right until they are ``gap_s`` apart."""
    spread = times_s.copy()
    for index in range(1, len(spread)):
        spread[index] = max(spread[index], spread[index - 1] + gap_s)
    return spread


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)
    for text in (axes.xaxis.label, axes.yaxis.label):
        text.set_color(INK)
