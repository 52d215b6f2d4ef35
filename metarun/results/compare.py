"""``metarun-compare``: runs side by side, one table per setting, and the two families on the same episodes.

- ``score``: mean over seeds of the mean test score;
- ``method_ci95``: 95 % confidence interval over seeds and episodes together, the one for claims about methods;
- ``ci95``: 95 % confidence interval over episodes of one model, averaged over the seeds;
- ``seed_std``: standard deviation over seeds.

The best of each family is chosen by validation score. The difference between the two is taken episode by episode, which
cancels the difficulty of the episodes, and seed by seed where both have the same seeds.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd

from metarun.errors import UserError
from metarun.results.comparison import printing
from metarun.results.comparison.reading import SETTING, chosen, newest_of_each, read_runs
from metarun.results.comparison.summary import (
    OBJECTS,
    FamilyDifference,
    Ranking,
    against,
    best_first,
    family_difference,
    ranking,
    read_ahead,
    settings_of,
    summarise,
    with_variants,
)
from metarun.system.files import atomic_write, write_text
from metarun.system.terminal import printable
from metarun.targets.metric import Metric

FILES = "comparison.csv, families.csv, pareto.csv, comparison.md, comparison.png, costs.png"


@dataclass(frozen=True)
class Compared:
    """One setting."""

    setting: dict[str, Any]
    runs: pd.DataFrame
    table: pd.DataFrame
    """One row per method, as `metarun.results.comparison.summary.summarise` returns it."""
    families: FamilyDifference | None

    @property
    def title(self) -> str:
        """The setting in words."""
        return printing.setting_title(self.setting)

    @property
    def drawable(self) -> pd.DataFrame:
        """The table without infinite numbers, which no axis can show."""
        drawn = ["score", "ci95", "method_ci95", "train_seconds", "adapt_ms_per_task"]
        return self.table.assign(**{name: self.table[name].replace([math.inf, -math.inf], math.nan) for name in drawn})

    @property
    def metric(self) -> Metric:
        """The metric of the scores."""
        metric: Metric = self.table["metrics"].iloc[0][0]
        return metric


@dataclass(frozen=True)
class Comparison:
    """Everything that is known about runs side by side."""

    settings: list[Compared]
    ranking: Ranking | None
    notes: list[str]


def compared(paths: Sequence[Path], reference: str | None = None, filters: Sequence[str] = ()) -> Comparison:
    """Read the runs under ``paths`` and compare them.

    Raises:
        UserError: nothing to compare, a filter that leaves nothing, or no run of the reference.
    """
    found = read_runs(paths)
    results, notes = newest_of_each(chosen(found.rows, filters))
    if filters and found.left_out:
        # Without a result it is not known whether a run fits the filters.
        notes.append(f"runs without a usable result: {len(found.left_out)}; leave out --filter to see them named")
    else:
        notes += found.left_out
    if reference is not None and reference not in set(results["algo"]):
        known = ", ".join(sorted(set(results["algo"])))
        raise UserError(f"None of the runs used {reference}; compare against one of {known}.")
    read_ahead(results)
    settings = []
    for setting, group in settings_of(results, SETTING):
        runs = with_variants(group)
        table = summarise(runs)
        if reference is not None:
            table = against(table, reference)
        settings.append(Compared(setting, runs, table, family_difference(table)))
        for column, said in (
            ("device", "the times in {} are of different devices"),
            ("metarun_version", "the runs in {} are of different versions of metarun"),
        ):
            values = sorted(set(group[column]) - {""})
            if len(values) > 1:
                notes.append(f"{said.format(settings[-1].title)} ({', '.join(values)})")
    return Comparison(settings, ranking([one.table for one in settings]), notes)


def in_order(table: pd.DataFrame, sort: str | None) -> pd.DataFrame:
    """Return the table sorted by a column, across families; the best score first, other columns rising.

    ``COLUMN:falling`` reverses the order.

    Raises:
        UserError: there is no such column.
    """
    if sort is None:
        return table
    column, _, direction = sort.partition(":")
    if column not in table or column in OBJECTS or direction not in ("", "falling"):
        known = ", ".join(name for name in table if name not in OBJECTS)
        raise UserError(f"--sort takes COLUMN or COLUMN:falling, not {sort}; the columns are {known}.")
    keys = best_first(table, column) if column in ("score", "val_score", "score_before") else table[column]
    return table.loc[keys.sort_values(ascending=not direction, kind="stable").index].reset_index(drop=True)


def text_of(comparison: Comparison, sort: str | None, columns: Sequence[str]) -> tuple[str, str]:
    """Return the comparison as Markdown and its tables in LaTeX."""
    texts, tables = [], []
    for one in comparison.settings:
        rows = printing.printed_table(in_order(one.table, sort), one.metric, columns)
        printed = printing.markdown(rows)
        further = [] if columns else printing.further_table(in_order(one.table, sort))
        parts = (
            printed,
            printing.markdown(further) if further else "",
            printing.footnotes(one.table, printed),
            printing.worth_its_cost(one.table),
            printing.sentence(one.families, one.table, one.metric),
        )
        texts.append("\n\n".join([f"## {one.title}", *(part.rstrip("\n") for part in parts if part)]))
        tables.append(printing.latex(rows, one.title))
    texts += [part for part in (printing.ranks_text(comparison.ranking),) if part]
    texts += ["\n".join(lines)] if (lines := printing.notes_text(comparison.notes)) else []
    return printable("\n\n".join(texts) + "\n"), printable("\n\n".join(tables) + "\n")


def write_tables(comparison: Comparison, out: Path) -> None:
    """Write ``comparison.csv``, ``families.csv`` and ``pareto.csv``."""
    tables = [one.table.drop(columns=OBJECTS, errors="ignore").assign(**one.setting) for one in comparison.settings]
    everything = pd.concat(tables, ignore_index=True)
    everything = everything[[*SETTING, *(column for column in everything if column not in SETTING)]]
    differences = [one.setting | vars(one.families) for one in comparison.settings if one.families is not None]
    worth = everything[everything["pareto_training"] | everything["pareto_adaptation"]]
    costs = ["train_seconds", "adapt_ms_per_task", "peak_memory_mb", "pareto_training", "pareto_adaptation"]
    pareto = worth[[*SETTING, "family", "algo", "variant", "score", *costs]].sort_values([*SETTING, "train_seconds"])
    columns = [*SETTING, *(field.name for field in fields(FamilyDifference))]
    families = pd.DataFrame(differences, columns=columns)
    for name, frame in {"comparison": everything, "families": families, "pareto": pareto}.items():
        with atomic_write(out / f"{name}.csv") as file:
            frame.to_csv(file, index=False)


def compare(
    paths: Sequence[Path],
    out: Path,
    reference: str | None = None,
    filters: Sequence[str] = (),
    sort: str | None = None,
    columns: Sequence[str] = (),
    latex: bool = False,
) -> str:
    """Write the tables, ``comparison.md`` and the pictures; return the text.

    Args:
        paths: directories above runs, or result tables.
        out: where to write.
        reference: name of an algorithm, from which every row shows its difference.
        filters: KEY=VALUE that runs must have.
        sort: column by which the printed rows are sorted, instead of by family and score.
        columns: columns that are printed; none: the usual ones.
        latex: whether to write ``comparison.tex`` and return its text instead.

    Raises:
        UserError: nothing to compare, or an argument that fits no column.
    """
    comparison = compared(paths, reference, filters)
    text, tables = text_of(comparison, sort, columns)
    # matplotlib takes half a second to import, and errors should not wait for it.
    from metarun.results.comparison.pictures import plot_comparison, plot_costs, plot_ranks

    write_tables(comparison, out)
    write_text(out / "comparison.md", text)
    # One that an earlier comparison has left would have other numbers.
    if latex or (out / "comparison.tex").exists():
        write_text(out / "comparison.tex", tables)
    panels = [(one.title, one.metric, one.drawable) for one in comparison.settings]
    plot_comparison(out / "comparison.png", panels)
    plot_costs(out / "costs.png", panels)
    if comparison.ranking is not None:
        plot_ranks(out / "ranks.png", comparison.ranking)
    else:
        (out / "ranks.png").unlink(missing_ok=True)
    return tables if latex else text


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(
        prog="metarun-compare",
        description="Compare runs: one table per setting, and the two families on the same test episodes.",
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="directories of runs, or result CSVs")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (the first PATH that is a directory)")
    parser.add_argument("--against", metavar="ALGO", help="also show each row's difference from this algorithm's")
    parser.add_argument(
        "--filter", action="append", default=[], metavar="KEY=VALUE", help="only runs with this (repeatable; a,b: or)"
    )
    parser.add_argument("--sort", metavar="COLUMN", help="sort the rows by a column of comparison.csv (:falling)")
    parser.add_argument("--columns", default="", metavar="A,B,…", help="print these columns of comparison.csv only")
    parser.add_argument("--latex", action="store_true", help="print LaTeX tables, and write comparison.tex")
    return parser.parse_args(arguments)


def main() -> None:
    """Entry point of ``metarun-compare``."""
    given = parsed()
    out = given.out or next((path for path in given.paths if path.is_dir()), Path())
    columns = [name for name in given.columns.split(",") if name]
    try:
        print(compare(given.paths, out, given.against, given.filter, given.sort, columns, given.latex))
        if not given.latex:
            print(f"files: {out}/{FILES}{', ranks.png' if (out / 'ranks.png').exists() else ''}")
    except UserError as error:
        sys.exit(printable(f"metarun-compare: {error}"))
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:
        sys.exit(
            f"metarun-compare: {out} cannot be written ({error.strerror or error}); choose another place with --out."
        )
