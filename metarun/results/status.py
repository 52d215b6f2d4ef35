"""``metarun-status``: the state of runs and sweeps, read only from their files, while they run or afterwards.

A job is in one of these states:

- ``completed``: ``result.csv`` says so;
- ``running``: a live process owns its folder;
- ``failed``: the job ended with an error, and its sentence is shown;
- ``pruned``: a study has ended the job early, because other jobs do better;
- ``interrupted``: a signal stopped the job, after a checkpoint was written if training had begun;
- ``cut off``: the job has begun, and has neither ended nor is it running;
- ``not begun``: the sweep has planned the job, which has no folder yet.
"""

import argparse
import csv
import json
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from metarun.results.tables import RESULT_COLUMNS
from metarun.system.files import write_csv
from metarun.system.lock import owner_of
from metarun.system.terminal import printable

PLAN = "sweep.json"
"""The file in a sweep's directory that holds its plan."""
TESTS = "tests"
"""The folder of a run in which later tests of it lie."""
MAY_CHANGE = ("device=", "data_dir=", "tracker=", "resume=")
"""Overrides that do not change a job's identity."""
SAFE_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
STATES = ("completed", "pruned", "failed", "interrupted", "cut off", "running", "not begun")


@dataclass(frozen=True)
class Job:
    """A single run, or one of a sweep."""

    name: str
    directory: Path | None
    state: str
    reason: str = ""
    metric: str = ""
    step: int | None = None
    steps: int | None = None
    best: float | None = None
    """The best validation score so far."""
    seconds_left: float | None = None
    """Seconds of training that remain, at the pace so far."""


def rows_of(path: Path) -> list[dict[str, str]]:
    """Return the rows of a table; no rows if the table is missing or cannot be read."""
    try:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            return list(csv.DictReader(file))
    except (OSError, csv.Error):
        return []


def loaded(path: Path) -> Any:
    """Return the content of a YAML or JSON file as plain, unresolved values; None if it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
        return json.loads(text) if path.suffix == ".json" else yaml.load(text, SAFE_LOADER)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None


def number(text: str | None) -> float | None:
    """Return a cell as a finite number; None if it holds no such number."""
    with suppress(ValueError, TypeError):
        value = float(text or "")
        return value if math.isfinite(value) else None
    return None


def identity(overrides: Any) -> tuple[str, ...]:
    """Return the overrides that make up a job's identity."""
    given = overrides if isinstance(overrides, list) else []
    return tuple(one for one in given if isinstance(one, str) and not one.startswith(MAY_CHANGE))


def mark(directory: Path, known: Sequence[Mapping[str, Any]], status: str, reason: str | None = None) -> None:
    """Record a run's state in ``result.csv``; a completed result stays as it is.

    Args:
        directory: directory of the run.
        known: known columns of the run's rows; if empty, existing rows keep their other columns.
        status: status of every row.
        reason: the sentence that a failed run ended with.
    """
    before = rows_of(directory / "result.csv")
    if any(row.get("status") == "completed" for row in before):
        return
    rows: Sequence[Mapping[str, Any]] = known or before
    columns = list(dict.fromkeys([*RESULT_COLUMNS, *(str(key) for row in rows for key in row)]))
    write_csv(directory / "result.csv", columns, [{**row, "status": status, "reason": reason} for row in rows])


def progress(directory: Path, rows: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """Return a run's progress: steps, the best validation score and the remaining seconds of training."""
    metrics = rows_of(directory / "metrics.csv")
    done, seconds = (number(metrics[-1].get(key)) if metrics else None for key in ("step", "seconds"))
    config = loaded(directory / ".hydra" / "config.yaml")
    train = config.get("train") if isinstance(config, dict) else None
    steps = train.get("steps") if isinstance(train, dict) else None
    if type(steps) is not int:
        steps = None
    scores = [score for row in metrics if (score := number(row.get("val_score"))) is not None]
    first = rows[0] if rows else {}
    best = max if first.get("higher_is_better") == "True" else min
    return {
        "metric": first.get("metric") or "",
        "step": None if done is None else int(done),
        "steps": steps,
        "best": best(scores) if scores else None,
        "seconds_left": None if not done or seconds is None or steps is None else seconds / done * (steps - done),
    }


def state_of(directory: Path, rows: Sequence[Mapping[str, str]]) -> tuple[str, str]:
    """Return the state of the run in a folder and the sentence that explains it, given the rows of ``result.csv``."""
    found = Counter(row.get("status") for row in rows)
    reason = next((row["reason"] for row in rows if row.get("reason")), "")
    if found["completed"]:
        return "completed", f"{found['failed']} of {len(rows)} replicas diverged" if found["failed"] else ""
    if owner_of(directory) is not None:
        return "running", ""
    return next((state for state in ("failed", "pruned", "interrupted") if found[state]), "cut off"), reason


def job_in(directory: Path, name: str) -> Job:
    """Return the run in a folder as a job."""
    rows = rows_of(directory / "result.csv")
    state, reason = state_of(directory, rows)
    return Job(name, directory, state, reason, **progress(directory, rows))


def runs_under(directory: Path) -> list[Path]:
    """Return the folders of runs in a directory, in the order of the numbers in their names.

    Later tests of a run (``metarun-test``), which lie in its folder ``tests``, do not count as runs.
    """

    def order(path: Path) -> tuple[int, str]:
        digits = path.name.partition("_")[0]
        return int(digits) if digits.isdecimal() and len(digits) < 10 else 0, str(path)

    found = {path.parent.parent for path in directory.rglob(".hydra/overrides.yaml")}
    return sorted((path for path in found if not is_later_test(path)), key=order)


def is_later_test(directory: Path) -> bool:
    """Whether a folder holds a later test of a run, and no run."""
    return directory.parent.name == TESTS and (directory.parent.parent / ".hydra").is_dir()


def jobs_of_sweep(directory: Path) -> list[Job]:
    """Return every job of the sweep in a directory, begun or not, named by the overrides in which they differ."""
    plan = loaded(directory / PLAN)
    planned = plan.get("jobs") if isinstance(plan, dict) else None
    folders = [folder for folder in runs_under(directory) if folder != directory]
    begun = [(identity(loaded(folder / ".hydra" / "overrides.yaml")), folder) for folder in folders]
    if not isinstance(planned, list):
        planned = [list(overrides) for overrides, _ in begun]
    wanted = [identity(job if isinstance(job, list) else ()) for job in planned]
    shared = set.intersection(*map(set, wanted)) if len(wanted) > 1 else set()
    jobs = []
    for overrides in wanted:
        name = " ".join(one for one in overrides if one not in shared) or " ".join(overrides)
        place = next((index for index, (own, _) in enumerate(begun) if own == overrides), None)
        jobs.append(Job(name, None, "not begun") if place is None else job_in(begun.pop(place)[1], name))
    return jobs


def jobs_in(directory: Path) -> list[Job]:
    """Return every job in a directory: that of a run, those of a sweep, or those of all runs and sweeps below."""
    sweeps = sorted(path.parent for path in directory.rglob(PLAN))
    jobs = [job for sweep in sweeps for job in jobs_of_sweep(sweep)]
    alone = [run for run in runs_under(directory) if not any(sweep in run.parents for sweep in sweeps)]
    return jobs + [job_in(run, run.name if run == directory else str(run.relative_to(directory))) for run in alone]


def duration(seconds: float | None) -> str:
    """Return seconds in words."""
    if seconds is None:
        return ""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def table(jobs: Sequence[Job]) -> str:
    """Return the jobs as text: one line each, the sentences of failed jobs, and the number of jobs in each state."""
    rows = [("job", "status", "step", "best validation", "left")]
    for job in jobs:
        steps = "" if job.step is None else f"{job.step}/{'?' if job.steps is None else job.steps}"
        best = "" if job.best is None else f"{job.metric} {job.best:.4g}".strip()
        left = duration(job.seconds_left) if job.state == "running" else ""
        rows.append((job.name, job.state, steps, best, left))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += ["", *(f"{job.name}: {job.reason}" for job in jobs if job.reason)]
    count = Counter(job.state for job in jobs)
    lines.append(", ".join(f"{count[state]} {state}" for state in STATES if count[state]) + ".")
    return "\n".join(printable(line.replace("\n", " ")) for line in lines)


def main() -> None:
    """Entry point of ``metarun-status``."""
    parser = argparse.ArgumentParser(
        prog="metarun-status",
        description="Show the state of runs and sweeps: which jobs have completed, failed (and why), are running or "
        "have not begun, the best validation score so far, and the time left.",
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="directory of a run or a sweep, or one above them")
    directory = parser.parse_args().directory
    if not directory.is_dir():
        sys.exit(printable(f"metarun-status: there is no directory {directory}; name that of a run or a sweep."))
    jobs = jobs_in(directory)
    if not jobs:
        sys.exit(printable(f"metarun-status: no run has begun in {directory}; name the directory of a run or a sweep."))
    try:
        print(table(jobs), flush=True)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
