"""Reports on test tasks besides scores: a table, a figure and a few lines."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from metarun.results.plots import AGNOSTIC, blank_figure, new_figure, save_figure
from metarun.system.files import write_csv
from metarun.targets.metric import Metric

COLOURS = (AGNOSTIC, "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
"""Colours of operations (Okabe and Ito 2008)."""


@dataclass(frozen=True)
class Measured:
    """Numbers of one replica's test tasks."""

    replica: int
    axes: Mapping[str, Sequence[str]]
    """The names along each axis after the first, which is that of the episodes."""
    value: Metric
    """What a measured number means."""
    numbers: Any
    """An array ``[episodes, …]``."""
    groups: Sequence[str]
    """The kind of each task; the same for all if the task family has only one kind."""
    matrix: bool = False
    """Whether the numbers of two axes are counts, which are summed over tasks and shown as a matrix."""


def write_measured(path: Path, measured: Sequence[Measured]) -> None:
    """Write one row per replica, episode and position on the axes; of a matrix one row per replica and position."""
    first = measured[0]
    if first.matrix:
        write_matrix(path, measured)
        return
    rows = []
    for one in measured:
        for index in np.ndindex(*one.numbers.shape):
            places = {name: labels[i] for (name, labels), i in zip(one.axes.items(), index[1:], strict=True)}
            row = {"episode": index[0], "group": one.groups[index[0]], **places}
            rows.append({**row, one.value.name: one.numbers[index], "replica": one.replica})
    write_csv(path, ("episode", "group", *first.axes, first.value.name, "replica"), rows)


def shares(measured: Measured) -> tuple[Any, Any]:
    """Return counts ``[rows, columns]`` over all tasks, and what share each is of its row; NaN in an empty row."""
    counts = measured.numbers.sum(0)
    totals = counts.sum(1, keepdims=True)
    return counts, np.divide(counts, totals, out=np.full(counts.shape, np.nan), where=totals > 0)


def write_matrix(path: Path, measured: Sequence[Measured]) -> None:
    """Write the count and the share of every position, summed over episodes."""
    (row_axis, row_names), (column_axis, column_names) = measured[0].axes.items()
    name, rows = measured[0].value.name, []
    for one in measured:
        counts, share = shares(one)
        for i, j in np.ndindex(*counts.shape):
            place = {row_axis: row_names[i], column_axis: column_names[j]}
            rows.append({**place, name: int(counts[i, j]), "share": share[i, j], "replica": one.replica})
    write_csv(path, (row_axis, column_axis, name, "share", "replica"), rows)


def winners(measured: Measured) -> dict[str, dict[str, Counter[str]]]:
    """Count, per name on the first axis and per group, how often each name on the second has the largest number."""
    (_, rows), (_, columns) = measured.axes.items()
    best = measured.numbers.argmax(-1)
    sound = np.isfinite(measured.numbers).all(-1)
    return {
        row: {
            group: Counter(
                columns[best[e, i]] if sound[e, i] else "diverged"
                for e, own in enumerate(measured.groups)
                if own == group
            )
            for group in dict.fromkeys(sorted(measured.groups))
        }
        for i, row in enumerate(rows)
    }


def mean_and_half_width(numbers: Any) -> tuple[Any, Any]:
    """Return the mean over episodes of ``numbers [episodes, ...]`` and the half-width of its 95 % interval.

    Episodes whose number is NaN, since they have nothing to measure there, are left out.
    """
    there = ~np.isnan(numbers)
    count = there.sum(0)
    # An infinite number, of an episode that has diverged, is not left out: it makes the mean infinite.
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(there, numbers, 0).sum(0) / count
        variance = np.square(np.where(there, numbers - mean, 0)).sum(0) / (count - 1)
        return mean, 1.96 * np.sqrt(variance / count)


def described(measured: Measured) -> list[str]:
    """Return human-readable lines."""
    if len(measured.axes) == 1:
        ((axis, names),) = measured.axes.items()
        means, _ = mean_and_half_width(measured.numbers)
        shown = [i for i in range(len(names)) if i < 2 or (i + 1) % 5 == 0 or i == len(names) - 1]
        values = ", ".join(f"{names[i]}: {measured.value.text(means[i])}" for i in shown)
        return [f"{measured.value.name} by {axis}   {values}"]
    if measured.matrix:
        counts, share = shares(measured)
        (row_axis, names), _ = measured.axes.items()
        return [
            f"{row_axis} {name}   {100 * share[i, i]:.1f} % of {counts[i].sum():.0f} correct"
            for i, name in enumerate(names)
            if counts[i].sum() > 0
        ]
    return [
        f"{row}, {group or 'all tasks'}: " + ", ".join(f"{name} {n}" for name, n in counts.most_common())
        for row, by_group in winners(measured).items()
        for group, counts in by_group.items()
    ]


def plot_measured(path: Path, title: str, measured: Measured) -> None:
    """Plot means with 95 % intervals for one axis; for two, how often each name of the second has the most."""
    if len(measured.axes) == 1:
        ((axis_name, names),) = measured.axes.items()
        figure, axis = new_figure()
        scale = measured.value.scale
        mean, half_width = mean_and_half_width(measured.numbers)
        axis.errorbar(names, scale * mean, yerr=scale * half_width, color=AGNOSTIC, marker="o", markersize=4, capsize=2)
        axis.set(title=title, xlabel=axis_name, ylabel=f"test {measured.value.label}")
        save_figure(figure, path)
        return
    if measured.matrix:
        plot_matrix(path, title, measured)
        return
    (row_axis, rows), (column_axis, columns) = measured.axes.items()
    found = winners(measured)
    figure = blank_figure(1.2 + 2.4 * max(len(rows), 2), 3.6)
    panels = figure.subplots(1, len(rows), squeeze=False, sharey=True)[0]
    for panel, row in zip(panels, rows, strict=True):
        labels = [group or "all tasks" for group in found[row]]
        below = np.zeros(len(labels))
        for colour, name in zip(cycle(COLOURS), columns, strict=False):
            share = np.array([100 * counts[name] / max(counts.total(), 1) for counts in found[row].values()])
            panel.bar(labels, share, bottom=below, color=colour, label=name, width=0.7)
            below += share
        panel.set_title(f"{row_axis} {row}", fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_xlabel("kind of task" if any(measured.groups) else "")
    panels[0].set_ylabel("test tasks (%)")
    panels[-1].legend(title=column_axis, frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(title)
    save_figure(figure, path)


MOST_WRITTEN = 12
"""Number of rows of a matrix up to which the shares are written into its cells."""


def plot_matrix(path: Path, title: str, measured: Measured) -> None:
    """Plot the share that each position has of its row, as shades of one colour."""
    (row_axis, rows), (column_axis, columns) = measured.axes.items()
    _, share = shares(measured)
    side = 1.8 + 0.45 * max(len(rows), len(columns), 4)
    figure = blank_figure(side + 1, side)
    axis = figure.subplots()
    image = axis.imshow(100 * share, cmap="Blues", vmin=0, vmax=100)
    axis.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
    axis.set_yticks(range(len(rows)), rows)
    axis.set(title=title, xlabel=column_axis, ylabel=row_axis)
    if len(rows) <= MOST_WRITTEN:
        for i, j in np.ndindex(*share.shape):
            if np.isfinite(share[i, j]):
                colour = "white" if share[i, j] > 0.6 else "black"
                axis.text(j, i, f"{100 * share[i, j]:.0f}", ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(image, label=f"share of the {row_axis} (%)")
    save_figure(figure, path)
