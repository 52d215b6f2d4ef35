"""The tables that a run writes: ``metrics.csv``, ``episodes.csv``, ``result.csv``."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metarun.files import write_text

METRICS_COLUMNS = ("step", "train_loss", "train_score", "val_loss", "val_score", "seconds")
EPISODES_COLUMNS = ("episode", "adapt_step", "loss", "score", "second_score")
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
)
"""One row a run; accuracies are fractions. ``episodes_hash`` is equal where the test episodes are."""


def _write(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        missing = {key for key, value in row.items() if value is None}
        writer.writerow({key: "" if key in missing else value for key, value in row.items()})
    write_text(path, text.getvalue())


def write_metrics(directory: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """``metrics.csv``: a row a logging step; validation columns are empty where there was none."""
    _write(directory / "metrics.csv", METRICS_COLUMNS, rows)


def write_episodes(
    directory: Path,
    adapt_steps: Sequence[int],
    losses: Sequence[Sequence[float]],
    scores: Sequence[Sequence[float]],
    second_scores: Sequence[Sequence[float]] | None,
) -> None:
    """``episodes.csv``: a row a test episode and adaptation step; second scores are empty where there are none."""
    rows = []
    for episode in range(len(losses)):
        for i, step in enumerate(adapt_steps):
            second = None if second_scores is None else second_scores[episode][i]
            values = (episode, step, losses[episode][i], scores[episode][i], second)
            rows.append(dict(zip(EPISODES_COLUMNS, values, strict=True)))
    _write(directory / "episodes.csv", EPISODES_COLUMNS, rows)


def write_result(directory: Path, row: Mapping[str, Any]) -> None:
    """``result.csv``: the run's row."""
    _write(directory / "result.csv", RESULT_COLUMNS, [row])


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
