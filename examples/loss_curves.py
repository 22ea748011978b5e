"""The picture of the demo: training and held-out loss of each form, from one starting point."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from trainer import Curve

INK, GREY = "#22262b", "#8b939c"
COLOURS = ("#22262b", "#1f6fb4", "#d9652b", "#3c8d53", "#8a4fa3")


def draw(curves: Sequence[Curve], path: Path, title: str) -> None:
    """Write a PNG: held-out loss as lines with points, each step's training loss smoothed behind them.

    Args:
        curves: the forms, from one starting point: their held-out losses before the first step are equal.
        path: the file to write.
        title: one line above the picture.
    """
    figure = Figure(figsize=(9.6, 5.4), dpi=150, layout="constrained")
    axes = figure.subplots()
    untouched, steps = curves[0].held_out[0][1], curves[0].held_out[-1][0]
    axes.axhline(untouched, color=GREY, linewidth=1.2, linestyle=(0, (4, 3)))
    lowest = untouched
    for curve, colour in zip(curves, COLOURS):
        smooth = _smooth(curve.train)
        lowest = min(lowest, smooth.min(), *(loss for _, loss in curve.held_out))
        axes.plot(np.arange(1, steps + 1), smooth, color=colour, linewidth=1.0, alpha=0.3)
        axes.plot(*zip(*curve.held_out), color=colour, linewidth=2.2, marker="o", markersize=4.5, clip_on=False)
    span = untouched - lowest
    axes.set_xlim(0, steps)
    axes.set_ylim(lowest - 0.06 * span, untouched + 0.12 * span)
    labels = [(curve.final, _label(curve), colour) for curve, colour in zip(curves, COLOURS)]
    _label_ends(axes, [(untouched, f"untouched\n{untouched:.3f}", GREY), *labels])
    axes.set_title(title, loc="left", color=INK, fontsize=12, fontweight="bold", pad=12)
    axes.set_xlabel("fine-tuning step", color=INK)
    axes.set_ylabel("loss, nats a byte", color=INK)
    axes.grid(axis="y", color="#e6e9ec", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GREY)
    axes.tick_params(colors=GREY, labelcolor=INK, length=0)
    axes.plot([], [], color=GREY, linewidth=2.2, marker="o", markersize=4.5, label="held-out files")
    axes.plot([], [], color=GREY, linewidth=1.0, alpha=0.5, label="training batches, smoothed")
    axes.legend(loc="upper right", frameon=False, labelcolor=INK, fontsize=9, bbox_to_anchor=(1.0, 0.9))
    figure.savefig(path)


def _label(curve: Curve) -> str:
    return f"{curve.name}  {curve.final:.3f}\n{curve.trained / 1e6:.2f} M parameters"


def _label_ends(axes: Axes, labels: Sequence[tuple[float, str, str]]) -> None:
    """Write (height, text, colour) to the right of the axes, pushed apart where they would overlap."""
    low, high = axes.get_ylim()
    gap, floor = 0.1 * (high - low), low
    for height, text, colour in sorted(labels):
        floor = max(height, floor + gap if floor > low else height)
        axes.annotate(
            text, (1.0, floor), xycoords=axes.get_yaxis_transform(), xytext=(10, 0), textcoords="offset points",
            color=colour, fontsize=9.5, va="center", annotation_clip=False,
        )  # fmt: skip


def _smooth(values: Sequence[float], window: int = 25) -> NDArray[np.float64]:
    """Mean over a window around each value, which is cut off at both ends."""
    ones = np.ones(min(window, len(values)))
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")
