"""The pictures of a comparison."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from metarun.results.comparison.summary import Ranking, name_of
from metarun.results.plots import AGNOSTIC, FAMILY_COLOURS, blank_figure, readable_log, save_figure
from metarun.targets.metric import Metric

Panel = tuple[str, Metric, pd.DataFrame]
"""A setting in words, its metric and its table."""
LARGEST = 40
"""Rows of a panel that can still be read; a sweep may have hundreds."""


def short_names(rows: Iterable[pd.Series], width: int = 48) -> list[str]:
    """Return different names for rows; a long list of overrides would leave no room for the picture.

    Where names begin alike, what they share is left out.
    """
    words = [name_of(row).split() for row in rows]
    names = [shorten(" ".join(own), width, placeholder=" …") for own in words]
    for alike in equal_ones(names):
        shared = set.intersection(*(set(words[i]) for i in alike))
        for i in alike:
            differs = [word for word in words[i] if word not in shared]
            cut = shorten(" ".join([words[i][0], "…", *differs]), width - 4, placeholder=" …")
            names[i] = cut.replace("… …", "…")
    for alike in equal_ones(names):
        for number, i in enumerate(alike, 1):
            names[i] += f" #{number}"
    return names


def equal_ones(names: Sequence[str]) -> list[list[int]]:
    """Return the places of each name that occurs more than once."""
    repeated = [name for name, count in Counter(names).items() if count > 1]
    return [[i for i, own in enumerate(names) if own == name] for name in repeated]


def label_of(family: str) -> str:
    """Return the name of a family of algorithms in a legend."""
    return family if family == "baseline" else f"model-{family}"


def shown_rows(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows that are drawn: the first ones of each family where there are too many."""
    if len(table) <= LARGEST:
        return table
    kept = table.groupby("family", observed=True).head(LARGEST // table["family"].nunique())
    return kept.reset_index(drop=True)


def plot_comparison(path: Path, panels: Sequence[Panel]) -> None:
    """Plot one panel per setting: each row's score with its interval, the best of each family at the top.

    A thick line is the interval over seeds and episodes, a thin one that over the episodes of one model.
    """
    tables = [shown_rows(table) for _, _, table in panels]
    heights = [1.1 + 0.32 * len(table) for table in tables]
    figure = blank_figure(7.5, sum(heights) + 0.4)
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (title, metric, whole), table in zip(axes, panels, tables, strict=True):
        draw_comparison(axis, metric, table)
        more = "" if len(table) == len(whole) else f" ({len(table)} of {len(whole)} rows)"
        axis.set_title(title + more, fontsize=10, loc="left")
    save_figure(figure, path)


def draw_comparison(axis: Any, metric: Metric, table: pd.DataFrame) -> None:
    """The panel of one setting."""
    scale, rows = metric.scale, range(len(table))
    whole = table["method_ci95"].fillna(table["ci95"])
    for family, colour in FAMILY_COLOURS.items():
        chosen = [i for i in rows if table["family"].iloc[i] == family]
        if chosen:
            x = [scale * table["score"].iloc[i] for i in chosen]
            one = [scale * table["ci95"].iloc[i] for i in chosen]
            axis.errorbar(x, chosen, xerr=one, fmt="none", ecolor=colour, elinewidth=1, capsize=3, alpha=0.8)
            axis.plot(x, chosen, "o", color=colour, markersize=5, label=label_of(family))
            several = [i for i in chosen if not math.isnan(table["method_ci95"].iloc[i])]
            axis.hlines(
                several,
                [scale * (table["score"].iloc[i] - whole.iloc[i]) for i in several],
                [scale * (table["score"].iloc[i] + whole.iloc[i]) for i in several],
                color=colour,
                linewidth=3,
                alpha=0.45,
            )
    axis.set_yticks(list(rows), short_names(row for _, row in table.iterrows()))
    axis.set_ylim(len(table) - 0.4, -0.6)
    low = scale * (table["score"] - whole.where(whole > table["ci95"], table["ci95"])).min()
    high = scale * (table["score"] + whole).max()
    if not metric.higher_is_better and low > 0 and high > 4 * low:
        readable_log(axis.xaxis, low, high)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="x", color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    several_seeds = bool(table["method_ci95"].notna().any())
    # Three lines, since long names of methods leave a narrow axis, and what does not fit below it is cut.
    over = "over seeds and episodes (thick),\nof one model (thin)" if several_seeds else "over episodes"
    axis.set_xlabel(f"test {metric.label}\n95 % interval {over}", fontsize=9)
    axis.legend(frameon=False, fontsize=8)


def plot_costs(path: Path, panels: Sequence[Panel]) -> None:
    """Plot scores against training time and against the time of adaptation; a line joins what is worth its cost."""
    figure = blank_figure(10, 3.6 * len(panels))
    grid = figure.subplots(len(panels), 2, squeeze=False)
    costs = (
        ("train_seconds", "training of one model (s)", "pareto_training"),
        ("adapt_ms_per_task", "adaptation (ms per task)", "pareto_adaptation"),
    )
    for axes, (title, metric, table) in zip(grid, panels, strict=True):
        axes[0].set_title(title, fontsize=10, loc="left")
        for axis, (column, label, front) in zip(axes, costs, strict=True):
            draw_costs(axis, metric, table, column, front)
            axis.set_xlabel(label)
        axes[0].set_ylabel(f"test {metric.label}")
        axes[1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    save_figure(figure, path)


def draw_costs(axis: Any, metric: Metric, table: pd.DataFrame, column: str, front: str) -> None:
    """Scores against one cost."""
    drawn = table[table["score"].notna() & table[column].notna()]
    best = drawn[drawn[front]].sort_values(column)
    axis.plot(best[column], metric.scale * best["score"], color="#bbbbbb", linewidth=1, zorder=1)
    for family, colour in FAMILY_COLOURS.items():
        own = drawn[drawn["family"] == family]
        if len(own):
            axis.scatter(own[column], metric.scale * own["score"], color=colour, s=25, label=label_of(family), zorder=2)
    positive = drawn[column][drawn[column] > 0]
    if len(positive) and positive.max() > 4 * positive.min():
        readable_log(axis.xaxis, positive.min(), positive.max())
    scores = metric.scale * drawn["score"]
    if not metric.higher_is_better and len(drawn) and scores.min() > 0 and scores.max() > 4 * scores.min():
        readable_log(axis.yaxis, scores.min(), scores.max())
    axis.margins(x=0.2, y=0.12)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#eeeeee", linewidth=0.6)
    named = best.head(15) if len(drawn) > 15 else drawn
    rows = [row for _, row in named.iterrows()]
    places = [(row[column], metric.scale * row["score"]) for row in rows]
    label_apart(axis, [(*place, name) for place, name in zip(places, short_names(rows), strict=True)])


def label_apart(axis: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """Write a name next to each point, on the side where it covers no other name and fits, if there is one."""
    # In points of 1/72 inch; the layout may still move the axis a little.
    places = [tuple(axis.transData.transform((x, y)) * 72 / axis.figure.dpi) for x, y, _ in points]
    taken = [(x - 3, y - 3, x + 3, y + 3) for x, y in places]
    edge = 72 * axis.figure.get_figwidth()
    for (x, y, name), (across, up) in zip(points, places, strict=True):
        width = 4.6 * len(name)
        for dx, dy in ((5, 4), (5, -11), (-5 - width, 4), (-5 - width, -11)):
            box = (across + dx, up + dy, across + dx + width, up + dy + 9)
            covers = any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken)
            if not covers and box[0] > 0 and box[2] < edge:
                break
        taken.append(box)
        left = dx > 0
        at = {"xytext": (5 if left else -5, dy), "textcoords": "offset points", "ha": "left" if left else "right"}
        axis.annotate(name, (x, y), fontsize=8, **at)


def groups_without_difference(ranks: Sequence[float], critical: float) -> list[tuple[int, int]]:
    """Return the longest spans (first and last place) of rising ``ranks`` that are at most ``critical`` apart."""
    spans: list[tuple[int, int]] = []
    for first in range(len(ranks)):
        last = max(i for i in range(first, len(ranks)) if ranks[i] - ranks[first] <= critical)
        if last > first and (not spans or last > spans[-1][1]):
            spans.append((first, last))
    return spans


def plot_ranks(path: Path, ranking: Ranking) -> None:
    """Plot average ranks."""
    save_figure(rank_figure(ranking), path)


def rank_figure(ranking: Ranking) -> Figure:
    """Return average ranks as a figure; a bar joins algorithms closer than the critical difference."""
    count, ranks = len(ranking.algos), ranking.ranks
    spans = groups_without_difference(ranks, ranking.critical_difference)
    half = (count + 1) // 2
    height = 1.3 + 0.25 * len(spans) + 0.28 * half
    figure = blank_figure(7, height)
    axis = figure.add_subplot()
    bars = 0.35 * len(spans)
    for place, (algo, rank) in enumerate(zip(ranking.algos, ranks, strict=True)):
        left = place < half
        level = -bars - 0.5 - 0.5 * (place if left else count - 1 - place)
        edge = 0.6 if left else count + 0.4
        axis.plot([rank, rank, edge], [0, level, level], color="#777777", linewidth=0.9, clip_on=False)
        axis.text(
            edge + (-0.05 if left else 0.05),
            level,
            f"{algo}  {rank:.2f}" if left else f"{rank:.2f}  {algo}",
            ha="right" if left else "left",
            va="center",
        )
    for i, (first, last) in enumerate(spans):
        y = -0.3 - 0.35 * i
        axis.plot([ranks[first] - 0.03, ranks[last] + 0.03], [y, y], color=AGNOSTIC, linewidth=4)
    reach = min(ranking.critical_difference, count - 1)
    axis.plot([1, 1 + reach], [0.75, 0.75], color="black", linewidth=1.5, marker="|")
    cut = "" if reach == ranking.critical_difference else " (more than all ranks)"
    axis.text(1, 0.9, f"critical difference {ranking.critical_difference:.2f}{cut}", va="bottom", fontsize=9)
    axis.set(xlim=(0.5, count + 0.5), ylim=(-bars - 0.5 - 0.5 * half, 1.4))
    axis.set_xticks(range(1, count + 1))
    axis.spines[["left", "right", "bottom"]].set_visible(False)
    axis.spines["top"].set_position(("data", 0))
    axis.xaxis.set_ticks_position("top")
    axis.set_yticks([])
    axis.set_title(f"average rank over {ranking.settings} settings (1 is the best)", fontsize=10, loc="left")
    return figure
