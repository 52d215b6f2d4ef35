"""Drawing the tasks of a meta-step while a GPU computes the one before."""

from collections.abc import Callable

import torch

from metarun.contracts import Task
from metarun.tree import leaves


class Ahead:
    """Draws tasks on a second stream of a GPU; on a CPU, in the usual way.

    A copy to a GPU waits for the work already queued on its stream: on that of the meta-steps, for the previous step.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.stream = None if device == "cpu" else torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.before: torch.cuda.Event | None = None

    def __call__(self, draw: Callable[[], Task]) -> Task:
        """Return the tasks that ``draw`` returns, once at most one earlier step is unfinished."""
        if self.stream is None:
            return draw()
        steps = torch.cuda.current_stream(self.device)
        if self.before is None:
            self.stream.wait_stream(steps)
        else:
            # The tasks of more than one step ahead would fill the GPU's memory.
            self.before.synchronize()
        self.before = steps.record_event()
        with torch.cuda.stream(self.stream):
            tasks = draw()
        steps.wait_stream(self.stream)
        for leaf in leaves(tasks):
            leaf.record_stream(steps)
        return tasks
