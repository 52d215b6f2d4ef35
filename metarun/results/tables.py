"""The tables that a run writes: ``metrics.csv``, ``episodes.csv``, ``result.csv``."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from metarun.results.files import write_csv

METRICS_COLUMNS = ("step", "train_loss", "train_score", "val_loss", "val_score", "seconds", "replica")
EPISODES_COLUMNS = ("episode", "adapt_step", "loss", "score", "second_score", "replica")
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
    *("second_metric", "second_score", "second_ci95"),
    *("engine", "task_map", "precision", "replica", "varied", "reason"),
)
"""One row a replica of a run, which mostly has one; accuracies are fractions. ``episodes_hash`` is equal where the test
episodes are."""


def write_metrics(directory: Path, rows: Sequence[Sequence[Mapping[str, Any]]]) -> None:
    """``metrics.csv``: a row a logging step and replica; validation columns are empty where there was none."""
    numbered = [{**row, "replica": index} for index, own in enumerate(rows) for row in own]
    write_csv(directory / "metrics.csv", METRICS_COLUMNS, numbered)


class Scored(Protocol):
    """Scores along adaptation, ``[episodes, states]``."""

    @property
    def adapt_steps(self) -> Sequence[int]:
        """Of the states."""

    @property
    def losses(self) -> Any:
        """A tensor."""

    @property
    def scores(self) -> Any:
        """A tensor."""

    @property
    def second_scores(self) -> Any:
        """A tensor."""


def write_episodes(directory: Path, replicas: Sequence[tuple[int, Scored]], has_second: bool) -> None:
    """``episodes.csv``: a row a test episode, adaptation step and replica, whose number stands with its scores.

    Second scores are empty where there are none.
    """
    rows = []
    for replica, scored in replicas:
        columns = [values.tolist() for values in (scored.losses, scored.scores, scored.second_scores)]
        for episode, (losses, scores, second) in enumerate(zip(*columns, strict=True)):
            for i, step in enumerate(scored.adapt_steps):
                values = (episode, step, losses[i], scores[i], second[i] if has_second else None, replica)
                rows.append(dict(zip(EPISODES_COLUMNS, values, strict=True)))
    write_csv(directory / "episodes.csv", EPISODES_COLUMNS, rows)


def write_results(directory: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """``result.csv``: the run's rows, one for each replica."""
    write_csv(directory / "result.csv", RESULT_COLUMNS, rows)


def format_score(value: float | None, metric: str) -> str:
    """A score for people: accuracy in percent, others to three decimals."""
    if value is None or math.isnan(value):
        return "–"
    return f"{100 * value:.2f} %" if metric == "accuracy" else f"{value:.3f}"


def format_score_ci(value: float, ci: float, metric: str) -> str:
    """A score and the half-width of its confidence interval, for people."""
    if metric == "accuracy":
        return f"{100 * value:.2f} ± {100 * ci:.2f} %"
    return f"{value:.3f} ± {ci:.3f}"
