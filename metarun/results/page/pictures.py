"""The pictures of a report, as PNG files in memory."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray
from PIL import Image

from metarun.results.plots import blank_figure, new_figure, plain, readable_log
from metarun.targets.metric import Metric

Array = NDArray[np.float64]
Line = tuple[Array, Array]
"""x and y of one run."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7f6a00")
"""Colours that colour-blind readers can distinguish (Okabe and Ito 2008)."""
MOST = len(COLOURS)
"""Methods that a picture can show."""
WIDTH, HEIGHT = 5.4, 3.5


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG with 128 colours, which is a third of the size."""
    file, small = io.BytesIO(), io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    image = Image.open(file).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    image.save(small, format="png", optimize=True)
    return small.getvalue()


def log_scale(axis: Any, metric: Metric, values: Array) -> None:
    """Use a logarithmic y axis with plain numbers where errors differ by more than a factor of 4."""
    finite = values[np.isfinite(values)]
    if metric.higher_is_better or not len(finite) or finite.min() <= 0 or finite.max() < 4 * finite.min():
        return
    readable_log(axis.yaxis, float(finite.min()), float(finite.max()))


def curves(methods: Mapping[str, Sequence[Line]], colours: Mapping[str, str], metric: Metric, x: str, y: str) -> bytes:
    """Draw one line per run and, where the runs of a method share their x, a thick one of their mean."""
    figure, axis = new_figure(WIDTH, HEIGHT)
    every = []
    for name, lines in methods.items():
        shared = len(lines) > 1 and all(np.array_equal(lines[0][0], other) for other, _ in lines)
        for place, (own_x, own_y) in enumerate(lines):
            label = name if place == 0 and not shared else None
            style = {"linewidth": 0.7, "alpha": 0.5} if shared else {"linewidth": 1.3}
            axis.plot(own_x, metric.scale * own_y, color=colours[name], label=label, **style)
            every.append(metric.scale * own_y)
        if shared:
            mean = np.mean([own_y for _, own_y in lines], axis=0)
            axis.plot(lines[0][0], metric.scale * mean, color=colours[name], linewidth=1.8, label=name)
    log_scale(axis, metric, np.concatenate(every))
    whole = all(np.array_equal(own_x, np.round(own_x)) for lines in methods.values() for own_x, _ in lines)
    if whole and axis.get_xscale() == "linear":
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axis.xaxis.set_major_formatter(FuncFormatter(plain))
    axis.set(xlabel=x, ylabel=y)
    legend(figure, axis)
    return png(figure)


def legend(figure: Figure, axis: Any) -> None:
    """Put the legend above the picture, where it covers no line."""
    handles, names = axis.get_legend_handles_labels()
    columns = 1 if max(map(len, names), default=0) > 22 else 2 if max(map(len, names), default=0) > 11 else 4
    figure.legend(handles, names, loc="outside upper left", ncols=columns, frameon=False, fontsize=8)


def histograms(methods: Mapping[str, Array], colours: Mapping[str, str], metric: Metric) -> bytes:
    """Draw how the finite scores of test episodes are distributed, one row per method on a common axis."""
    figure = blank_figure(WIDTH, 0.8 + 0.75 * len(methods))
    axes = figure.subplots(len(methods), 1, sharex=True, squeeze=False)[:, 0]
    every = np.concatenate(list(methods.values())) * metric.scale
    low, high = float(every.min()), float(every.max())
    logarithmic = not metric.higher_is_better and low > 0 and high > 50 * low
    if high <= low:
        low, high = low - 0.5, high + 0.5
    edges = np.geomspace(low, high, 41) if logarithmic else np.linspace(low, high, 31)
    for axis, (name, scores) in zip(axes, methods.items(), strict=True):
        axis.hist(metric.scale * scores, edges, color=colours[name], alpha=0.75)
        axis.axvline(metric.scale * scores.mean(), color="black", linewidth=1)
        axis.set_title(name, fontsize=8, loc="left", pad=2)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.set_yticks([])
    if logarithmic:
        readable_log(axes[-1].xaxis, low, high)
    axes[-1].set_xlabel(f"test {metric.label} of an episode (the line is the mean)")
    return png(figure)


def seeds(methods: Mapping[str, Array], colours: Mapping[str, str], metric: Metric) -> bytes:
    """Draw the finite test score of every seed, one row per method."""
    figure, axis = new_figure(WIDTH, 1.0 + 0.32 * len(methods))
    for place, (name, scores) in enumerate(methods.items()):
        shown = metric.scale * scores
        axis.scatter(shown, [place] * len(shown), color=colours[name], s=22, alpha=0.75, linewidths=0)
        if len(shown):
            axis.plot([shown.mean()] * 2, [place - 0.3, place + 0.3], color="black", linewidth=1.2)
    every = np.concatenate(list(methods.values())) * metric.scale
    if not metric.higher_is_better and every.min() > 0 and every.max() > 4 * every.min():
        readable_log(axis.xaxis, float(every.min()), float(every.max()))
    axis.set_yticks(range(len(methods)), list(methods))
    axis.set_ylim(len(methods) - 0.4, -0.6)
    axis.grid(axis="x", color="#dddddd", linewidth=0.6)
    axis.set_xlabel(f"test {metric.label} of each seed (the line is the mean)")
    return png(figure)


def summary_of(values: Mapping[str, float], metric: Metric) -> str:
    """Return values of methods in words, for text alternatives."""
    return ", ".join(f"{name} {'none' if math.isnan(value) else metric.text(value)}" for name, value in values.items())
