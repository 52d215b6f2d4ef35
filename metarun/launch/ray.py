"""``hydra/launcher=ray``: the jobs of a sweep on the nodes of a Ray cluster, or on one that is started here."""

import logging
import os
from collections.abc import Sequence

from metarun.launch.base import Call, InOtherProcesses, collected

log = logging.getLogger(__name__)


def run(call: Call) -> float:
    """Run a call in a process of Ray's."""
    return call()


class RayLauncher(InOtherProcesses):
    """Runs as many jobs at a time as the cluster has room for.

    Args:
        address: address of a cluster (``auto`` finds one on this machine); None starts one that ends with the sweep.
        cpus: CPUs of a cluster that is started here; None: all.
        cpus_per_job: CPUs that each job occupies.
        gpus_per_job: GPUs that each job occupies; a fraction shares one.
    """

    name = "ray"

    def __init__(self, address: str | None, cpus: int | None, cpus_per_job: float, gpus_per_job: float) -> None:
        self.address, self.cpus = address, cpus
        self.of_each = {"num_cpus": cpus_per_job, "num_gpus": gpus_per_job}

    def results(self, calls: Sequence[Call]) -> list[float]:
        """Run the calls as Ray's tasks, spread over the nodes."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        cluster = {"num_cpus": self.cpus} if self.address is None else {"address": self.address}
        ray.init(logging_level=logging.WARNING, **cluster)
        try:
            log.info("Ray has %d nodes", sum(node["Alive"] for node in ray.nodes()))
            # A job whose process or node has died is tried again, and goes on from its checkpoint.
            task = ray.remote(run).options(scheduling_strategy="SPREAD", max_retries=3, **self.of_each)
            waiting = [task.remote(call) for call in calls]
            return collected([lambda one=one: ray.get(one) for one in waiting])
        finally:
            ray.shutdown()
