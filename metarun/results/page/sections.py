"""The sections of a report: one per setting, and the average ranks."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from urllib.parse import quote

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from metarun.results.compare import Compared, Comparison
from metarun.results.comparison import printing
from metarun.results.comparison.pictures import draw_comparison, draw_costs, rank_figure, short_names, shown_rows
from metarun.results.comparison.reading import flat
from metarun.results.comparison.summary import best_first, cached_scores, name_of, per_seed
from metarun.results.page import html, pictures
from metarun.results.page.html import Cell
from metarun.results.plots import blank_figure
from metarun.results.status import loaded
from metarun.system.terminal import printable

Array = NDArray[np.float64]
MOST_KEYS = 60
"""Keys of the configuration that are shown; what differs in more than these cannot be read anyway."""


def link_to(target: str | Path, out: Path) -> str:
    """Return a relative address of a file or folder, as seen from the page ``out``."""
    # As bytes, because a name need not be text.
    return quote(os.fsencode(Path(os.path.relpath(target, out.parent)).as_posix()))


def shown_methods(one: Compared, most: int) -> list[pd.Series]:
    """Return the methods that pictures show: the best ones by validation if there are too many."""
    keys = best_first(one.table, "val_score").fillna(math.inf)
    kept = set(keys.sort_values(kind="stable").index[:most])
    return [row for index, row in one.table.iterrows() if index in kept]


def table_of(path: Path, columns: Sequence[str]) -> pd.DataFrame | None:
    """Return a table of numbers, with the column ``replica``; None if it is missing or damaged."""
    try:
        table = pd.read_csv(path, low_memory=False)
        table = table if "replica" in table else table.assign(replica=0)
        return table[[*columns, "replica"]].astype(float)
    except (OSError, ValueError, TypeError, KeyError, pd.errors.ParserError):
        return None


def training_lines(row: pd.Series, x: str) -> list[tuple[Array, Array]]:
    """Return the validation scores of every run of a method over a column of ``metrics.csv``."""
    lines = []
    for directory, number, _ in row["replicas"]:
        table = table_of(Path(directory) / "metrics.csv", [x, "val_score"])
        if table is not None:
            own = table[(table["replica"] == number) & table["val_score"].notna()]
            if len(own) > 1:
                lines.append((own[x].to_numpy(), own["val_score"].to_numpy()))
    return lines


def adaptation_lines(row: pd.Series) -> list[tuple[Array, Array]]:
    """Return the mean test score of every run of a method over adaptation steps."""
    lines = []
    for directory, number, _ in row["replicas"]:
        table = table_of(Path(directory) / "episodes.csv", ["adapt_step", "score"])
        if table is not None:
            means = table[table["replica"] == number].groupby("adapt_step")["score"].mean()
            if len(means) > 1:
                lines.append((means.index.to_numpy(), means.to_numpy()))
    return lines


def pictures_of(one: Compared) -> list[str]:
    """Return the pictures of a setting as HTML. What has no numbers has no picture."""
    rows = shown_methods(one, pictures.MOST)
    metric, found = one.metric, list[str]()
    named = dict(zip(short_names(rows, 40), rows, strict=True))
    colours = dict(zip(named, pictures.COLOURS, strict=False))
    some = (
        "" if len(rows) == len(one.table) else f" The {len(rows)} methods of {len(one.table)} with the best validation."
    )
    for lines, x, what in (
        ({name: training_lines(row, "step") for name, row in named.items()}, "meta-step", "over training"),
        (
            {name: training_lines(row, "seconds") for name, row in named.items()},
            "seconds of training",
            "over the time of training",
        ),
        ({name: adaptation_lines(row) for name, row in named.items()}, "adaptation step", "over adaptation"),
    ):
        drawn = {name: own for name, own in lines.items() if own}
        if drawn:
            kind = "test" if x == "adaptation step" else "validation"
            last = {name: float(np.mean([y[-1] for _, y in own])) for name, own in drawn.items()}
            alternative = f"{kind} {metric.name} {what}. Last values: {pictures.summary_of(last, metric)}."
            caption = f"{kind.capitalize()} {metric.label} {what}; a thin line per run.{some}"
            picture = pictures.curves(drawn, colours, metric, x, f"{kind} {metric.label}")
            found.append(html.figure(picture, alternative, caption))
    scores = {name: finite(episode_scores(row)) for name, row in named.items()}
    scores = {name: own for name, own in scores.items() if len(own)}
    if scores:
        medians = {name: float(np.median(own)) for name, own in scores.items()}
        alternative = (
            f"Histograms of the test {metric.name} of episodes. Medians: {pictures.summary_of(medians, metric)}."
        )
        caption = f"How the test {metric.name} of episodes is distributed.{some}"
        found.append(html.figure(pictures.histograms(scores, colours, metric), alternative, caption))
    by_seed = {name: finite(per_seed(runs_of(one, row), "score").to_numpy(float)) for name, row in named.items()}
    if any(len(own) > 1 for own in by_seed.values()):
        spread = {name: float(own.std(ddof=1)) if len(own) > 1 else math.nan for name, own in by_seed.items()}
        alternative = f"Test {metric.name} of each seed. Standard deviations: {pictures.summary_of(spread, metric)}."
        found.append(html.figure(pictures.seeds(by_seed, colours, metric), alternative, f"Spread over seeds.{some}"))
    return found


def finite(numbers: Array) -> Array:
    """Return the numbers that a picture can show."""
    return numbers[np.isfinite(numbers)]


def episode_scores(row: pd.Series) -> Array:
    """Return the final scores of all test episodes of a method, over all its runs."""
    found = [cached_scores(directory).get(number, {}).get("score") for directory, number, _ in row["replicas"]]
    there = [scores for scores in found if scores is not None]
    return np.concatenate(there) if there else np.zeros(0)


def runs_of(one: Compared, row: pd.Series) -> pd.DataFrame:
    """Return the runs of a method."""
    runs = one.runs
    return runs[(runs["algo"] == row["algo"]) & (runs["model"] == row["model"]) & (runs["variant"] == row["variant"])]


def overview(one: Compared) -> list[str]:
    """Return the two pictures of a comparison that a setting has."""
    metric, table = one.metric, shown_rows(one.drawable)
    figure = blank_figure(pictures.WIDTH, 1.3 + 0.3 * len(table))
    draw_comparison(figure.subplots(), metric, table)
    scores = {name_of(row): float(row["score"]) for _, row in table.head(20).iterrows()}
    first = html.figure(
        pictures.png(figure),
        f"Test {metric.name} of every method with its interval: {pictures.summary_of(scores, metric)}.",
        f"Test {metric.label} with 95 % intervals.",
    )
    figure = blank_figure(pictures.WIDTH, pictures.HEIGHT)
    axis = figure.subplots()
    draw_costs(axis, metric, one.drawable, "train_seconds", "pareto_training")
    axis.set(xlabel="training of one model (s)", ylabel=f"test {metric.label}")
    pictures.legend(figure, axis)
    text = printing.worth_its_cost(one.table) or "There is one method only."
    second = html.figure(pictures.png(figure), f"Test {metric.name} against training time. {text}", "Score and cost.")
    return [first, second]


def sort_value(text: str, row: pd.Series, name: str) -> float | None:
    """Return the number by which a cell is sorted; None for text."""
    value = row.get(name)
    if isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool):
        return float(value)
    if name in row["further"]:
        return float(row["further"][name][0])
    return None if name in ("family", "algo") else math.nan


def method_table(one: Compared) -> str:
    """Return the table of methods."""
    columns = printing.columns_of(one.table, one.metric)
    # The first column stays in sight on a narrow screen.
    columns = {"algo": columns["algo"], **columns}
    rows = [
        [Cell(text := function(row), sort_value(text, row, name)) for name, (_, function) in columns.items()]
        for _, row in one.table.iterrows()
    ]
    return html.table([header for header, _ in columns.values()], rows, f"Methods: {one.title}")


def run_table(one: Compared, out: Path) -> str:
    """Return the table of runs, with links to their folders and pictures."""
    header = ["run", "algorithm", "seed", one.metric.name, "validation", "tested step", "training", "device", "engine"]
    rows = []
    for _, run in one.runs.sort_values(["algo", "variant", "seed"]).iterrows():
        folder = Path(run["directory"])
        metric = one.metric
        rows.append(
            [
                Cell(run["run"] or folder.name, link=link_to(folder, out)),
                Cell(name_of(run)),
                Cell(f"{run['seed']:.0f}", float(run["seed"])),
                Cell(metric.interval(run["score"], run["ci95"]), float(run["score"])),
                Cell(metric.text(run["val_score"]), float(run["val_score"])),
                Cell(printing.whole(run["selected_step"]), float(run["selected_step"])),
                Cell(printing.seconds(run["train_seconds"]), float(run["train_seconds"])),
                Cell(run["device"]),
                Cell(run["engine"]),
            ]
        )
    return html.table(header, rows, f"Runs: {one.title}")


def configurations(one: Compared) -> str:
    """Return the table of the keys in which methods differ; empty if none differ or no configuration can be read."""
    by_method: dict[str, dict[str, set[str]]] = {}
    for _, row in one.table.iterrows():
        own: dict[str, set[str]] = {}
        for directory in dict.fromkeys(directory for directory, *_ in row["replicas"]):
            config = loaded(Path(directory) / ".hydra" / "config.yaml")
            for key, value in flat(config).items() if isinstance(config, dict) else ():
                own.setdefault(printable(key), set()).add(printable(value))
        if own:
            by_method[name_of(row)] = own
    keys = sorted(set().union(*by_method.values()) - {"seed", "data_dir", "resume"}) if by_method else []
    values = {key: [", ".join(sorted(own.get(key, ()))) for own in by_method.values()] for key in keys}
    different = [key for key in keys if len(set(values[key])) > 1 and not key.endswith("_target_")]
    if not different:
        return ""
    rows = [[Cell(key), *(Cell(shorten(text, 80, placeholder=" …")) for text in values[key])] for key in different]
    more = len(rows) - MOST_KEYS
    note = html.paragraph(f"{more} more keys differ.", "pale") if more > 0 else ""
    return html.table(["key", *by_method], rows[:MOST_KEYS], f"Configurations: {one.title}") + note


def section(one: Compared, number: int, out: Path) -> list[str]:
    """Return everything on one setting."""
    printed = printing.markdown(printing.printed_table(one.table, one.metric))
    marks = printing.footnotes(one.table, printed).splitlines()
    differ = configurations(one)
    return [
        html.heading(2, one.title, f"setting{number}"),
        html.paragraph(printing.sentence(one.families, one.table, one.metric), "verdict"),
        html.paragraph(printing.worth_its_cost(one.table)) if len(one.table) > 1 else "",
        html.heading(3, "Methods"),
        method_table(one),
        *(html.paragraph(mark, "pale") for mark in marks),
        html.heading(3, "Pictures"),
        html.side_by_side([*overview(one), *pictures_of(one)]),
        html.heading(3, "Runs"),
        run_table(one, out),
        *([html.heading(3, "Where the configurations differ"), differ] if differ else []),
    ]


def ranks(comparison: Comparison) -> list[str]:
    """Return the average ranks over settings, if there are any."""
    ranking = comparison.ranking
    if ranking is None:
        return []
    title, *text = printing.ranks_text(ranking).removeprefix("## ").split("\n\n")
    caption = "A bar joins algorithms whose average ranks do not differ at the level of 5 %."
    picture = html.figure(pictures.png(rank_figure(ranking)), " ".join(text), caption)
    return [html.heading(2, title, "ranks"), *(html.paragraph(one) for one in text), picture]
