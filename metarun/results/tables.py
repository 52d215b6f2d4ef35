"""The tables that a run writes: ``metrics.csv``, ``episodes.csv``, ``pooled.csv``, ``result.csv``."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

from metarun.system.files import write_csv
from metarun.targets.metric import Metric

Row: TypeAlias = Mapping[str, float | int]
"""A row of ``metrics.csv``."""
Watcher: TypeAlias = Callable[[Sequence[Row]], None]
"""What follows a run live: called with the newest row of each replica, once these are written."""

METRICS_COLUMNS = ("step", "train_loss", "train_score", "val_loss", "val_score", "seconds", "replica")
EPISODES_COLUMNS = ("episode", "adapt_step", "loss", "score", "replica")
"""Columns of ``episodes.csv``. ``score`` is the first metric; a column with the name of each further metric follows."""
TASK = "task"
"""The column after them with the number of the task, where episodes are other examples of the same few tasks."""
POOLED_COLUMNS = ("replica", "resampling")
"""Columns of ``pooled.csv``; a column with the name of each metric follows. Resampling 0 is all test episodes as they
are."""
RESULT_COLUMNS = (
    *(
        "run",
        "status",
        "algo",
        "family",
        "task",
        "dataset",
        "model",
        "seed",
        "ways",
        "shots",
        "queries",
        "metric",
    ),
    *(
        "adapt_steps",
        "score_before",
        "score",
        "ci95",
        "n_episodes",
        "val_score",
        "selected_step",
        "meta_steps",
    ),
    *("meta_batch", "transductive", "train_seconds", "compile_seconds", "test_seconds", "tasks_per_second"),
    *("adapt_ms_per_task", "peak_memory_mb", "meta_parameters", "adapted_parameters", "device", "dtype"),
    *("torch_version", "metarun_version", "config_hash", "episodes_hash", "higher_is_better"),
    *("engine", "task_map", "precision", "replica", "varied"),
    *("metrics", "percent", "reason", "tested", "different_tests"),
)
"""Columns of ``result.csv``, which has one row per replica; most runs have one replica. ``score`` is measured in
``metric``, the first of ``metrics``, which are separated by semicolons. For each further metric two columns follow,
NAME and NAME_ci95. ``percent`` names the metrics that are fractions displayed as percentages. ``episodes_hash`` is
equal for runs with the same test episodes. ``tested`` has the keys that a later test has changed, separated like
``metrics``, and is empty for the test of the run itself. ``different_tests`` is the number of different tasks among
the test episodes where these are other examples of the same few tasks, and empty otherwise."""

SEPARATOR = ";"


def write_metrics(directory: Path, rows: Sequence[Sequence[Mapping[str, Any]]]) -> None:
    """Write ``metrics.csv``: one row per logging step and replica; without validation, its columns are empty."""
    numbered = [{**row, "replica": index} for index, own in enumerate(rows) for row in own]
    write_csv(directory / "metrics.csv", METRICS_COLUMNS, numbered)


class Scored(Protocol):
    """Scores along adaptation, ``[episodes, states]``."""

    @property
    def adapt_steps(self) -> Sequence[int]:
        """The adaptation steps of the states."""

    @property
    def losses(self) -> Any:
        """A tensor."""

    @property
    def scores(self) -> Mapping[str, Any]:
        """A tensor per metric."""

    @property
    def units(self) -> Any:
        """The number of each episode's task ``[episodes]``, a tensor; None where all are different."""


def write_episodes(directory: Path, replicas: Sequence[tuple[int, Scored]], metrics: Sequence[Metric]) -> None:
    """Write ``episodes.csv``: one row per test episode, adaptation step and replica, given by its number."""
    first, *further = (metric.name for metric in metrics)
    rows, known = [], False
    for replica, scored in replicas:
        losses, scores = scored.losses.tolist(), {name: values.tolist() for name, values in scored.scores.items()}
        known = scored.units is not None
        units = [{TASK: unit} for unit in scored.units.tolist()] if known else [{}] * len(losses)
        for episode, of_steps in enumerate(losses):
            for i, step in enumerate(scored.adapt_steps):
                values = (episode, step, of_steps[i], scores[first][episode][i], replica)
                row = dict(zip(EPISODES_COLUMNS, values, strict=True))
                rows.append(row | {name: scores[name][episode][i] for name in further} | units[episode])
    write_csv(directory / "episodes.csv", (*EPISODES_COLUMNS, *further, *([TASK] if known else [])), rows)


class PooledScore(NamedTuple):
    """A metric of all test episodes together."""

    score: float
    resampled: Sequence[float]
    """The same over resamplings of the episodes with replacement, which are equal for runs on the same episodes."""

    @property
    def half_width(self) -> float:
        """The half-width of the 95 % interval: 1.96 times the standard deviation over the resamplings.

        Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 13.2. Resamplings that hold nothing to
        measure, which are NaN, do not count.
        """
        there = [score for score in self.resampled if not math.isnan(score)]
        return 1.96 * statistics.stdev(there) if len(there) > 1 else math.nan


def write_pooled(directory: Path, replicas: Sequence[tuple[int, Mapping[str, PooledScore]]]) -> None:
    """Write ``pooled.csv``, if there are such metrics: a row per resampling and replica, given by its number."""
    rows = [
        {"replica": replica, "resampling": i, **dict(zip(found, values, strict=True))}
        for replica, found in replicas
        for i, values in enumerate(zip(*((one.score, *one.resampled) for one in found.values()), strict=True))
    ]
    if rows:
        write_csv(directory / "pooled.csv", (*POOLED_COLUMNS, *replicas[0][1]), rows)


def columns_of(metrics: Sequence[Metric]) -> tuple[str, ...]:
    """Return the columns of ``result.csv``."""
    return (*RESULT_COLUMNS, *(column for metric in metrics[1:] for column in (metric.name, f"{metric.name}_ci95")))


def write_results(directory: Path, rows: Sequence[Mapping[str, Any]], metrics: Sequence[Metric]) -> None:
    """Write ``result.csv``: the run's rows, one per replica."""
    write_csv(directory / "result.csv", columns_of(metrics), rows)


def metrics_of(row: Mapping[str, Any]) -> tuple[Metric, ...]:
    """Return the metrics of a row of ``result.csv``, in order."""
    percent = str(row["percent"]).split(SEPARATOR)
    first, *further = str(row["metrics"]).split(SEPARATOR)
    return (
        Metric(first, bool(row["higher_is_better"]), first in percent),
        *(Metric(name, True, name in percent) for name in further),
    )
