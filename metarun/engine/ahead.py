"""The tasks of the next meta-step, drawn by another thread while a step runs.

What a step draws depends on the seed and its number alone, so it does not matter which thread draws it, or when.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from metarun.contracts import Task


class Ahead:
    """Draws tasks step by step."""

    def __init__(self, draw: Callable[[int], Task], steps: int) -> None:
        """``draw`` returns the tasks of a step, and ``steps`` is the number of steps of the whole run."""
        self.draw, self.steps = draw, steps
        self.pool: ThreadPoolExecutor | None = None
        self.waiting: tuple[int, Future[Task]] | None = None
        self.in_threads = True

    def __call__(self, step: int, ahead: bool) -> Task:
        """Return the tasks of a step; if ``ahead``, begin with those of the step after it."""
        tasks = self.drawn(step)
        if ahead and self.in_threads and step + 1 < self.steps:
            if self.pool is None:
                self.pool = ThreadPoolExecutor(1, "tasks", torch.set_num_threads, (1,))
            self.waiting = step + 1, self.pool.submit(self.draw, step + 1)
        return tasks

    def drawn(self, step: int) -> Task:
        """Return the tasks of a step, which may have been drawn already."""
        waiting, self.waiting = self.waiting, None
        if waiting is not None and waiting[0] == step:
            try:
                return waiting[1].result()
            except Exception:
                # Some data can only be read by the thread that opened it. If that is not the reason, this fails, too.
                self.in_threads = False
        return self.draw(step)

    def close(self) -> None:
        """End the thread."""
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)
