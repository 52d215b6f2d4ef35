"""``metarun-status``: what has become of runs and sweeps, read from their files alone, while they run or afterwards.

A job is in one of these states:

- ``completed``: ``result.csv`` says so;
- ``running``: a live process owns its folder;
- ``failed``: with the sentence that it ended with;
- ``interrupted``: stopped by a signal, after writing a checkpoint if it had come to training;
- ``cut off``: begun, and neither ended nor running;
- ``not begun``: planned by the sweep, without a folder.
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

from metarun.command.lock import owner_of
from metarun.command.terminal import printable
from metarun.results.files import write_csv
from metarun.results.tables import RESULT_COLUMNS

PLAN = "sweep.json"
"""What a sweep was told to do, in its directory."""
MAY_CHANGE = ("device=", "data_dir=", "resume=")
"""Overrides that do not make a job another one."""
SAFE_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
STATES = ("completed", "failed", "interrupted", "cut off", "running", "not begun")


@dataclass(frozen=True)
class Job:
    """A run, alone or of a sweep."""

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
    """Of training, at the pace so far."""


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of a table; none where it is missing or cannot be read."""
    try:
        with path.open(newline="", errors="replace") as file:
            return list(csv.DictReader(file))
    except (OSError, csv.Error):
        return []


def loaded(path: Path) -> Any:
    """What a YAML or JSON file holds, as plain values that nothing resolves; None where it cannot be read."""
    try:
        text = path.read_text(errors="replace")
        return json.loads(text) if path.suffix == ".json" else yaml.load(text, SAFE_LOADER)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None


def number(text: str | None) -> float | None:
    """A cell as a finite number; None where it holds none."""
    with suppress(ValueError, TypeError):
        value = float(text or "")
        return value if math.isfinite(value) else None
    return None


def identity(overrides: Any) -> tuple[str, ...]:
    """The overrides that make a job what it is."""
    given = overrides if isinstance(overrides, list) else []
    return tuple(one for one in given if isinstance(one, str) and not one.startswith(MAY_CHANGE))


def mark(directory: Path, known: Sequence[Mapping[str, Any]], status: str, reason: str | None = None) -> None:
    """Say in ``result.csv`` what state a run is in; a completed result stays as it is.

    Args:
        directory: of the run.
        known: what is known of it; if nothing, the rows that are there keep what they say.
        status: of every row.
        reason: the sentence that a failed run ended with.
    """
    before = rows_of(directory / "result.csv")
    if any(row.get("status") == "completed" for row in before):
        return
    rows: Sequence[Mapping[str, Any]] = known or before
    columns = list(dict.fromkeys([*RESULT_COLUMNS, *(str(key) for row in rows for key in row)]))
    write_csv(directory / "result.csv", columns, [{**row, "status": status, "reason": reason} for row in rows])


def progress(directory: Path, rows: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """How far a run has come: steps, the best validation score and the seconds that training still needs."""
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


def job_in(directory: Path, name: str) -> Job:
    """The run of a folder."""
    rows = rows_of(directory / "result.csv")
    found = Counter(row.get("status") for row in rows)
    reason = next((row["reason"] for row in rows if row.get("reason")), "")
    if found["completed"]:
        state, reason = "completed", f"{found['failed']} of {len(rows)} replicas diverged" if found["failed"] else ""
    elif owner_of(directory) is not None:
        state, reason = "running", ""
    else:
        state = next((state for state in ("failed", "interrupted") if found[state]), "cut off")
    return Job(name, directory, state, reason, **progress(directory, rows))


def runs_under(directory: Path) -> list[Path]:
    """The folders of runs in a directory, in the order of the numbers in their names."""

    def order(path: Path) -> tuple[int, str]:
        digits = path.name.partition("_")[0]
        return int(digits) if digits.isdecimal() and len(digits) < 10 else 0, str(path)

    return sorted({path.parent.parent for path in directory.rglob(".hydra/overrides.yaml")}, key=order)


def jobs_of_sweep(directory: Path) -> list[Job]:
    """Every job of the sweep in a directory, begun or not; named by the overrides in which they differ."""
    plan = loaded(directory / PLAN)
    planned = plan.get("jobs") if isinstance(plan, dict) else None
    folders = [folder for folder in runs_under(directory) if folder != directory]
    begun = [(identity(loaded(folder / ".hydra" / "overrides.yaml")), folder) for folder in folders]
    if not isinstance(planned, list):
        return [job_in(folder, " ".join(overrides)) for overrides, folder in begun]
    wanted = [identity(job if isinstance(job, list) else ()) for job in planned]
    shared = set.intersection(*map(set, wanted)) if len(wanted) > 1 else set()
    jobs = []
    for overrides in wanted:
        name = " ".join(one for one in overrides if one not in shared) or " ".join(overrides)
        place = next((index for index, (own, _) in enumerate(begun) if own == overrides), None)
        jobs.append(Job(name, None, "not begun") if place is None else job_in(begun.pop(place)[1], name))
    return jobs


def jobs_in(directory: Path) -> list[Job]:
    """Every job in a directory: a run's, a sweep's, or those of all runs and sweeps below."""
    sweeps = sorted(path.parent for path in directory.rglob(PLAN))
    jobs = [job for sweep in sweeps for job in jobs_of_sweep(sweep)]
    alone = [run for run in runs_under(directory) if not any(sweep in run.parents for sweep in sweeps)]
    return jobs + [job_in(run, run.name if run == directory else str(run.relative_to(directory))) for run in alone]


def duration(seconds: float | None) -> str:
    """Seconds in words."""
    if seconds is None:
        return ""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def table(jobs: Sequence[Job]) -> str:
    """The jobs as text: a line each, the sentences of those that failed, and how many are in which state."""
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
        description="Runs and sweeps: which jobs have completed, failed (and why), run or have not begun; the best "
        "validation score so far, and the time that is left.",
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="of a run, of a sweep, or above them")
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
