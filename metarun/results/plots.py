"""The figures of a run, and what all figures share.

matplotlib takes half a second to import, so the functions that draw import it: a run leaves drawing to another process
(`metarun.results.drawer`).
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metarun.system.files import atomic_write
from metarun.targets.metric import Metric

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AGNOSTIC, DEPENDENT, BASELINE = "#0072B2", "#D55E00", "#777777"
FAMILY_COLOURS = {"agnostic": AGNOSTIC, "dependent": DEPENDENT, "baseline": BASELINE}
"""Colours that colour-blind readers can distinguish (Okabe and Ito 2008)."""


def blank_figure(width: float, height: float) -> "Figure":
    """Return an empty figure, in inches."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    # Names come from data, so a dollar sign in a name does not begin a formula.
    rcParams["text.parse_math"] = False
    return Figure(figsize=(width, height), layout="constrained")


def plain_axis(axis: Any) -> None:
    """Remove the upper and right sides of the frame, and draw pale grid lines."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)


def new_figure(width: float = 6.4, height: float = 4.0) -> "tuple[Figure, Any]":
    """A figure with one axis."""
    figure = blank_figure(width, height)
    axis = figure.add_subplot()
    plain_axis(axis)
    return figure, axis


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a PNG atomically."""
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=150)


def plain(value: float, position: int | None = None) -> str:
    """Return a number of an axis without a power of ten, unless it would be long."""
    return f"{value:,.0f}" if 1000 <= value < 1e6 else f"{value:g}".replace("e-0", "e-").replace("e+0", "e+")


def readable_log(axis: Any, low: float, high: float) -> None:
    """Make an x or y axis that shows numbers from ``low`` to ``high`` logarithmic, and label it with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    decades = math.log10(high / low) if low > 0 else math.inf
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2.5 else (1.0,), numticks=12))
    axis.set_major_formatter(FuncFormatter(plain))
    axis.set_minor_formatter(NullFormatter())


Curve = tuple[str, Sequence[Mapping[str, float | int]], int]
"""How a replica differs from the others, its rows of ``metrics.csv``, and the step that was tested."""


def plot_training(path: Path, title: str, metric: Metric, curves: Sequence[Curve]) -> None:
    """Plot scores over meta-training and the tested step; for several replicas only the validation scores."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure, axis = new_figure()
    scale = metric.scale
    one = len(curves) == 1
    for number, (differs, rows, selected_step) in enumerate(curves):
        colour = replica_colour(number, len(curves))
        for column, label, own_colour, marker in (
            ("train_score", "training tasks", "#999999", ""),
            ("val_score", "validation tasks" if one else differs, colour, "o"),
        )[0 if one else 1 :]:
            points = [(row["step"], scale * row[column]) for row in rows if column in row and row["step"] > 0]
            points = [(x, y) for x, y in points if math.isfinite(y)]
            if points:
                axis.plot(*zip(*points, strict=True), label=label, color=own_colour, marker=marker, markersize=4)
        if one:
            axis.axvline(selected_step, color=DEPENDENT, linestyle=":", label=f"tested: step {selected_step}")
    scores = [y for line in axis.lines[: -1 if one else None] for y in line.get_ydata()]
    if not metric.higher_is_better and scores and 0 < 4 * min(scores) < max(scores):
        readable_log(axis.yaxis, min(scores), max(scores))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axis.xaxis.set_major_formatter(FuncFormatter(plain))
    what = metric.label if one else f"validation {metric.label}"
    axis.set(title=title, xlabel="meta-step", ylabel=what)
    axis.legend(frameon=False, fontsize=None if one else 8)
    save_figure(figure, path)


def replica_colour(number: int, count: int) -> Any:
    """Return the colour of one of several lines, or the usual colour for a single line."""
    from matplotlib import colormaps

    return AGNOSTIC if count == 1 else colormaps["viridis"](number / count)


Lines = Sequence[tuple[str, Sequence[float], Sequence[float]]]
"""For each replica what it differs in, means along adaptation and half-widths of their intervals."""


def plot_adaptation(path: Path, title: str, adapt_steps: Sequence[int], panels: Sequence[tuple[Metric, Lines]]) -> None:
    """Plot the test scores along adaptation with their 95 % confidence intervals over episodes, a panel per metric.

    Args:
        path: path of the PNG.
        title: title of the figure.
        adapt_steps: adaptation steps that were scored.
        panels: each metric with its lines.
    """
    figure = blank_figure(6.4 * len(panels), 4.0)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (metric, lines) in zip(axes, panels, strict=True):
        plain_axis(axis)
        draw_adaptation(axis, metric, adapt_steps, lines)
    if len(panels) == 1:
        axes[0].set_title(title)
    else:
        figure.suptitle(title)
    save_figure(figure, path)


def draw_adaptation(axis: Any, metric: Metric, adapt_steps: Sequence[int], lines: Lines) -> None:
    """The panel of one metric."""
    scale = metric.scale
    for number, (differs, means, cis) in enumerate(lines):
        colour = replica_colour(number, len(lines))
        y = [scale * value for value in means]
        low = [scale * (m - c) for m, c in zip(means, cis, strict=True)]
        high = [scale * (m + c) for m, c in zip(means, cis, strict=True)]
        axis.errorbar(
            adapt_steps,
            y,
            yerr=[scale * c for c in cis],
            color=colour,
            marker="o",
            markersize=4,
            capsize=2,
            linewidth=1,
            label=differs,
        )
        axis.fill_between(adapt_steps, low, high, color=colour, alpha=0.15, linewidth=0)
        if len(adapt_steps) == 1:
            axis.annotate(f"{y[0]:.4g}", (adapt_steps[0], y[0]), xytext=(8, 0), textcoords="offset points", va="center")
    if len(adapt_steps) == 1:
        axis.set_xlim(adapt_steps[0] - 1, adapt_steps[0] + 1)
        axis.set_xticks(list(adapt_steps), ["after the support set"])
    elif len(adapt_steps) <= 12:
        axis.set_xticks(list(adapt_steps))
    if len(lines) > 1:
        axis.legend(frameon=False, fontsize=8)
    axis.set(xlabel="adaptation step", ylabel=f"test {metric.label}")
