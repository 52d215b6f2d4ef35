"""Taking possession of directories before Hydra writes into them: one owner and one run per directory."""

import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from metarun import launch
from metarun.command import sweep
from metarun.command.sentences import sentence_of
from metarun.config import config_hash
from metarun.errors import UserError
from metarun.results.status import PLAN, rows_of, runs_under
from metarun.system import lock
from metarun.system.files import has_checkpoint
from metarun.system.terminal import printable

UNIQUE_SUBDIR = ("${hydra:job.num}_", "${hydra:job.num}/", "${hydra:job.num}-", "${hydra.job.num}_")
"""Beginnings of ``hydra.sweep.subdir`` with which no two jobs can share a folder."""


def holds_a_run(directory: Path) -> bool:
    """Whether something would be lost if another run wrote into ``directory``: a checkpoint, or a completed result.

    A run that was killed between its first ``best.pt`` and its first ``last.pt`` can only be started again.
    """
    return has_checkpoint(directory) or any(
        row.get("status") == "completed" for row in rows_of(directory / "result.csv")
    )


def jobs_of(config: DictConfig) -> list[list[str]] | None:
    """Return the overrides of each job of a sweep, in order; None if the sweeper chooses jobs while it runs."""
    if config.hydra.sweeper._target_ != "hydra._internal.core_plugins.basic_sweeper.BasicSweeper":
        return None
    fixed = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    # A pattern such as algo=glob(ma*) stands for members, which the loader knows.
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    parsed = parser.parse_overrides([*fixed, *config.hydra.overrides.task])
    return [job for batch in BasicSweeper.split_arguments(parsed, None) for job in batch]


def composed_jobs(config: DictConfig, jobs: Sequence[Sequence[str]], first: int = 0) -> Iterator[DictConfig]:
    """Yield the configuration of each job, in which Hydra's own keys can be read until the next one is asked for.

    The jobs are numbered from ``first`` on.
    """
    loader = GlobalHydra.instance().config_loader()
    try:
        for number, overrides in enumerate(jobs, first):
            composed = loader.load_sweep_config(config, list(overrides))
            with open_dict(composed):
                composed.hydra.job.id = composed.hydra.job.num = number
            HydraConfig.instance().set_config(composed)
            yield composed
    finally:
        HydraConfig.instance().set_config(config)


def folders_of(config: DictConfig, jobs: Sequence[Sequence[str]], first: int = 0) -> list[str]:
    """Return each job's folder within the sweep's directory, found by composing the job's configuration."""
    return [str(OmegaConf.select(own, "hydra.sweep.subdir")) for own in composed_jobs(config, jobs, first)]


def refuse_other_configuration(config: DictConfig, directory: Path, key: str) -> None:
    """Raise an error if ``directory`` holds a run with other values than those of ``config``.

    Hydra would write the new values next to the results of the old ones, before the run could refuse its checkpoint.

    Raises:
        UserError: there is such a run.
    """
    # Imported here, since help and errors in keys do not need it.
    from metarun.engine.replicas import replica_configs

    was = [row.get("config_hash") for row in rows_of(directory / "result.csv")]
    own = OmegaConf.masked_copy(config, [str(name) for name in config if name != "hydra"])
    now = list[str]()
    # What cannot be resolved is said where it is used.
    with suppress(UserError, OmegaConfBaseException, ValueError, TypeError):
        now = [config_hash(one) for one, _ in replica_configs(own)]
    if any(before and before != after for before, after in zip(was, now, strict=False)):
        raise UserError(
            f"The run in {directory} belongs to another configuration: a default has changed since, in a file of the "
            f"configuration or by another version of metarun. Put it back, or choose another {key}."
        )


def refuse_shared_folders(config: DictConfig, jobs: Sequence[Sequence[str]]) -> None:
    """Raise an error if jobs of a sweep would write into the same folder.

    Raises:
        UserError: jobs share a folder; the sentence names the folder and the jobs.
    """
    unresolved: Any = OmegaConf.to_container(config.hydra.sweep, resolve=False)
    if str(unresolved["subdir"]).startswith(UNIQUE_SUBDIR):
        return
    folders = folders_of(config, jobs)
    folder, count = Counter(folders).most_common(1)[0]
    if count > 1:
        sharing = [" ".join(job) for job, own in zip(jobs, folders, strict=True) if own == folder]
        raise UserError(
            f"{count} jobs of the sweep would share the folder {folder!r} ({sharing[0]}; {sharing[1]}): begin "
            "hydra.sweep.subdir with ${hydra:job.num}_, or leave it as it is."
        )


def directory_under(config: DictConfig, key: str) -> Path:
    """Return the directory that a key names."""
    HydraConfig.instance().set_config(config)
    return Path(str(OmegaConf.select(config, key)))


class OneOwner(Callback):
    """Take possession of the directory of a run or a sweep, or exit with a sentence, before Hydra writes there.

    Hydra turns an exception in a callback into a warning and goes on, except for SystemExit.
    """

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check the directory of a single run."""
        self.leave_if_refused(self.take_run, config, "hydra.run.dir")

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check the directory of a sweep."""
        self.leave_if_refused(self.take_sweep, config, "hydra.sweep.dir")

    def take_run(self, config: DictConfig, directory: Path) -> None:
        """Own the directory of a single run; a new run needs a directory without one."""
        lock.acquire(directory)
        if (directory / PLAN).exists():
            raise UserError(f"{directory} holds a sweep; choose another hydra.run.dir.")
        if config.resume is not None:
            refuse_other_configuration(config, directory, "hydra.run.dir")
        elif holds_a_run(directory):
            raise UserError(
                f"{directory} holds a run already; continue it with resume=DIR, or choose another hydra.run.dir."
            )

    def take_sweep(self, config: DictConfig, directory: Path) -> None:
        """Own the directory of a sweep, which is new or was begun by the same command."""
        launch.check(config)
        jobs = jobs_of(config)
        if jobs is not None:
            refuse_shared_folders(config, jobs)
        lock.acquire(directory)
        holds_runs = any(holds_a_run(folder) for folder in (directory, *runs_under(directory)))
        plan = sweep.plan_of(config, jobs)
        sweep.check_plan(directory, plan, holds_runs)
        # What cannot be composed is said when the job is launched.
        with suppress(HydraException, OmegaConfBaseException):
            for job in composed_jobs(config, jobs) if jobs is not None and holds_runs else ():
                folder = directory / str(OmegaConf.select(job, "hydra.sweep.subdir"))
                if any(row.get("status") == "completed" for row in rows_of(folder / "result.csv")):
                    refuse_other_configuration(job, folder, "hydra.sweep.dir")
        sweep.begin(directory, plan)

    def leave_if_refused(self, take: Callable[[DictConfig, Path], None], config: DictConfig, key: str) -> None:
        """Exit the process if ``take`` raises an error, whatever it is: nobody would own the directory."""
        try:
            take(config, directory_under(config, key))
        except UserError as error:
            sys.exit(f"metarun: {error}")
        except (HydraException, OmegaConfBaseException) as error:
            sys.exit(printable(f"metarun: {sentence_of(error)}"))
        except OSError as error:
            sys.exit(
                f"metarun: the output directory cannot be written ({error.strerror or error}: {error.filename}); "
                f"choose another with {key}=DIR."
            )
        except Exception as error:
            if os.environ.get("METARUN_FULL_ERROR") == "1":
                traceback.print_exc()
            sys.exit(printable(f"metarun: {type(error).__name__}: {error} (HYDRA_FULL_ERROR=1 shows where)."))
