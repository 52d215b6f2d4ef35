"""Reading the files of finished runs. Whatever cannot be read is named, left out, and the rest is used.

The content of somebody else's directory is data: it is read as text, never resolved or executed.
"""

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from metarun.errors import UserError
from metarun.results.status import PLAN, identity, loaded, runs_under, state_of
from metarun.results.tables import POOLED_COLUMNS, RESULT_COLUMNS, SEPARATOR
from metarun.system.terminal import printable

SETTING = ["task", "dataset", "ways", "shots", "queries", "metric"]
FAMILIES = {"agnostic": "model-agnostic", "dependent": "model-dependent", "baseline": "baseline"}
NOT_A_VARIANT = (
    *("algo", "task", "seed", "device", "data_dir", "resume", "tracker", "task.download"),
    *("replicas.count", "replicas.over", "engine.threads", "engine.keep_memory", "train.task_chunk"),
)
TEXTS = (
    *("run", "algo", "family", "task", "dataset", "model", "metric", "device", "config_hash", "episodes_hash"),
    *("engine", "varied", "metrics", "percent", "reason", "tested", "metarun_version"),
)
"""Columns that hold text, which is empty where it is missing."""
NUMBERS = (
    *("seed", "ways", "shots", "queries", "adapt_steps", "score_before", "score", "ci95", "n_episodes", "val_score"),
    *("selected_step", "meta_steps", "meta_batch", "train_seconds", "test_seconds", "adapt_ms_per_task"),
    *("peak_memory_mb", "meta_parameters", "adapted_parameters", "replica", "different_tests"),
)
NEEDED = ("status", "algo", "family", "task", "dataset", "seed", "shots", "metric", "score", "ci95", "n_episodes")
"""Columns that every version has written."""
LARGEST = 20_000_000
"""Bytes of the largest ``result.csv`` that is read; a row has about 600."""

Array = NDArray[np.float64]


@dataclass
class Runs:
    """What was read."""

    rows: pd.DataFrame
    """One row per replica of a finished run, with the columns ``directory`` and ``overrides``."""
    left_out: list[str] = field(default_factory=list)
    """A sentence on each run that has no result, and on each file that cannot be read."""


def result_files(paths: Sequence[Path]) -> list[Path]:
    """Return every ``result.csv`` under the directories, and the files named, once each.

    Raises:
        UserError: a path does not exist.
    """
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"There is no {path}; name a run's directory, a directory above runs, or a result.csv.")
        found += sorted(path.rglob("result.csv")) if path.is_dir() else [path]
    return list({path.resolve(): path for path in found}.values())


def number(row: Mapping[str, str], column: str) -> float:
    """Return a cell as a number, NaN where it is empty.

    Raises:
        ValueError: the cell holds something else.
    """
    cell = row.get(column) or ""
    try:
        return float(cell) if cell.strip() else math.nan
    except ValueError:
        raise ValueError(f"its column {column} holds {cell[:40]!r}, which is not a number") from None


def truth(row: Mapping[str, str], column: str) -> bool:
    """Return a cell as a truth value, False where it is empty.

    Raises:
        ValueError: the cell holds something else.
    """
    cell = row.get(column) or "False"
    if cell not in ("True", "False"):
        raise ValueError(f"its column {column} holds {cell[:40]!r} instead of True or False")
    return cell == "True"


def typed(row: Mapping[str, str]) -> dict[str, Any]:
    """Return a row of ``result.csv`` with its types. Columns that its version did not have yet are filled in.

    Raises:
        ValueError: a cell has the wrong type, or a finished run lacks what a comparison needs.
    """
    found: dict[str, Any] = {column: row.get(column) or "" for column in TEXTS}
    found |= {column: number(row, column) for column in NUMBERS}
    found |= {column: truth(row, column) for column in ("transductive", "higher_is_better")}
    found["status"] = row["status"]
    if found["status"] != "completed":
        return found
    if found["family"] not in FAMILIES:
        raise ValueError(f"its column family holds {found['family'][:40]!r}, which is none of {', '.join(FAMILIES)}")
    empty = [column for column in NEEDED if row[column] is None or not row[column].strip()]
    if empty:
        raise ValueError(f"its column {empty[0]} is empty")
    found["replica"] = 0 if math.isnan(found["replica"]) else int(found["replica"])
    if not found["metrics"]:
        # Before there were several metrics, accuracies were the only fractions.
        found |= {"metrics": found["metric"], "percent": found["metric"] if found["metric"] == "accuracy" else ""}
    for name in found["metrics"].split(SEPARATOR)[1:]:
        found |= {column: number(row, column) for column in (name, f"{name}_ci95")}
    return found


def rows_of_file(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a ``result.csv``.

    Raises:
        ValueError: the file cannot be read as such a table.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError("it is too large for a table of results")
        # Names come from data, and are shown on terminals, in pictures and in pages.
        lines = printable(path.read_text(encoding="utf-8", errors="replace")).splitlines(keepends=True)
        reader = csv.DictReader(lines)
        missing = [column for column in NEEDED if column not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"it lacks the column {missing[0]}")
        rows = list(reader)
        if any(None in row for row in rows):
            raise ValueError("a row has more cells than the header")
        return [typed(row) for row in rows]
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from None
    except csv.Error as error:
        raise ValueError(str(error)) from None


def overrides_of(directory: Path) -> frozenset[str]:
    """Return the command-line keys of a run that can distinguish it from other runs of its algorithm.

    Raises:
        ValueError: the file of the keys is damaged.
    """
    path = directory / ".hydra" / "overrides.yaml"
    if not path.is_file():
        return frozenset()
    overrides = loaded(path)
    if not isinstance(overrides, list) or not all(isinstance(one, str) for one in overrides):
        raise ValueError("its .hydra/overrides.yaml does not hold the keys of a run")
    return frozenset(printable(one) for one in overrides if one.partition("=")[0].lstrip("+~") not in NOT_A_VARIANT)


def with_varied(given: frozenset[str], varied: str) -> frozenset[str]:
    """Return the overrides of a run, with those of a replica, ``varied``, replacing the ones for the same keys."""
    own = varied.split()
    keys = {word.partition("=")[0] for word in own}
    kept = {override for override in given if override.partition("=")[0] not in keys}
    return frozenset(kept | {word for word in own if word.partition("=")[0] not in NOT_A_VARIANT})


def with_later_test(overrides: frozenset[str], tested: str) -> frozenset[str]:
    """Return the overrides of a run, told apart from those with which a run was only ``tested`` later.

    A model that was trained on one shot and tested on five is no model that was trained on five.
    """
    later = tested.split(SEPARATOR) if tested else []
    return frozenset(overrides - set(later) | ({f"tested with {' '.join(later)}"} if later else set()))


def read_run(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a run, with its directory and overrides.

    Raises:
        ValueError: something cannot be read.
    """
    rows = rows_of_file(path)
    if not any(row["status"] == "completed" for row in rows):
        return rows
    given = overrides_of(path.parent)
    asked = " ".join(sorted(override for override in given if override.startswith("engine")))
    together = {"directory": str(path.parent), "asked": asked, "modified": path.stat().st_mtime}
    return [
        {**row, **together, "overrides": with_later_test(with_varied(given, row["varied"]), row["tested"])}
        for row in rows
    ]


def without_result(paths: Sequence[Path], known: set[Path]) -> Iterator[str]:
    """Yield a sentence on each run that began and has no ``result.csv``, and on each job that has not begun."""
    for top in (path for path in paths if path.is_dir()):
        begun = runs_under(top)
        for directory in begun:
            if directory.resolve() not in known and not (directory / PLAN).exists():
                yield f"left out: {directory} ({state_of(directory, [])[0]})"
        for plan in sorted(top.rglob(PLAN)):
            jobs = content.get("jobs") if isinstance(content := loaded(plan), dict) else None
            if not isinstance(jobs, list):
                yield f"left out: {plan} does not hold the plan of a sweep"
                continue
            own = [run for run in begun if plan.parent in run.parents]
            folders = {identity(loaded(run / ".hydra" / "overrides.yaml")) for run in own}
            for job in jobs:
                if identity(job) not in folders:
                    yield f"left out: {' '.join(identity(job))} of {plan.parent} (not begun)"


def read_runs(paths: Sequence[Path]) -> Runs:
    """Return all rows of finished runs under ``paths``.

    Raises:
        UserError: a path does not exist, or no run has a result; the sentence says why.
    """
    rows, left_out, files = [], [], result_files(paths)
    for path in files:
        try:
            found = read_run(path)
        except (ValueError, OSError) as error:
            left_out.append(f"left out: {path} ({error})")
            continue
        done = [row for row in found if row["status"] == "completed"]
        rows += [{**row, "train_seconds": row["train_seconds"] / len(found)} for row in done]
        if len(done) < len(found) or not found:
            reasons = [row["reason"].rstrip(".") for row in found if row["reason"]]
            plain = [{"status": row["status"]} for row in found]
            state, diverged = state_of(path.parent, plain)
            why = diverged if state == "completed" else ": ".join([state, *reasons[:1]])
            left_out.append(f"left out: {path.parent} ({why})")
    left_out += without_result(paths, {path.parent.resolve() for path in files})
    left_out = [printable(sentence.replace("\n", " ")) for sentence in left_out]
    if not rows:
        if not left_out:
            raise UserError(f"No result.csv under {', '.join(map(str, paths))}; name a directory with finished runs.")
        more = f"; and {len(left_out) - 3} more" if len(left_out) > 3 else ""
        raise UserError(f"No run there can be used: {'; '.join(left_out[:3])}{more}.")
    table = pd.DataFrame(rows)
    return Runs(table.reindex(columns=list(dict.fromkeys([*RESULT_COLUMNS, *table.columns]))), left_out)


def newest_of_each(results: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Return the newest run of each configuration, and a sentence if any are left out."""
    # Without a hash it is not known of which configuration a run is.
    place = results["directory"] + " " + results["replica"].astype(str)
    known = results.assign(identity=results["config_hash"].where(results["config_hash"] != "", place))
    same = ["identity", "asked", "episodes_hash", *SETTING]
    newest = results.loc[known.sort_values("modified", kind="stable").drop_duplicates(same, keep="last").index]
    older = len(results) - len(newest)
    notes = [f"{older} older runs of the same configuration are left out"] if older else []
    return newest.sort_index(), notes


def same(value: Any, wanted: str) -> bool:
    """Whether a value is the one that was written on the command line, as a number if both are numbers."""
    try:
        return float(value) == float(wanted)
    except (TypeError, ValueError):
        # A list is written with or without spaces.
        return str(value).replace(" ", "").casefold() == wanted.replace(" ", "").casefold()


def flat(tree: Any, prefix: str = "") -> dict[str, str]:
    """Return the leaves of a configuration by their dotted keys, as text."""
    if isinstance(tree, Mapping) and tree:
        found: dict[str, str] = {}
        for key, value in tree.items():
            found |= flat(value, f"{prefix}.{key}" if prefix else str(key))
        return found
    return {prefix: "null" if tree is None else str(tree)}


def configuration_of(directory: str) -> dict[str, str]:
    """Return the keys of a run's configuration that may distinguish it from others; empty if it cannot be read."""
    config = loaded(Path(directory) / ".hydra" / "config.yaml")
    found = flat(config) if isinstance(config, dict) else {}
    return {
        printable(key): printable(value)
        for key, value in found.items()
        if key not in NOT_A_VARIANT and key.partition(".")[0] not in ("tracker", "engine", "replicas")
    }


def configured(directory: str, key: str) -> Any:
    """Return the value of a dotted key in a run's configuration; None if it is not there."""
    value = loaded(Path(directory) / ".hydra" / "config.yaml")
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def chosen(results: pd.DataFrame, filters: Sequence[str]) -> pd.DataFrame:
    """Return the rows that agree with every filter ``KEY=VALUE`` or ``KEY=VALUE,VALUE,…``.

    A key is a column of ``result.csv`` or a key of the configuration, such as ``train.steps``.

    Raises:
        UserError: a filter is not of that form, its key is unknown, or no row is left.
    """
    for one in filters:
        key, equals, values = one.partition("=")
        if not equals or not key:
            raise UserError(f"--filter takes KEY=VALUE, such as algo=maml or train.steps=500, not {one}.")
        if key in results:
            own = results[key].tolist()
        else:
            replicas = zip(results["directory"], results["overrides"], strict=True)
            own = [
                next((o.partition("=")[2] for o in given if o.partition("=")[0] == key), None) or configured(place, key)
                for place, given in replicas
            ]
            if all(value is None for value in own):
                raise UserError(f"--filter: no run has a column or a key {key}.")
        # A value may have commas itself: a list, or the name of a file.
        known = [values] if any(same(value, values) for value in own) else values.split(",")
        kept = [any(same(value, wanted) for wanted in known) for value in own]
        if not any(kept):
            there = sorted({str(value) for value in own})
            raise UserError(f"--filter {one} leaves no run; {key} is one of {', '.join(there[:20])}.")
        results = results[kept]
    return results


def pooled_scores(directory: str) -> dict[int, dict[str, Array]]:
    """Return each replica's metrics of all test episodes together: ``[1 + resamplings]``, the score itself first.

    It is empty if the file is missing or damaged.
    """
    try:
        table = pd.read_csv(Path(directory) / "pooled.csv").sort_values(["replica", "resampling"])
        names = [name for name in table if name not in POOLED_COLUMNS]
        return {
            int(number): {str(name): own[name].to_numpy(dtype=float) for name in names}
            for number, own in table.groupby("replica")
        }
    except (OSError, ValueError, TypeError, KeyError, pd.errors.ParserError):
        return {}


def final_scores(directory: str) -> dict[int, dict[str, Array]]:
    """Return each replica's scores by metric ``[episodes]``, after the last adaptation step and in order of episodes.

    Where the file says of which task each episode is, this is under ``TASK``. The result is empty if the file is
    missing or damaged.
    """
    try:
        # Through numpy, because filtering by pandas takes longer than reading.
        table = pd.read_csv(Path(directory) / "episodes.csv", low_memory=False)
        columns = {str(name): values.to_numpy(dtype=float) for name, values in table.items() if name != "loss"}
        step, episode = columns.pop("adapt_step"), columns.pop("episode")
        replica = columns.pop("replica", np.zeros(len(table)))
        found = {}
        for number in np.unique(replica):
            own = replica == number
            last = own & (step == step[own].max())
            order = np.flatnonzero(last)[np.argsort(episode[last], kind="stable")]
            if len(np.unique(episode[order])) < len(order):
                return {}
            found[int(number)] = {name: values[order] for name, values in columns.items()}
        return found
    except (OSError, ValueError, TypeError, KeyError, pd.errors.ParserError):
        return {}
