"""What launchers that run jobs in other processes share: composing the jobs, running one, collecting its result.

How a sweep has ended is read from the files in the folders of its jobs, so a launcher passes on a single number per
job, and a job whose process has died returns NaN.
"""

import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

from hydra import version
from hydra._internal.callbacks import Callbacks
from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import (
    JobReturn,
    JobStatus,
    configure_log,
    filter_overrides,
    run_job,
    setup_globals,
)
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from metarun.errors import first_line

log = logging.getLogger(__name__)


class Call:
    """One job, to be called in another process; made of what ``pickle`` can send there."""

    def __init__(self, task: TaskFunction, config: DictConfig) -> None:
        self.task, self.config, self.folder = task, config, str(Path.cwd())

    def __call__(self) -> float:
        """Run the job as Hydra does; return its validation score, or NaN."""
        os.chdir(self.folder)
        if self.folder not in sys.path:
            # As for a single run, _target_ can name modules in the folder of the command.
            sys.path.append(self.folder)
        version.setbase("1.3")
        setup_globals()
        # A job is composed already, so nothing loads configurations any more.
        context = HydraContext(config_loader=cast(ConfigLoader, None), callbacks=Callbacks(self.config))
        try:
            done = run_job(self.task, self.config, "hydra.sweep.dir", "hydra.sweep.subdir", context)
            return float(done.return_value)
        except OSError as error:
            # Of the job's folder, in which Hydra writes first; whatever the job itself comes upon it says by itself.
            if os.environ.get("METARUN_FULL_ERROR") == "1":
                raise
            log.error(
                "metarun: the folder of a job cannot be written (%s: %s); make room there, and continue the sweep.",
                error.strerror or error,
                error.filename,
            )
            return math.nan


class InOtherProcesses(Launcher):
    """A launcher that hands calls to a library."""

    name: ClassVar[str]
    """The member of ``hydra/launcher``."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what Hydra gives."""
        self.context, self.task, self.composed = hydra_context, task_function, config

    def results(self, calls: Sequence[Call]) -> list[float]:
        """Run the calls; return what each returned, NaN for a job whose process has died."""
        raise NotImplementedError

    def of_job(self, overrides: Sequence[str], number: int) -> DictConfig:
        """Return the configuration of one job."""
        config = self.context.config_loader.load_sweep_config(self.composed, list(overrides))
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        return config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs; return one result per job, in order."""
        setup_globals()
        configure_log(self.composed.hydra.hydra_logging, self.composed.hydra.verbose)
        Path(str(self.composed.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        log.info("Launching %d jobs with %s", len(job_overrides), self.name)
        for index, overrides in enumerate(job_overrides):
            log.info("\t#%d : %s", initial_job_idx + index, " ".join(filter_overrides(overrides)))
        configs = [self.of_job(own, initial_job_idx + index) for index, own in enumerate(job_overrides)]
        values = self.results([Call(self.task, config) for config in configs])
        HydraConfig.instance().set_config(self.composed)
        configure_log(self.composed.hydra.hydra_logging, self.composed.hydra.verbose)
        return [
            JobReturn(overrides=list(overrides), cfg=config, status=JobStatus.COMPLETED, _return_value=value)
            for overrides, config, value in zip(job_overrides, configs, values, strict=True)
        ]


def end_with(parent: int) -> None:
    """Stop this process, as Ctrl-C would, once it is no longer a child of ``parent``; return at once."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    if not any(thread.name == "parent" for thread in threading.enumerate()):
        threading.Thread(target=watch, name="parent", daemon=True).start()


def lost(reason: str) -> float:
    """Report that the process of a job has died; return the result of that job."""
    log.error("A job's process has died: %s", reason)
    return math.nan


def collected(waiting: Sequence[Any]) -> list[float]:
    """Return the results of functions that wait for one job each."""
    values = []
    for wait in waiting:
        try:
            values.append(float(wait()))
        except Exception as error:
            values.append(lost(first_line(error)))
    return values
