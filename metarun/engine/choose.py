"""The engine: what runs the meta-steps of a run, named by the configuration or chosen by an estimate of its time.

- ``eager``: torch runs the function as it is written.
- ``replay``: the operations of one step, recorded once (`metarun.engine.recording`), are run again without being
  derived again.
- ``compile``: the recording as one compiled graph.
- ``xla``: the recording translated to JAX and compiled by XLA, on a CPU and where JAX is installed.
- ``cudagraph``: the recording as one launch on a GPU.

Tasks are mapped by ``vmap``, or by ``threads``: as many Python threads as torch has been given run a recording of one
task's gradient, replayed or compiled, each with a single thread of torch. On a CPU this is faster than one grouped
convolution where convolutions have separate weights per task.

``auto`` does not time anything. It estimates from the number of operations and the amount of arithmetic in the first
step, the number of steps of the whole run, and the kind of machine. The same command therefore runs on the same engine,
and gives the same numbers, on an idle machine or a busy one. A resumed run goes on with the engine that its checkpoint
names. Every engine except eager is compared with eager before it is used, on other tasks and other parameters than
those of the recording: what a recording holds as a constant would otherwise not show.
"""

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from metarun.assemble import Experiment, training_tasks
from metarun.checks.gradient import check_gradient
from metarun.contracts import Tree
from metarun.engine import xla
from metarun.engine.meta_step import MetaStep, Step, accumulated, parts_of, refuse_out_of_memory
from metarun.engine.processes import averaged, own_part, share, with_own_part
from metarun.engine.recorder import CannotRecord
from metarun.engine.recording import LARGEST_SCRIPT, Captured, OtherShapes, Recording, release_gpu_memory
from metarun.errors import UserError, first_line
from metarun.system.torchrun import count
from metarun.tree import leaves

log = logging.getLogger(__name__)

SMALL_WORK = 5e8
"""Floating-point operations per step and replica in products and convolutions, below which calling an operation costs
more than computing it."""
TOLERANCE = 5e-3
"""Largest relative difference of an engine's step from eager's in float32. Convolutions differ by 3e-4 in second
order, and Adam's first steps can enlarge this difference."""
ONE_THREAD_WORK = 1e8
"""The same, below which a second thread only adds variance to the time of a step."""
EAGER_OPERATION, ARITHMETIC = 1.5e-5, 2e10
"""Seconds that an operation of an eager step takes by itself, and floating-point operations per second and thread:
docs/performance.md. They decide which engine pays off, and no result depends on their being exact."""
GPU_ARITHMETIC = 1e13
"""Floating-point operations per second on a GPU, as an H200 has in the convolutions of iMAML on Omniglot."""
RECORDING = 0.0003
"""Seconds to record an operation."""
SCRIPTING = 1e-7
"""Seconds to prepare a replay in C++, per square of the number of operations."""
COMPILING = {"compile": (12.0, 0.012), "xla": (1.0, 0.003)}
"""Seconds to compile at all, and to compile an operation."""
KEPT = 0.5
"""The part of these seconds that is charged to a run whose compiled step is kept for other runs. A command is seldom
the last of its kind, and whether it is the first must not decide. What an only run loses is less than the next would
gain."""
CALLED = {"eager": (1.0, 1.0), "replay": (0.33, 0.55), "cudagraph": (0.06, 0.06)}
"""For engines that run an eager step's kernels, so that arithmetic takes as long: the share of an eager step's time for
calling them, with few operations, and with so many that a replay calls them in Python."""
SHARES = {
    # engine: (of small work, of other work)
    "compile": (0.1, 0.7),
    # XLA takes several times as long as torch for convolutions whose weights differ between tasks.
    "xla": (0.13, 4.0),
    "compile threads": (1.0, 0.6),
    "replay threads": (1.0, 0.8),
}
"""The share of an eager step's time that a step takes on engines with other kernels."""


def choose_threads(experiment: Experiment, work: float) -> None:
    """Set torch's threads: as configured, or one for little work, or all that torch has."""
    chosen = experiment.config.engine.threads
    if chosen is not None:
        torch.set_num_threads(chosen)
    elif experiment.device == "cpu" and work < ONE_THREAD_WORK:
        torch.set_num_threads(1)


@contextmanager
def one_thread_each(workers: int) -> Iterator[None]:
    """Inside, torch uses a single thread in the caller, while workers have the cores."""
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(workers)


def agrees(found: Tree, expected: Tree, given: Tree) -> bool:
    """Whether two results of a step are equal up to rounding: each replica's leaves, and the change of its weights.

    The change is compared by itself, because it is small relative to the weights, and Adam enlarges rounding errors.
    """

    def near(a: Tensor, b: Tensor, tolerance: float) -> bool:
        # What is not finite has to be the same: one of several replicas may have diverged.
        apart = torch.where((a == b) | (a.isnan() & b.isnan()), 0, a - b)
        size = b.double().nan_to_num(0.0, 0.0, 0.0)
        found, allowed = (one.double().reshape(len(b), -1).norm(dim=1) for one in (apart, size))
        return bool((found <= tolerance * allowed + 1e-7 * (b.numel() / len(b)) ** 0.5).all())

    old, new, other = (tree["train_state"]["weights"] for tree in (given, expected, found))
    pairs = zip(leaves(found), leaves(expected), strict=True)
    return near(other - old, new - old, 10 * TOLERANCE) and all(near(a, b, TOLERANCE) for a, b in pairs)


def elsewhere(state: Tree) -> Tree:
    """Return a state like ``state`` whose learned numbers are others, by about a tenth, and of the same size."""
    weights: Tensor = state["weights"]
    signs = torch.ones_like(weights)
    signs[..., ::2] = -1
    usual = weights.square().mean(-1, keepdim=True).sqrt()
    return {**state, "weights": weights + 0.1 * signs * (weights.abs() + usual)}


class Counted(TorchDispatchMode):
    """Counts the operations that reach the kernels, and the arithmetic of products and convolutions among them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations, self.work = 0, 0.0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Being marked for torch's compiler would import all of the compiler, and nothing here is compiled."""
        return False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self.operations += 1
        if function.overloadpacket in flop_registry:
            self.work += flop_registry[function.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def captured_if_possible(compiled: Recording, example: Tree) -> Step:
    """Return a compiled recording; on a GPU, as one launch for all of its kernels if they can be captured."""
    if not next(leaves(example)).is_cuda:
        return compiled
    try:
        return Captured(compiled, example)
    except CannotRecord as error:
        log.debug("What is compiled cannot be captured: %s", error)
        return compiled


class Stepper:
    """Runs meta-steps one after the other, from the first that this process runs.

    ``engine`` names the current engine and ``task_map`` how tasks are mapped; ``compile_seconds`` is the time spent on
    recording, compiling and comparing.
    """

    def __init__(self, experiment: Experiment, meta_step: MetaStep, kept: tuple[str, str] | None = None) -> None:
        """``kept`` are the engine and the map over tasks with which a resumed run goes on.

        Raises:
            UserError: this machine or this run cannot use the engine.
        """
        self.experiment, self.meta_step, self.kept = experiment, meta_step, kept
        settings = experiment.config.engine
        self.mode, self.wanted_map = settings.mode.name, settings.task_map.name
        if self.mode == "cudagraph" and experiment.device == "cpu":
            raise UserError("engine=cudagraph needs a CUDA device, and this run is on the CPU; choose engine=auto.")
        if self.mode == "xla" and experiment.device != "cpu":
            raise UserError("engine=xla runs on the CPU, and this run is on a GPU; choose engine=auto or device=cpu.")
        if self.mode == "xla" and not xla.installed():
            raise UserError("engine=xla needs JAX: pip install 'metarun[xla]', or choose engine=auto.")
        if self.wanted_map == "threads" and (experiment.device != "cpu" or meta_step.count > 1):
            raise UserError(
                "engine.task_map=threads is for one replica on the CPU; choose engine.task_map=auto or vmap."
            )
        if self.wanted_map == "threads" and self.mode in ("eager", "xla", "cudagraph"):
            raise UserError("engine.task_map=threads runs recordings; choose engine=auto, replay or compile with it.")
        if experiment.config.train.precision.name == "bfloat16" and experiment.family.spec.offers("policy"):
            raise UserError(
                "train.precision=bfloat16 is too coarse for the baselines of policy gradients; choose float32."
            )
        self.meta_batch: int = experiment.config.train.meta_batch
        self.chunk = experiment.config.train.task_chunk or self.meta_batch
        if self.meta_batch % self.chunk:
            raise UserError(
                f"train.task_chunk must divide train.meta_batch={self.meta_batch}, and {self.chunk} does not."
            )
        self.share = share(self.meta_batch)
        if count() > 1 and (self.wanted_map == "threads" or meta_step.trust_region is not None):
            raise UserError("torchrun shares tasks between processes: choose task_map=vmap, and not trpo.")
        self.may_halve = experiment.config.train.task_chunk is None and meta_step.trust_region is None
        self.engine, self.task_map, self.compile_seconds = "eager", "vmap", 0.0
        self.work, self.workers = 0.0, 1
        self.pool: ThreadPoolExecutor | None = None
        self.operations = 0
        self.recordings: dict[str, Recording] = {}
        self.run: Step = self.eager()
        self.began, self.said_shapes = False, False

    def eager(self) -> Step:
        """Return the step as it is written, ``chunk`` tasks at a time."""
        if count() > 1:
            chunk = max(c for c in range(1, min(self.chunk, self.share) + 1) if self.share % c == 0)
            return self.over_processes(self.meta_step.gradient, chunk)
        if self.chunk == self.meta_batch:
            return self.meta_step.whole
        return accumulated(self.meta_step.gradient, self.meta_step.update, self.chunk)

    def __call__(self, given: Tree) -> Tree:
        """Run one meta-step; see `metarun.engine.meta_step` for what is given and returned."""
        if self.began:
            return self.run_or_halve(given)
        self.began = True
        if self.experiment.placeholders:
            self.meta_step.check_replicas(parts_of(given, 1)[0])
        check_gradient(self.meta_step, given)
        with Counted() as counted:
            out = self.run_or_halve(given)
        self.operations, self.work = counted.operations, counted.work / self.meta_step.count
        choose_threads(self.experiment, counted.work)
        self.workers = torch.get_num_threads()
        # A trust region searches along its step, which only the step as it is written can do.
        if self.mode != "eager" and self.meta_step.trust_region is None:
            self.choose(given, out["train_state"])
        # Only the first step of the whole run is eager: the first step of a resumed run is on its engine too.
        return out if self.kept is None else self.run_or_halve(given)

    def run_or_halve(self, given: Tree) -> Tree:
        """Run a step; while a GPU is too small and ``train.task_chunk`` is not set, halve the tasks at a time."""
        while True:
            try:
                return self.run(given)
            except OtherShapes:
                if not self.said_shapes:
                    log.info("Batches of tasks differ in their shapes; those unlike the first run on engine=eager.")
                self.said_shapes = True
                return self.eager()(given)
            except torch.cuda.OutOfMemoryError as error:
                release_gpu_memory()
                if self.engine != "eager":
                    log.info("The GPU has no room left for engine=%s, so the engine is eager from now on.", self.engine)
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

    def over_processes(self, gradient: Step, chunk: int) -> Step:
        """Return a step that shares tasks with other processes; ``gradient`` gets ``chunk`` of this one's at a time."""
        return with_own_part(accumulated(gradient, averaged(self.meta_step.update), chunk))

    def recorded_part(self, example: Tree) -> Recording:
        """Record the gradient of this process's tasks once."""
        if "part" not in self.recordings:
            self.recordings["part"] = Recording(self.meta_step.gradient, own_part(example))
        return self.recordings["part"]

    def ways_over_processes(self) -> Iterator[tuple[str, Callable[[Tree], Step]]]:
        """Yield what ``ways`` does, for tasks that are shared with other processes."""

        def replayed(example: Tree) -> Step:
            return self.over_processes(self.recorded_part(example).replayed(own_part(example)), self.share)

        def compiled(example: Tree) -> Step:
            return self.over_processes(self.recorded_part(example).compiled(own_part(example)), self.share)

        def translated(example: Tree) -> Step:
            return self.over_processes(self.recorded_part(example).by_xla(own_part(example)), self.share)

        def captured(example: Tree) -> Step:
            return self.over_processes(Captured(self.recorded_part(example), own_part(example)), self.share)

        if self.tries("replay"):
            yield "replay", replayed
        if self.tries("compile"):
            yield "compile", compiled
        if self.tries("xla"):
            yield "xla", translated
        if self.tries("cudagraph"):
            yield "cudagraph", captured

    def synchronize(self) -> None:
        """Wait for the GPU, if there is one."""
        if self.experiment.device != "cpu":
            torch.cuda.synchronize(self.experiment.device)

    def choose(self, given: Tree, after: Tree) -> None:
        """Change from eager to the engine that is configured, named by the checkpoint, or estimated to be fastest.

        Recordings are made on ``given``, and compared with eager on the tasks of the second step, close to the state
        ``after`` the first one.
        """
        began = time.perf_counter()
        other = given
        if self.kept is None:
            seeds = [one.config.seed for one in self.experiment.replicas]
            tasks = training_tasks(self.experiment, seeds, self.meta_batch, 1)
            other = {**given, "train_state": elsewhere(after), "tasks": tasks}
        expected: Tree | None = None
        estimates = {name: self.estimated_seconds(name) for name in ("eager", *(name for name, _ in self.ways()))}
        reasons, chosen = list[str](), "eager"
        for name, make in self.in_order(estimates):
            try:
                run = make(given)
                if self.kept is None:
                    expected = self.run(other) if expected is None else expected
                    if not agrees(run(other), expected, other):
                        raise CannotRecord("its results differ from those of eager")
            except CannotRecord as error:
                reasons.append(f"no {name}: {error}")
                continue
            except torch.cuda.OutOfMemoryError as error:
                reasons.append(f"no {name}: {first_line(error)}")
                release_gpu_memory()
                continue
            chosen, self.run = name, run
            break
        self.compile_seconds += time.perf_counter() - began
        self.recordings.clear()
        self.engine, _, threads = chosen.partition(" ")
        self.task_map = "threads" if threads else "vmap"
        if self.kept is not None:
            reasons.append("as before the run was interrupted")
        elif self.mode == "auto":
            steps = self.experiment.config.train.steps
            by_estimate = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in estimates.items())
            reasons.append(f"estimated for {steps} steps of {self.operations} operations: {by_estimate}")
        log.info("engine: %s%s", chosen, f" ({'; '.join(reasons)})" if reasons else "")

    def in_order(self, estimates: dict[str, float]) -> list[tuple[str, Callable[[Tree], Step]]]:
        """Return the engines to try in order until one works; eager always works and ends the list."""
        ways = list(self.ways())
        if self.kept is not None:
            engine, task_map = self.kept
            name = engine if task_map == "vmap" else f"{engine} {task_map}"
            return [way for way in ways if way[0] == name]
        if self.mode != "auto":
            return ways
        better = [way for way in ways if estimates[way[0]] < estimates["eager"] or self.wanted_map == "threads"]
        return sorted(better, key=lambda way: estimates[way[0]])

    def estimated_seconds(self, name: str) -> float:
        """Return the estimated seconds of a whole run on an engine, including those of recording and compiling."""
        small = self.work < SMALL_WORK
        count = self.meta_step.count
        rate = ARITHMETIC * self.workers if self.experiment.device == "cpu" else GPU_ARITHMETIC
        calling, arithmetic = EAGER_OPERATION * self.operations, self.work * count / rate
        steps: int = self.experiment.config.train.steps
        making = 0.0 if name == "eager" else RECORDING * self.operations
        if name.startswith("replay") and self.operations <= LARGEST_SCRIPT:
            making += SCRIPTING * self.operations**2
        anything, operation = COMPILING.get(name.partition(" ")[0], (0.0, 0.0))
        making += KEPT * (anything + operation * self.operations)
        if name in CALLED:
            calling *= CALLED[name][self.operations > LARGEST_SCRIPT]
            return 1.3 * making + (calling + arithmetic) * steps
        return 1.3 * making + SHARES[name][0 if small else 1] * (calling + arithmetic) * steps

    def tries(self, engine: str) -> bool:
        """Whether an engine is configured, or is one of those from which auto chooses on this machine."""
        if self.mode != "auto":
            return bool(self.mode == engine)
        if self.experiment.device != "cpu":
            return engine == "cudagraph"
        # A resumed run says why it cannot go on with the engine that its checkpoint names.
        return engine in ("replay", "compile") or (engine == "xla" and (xla.installed() or self.kept is not None))

    def ways(self) -> Iterator[tuple[str, Callable[[Tree], Step]]]:
        """Yield names of engines to try, with a function that makes each from an example.

        A configured engine is made in the first of these ways that works.
        """
        if count() > 1:
            yield from self.ways_over_processes()
            return
        asked = self.mode
        if self.wanted_map == "threads" or (self.threads_possible() and self.wanted_map == "auto"):
            if asked == "replay" or (asked == "auto" and self.wanted_map == "threads"):
                yield "replay threads", lambda example: self.threaded(self.replayed_task(example))
            if asked in ("auto", "compile"):
                yield "compile threads", lambda example: self.threaded(self.compiled_task(example))
            if self.wanted_map == "threads":
                return
        if self.tries("replay"):
            yield "replay", lambda example: self.recorded_step(example).replayed(example)
        if self.tries("compile"):
            yield (
                "compile",
                lambda example: captured_if_possible(self.recorded_step(example).compiled(example), example),
            )
        if self.tries("xla"):
            yield "xla", lambda example: self.recorded_step(example).by_xla(example)
        if self.tries("cudagraph"):
            yield "cudagraph", lambda example: Captured(self.recorded_step(example), example)

    def threads_possible(self) -> bool:
        """Whether there are tasks to distribute over threads of a CPU, and enough work to fill a thread."""
        return (
            self.experiment.device == "cpu"
            and self.meta_step.count == 1
            and self.workers > 1
            and self.meta_batch > 1
            and self.chunk == self.meta_batch
            and self.work >= SMALL_WORK
        )

    def recorded_step(self, example: Tree) -> Recording:
        """Record the whole step once."""
        if "step" not in self.recordings:
            self.recordings["step"] = Recording(self.eager(), example)
        return self.recordings["step"]

    def recorded_task(self, example: Tree) -> Recording:
        """Record the gradient of a single task once."""
        if "task" not in self.recordings:
            self.recordings["task"] = Recording(self.meta_step.gradient, parts_of(example, 1)[0])
        return self.recordings["task"]

    def replayed_task(self, example: Tree) -> Recording:
        """Record the gradient of a single task, to be run in C++."""
        return self.recorded_task(example).replayed(parts_of(example, 1)[0])

    def compiled_task(self, example: Tree) -> Recording:
        """Compile the gradient of a single task into one graph whose kernels use one thread."""
        with one_thread_each(self.workers):
            return self.recorded_task(example).compiled(parts_of(example, 1)[0], self.workers)

    def threaded(self, gradient: Recording) -> Step:
        """Return a step that distributes the gradients of single tasks over threads."""
        if self.pool is None:
            self.pool = ThreadPoolExecutor(self.workers, "metarun", torch.set_num_threads, (1,))
        run = accumulated(gradient, self.meta_step.update, 1, self.pool)

        def step(given: Tree) -> Tree:
            with one_thread_each(self.workers):
                return run(given)

        return step
