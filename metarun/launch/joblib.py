"""``hydra/launcher=joblib``: the jobs of a sweep in several processes of this machine."""

import math
import os
from collections.abc import Sequence

from metarun.errors import first_line
from metarun.launch.base import Call, InOtherProcesses, end_with, lost


def guarded(call: Call, parent: int) -> float:
    """Run a call, unless the process that began the sweep has been killed, and stop it if that happens."""
    if os.name == "posix":
        if os.getppid() != parent:
            return math.nan
        end_with(parent)
    return call()


class JoblibLauncher(InOtherProcesses):
    """Runs ``n_jobs`` jobs at a time; -1 means one per core."""

    name = "joblib"

    def __init__(self, n_jobs: int) -> None:
        self.n_jobs = n_jobs

    def results(self, calls: Sequence[Call]) -> list[float]:
        """Run the calls in joblib's processes."""
        from joblib import Parallel, delayed

        # One at a time, so that a sweep that is killed leaves no queue of jobs to its orphans.
        run = Parallel(self.n_jobs, backend="loky", pre_dispatch="n_jobs", batch_size=1, return_as="generator")
        values: list[float] = []
        try:
            values.extend(run(delayed(guarded)(call, os.getpid()) for call in calls))
        except Exception as error:
            values += [lost(first_line(error))] * (len(calls) - len(values))
        return values
