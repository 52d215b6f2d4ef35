"""The engine: what runs the meta-steps of a run, named by the configuration or chosen by measurement.

- ``eager``: torch runs the function as it is written.
- ``replay``: the operations of one step, recorded once (`metarun.recording`), without the work of deriving them.
- ``compile``: the recording in one compiled graph.
- ``cudagraph``: the recording as one launch on a GPU.

Tasks are mapped by ``vmap``, or by ``threads``: a recording of one task's gradient, replayed or compiled, is run by as
many Python threads as torch has been given, each with one of torch's own. On a CPU that is faster for convolutions with
weights of each task's own than one grouped convolution.

``auto`` measures the first eager steps, and goes on to whatever saves more time over the steps that remain than it
costs. Every other engine is compared with eager on tasks that it has not seen before it is used.
"""

import logging
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from metarun.assemble import Experiment
from metarun.errors import UserError, first_line
from metarun.recording import CannotRecord, Captured, Recording, release_gpu_memory
from metarun.stepping import MetaStep, Step, accumulated, parts_of, refuse_out_of_memory
from metarun.tree import leaves
from metarun.types import Tree

log = logging.getLogger(__name__)

WATCHED = 10
"""Eager steps that ``auto`` times, after the first."""
SMALL_WORK = 5e8
"""Floating-point operations of a step and replica in products and convolutions, below which calling costs more than
computing."""
TOLERANCE = 5e-3
"""Largest relative difference of an engine's step from eager's in float32; convolutions differ by 3e-4 in second
order, which Adam's first steps can enlarge."""
ONE_THREAD_WORK = 1e8
"""The same, below which a second thread only adds variance."""
RECORD_SECONDS = 0.0012
COMPILE_SECONDS = {"cold": (12.0, 0.012), "warm": (1.5, 0.004)}
COMPILED_SHARE = 0.25
"""Seconds that it costs to record an operation, to compile (once, and for each operation; with and without what the
compiler has cached), and the share of a replayed small step that is left: docs/performance.md."""


def choose_threads(experiment: Experiment, work: float) -> None:
    """One thread for little work, else as many as torch has; or what the configuration says."""
    chosen = experiment.config.engine.threads
    if chosen is not None:
        torch.set_num_threads(chosen)
    elif experiment.device == "cpu" and work < ONE_THREAD_WORK:
        torch.set_num_threads(1)


@contextmanager
def one_thread_each(workers: int) -> Iterator[None]:
    """Torch's own threads off in the caller while workers have the cores."""
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(workers)


def agrees(found: Tree, expected: Tree, given: Tree) -> bool:
    """Whether two results of a step are equal up to rounding: every leaf, and the change that the weights have seen.

    The change is looked at by itself, because it is small beside the weights, and Adam enlarges what is rounded.
    """

    def near(a: Tensor, b: Tensor, tolerance: float) -> bool:
        return bool((a - b).double().norm() <= tolerance * b.double().norm() + 1e-7 * b.numel() ** 0.5)

    old, new, other = (tree["state"]["weights"] for tree in (given, expected, found))
    pairs = zip(leaves(found), leaves(expected), strict=True)
    return near(other - old, new - old, 10 * TOLERANCE) and all(near(a, b, TOLERANCE) for a, b in pairs)


class Counted(TorchDispatchMode):
    """Counts the operations that reach the kernels, and the arithmetic of products and convolutions among them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations, self.work = 0, 0.0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self.operations += 1
        if function.overloadpacket in flop_registry:
            self.work += flop_registry[function.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


@dataclass
class Candidate:
    """An engine that could run, and what it was measured to take."""

    name: str
    run: Step
    seconds: float


class Stepper:
    """Runs meta-steps one after the other, from the first that this process runs.

    ``engine`` names what runs now, ``task_map`` how tasks are mapped; ``compile_seconds`` is what was spent on
    recording, compiling, comparing and measuring.
    """

    def __init__(self, experiment: Experiment, meta_step: MetaStep, steps: int) -> None:
        """``steps`` are those that this process will run.

        Raises:
            UserError: an engine that this machine or this run cannot have.
        """
        self.experiment, self.meta_step, self.remaining = experiment, meta_step, steps
        settings = experiment.config.engine
        self.mode, self.wanted_map = settings.mode.name, settings.task_map.name
        if self.mode == "cudagraph" and experiment.device == "cpu":
            raise UserError("engine=cudagraph needs a CUDA device, and this run is on the CPU; choose engine=auto.")
        if self.wanted_map == "threads" and (experiment.device != "cpu" or meta_step.count > 1):
            raise UserError(
                "engine.task_map=threads is for one replica on the CPU; choose engine.task_map=auto or vmap."
            )
        if self.wanted_map == "threads" and self.mode in ("eager", "cudagraph"):
            raise UserError("engine.task_map=threads runs recordings; choose engine=auto, replay or compile with it.")
        if experiment.config.train.precision.name == "bfloat16" and experiment.family.spec.kind == "control":
            raise UserError(
                "train.precision=bfloat16 is too coarse for the baselines of policy gradients; choose float32."
            )
        self.meta_batch: int = experiment.config.train.meta_batch
        self.chunk = experiment.config.train.task_chunk or self.meta_batch
        if self.meta_batch % self.chunk:
            raise UserError(
                f"train.task_chunk must divide train.meta_batch={self.meta_batch}, and {self.chunk} does not."
            )
        self.may_halve = experiment.config.train.task_chunk is None and meta_step.trust_region is None
        self.engine, self.task_map, self.compile_seconds = "eager", "vmap", 0.0
        self.small, self.workers = False, 1
        self.pool: ThreadPoolExecutor | None = None
        self.operations = 0
        self.recordings: dict[str, Recording] = {}
        self.run: Step = self.eager()
        # A trust region searches along its step, which only the step as it is written can do.
        self.choosing = self.mode != "eager" and meta_step.trust_region is None
        self.watched: list[float] = []
        self.before: Tree | None = None

    def eager(self) -> Step:
        """The step as it is written, ``chunk`` tasks at a time."""
        if self.chunk == self.meta_batch:
            return self.meta_step.whole
        return accumulated(self.meta_step.gradient, self.meta_step.update, self.chunk)

    def __call__(self, given: Tree) -> Tree:
        """One meta-step; see `metarun.stepping` for what is given and returned."""
        began = time.perf_counter()
        if self.before is None:
            if self.experiment.placeholders:
                self.meta_step.check_replicas(parts_of(given, 1)[0])
            with Counted() as counted:
                out = self.run_or_halve(given)
            self.operations, self.small = counted.operations, counted.work / self.meta_step.count < SMALL_WORK
            choose_threads(self.experiment, counted.work)
            self.workers = torch.get_num_threads()
        else:
            out = self.run_or_halve(given)
        self.remaining -= 1
        if self.choosing:
            self.synchronize()
            self.watched.append(time.perf_counter() - began)
            if len(self.watched) > (WATCHED if self.mode == "auto" else 1):
                assert self.before is not None
                self.choose(self.before, given, out)
                self.choosing = False
        self.before = given if self.choosing or self.before is None else self.before
        return out

    def run_or_halve(self, given: Tree) -> Tree:
        """Run a step; where a GPU is too small for it and ``train.task_chunk`` is free, with half as many tasks."""
        while True:
            try:
                return self.run(given)
            except torch.cuda.OutOfMemoryError as error:
                release_gpu_memory()
                if self.engine != "eager":
                    log.info("The GPU has no room left for engine=%s, so it is eager from here on.", self.engine)
                    self.engine = "eager"
                elif self.may_halve and self.chunk > 1:
                    self.chunk = max(c for c in range(1, self.chunk) if self.meta_batch % c == 0)
                    log.info("The GPU is too small for all tasks at once: %d at a time.", self.chunk)
                else:
                    raise refuse_out_of_memory(error, self.meta_batch) from error
                self.run = self.eager()

    def close(self) -> None:
        """End the threads."""
        if self.pool is not None:
            self.pool.shutdown()

    def synchronize(self) -> None:
        """Wait for the GPU, if there is one."""
        if self.experiment.device != "cpu":
            torch.cuda.synchronize(self.experiment.device)

    def timed(self, run: Step, given: Tree) -> float:
        """Median seconds of a step, over as many as eager was watched for or half a second allows."""
        taken: list[float] = []
        while len(taken) < WATCHED and sum(taken) < 0.5:
            began = time.perf_counter()
            run(given)
            self.synchronize()
            taken.append(time.perf_counter() - began)
        return statistics.median(taken)

    def choose(self, before: Tree, given: Tree, expected: Tree) -> None:
        """Go from eager to the engine that was asked for, or to the one that saves most.

        Recordings are made on ``before`` and compared on ``given``, whose eager result is ``expected``.
        """
        began = time.perf_counter()
        reasons: list[str] = []
        # The very first step also warms up.
        seconds = statistics.median(self.watched[1:])
        best = Candidate("eager", self.run, seconds)
        for name, make in self.ways():
            try:
                if self.mode == "auto" and (refusal := self.not_worth(name, best, before)):
                    reasons.append(refusal)
                    continue
                run = make(before)
                if not agrees(run(given), expected, given):
                    raise CannotRecord("it does not give what eager gives")
                candidate = Candidate(name, run, self.timed(run, given))
            except CannotRecord as error:
                reasons.append(f"no {name}: {error}")
                continue
            except torch.cuda.OutOfMemoryError as error:
                reasons.append(f"no {name}: {first_line(error)}")
                release_gpu_memory()
                continue
            reasons.append(f"{name} {1000 * candidate.seconds:.3g} ms")
            if self.mode != "auto":
                best = candidate
                break
            best = min(best, candidate, key=lambda one: one.seconds)
        self.compile_seconds += time.perf_counter() - began
        self.run = best.run
        self.recordings.clear()
        self.engine, _, threads = best.name.partition(" ")
        self.task_map = "threads" if threads else "vmap"
        log.info("engine: %s (eager %.3g ms a step; %s)", best.name, 1000 * seconds, "; ".join(reasons) or "no other")

    def ways(self) -> Iterator[tuple[str, Callable[[Tree], Step]]]:
        """Names of engines to try and how to make each from an example.

        ``auto`` tries all and keeps the fastest; an engine that was asked for is had by the first way that works.
        """
        cuda, asked = self.experiment.device != "cpu", self.mode
        if self.wanted_map == "threads" or (self.threads_possible() and self.wanted_map == "auto"):
            if asked == "replay" or (asked == "auto" and self.wanted_map == "threads"):
                yield "replay threads", lambda example: self.threaded(self.recorded_task(example))
            if asked in ("auto", "compile"):
                yield "compile threads", lambda example: self.threaded(self.compiled_task(example))
            if self.wanted_map == "threads":
                return
        if asked == "replay" or (asked == "auto" and not cuda):
            yield "replay", self.recorded_step
        if asked == "compile" or (asked == "auto" and not cuda):
            yield "compile", lambda example: self.recorded_step(example).compiled(example)
        if asked == "cudagraph" or (asked == "auto" and cuda):
            yield "cudagraph", lambda example: Captured(self.recorded_step(example), example)

    def threads_possible(self) -> bool:
        """Whether there are tasks to share out among threads of a CPU, and reason to: work that fills a thread."""
        return (
            self.experiment.device == "cpu"
            and self.meta_step.count == 1
            and self.workers > 1
            and self.meta_batch > 1
            and self.chunk == self.meta_batch
            and not self.small
        )

    def recorded_step(self, example: Tree) -> Recording:
        """The whole step, recorded once."""
        if "step" not in self.recordings:
            self.recordings["step"] = Recording(self.eager(), example)
        return self.recordings["step"]

    def recorded_task(self, example: Tree) -> Recording:
        """The gradient of a single task, recorded once."""
        if "task" not in self.recordings:
            self.recordings["task"] = Recording(self.meta_step.gradient, parts_of(example, 1)[0])
        return self.recordings["task"]

    def compiled_task(self, example: Tree) -> Recording:
        """The gradient of a single task in one graph, whose kernels keep to one thread."""
        with one_thread_each(self.workers):
            return self.recorded_task(example).compiled(parts_of(example, 1)[0])

    def threaded(self, gradient: Recording) -> Step:
        """The gradients of single tasks shared out among threads."""
        if self.pool is None:
            self.pool = ThreadPoolExecutor(self.workers, "metarun", torch.set_num_threads, (1,))
        run = accumulated(gradient, self.meta_step.update, 1, self.pool)

        def step(given: Tree) -> Tree:
            with one_thread_each(self.workers):
                return run(given)

        return step

    def not_worth(self, name: str, best: Candidate, example: Tree) -> str:
        """Why ``auto`` should not even make an engine: it would cost more than it can save; '' if it should.

        Small steps lose half of their time by replaying and more by compiling; of others threads and compiling can
        save a third, and what is spent on trying must stay below a twentieth of the whole (for threads a tenth).
        """
        left, eager = self.remaining, statistics.median(self.watched[1:])
        engine, _, threads = name.partition(" ")
        if self.wanted_map == "threads":
            return ""
        if engine == "replay" and not self.small:
            return "replay would gain nothing on work of this size"
        if engine == "compile" and not threads and self.threads_possible():
            return "compile is left to threads"
        # Compiled threads have never gained less than a third; half of a tenth gained back keeps the promise.
        affordable = left * eager * (0.5 if self.small else 0.1 if threads else 0.05)
        record = 0.0 if ("task" if threads else "step") in self.recordings else RECORD_SECONDS * self.operations
        cost, gain = record, 0.4 if self.small else 0.2
        if engine == "compile":
            # Whether the compiler's cache has this graph shows only once it is recorded.
            warm = self.is_warm(bool(threads), example) if record < affordable / 2 else False
            once, an_operation = COMPILE_SECONDS["warm" if warm else "cold"]
            cost = record + once + an_operation * self.operations
            gain = 1 - COMPILED_SHARE if self.small else 0.3
        saves = gain * left * best.seconds
        if saves > 1.3 * cost and cost < affordable:
            return ""
        return f"{name} would save {saves:.1f} s and cost about {cost:.1f} s"

    def is_warm(self, one_task: bool, example: Tree) -> bool:
        """Whether the step, or one task's gradient, has been compiled on this machine before."""
        try:
            with one_thread_each(self.workers) if one_task else nullcontext():
                return (self.recorded_task(example) if one_task else self.recorded_step(example)).marker().exists()
        except CannotRecord:
            return False
