"""Sweeps that can be resumed: the plan of a sweep, which of its jobs are done, and how it has ended.

Everything is read from files in the folders of the jobs, so that it does not matter which launcher runs the jobs.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from metarun.config import config_hash
from metarun.errors import UserError
from metarun.results.status import PLAN, identity, jobs_of_sweep, loaded, number, rows_of, table
from metarun.system.files import write_text

STUDY = "study.log"
"""The file in a sweep's directory that holds its study, if Optuna chooses the jobs."""

begun: list[Path] = []
"""The directory of the sweep that this process runs, once the process owns it."""


@dataclass(frozen=True)
class Plan:
    """The plan of a sweep, as stored in its directory."""

    overrides: list[str]
    """Overrides of the command, without those of Hydra itself."""
    hydra: list[str]
    """Overrides of Hydra itself, such as the launcher, without the directory and the mode."""
    config_dirs: list[str]
    jobs: list[list[str]] | None
    """The overrides of each job, in order; None if the sweeper chooses jobs while it runs."""


def plan_of(config: DictConfig, jobs: list[list[str]] | None) -> Plan:
    """Return the plan of a composed command."""
    left_out = ("hydra.mode=", "hydra.sweep.dir=")
    return Plan(
        overrides=[str(one) for one in config.hydra.overrides.task],
        hydra=[str(one) for one in config.hydra.overrides.hydra if not str(one).startswith(left_out)],
        config_dirs=[s.path for s in config.hydra.runtime.config_sources if s.provider == "command-line"],
        jobs=jobs,
    )


def read_plan(directory: Path) -> Plan | None:
    """Return the plan in a directory; None if there is no plan.

    Raises:
        UserError: there is a plan that cannot be read.
    """
    path = directory / PLAN
    if not path.exists():
        return None
    found = loaded(path)

    def texts(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(one, str) for one in value)

    if isinstance(found, dict) and set(found) == set(Plan.__dataclass_fields__):
        plan = Plan(**found)
        jobs = plan.jobs if isinstance(plan.jobs, list) else []
        if all(texts(one) for one in (plan.overrides, plan.hydra, plan.config_dirs, *jobs)):
            return plan
    raise UserError(f"{path} cannot be read; give the command of the sweep again with another hydra.sweep.dir.")


def check_plan(directory: Path, plan: Plan, holds_runs: bool) -> None:
    """Raise an error if the directory of a sweep holds anything but a part of the same sweep.

    Raises:
        UserError: the directory holds something else.
    """
    before = read_plan(directory)
    if before is None and holds_runs:
        raise UserError(
            f"{directory} holds a run already; continue it with resume=DIR, or choose another hydra.sweep.dir."
        )
    if before is not None and identity(before.overrides) != identity(plan.overrides):
        raise UserError(
            f"{directory} holds another sweep ({' '.join(before.overrides)}); continue that one with metarun -m "
            f"resume='{directory}', or choose another hydra.sweep.dir."
        )
    if holds_runs and plan.jobs is None and not (directory / STUDY).is_file():
        raise UserError(
            f"{directory} holds jobs already, and this sweeper chooses different ones each time; choose another "
            "hydra.sweep.dir."
        )


def begin(directory: Path, plan: Plan) -> None:
    """Store the plan in the directory of a sweep that this process owns."""
    write_text(directory / PLAN, json.dumps(asdict(plan), indent=1))
    begun[:] = [directory]


def finished(config: DictConfig, directory: Path) -> float | None:
    """Return the validation score of the run in ``directory``, if it has completed and has this configuration."""
    # Imported here, since help and errors in keys do not need it.
    from metarun.engine.replicas import replica_configs

    rows = rows_of(directory / "result.csv")
    hashes = [config_hash(own) for own, _ in replica_configs(config)]
    if [row.get("config_hash") for row in rows] != hashes:
        return None
    done = [row for row in rows if row.get("status") == "completed"]
    scores = [score for row in done if (score := number(row.get("val_score"))) is not None]
    if not done:
        return None
    best = max if done[0].get("higher_is_better") == "True" else min
    return best(scores) if scores else math.nan


def closing_words(directories: Sequence[Path]) -> tuple[str, bool]:
    """Return the text printed at the end of sweeps, and whether every job has completed or was pruned."""
    texts, complete = [], True
    for directory in directories:
        jobs = jobs_of_sweep(directory)
        texts.append(f"\n{table(jobs)}")
        if any(job.state not in ("completed", "pruned") for job in jobs):
            complete = False
            texts.append(f"Continue with: metarun -m resume='{directory}'")
    return "\n".join(texts), complete
