"""What an algorithm shows of test tasks beside its score: a table, a picture and a few lines for people."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from metarun.results.files import write_csv
from metarun.results.plots import AGNOSTIC, axis_label, axis_scale, new_figure, save_figure
from metarun.results.tables import format_score

COLOURS = (AGNOSTIC, "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
"""Colours of operations (Okabe and Ito 2008)."""


@dataclass(frozen=True)
class Observed:
    """Numbers of one replica's test tasks."""

    replica: int
    axes: Mapping[str, Sequence[str]]
    """The names along each axis behind the first, which is the episodes'."""
    value: str
    """What a number means."""
    numbers: Any
    """An array ``[episodes, …]``."""
    groups: Sequence[str]
    """The kind of each task; the same for all if the task family has only one kind."""


def write_observed(path: Path, observed: Sequence[Observed]) -> None:
    """A row for each replica, episode and place of the axes."""
    first = observed[0]
    rows = []
    for one in observed:
        for index in np.ndindex(*one.numbers.shape):
            places = {name: labels[i] for (name, labels), i in zip(one.axes.items(), index[1:], strict=True)}
            row = {"episode": index[0], "group": one.groups[index[0]], **places}
            rows.append({**row, one.value: one.numbers[index], "replica": one.replica})
    write_csv(path, ("episode", "group", *first.axes, first.value, "replica"), rows)


def winners(observed: Observed) -> dict[str, dict[str, Counter[str]]]:
    """For each name along the first axis and each group: how often which name along the second has the most."""
    (_, rows), (_, columns) = observed.axes.items()
    best = observed.numbers.argmax(-1)
    sound = np.isfinite(observed.numbers).all(-1)
    return {
        row: {
            group: Counter(
                columns[best[e, i]] if sound[e, i] else "diverged"
                for e, own in enumerate(observed.groups)
                if own == group
            )
            for group in dict.fromkeys(sorted(observed.groups))
        }
        for i, row in enumerate(rows)
    }


def described(observed: Observed) -> list[str]:
    """Lines for people."""
    if len(observed.axes) == 1:
        ((axis, names),) = observed.axes.items()
        means = observed.numbers.mean(0)
        shown = [i for i in range(len(names)) if i < 2 or (i + 1) % 5 == 0 or i == len(names) - 1]
        values = ", ".join(f"{names[i]}: {format_score(means[i], observed.value)}" for i in shown)
        return [f"{observed.value} by {axis}   {values}"]
    return [
        f"{row}, {group or 'all tasks'}: " + ", ".join(f"{name} {n}" for name, n in counts.most_common())
        for row, by_group in winners(observed).items()
        for group, counts in by_group.items()
    ]


def plot_observed(path: Path, title: str, observed: Observed) -> None:
    """One axis: means with their 95 % intervals. Two: the share of tasks in which a name of the second has the most."""
    if len(observed.axes) == 1:
        ((axis_name, names),) = observed.axes.items()
        figure, axis = new_figure()
        scale = axis_scale(observed.value)
        spread = 1.96 * observed.numbers.std(0, ddof=1) / len(observed.numbers) ** 0.5
        mean = observed.numbers.mean(0)
        axis.errorbar(names, scale * mean, yerr=scale * spread, color=AGNOSTIC, marker="o", markersize=4, capsize=2)
        axis.set(title=title, xlabel=axis_name, ylabel=f"test {axis_label(observed.value)}")
        save_figure(figure, path)
        return
    (row_axis, rows), (column_axis, columns) = observed.axes.items()
    found = winners(observed)
    figure = Figure(figsize=(1.2 + 2.4 * max(len(rows), 2), 3.6), layout="constrained")
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
        panel.set_xlabel("kind of task" if any(observed.groups) else "")
    panels[0].set_ylabel("test tasks (%)")
    panels[-1].legend(title=column_axis, frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(title)
    save_figure(figure, path)
