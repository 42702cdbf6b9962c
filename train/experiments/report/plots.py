"""Pictures of sweeps, comparisons and learning curves, as PNG files."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ...progress import save_figure
from ..learning_curve import Curve

Axes = Any  # matplotlib's


@contextlib.contextmanager
def picture(path: Path, size: tuple[float, float], shape: tuple[int, int] = (1, 1), grid: bool = True) -> Iterator[Any]:
    """Yield the axes of a figure (an array of them, unless the shape is (1, 1)), and write it to `path`."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(*shape, squeeze=False)
    yield axes if axes.size > 1 else axes[0, 0]
    for ax in axes.flat:
        if grid:
            ax.grid(alpha=0.3)
        if len(ax.get_legend_handles_labels()[0]):
            ax.legend(fontsize=8)
    save_figure(figure, path, 110)


def plot_range(ax: Axes, x: Any, mean: Any, low: Any, high: Any, label: str = "") -> None:
    """Draw means as a line with marks, and the range from low to high as a band."""
    (line,) = ax.plot(x, mean, marker="o", markersize=3, label=label or None)
    ax.fill_between(x, low, high, alpha=0.15, color=line.get_color())


def plot_heatmap(path: Path, values: Any, x_label: str, y_label: str, title: str) -> None:
    """Draw a data frame as a heat map with the numbers in its cells."""
    rows, columns = values.shape
    with picture(path, (2 + 0.9 * columns, 1.6 + 0.5 * rows), grid=False) as ax:
        ax.imshow(values, cmap="viridis_r", aspect="auto")
        ax.set_xticks(range(columns), [f"{x:g}" for x in values.columns])
        ax.set_yticks(range(rows), list(values.index))
        ax.set(xlabel=x_label, ylabel=y_label, title=title)
        array = values.to_numpy()
        middle = np.nanmean(array)
        for i, j in np.argwhere(np.isfinite(array)):
            ax.text(j, i, f"{array[i, j]:.3f}", ha="center", va="center", fontsize=8,
                    color="white" if array[i, j] > middle else "black")  # fmt: skip


def plot_comparison(
    path: Path, data: dict[str, Any], costs: Sequence[tuple[str, str]], rates: str = "learning rate"
) -> None:
    """Draw scores against two costs (key, label), losses by learning rate, and losses by step, of one task.

    `data` has "metric", "points" (name, score, low, high, good, costs), and "rates" and "curves" {method: [[x, y]]}.
    """
    with picture(path, (11, 8), (2, 2)) as axes:
        for ax, (key, label) in zip(axes[0], costs, strict=True):
            for p in data["points"]:
                x = p["costs"][key]
                bars = [[max(p["score"] - p["low"], 0)], [max(p["high"] - p["score"], 0)]]
                ax.errorbar([x], [p["score"]], yerr=bars, fmt="o", color="C0" if p["good"] else "0.6")
                ax.annotate(p["name"], (x, p["score"]), textcoords="offset points", xytext=(5, 4), fontsize=8)
            ax.set(xlabel=label, ylabel=data["metric"], xscale="log" if key == "trainable" else "linear")
        by_rate, by_step = axes[1]
        for name, points in data["rates"].items():
            by_rate.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        for name, points in data["curves"].items():
            by_step.plot(*zip(*points, strict=True), label=name)
        by_rate.set(xlabel=rates, ylabel="validation loss", xscale="log")
        by_step.set(xlabel="step", ylabel="training loss")


def plot_learning_curve(
    path: Path, sizes: Sequence[int], mean: Sequence[float], low: Sequence[float], high: Sequence[float], curve: Curve,
    target: float,
) -> None:  # fmt: skip
    """Draw errors (mean, interval) by number of examples, the fitted curve to ten times as many, and the target."""
    with picture(path, (6, 4)) as ax:
        plot_range(ax, sizes, mean, low, high)
        beyond = np.geomspace(sizes[0], 10 * sizes[-1], 50)
        ax.plot(beyond, [curve.error(n) for n in beyond], "--", label=f"{curve.b:.2g} n^-{curve.c:.2f}")
        if target > 0:
            ax.axhline(target, color="0.5", linewidth=1, label="target")
        ax.set(xscale="log", yscale="log", xlabel="examples", ylabel="error")
