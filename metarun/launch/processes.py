"""``hydra/launcher=processes``, the default: the jobs of a sweep in several processes of this machine.

A process runs one job after the other, and another takes its place if it dies. On a machine with a GPU, and where only
one job runs at a time, the jobs run in the process of the command, as Hydra's own launcher runs them.
"""

import math
import os
import signal
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import cast

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.utils import JobReturn

from metarun.errors import UserError
from metarun.launch.base import Call, InOtherProcesses, end_with, lost
from metarun.system.importing import importing
from metarun.system.signals import handled_by, stop

MEMORY_OF_A_JOB = 3 * 2**30
"""Bytes of memory that a job is allowed, when the number of jobs at a time is chosen."""
LAST_WORDS = 60.0
"""Seconds that jobs have to save a checkpoint when the sweep is stopped."""
GPUS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""Files that say that there is a GPU, without importing torch."""


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory() -> float:
    """Return the bytes of memory that this process may use, whoever uses some of them now."""
    found = [math.inf]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdecimal():
        found.append(int(text))
    return min(found)


def jobs_at_a_time(device: str) -> int:
    """Return how many jobs run at a time: one per core, fewer if memory is short, one where there is a GPU.

    Nothing here depends on what else runs, because a job's number of threads, and with it rounding, follows from it.
    """
    if device != "cpu" and any(Path(file).exists() for file in GPUS):
        return 1
    return max(1, int(min(cores(), memory() / MEMORY_OF_A_JOB)))


def work(connection: Connection, parent: int) -> None:
    """Run the calls that come through ``connection``, and send back what each returns, until there are no more."""
    if os.name == "posix":
        end_with(parent)
    with importing():
        # While the jobs are being composed.
        import metarun.run  # noqa: F401
    # Where a job was stopped, it has said so in its folder; where the sweep has ended, nobody waits for a result.
    with suppress(KeyboardInterrupt):
        while (call := received(connection)) is not None:
            result = call()
            with suppress(OSError):
                connection.send(result)


def received(connection: Connection) -> Call | None:
    """Return the next call; None if there are no more, or the process that began the sweep has gone."""
    try:
        call: Call | None = connection.recv()
        return call
    except (EOFError, OSError):
        return None


class Worker:
    """A process that runs jobs. Ctrl-C and the end of a terminal reach it through the process that began the sweep."""

    def __init__(self) -> None:
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(target=work, args=(theirs, os.getpid()))
        with held_back():
            self.process.start()
        theirs.close()
        self.job: int | None = None

    def give(self, job: int, call: Call) -> None:
        """Begin a job. If the process has died meanwhile, ``result`` says so."""
        self.job = job
        with suppress(OSError):
            self.connection.send(call)

    def result(self) -> float:
        """Return what the job has returned, NaN if the process has died."""
        try:
            value: float = self.connection.recv()
            return value
        except (EOFError, OSError):
            self.process.join()
            return lost(f"its exit code is {self.process.exitcode}")

    def dismiss(self) -> None:
        """Let the process end, and wait for it."""
        with suppress(OSError):
            self.connection.send(None)
        self.process.join()


@contextmanager
def held_back() -> Iterator[None]:
    """Inside, SIGINT and SIGHUP wait; they never reach processes that are started here, where the system allows it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        # It lets go of SIGINT when it starts, which it does here instead of with the first process.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Inside, processes that are started have these variables in their environment."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def run_all(workers: list[Worker], calls: Sequence[Call]) -> list[float]:
    """Run the calls; return what each returned, NaN for a job whose process has died, whose place another one takes."""
    values, waiting = [math.nan] * len(calls), deque(range(len(calls)))
    for worker in workers:
        worker.give(job := waiting.popleft(), calls[job])
    while busy := {worker.connection: worker for worker in workers if worker.job is not None}:
        for connection in wait(list(busy)):
            worker = busy[cast(Connection, connection)]
            values[cast(int, worker.job)] = worker.result()
            worker.job = None
            if waiting and not worker.process.is_alive():
                workers.remove(worker)
                workers.append(worker := Worker())
            if waiting:
                worker.give(job := waiting.popleft(), calls[job])
    for worker in workers:
        worker.dismiss()
    return values


def stop_all(workers: Sequence[Worker]) -> None:
    """Stop the jobs, which save a checkpoint; end those that take too long."""
    if os.name == "posix":
        # Elsewhere this would be no request, and Ctrl-C has reached the jobs by itself.
        for worker in workers:
            worker.process.terminate()
    until = time.monotonic() + LAST_WORDS
    for worker in workers:
        worker.process.join(max(until - time.monotonic(), 0.0))
        worker.process.kill()


class ProcessesLauncher(InOtherProcesses):
    """Runs ``n_jobs`` jobs at a time; None means as many as ``jobs_at_a_time`` says."""

    name = "processes"

    def __init__(self, n_jobs: int | None) -> None:
        if n_jobs is not None and (type(n_jobs) is not int or n_jobs < 1):
            raise UserError(f"hydra.launcher.n_jobs must be a whole number from 1 on, or null, not {n_jobs}.")
        self.n_jobs = n_jobs

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs; return one result per job, in order."""
        chosen = self.n_jobs or jobs_at_a_time(str(self.composed.device))
        count = min(chosen, len(job_overrides))
        if count <= 1:
            own = BasicLauncher()
            own.setup(hydra_context=self.context, task_function=self.task, config=self.composed)
            return own.launch(job_overrides, initial_job_idx)
        # Each job has its part of the cores, and several progress bars would overwrite each other.
        threads = os.environ.get("OMP_NUM_THREADS", str(max(cores() // count, 1)))
        with handled_by(stop), environment(OMP_NUM_THREADS=threads, TQDM_DISABLE="1"):
            self.workers: list[Worker] = []
            try:
                for _ in range(count):
                    self.workers.append(Worker())
                return super().launch(job_overrides, initial_job_idx)
            except BaseException:
                stop_all(self.workers)
                raise

    def results(self, calls: Sequence[Call]) -> list[float]:
        """Run the calls in processes that have been started already."""
        return run_all(self.workers, calls)
