"""``hydra/launcher=submitit``: one job of a cluster's queue (SLURM), or one process of this machine, per job."""

import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metarun.launch.base import Call, InOtherProcesses, collected


class Requeued:
    """A call that saves its run and is queued again when the cluster stops it, to go on in its folder."""

    def __call__(self, call: Call) -> float:
        """Run the call; SIGTERM and submitit's own signal stop it as they stop a run elsewhere."""
        number = getattr(signal, f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}")
        queue_again = signal.getsignal(number)
        signal.signal(number, lambda number, frame: os.kill(os.getpid(), signal.SIGTERM))
        try:
            return call()
        except KeyboardInterrupt:
            if callable(queue_again):
                queue_again(number, None)
            raise

    def checkpoint(self, call: Call) -> Any:
        """Return what submitit queues again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, call)


class SubmititLauncher(InOtherProcesses):
    """Submits all jobs and waits for them; ``conf/hydra/launcher/submitit.yaml`` explains the keys."""

    name = "submitit"

    def __init__(self, cluster: str | None, at_once: int | None, timeout_min: int, **parameters: Any) -> None:
        self.cluster, self.at_once, self.timeout_min, self.parameters = cluster, at_once, timeout_min, parameters

    def results(self, calls: Sequence[Call]) -> list[float]:
        """Run the calls as jobs of the queue."""
        import submitit

        folder = Path(str(self.composed.hydra.sweep.dir)) / ".submitit"
        executor = submitit.AutoExecutor(folder=folder / "%j", cluster=self.cluster)
        given = {key: value for key, value in self.parameters.items() if value is not None}
        of_slurm: Mapping[str, Any] = given.pop("slurm", {})
        slurm = {f"slurm_{key}": value for key, value in of_slurm.items() if value is not None}
        executor.update_parameters(timeout_min=self.timeout_min, **given)
        if executor.cluster == "slurm":
            executor.update_parameters(**slurm, slurm_array_parallelism=self.at_once or 256)
            return collected([job.result for job in executor.map_array(Requeued(), calls)])
        return collected([job.result for job in self.submitted(executor, calls)])

    def submitted(self, executor: Any, calls: Sequence[Call]) -> list[Any]:
        """Start processes of this machine, at most ``at_once`` at a time, because nothing queues them."""
        jobs: list[Any] = []
        limit = self.at_once or os.cpu_count() or 1
        for call in calls:
            while sum(not job.done() for job in jobs) >= limit:
                time.sleep(0.1)
            jobs.append(executor.submit(Requeued(), call))
        return jobs
