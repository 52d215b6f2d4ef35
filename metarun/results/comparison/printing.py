"""Tables and sentences of a comparison, for terminals, Markdown and LaTeX."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from metarun.errors import UserError
from metarun.results.comparison.reading import FAMILIES
from metarun.results.comparison.summary import OBJECTS, FamilyDifference, Ranking, name_of
from metarun.targets.metric import Metric

Cell = Callable[[pd.Series], str]
Rows = list[list[str]]
SHOWN = 25
"""How many runs that were left out are named in the printed text."""


def setting_title(setting: Mapping[str, Any]) -> str:
    """Return a setting in words."""
    ways = "" if pd.isna(setting["ways"]) else f"{setting['ways']:.0f}-way "
    return f"{setting['task']} ({setting['dataset']}), {ways}{setting['shots']:.0f}-shot, {setting['metric']}"


def seconds(value: float) -> str:
    """Return a duration in human-readable form."""
    if math.isnan(value):
        return "–"
    return f"{value:.0f} s" if value < 600 else f"{value / 60:.0f} min"


def whole(value: float) -> str:
    """Return a number without decimals."""
    return "–" if math.isnan(value) else f"{value:.0f}"


def probability(p: float) -> str:
    """Return a p-value in human-readable form."""
    return "is not defined" if math.isnan(p) else "< 0.001" if p < 0.001 else f"= {p:.3f}"


def main_interval(row: pd.Series, metric: Metric) -> str:
    """Return the score with the interval of the method, or with that of the one model, which is marked."""
    if row["seeds"] == 1:
        return metric.interval(row["score"], row["ci95"]) + ("" if row["about_method"] else " (m)")
    return metric.interval(row["score"], row["method_ci95"]) + ("" if row["from_episodes"] else " (s)")


def against_cell(row: pd.Series, metric: Metric) -> str:
    """Return the difference from the reference with its marks."""
    if name_of(row) == row["reference"] or math.isnan(row["against"]):
        return ""
    sign = "" if row["against"] < 0 else "+"
    marks = ("*" if row["against_p"] <= 0.05 else "") + ("" if row["against_methods"] else " (m)")
    return (
        sign + metric.interval(row["against"], row["against_ci95"]) + marks + ("" if row["against_paired"] else " (u)")
    )


def columns_of(table: pd.DataFrame, metric: Metric) -> dict[str, tuple[str, Cell]]:
    """Return header and text of the cells of every column that is printed, by the column's name."""
    columns: dict[str, tuple[str, Cell]] = {
        "family": ("family", lambda row: FAMILIES[row["family"]]),
        "algo": ("algorithm", lambda row: name_of(row) + (" (t)" if row["transductive"] else "")),
        "score_before": ("before", lambda row: metric.text(row["score_before"])),
        "adapt_steps": ("steps", lambda row: whole(row["adapt_steps"])),
        "score": (f"{metric.name} ± CI95", lambda row: main_interval(row, metric)),
    }
    if "against" in table and table["against"].notna().any():
        columns |= {
            "against": (f"− {table['reference'].iloc[0]}", lambda row: against_cell(row, metric)),
            "against_d": ("d", lambda row: "" if math.isnan(row["against_d"]) else f"{row['against_d']:+.2f}"),
            "against_better": (
                "better on",
                lambda row: "" if math.isnan(row["against_better"]) else f"{100 * row['against_better']:.0f} %",
            ),
        }
    columns |= {
        "seeds": ("seeds", lambda row: str(row["seeds"])),
        "ci95": ("± one model", lambda row: metric.text(row["ci95"])),
        "seed_std": ("std over seeds", lambda row: metric.text(row["seed_std"])),
        "train_seconds": ("training", lambda row: seconds(row["train_seconds"])),
        "adapt_ms_per_task": (
            "ms/task",
            lambda row: "–" if math.isnan(row["adapt_ms_per_task"]) else f"{row['adapt_ms_per_task']:.2f}",
        ),
        "meta_parameters": ("meta-learned", lambda row: whole(row["meta_parameters"])),
        "adapted_parameters": ("adapted", lambda row: whole(row["adapted_parameters"])),
    }
    for other in {other.name: other for metrics in table["metrics"] for other in metrics[1:]}.values():
        columns[other.name] = (f"{other.name} ± CI95", further_cell(other))
    return columns


def further_table(table: pd.DataFrame) -> Rows:
    """Return header and rows of the differences from the reference in the metrics besides the first; none: empty."""
    if "further_against" not in table:
        return []
    metrics = {other.name: other for metrics in table["metrics"] for other in metrics[1:]}
    shown = [other for name, other in metrics.items() if any(name in found for found in table["further_against"])]

    def cell(row: pd.Series, metric: Metric) -> str:
        if metric.name not in row["further_against"]:
            return ""
        difference, half_width = row["further_against"][metric.name]
        sign = "" if difference < 0 else "+"
        return sign + metric.interval(difference, half_width) + ("" if row["against_methods"] else " (m)")

    rows = [
        [name_of(row), *(cell(row, other) for other in shown)] for _, row in table.iterrows() if row["further_against"]
    ]
    return [[f"− {table['reference'].iloc[0]}", *(other.name for other in shown)], *rows] if rows else []


def further_cell(metric: Metric) -> Cell:
    """Return the function for the cells of a metric besides the first."""
    return lambda row: metric.interval(*row["further"][metric.name]) if metric.name in row["further"] else ""


def plain_cell(name: str) -> Cell:
    """Return the function for the cells of a column that is not printed unless it is asked for."""

    def cell(row: pd.Series) -> str:
        value = row[name]
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return cell


def printed_table(table: pd.DataFrame, metric: Metric, wanted: Sequence[str] = ()) -> Rows:
    """Return header and rows of the printed table, with all columns or those ``wanted``.

    Raises:
        UserError: there is no column of that name.
    """
    columns = columns_of(table, metric)
    for name in wanted:
        if name not in columns and (name not in table or name in OBJECTS):
            known = [*columns, *(c for c in table if c not in columns and c not in OBJECTS)]
            raise UserError(f"--columns: there is no column {name}; take any of {', '.join(known)}.")
    shown = [columns.get(name, (name, plain_cell(name))) for name in wanted or columns]
    return [[header for header, _ in shown], *([cell(row) for _, cell in shown] for _, row in table.iterrows())]


def markdown(rows: Rows) -> str:
    """Return a Markdown table that is also readable as plain text."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


LATEX = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"±": r"$\pm$", "−": "$-$", "–": "--", "<": "$<$", ">": "$>$", "·": r"$\cdot$", "…": r"\dots{}"},
}


def latex(rows: Rows, caption: str) -> str:
    """Return a table for the package booktabs."""
    escaped = [["".join(LATEX.get(sign, sign) for sign in cell) for cell in row] for row in [*rows, [caption]]]
    *rows, [caption] = escaped
    lines = [" & ".join(row) + r" \\" for row in rows]
    return "\n".join(
        [
            r"\begin{table}",
            rf"\caption{{{caption}}}",
            rf"\begin{{tabular}}{{{'ll' + 'r' * (len(rows[0]) - 2)}}}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )


def footnotes(table: pd.DataFrame, printed: str) -> str:
    """Return what the marks in the printed table mean."""
    compared = "against" in table and bool(table["against"].notna().any())
    notes = {
        " (m)": "(m): for these trained models alone, for want of several seeds.",
        " (s)": "(s): the scores of the episodes are missing, so the interval is wider than it need be.",
        " (t)": "(t): queries are normalised together (transductive).",
        " (u)": "(u): not paired, for want of common test episodes.",
    }
    found = [note for mark, note in notes.items() if mark in printed]
    few = table["different_tests"].min()
    if not math.isnan(few):
        others = (
            f"intervals over seeds and intervals of differences are over these {few:.0f}, ± one model and (m) over "
            "their episodes"
        )
        found.append(
            f"The test episodes are of {'one task' if few == 1 else of_tasks(few)}: "
            + ("no interval says anything about other tasks." if few == 1 else f"{others}.")
        )
    if compared and "*" in printed:
        count = int(table["against_p"].notna().sum())
        found.insert(
            0, f"*: differs from {table['reference'].iloc[0]} at the level of 5 % (Holm, {count} comparisons)."
        )
    return "".join(f"{note}\n" for note in found)


def sentence(difference: FamilyDifference | None, table: pd.DataFrame, metric: Metric) -> str:
    """Return the sentence that compares the two families."""
    if difference is None:
        missing = [FAMILIES[f] for f in ("agnostic", "dependent") if f not in set(table["family"])]
        return f"Families: no {' and no '.join(missing)} run in this setting, so there is nothing to compare."
    d = difference
    better = (d.difference > 0) == bool(table["higher_is_better"].iloc[0])
    winner = "model-dependent" if better else "model-agnostic"
    about = "" if d.about_methods else ", for these trained models"
    verdict = f"{winner} is better{about}"
    if not math.isfinite(d.difference) or math.isnan(d.ci95):
        verdict = "no verdict, since a score is not a number"
    elif abs(d.difference) <= d.ci95:
        verdict = f"no difference beyond the interval{about}"
    value = metric.interval(d.difference, d.ci95)
    size = "" if math.isnan(d.effect_size) else f" (d = {d.effect_size:+.2f})"
    return (
        f"Families (best of each by validation): {d.dependent} (model-dependent) − {d.agnostic} (model-agnostic) = "
        f"{value}{size}: {verdict}. {how_compared(d)}"
    )


def of_tasks(count: float) -> str:
    """Return the number of different tasks in words."""
    return "one task, and says nothing about others" if count == 1 else f"{count:.0f} different tasks"


def how_compared(d: FamilyDifference) -> str:
    """Return what the difference of the two families is taken over."""
    few = "" if math.isnan(d.different_tests) else f" of {of_tasks(d.different_tests)}"
    if not d.paired:
        how = "It is not paired: the runs lack common test episodes"
    elif d.about_methods:
        by = "both" if d.paired_seeds else "episodes"
        how = f"It is over seeds and {d.n_episodes} episodes{few}, paired by {by}"
    else:
        how = f"It is paired on {d.n_episodes} episodes{few}"
    choice = f"; the interval allows for the choice among {d.candidates} pairs" if d.candidates > 1 else ""
    return f"{how}{choice}."


def worth_its_cost(table: pd.DataFrame) -> str:
    """Return the sentence on methods that no other beats at lower cost; empty for a single row."""
    if len(table) < 2:
        return ""
    found = []
    for mark, column, text in (
        ("pareto_training", "train_seconds", seconds),
        ("pareto_adaptation", "adapt_ms_per_task", lambda value: f"{value:.2f} ms/task"),
    ):
        rows = table[table[mark]].sort_values(column)
        if len(rows):
            names = ", ".join(f"{name_of(row)} ({text(row[column])})" for _, row in rows.iterrows())
            found.append(f"in {'training' if mark == 'pareto_training' else 'adaptation'}, {names}")
    return f"Worth the cost, as none is both better and faster: {'; '.join(found)}." if found else ""


def ranks_text(ranking: Ranking | None) -> str:
    """Return the average ranks in words; empty if there are none."""
    if ranking is None:
        return ""
    names = ", ".join(f"{algo} {rank:.2f}" for algo, rank in zip(ranking.algos, ranking.ranks, strict=True))
    left_out = f" Not in every setting: {', '.join(ranking.left_out)}." if ranking.left_out else ""
    few = " With so few settings the test finds large differences only." if ranking.settings < 10 else ""
    return (
        f"## Average ranks over {ranking.settings} settings\n\n{names}.\n\n"
        f"Friedman's test: p {probability(ranking.p)}. Ranks that are further apart than "
        f"{ranking.critical_difference:.2f} differ at the level of 5 % (Nemenyi).{few}{left_out}"
    )


def notes_text(notes: Sequence[str]) -> list[str]:
    """Return lines on what was left out, not more than can be read."""
    more = len(notes) - SHOWN
    lines = [f"Note: {note}." for note in notes[:SHOWN]]
    return [*lines, f"Note: {more} more are left out; metarun-status DIR lists them."] if more > 0 else lines
