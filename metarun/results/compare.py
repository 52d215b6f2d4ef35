"""``metarun-compare``: runs side by side, one table per setting, and the two families on the same episodes.

A setting consists of task, data set, ways, shots, queries and metric. Within a setting, a row is an algorithm with the
keys in which its runs differ from the others, over all its seeds:

- ``score``: mean over seeds of the mean test score;
- ``ci95``: 95 % confidence interval over episodes of one model, averaged over the seeds;
- ``seed_std``: standard deviation over seeds, a separate number that is never mixed with ``ci95``.

The best of each family is chosen by validation score. The difference between the two is taken episode by
episode (each episode's score averaged over seeds), which cancels the difficulty of the episodes.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from metarun.command.terminal import printable
from metarun.errors import UserError
from metarun.results.files import atomic_write, write_text
from metarun.results.status import loaded
from metarun.results.tables import RESULT_COLUMNS, metrics_of
from metarun.targets.metric import Metric

SETTING = ["task", "dataset", "ways", "shots", "queries", "metric"]
FAMILIES = {"agnostic": "model-agnostic", "dependent": "model-dependent", "baseline": "baseline"}
NOT_A_VARIANT = (
    *("algo", "task", "seed", "device", "data_dir", "resume", "task.download"),
    *("replicas.count", "replicas.over", "engine.threads", "engine.keep_memory", "train.task_chunk"),
)


@dataclass(frozen=True)
class Difference:
    """The score of one row minus that of another."""

    difference: float
    ci95: float
    n_episodes: int
    paired: bool


@dataclass(frozen=True)
class FamilyDifference(Difference):
    """The best model-dependent row minus the best model-agnostic one."""

    agnostic: str
    dependent: str


def result_files(paths: Sequence[Path]) -> list[Path]:
    """Return every ``result.csv`` under the directories, and the files named, once each.

    Raises:
        UserError: a path does not exist, or nothing was found.
    """
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"There is no {path}; name a run's directory, a directory above runs, or a result.csv.")
        found += sorted(path.rglob("result.csv")) if path.is_dir() else [path]
    if not found:
        raise UserError(f"No result.csv under {', '.join(map(str, paths))}; name a directory with finished runs.")
    return list({path.resolve(): path for path in found}.values())


def overrides_of(directory: Path) -> frozenset[str]:
    """Return the command-line keys of a run that can distinguish it from other runs of its algorithm."""
    path = directory / ".hydra" / "overrides.yaml"
    if not path.is_file():
        return frozenset()
    # Read as text, because the content of somebody else's directory must not be resolved.
    overrides = loaded(path)
    if not isinstance(overrides, list) or not all(isinstance(one, str) for one in overrides):
        raise UserError(f"{path} does not hold the keys of a run; remove it, or leave that run out.")
    return frozenset(o for o in overrides if o.partition("=")[0].lstrip("+~") not in NOT_A_VARIANT)


def with_varied(given: frozenset[str], varied: Any) -> frozenset[str]:
    """Return the overrides of a run, with those of a replica, ``varied``, replacing the ones for the same keys."""
    own = varied.split() if isinstance(varied, str) else []
    keys = {word.partition("=")[0] for word in own}
    kept = {override for override in given if override.partition("=")[0] not in keys}
    return frozenset(kept | {word for word in own if word.partition("=")[0] not in NOT_A_VARIANT})


def with_later_columns(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table of an earlier version with the columns that have been added since."""
    if "metric" in table and "metrics" not in table:
        percent = table["metric"].where(table["metric"] == "accuracy", "")
        table = table.assign(metrics=table["metric"], percent=percent)
    return table if "reason" in table else table.assign(reason=None)


def read_results(files: Sequence[Path]) -> pd.DataFrame:
    """Return all rows, with columns ``directory`` and ``overrides`` added.

    Raises:
        UserError: a file is not a result table.
    """
    tables = []
    for path in files:
        try:
            table = pd.read_csv(path, dtype={"run": str, "config_hash": str, "episodes_hash": str})
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read as a table ({error}); remove it or run again.") from error
        table.columns = [printable(str(column)) for column in table.columns]
        for column in table.select_dtypes(exclude=["number", "bool"]):
            # Names come from data, and are shown on terminals and in pictures.
            table[column] = [printable(v.replace("\n", " ")) if isinstance(v, str) else v for v in table[column]]
        table = with_later_columns(table)
        missing = [column for column in RESULT_COLUMNS if column not in table]
        if missing:
            raise UserError(f"{path} is not a result table of metarun: it lacks the column {missing[0]}.")
        table["directory"] = str(path.parent)
        given = overrides_of(path.parent)
        table["overrides"] = [with_varied(given, varied) for varied in table["varied"]]
        table["asked"] = " ".join(sorted(override for override in given if override.startswith("engine")))
        table["modified"] = path.stat().st_mtime
        tables.append(table.dropna(axis=1, how="all"))
    every = pd.concat(tables, ignore_index=True)
    return every.reindex(columns=list(dict.fromkeys([*RESULT_COLUMNS, *every.columns])))


def newest_of_each(results: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Return the newest finished run of each configuration, and a sentence on each omission."""
    notes = []
    finished = results[results["status"] == "completed"]
    for _, row in results[results["status"] != "completed"].iterrows():
        why = "" if pd.isna(row["reason"]) else f": {str(row['reason']).rstrip('.')}"
        notes.append(f"left out: {row['directory']} ({row['status']}{why})")
    newest = finished.sort_values("modified", kind="stable").drop_duplicates(
        ["config_hash", "asked", "episodes_hash", *SETTING], keep="last"
    )
    if len(newest) < len(finished):
        notes.append(f"{len(finished) - len(newest)} older runs of the same configuration are left out")
    return newest.sort_index(), notes


def best_first(table: pd.DataFrame, column: str) -> pd.Series:
    """Return scores as sort keys: the best score has the smallest key."""
    return table[column].where(~table["higher_is_better"], -table[column])


def with_variants(group: pd.DataFrame) -> pd.DataFrame:
    """Add ``variant``: the overrides of each run that not every run of the setting shares.

    Runs that differ only in their test episodes are distinguished by these episodes, and never averaged.
    """
    shared = frozenset.intersection(*group["overrides"])
    group = group.assign(variant=[" ".join(sorted(overrides - shared)) for overrides in group["overrides"]])
    mixed = group.groupby(["algo", "model", "variant"])["episodes_hash"].transform("nunique", dropna=False) > 1
    names = group["episodes_hash"].map(lambda one: "unknown" if pd.isna(one) else str(one))
    named = (group["variant"] + " episodes=" + names).str.strip()
    return group.assign(variant=group["variant"].where(~mixed, named))


def summarise(group: pd.DataFrame) -> pd.DataFrame:
    """Return one row per algorithm and variant, sorted by score within each family."""
    rows = []
    for (family, algo, model, variant), runs in group.groupby(["family", "algo", "model", "variant"]):
        rows.append(
            {
                "family": family,
                "algo": algo,
                "variant": variant,
                "model": model,
                "score_before": runs["score_before"].mean(),
                "adapt_steps": runs["adapt_steps"].max(),
                # A diverged run must be visible instead of vanishing from the mean.
                "score": runs["score"].mean(skipna=False),
                "ci95": runs["ci95"].mean(skipna=False),
                "seeds": runs["seed"].nunique(),
                "seed_std": runs["score"].std(ddof=1, skipna=False),
                "val_score": runs["val_score"].mean(),
                "n_episodes": runs["n_episodes"].min(),
                "transductive": runs["transductive"].any(),
                "meta_steps": runs["meta_steps"].mean(),
                "train_seconds": runs["train_seconds"].mean(),
                "adapt_ms_per_task": runs["adapt_ms_per_task"].mean(),
                "peak_memory_mb": runs["peak_memory_mb"].max(),
                "meta_parameters": runs["meta_parameters"].max(),
                "adapted_parameters": runs["adapted_parameters"].max(),
                "higher_is_better": bool(runs["higher_is_better"].iloc[0]),
                "metrics": metrics_of(runs.iloc[0]),
                "further": {
                    metric.name: (runs[metric.name].mean(skipna=False), runs[f"{metric.name}_ci95"].mean(skipna=False))
                    for metric in metrics_of(runs.iloc[0])[1:]
                },
                "replicas": list(zip(runs["directory"], runs["replica"], strict=True)),
                "episodes_hashes": set(runs["episodes_hash"]),
            }
        )
    table = pd.DataFrame(rows)
    table["family"] = pd.Categorical(table["family"], list(FAMILIES), ordered=True)
    order = pd.DataFrame({"family": table["family"], "score": best_first(table, "score")})
    return table.loc[order.sort_values(["family", "score"]).index].reset_index(drop=True)


def episode_scores(replicas: Sequence[tuple[str, int]]) -> NDArray[np.float64] | None:
    """Return each episode's final score, averaged over replicas (directory and number); None if a replica has none."""
    scores = []
    for directory, number in replicas:
        path = Path(directory) / "episodes.csv"
        if not path.is_file():
            return None
        try:
            table = pd.read_csv(path)
            table = table[table["replica"] == number]
            last = table[table["adapt_step"] == table["adapt_step"].max()].sort_values("episode")
            scores.append(last["score"].to_numpy(dtype=float))
        except (OSError, ValueError, KeyError):
            return None
    if len({len(s) for s in scores}) != 1:
        return None
    return np.asarray(np.mean(scores, axis=0), dtype=np.float64)


def name_of(row: pd.Series) -> str:
    """Return the name of an algorithm with its variant."""
    return f"{row['algo']} {row['variant']}".strip()


def difference_of(a: pd.Series, b: pd.Series) -> Difference:
    """Return row ``a`` minus row ``b``, episode by episode where both were tested on the same episodes."""
    scores = [episode_scores(row["replicas"]) for row in (a, b)]
    hashes = a["episodes_hashes"] | b["episodes_hashes"]
    same = len(hashes) == 1 and not any(pd.isna(one) for one in hashes)
    if same and scores[0] is not None and scores[1] is not None and len(scores[0]) == len(scores[1]):
        difference = scores[0] - scores[1]
        ci = 1.96 * float(difference.std(ddof=1)) / len(difference) ** 0.5
        return Difference(float(difference.mean()), ci, len(difference), True)
    ci = float(np.hypot(a["ci95"], b["ci95"]))
    return Difference(float(a["score"] - b["score"]), ci, int(min(a["n_episodes"], b["n_episodes"])), False)


def family_difference(table: pd.DataFrame) -> FamilyDifference | None:
    """Return the best model-dependent minus the best model-agnostic row, by validation; None if one is missing."""
    best = {}
    for family in ("agnostic", "dependent"):
        members = table[table["family"] == family]
        if members.empty:
            return None
        best[family] = members.loc[best_first(members, "val_score").idxmin()]
    a, b = best["agnostic"], best["dependent"]
    return FamilyDifference(**vars(difference_of(b, a)), agnostic=name_of(a), dependent=name_of(b))


def against(table: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Add each row's difference from the algorithm ``reference``.

    The new columns are ``against``, ``against_ci95``, ``against_paired``, and ``reference``, the name. Of several
    variants of the reference, the one with the best validation score is taken. Where the setting has no run of the
    reference, the columns are empty.
    """
    members = table[table["algo"] == reference]
    if members.empty:
        return table.assign(against=math.nan, against_ci95=math.nan, against_paired=False, reference="")
    row = members.loc[best_first(members, "val_score").idxmin()]
    found = [difference_of(other, row) for _, other in table.iterrows()]
    return table.assign(
        against=[d.difference for d in found],
        against_ci95=[d.ci95 for d in found],
        against_paired=[d.paired for d in found],
        reference=name_of(row),
    )


def setting_title(setting: dict[str, Any]) -> str:
    """Return a setting in words."""
    ways = "" if pd.isna(setting["ways"]) else f"{setting['ways']:.0f}-way "
    return f"{setting['task']} ({setting['dataset']}), {ways}{setting['shots']:.0f}-shot, {setting['metric']}"


def seconds(value: float) -> str:
    """Return a duration in human-readable form."""
    return f"{value:.0f} s" if value < 600 else f"{value / 60:.0f} min"


def printed_table(table: pd.DataFrame, metric: Metric) -> list[list[str]]:
    """Return header and rows of the printed table, with the differences from a reference if there are any."""
    header = ["family", "algorithm", "before", "steps", f"{metric.name} ± CI95", "seeds", "std over seeds"]
    header += ["training", "ms/task", "meta-learned", "adapted"]
    compared = "against" in table and bool(table["against"].notna().any())
    if compared:
        header.insert(5, f"− {table['reference'].iloc[0]}")
    further = {other.name: other for metrics in table["metrics"] for other in metrics[1:]}
    header += [f"{name} ± CI95" for name in further]
    rows = [header]
    for _, row in table.iterrows():
        others = [
            other.interval(*row["further"][name]) if name in row["further"] else "" for name, other in further.items()
        ]
        rows.append(
            [
                FAMILIES[row["family"]],
                name_of(row) + ("" if not row["transductive"] else " (t)"),
                metric.text(row["score_before"]),
                f"{row['adapt_steps']:.0f}",
                metric.interval(row["score"], row["ci95"]),
                str(row["seeds"]),
                metric.text(row["seed_std"]),
                seconds(row["train_seconds"]),
                f"{row['adapt_ms_per_task']:.2f}",
                f"{row['meta_parameters']:.0f}",
                f"{row['adapted_parameters']:.0f}",
                *others,
            ]
        )
        if compared:
            sign, mark = "" if row["against"] < 0 else "+", "" if row["against_paired"] else " (u)"
            value = sign + metric.interval(row["against"], row["against_ci95"]) + mark
            rows[-1].insert(5, "" if name_of(row) == row["reference"] else value)
    return rows


def markdown(rows: list[list[str]]) -> str:
    """Return a Markdown table that is also readable as plain text."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def sentence(difference: FamilyDifference | None, table: pd.DataFrame, metric: Metric) -> str:
    """Return the sentence that compares the two families."""
    if difference is None:
        missing = [FAMILIES[f] for f in ("agnostic", "dependent") if f not in set(table["family"])]
        return f"Families: no {' and no '.join(missing)} run in this setting, so there is nothing to compare."
    d = difference
    better = (d.difference > 0) == bool(table["higher_is_better"].iloc[0])
    verdict = f"{'model-dependent' if better else 'model-agnostic'} is better, for these trained models"
    if not math.isfinite(d.difference):
        verdict = "no verdict, since a score is not a number"
    elif abs(d.difference) <= d.ci95:
        verdict = "no difference beyond the interval"
    how = f"paired on {d.n_episodes} episodes" if d.paired else "not paired: the runs lack common test episodes"
    value = metric.interval(d.difference, d.ci95)
    return (
        f"Families (best of each by validation): {d.dependent} (model-dependent) − {d.agnostic} (model-agnostic) = "
        f"{value}, {how}: {verdict}."
    )


def compare(paths: Sequence[Path], out: Path, reference: str | None = None) -> str:
    """Write ``comparison.csv``, ``families.csv``, ``comparison.md`` and ``comparison.png``; return the text.

    With ``reference``, the name of an algorithm, every row shows its difference from that algorithm's.

    Raises:
        UserError: nothing to compare, or a file that cannot be read.
    """
    # matplotlib takes half a second to import, and errors should not wait for it.
    from metarun.results.plots import plot_comparison

    results, notes = newest_of_each(read_results(result_files(paths)))
    if results.empty:
        raise UserError(f"None of the runs has finished ({'; '.join(notes)}); resume one, or start again.")
    if reference is not None and reference not in set(results["algo"]):
        known = ", ".join(sorted(set(results["algo"])))
        raise UserError(f"None of the runs used {reference}; compare against one of {known}.")
    texts, tables, differences, panels = [], [], [], []
    for values, group in results.groupby(SETTING, dropna=False):
        setting = dict(zip(SETTING, values, strict=True))
        table = summarise(with_variants(group))
        metric = table["metrics"].iloc[0][0]
        if reference is not None:
            table = against(table, reference)
        difference = family_difference(table)
        printed = markdown(printed_table(table, metric))
        footnote = "(t): queries are normalised together (transductive).\n" if table["transductive"].any() else ""
        if "(u)" in printed:
            footnote += "(u): not paired, for want of common test episodes.\n"
        texts.append(f"## {setting_title(setting)}\n\n{printed}\n\n{footnote}{sentence(difference, table, metric)}")
        tables.append(table.drop(columns=["replicas", "episodes_hashes", "metrics", "further"]).assign(**setting))
        if difference is not None:
            differences.append(setting | vars(difference))
        # A long list of overrides would leave no room for the picture.
        names = [shorten(name_of(row), 48, placeholder=" …") for _, row in table.iterrows()]
        panels.append((setting_title(setting), metric, table.assign(name=names)))
    text = printable("\n\n".join(texts + [f"Note: {note}." for note in notes]) + "\n")
    everything = pd.concat(tables, ignore_index=True)
    columns = [*SETTING, *(column for column in everything if column not in SETTING)]
    for name, frame in {"comparison": everything[columns], "families": pd.DataFrame(differences)}.items():
        with atomic_write(out / f"{name}.csv") as file:
            frame.to_csv(file, index=False)
    write_text(out / "comparison.md", text)
    plot_comparison(out / "comparison.png", panels)
    return text


def main() -> None:
    """Entry point of ``metarun-compare``."""
    parser = argparse.ArgumentParser(
        prog="metarun-compare",
        description="Compare runs: one table per setting, and the two families on the same test episodes.",
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="directories of runs, or result CSVs")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (the first PATH that is a directory)")
    parser.add_argument("--against", metavar="ALGO", help="also show each row's difference from this algorithm's")
    arguments = parser.parse_args()
    out = arguments.out or next((path for path in arguments.paths if path.is_dir()), Path())
    try:
        print(compare(arguments.paths, out, arguments.against))
        print(f"files: {out}/comparison.csv, families.csv, comparison.md, comparison.png")
    except UserError as error:
        sys.exit(printable(f"metarun-compare: {error}"))
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:
        sys.exit(
            f"metarun-compare: {out} cannot be written ({error.strerror or error}); choose another place with --out."
        )
