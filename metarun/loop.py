"""The loop: meta-train, validate, keep the best, meta-test."""

import logging
import math
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor
from tqdm import tqdm

from metarun import engine
from metarun.assemble import Experiment, Replica, stream
from metarun.errors import UserError
from metarun.outer import learning_rates
from metarun.recording import release_gpu_memory
from metarun.results.tables import write_metrics
from metarun.stepper import Stepper
from metarun.stepping import MetaStep, replica, stacked
from metarun.training import Best, Training, restore, save, save_best, start
from metarun.tree import leaves, size, tree_map
from metarun.types import Split, Task, Tree

log = logging.getLogger(__name__)

EPISODE_BLOCK = 50
"""Validation and test episodes come in blocks of this many, each from its own generator: an episode does not
depend on how many are asked for."""


class Interrupted(Exception):
    """The user stopped the run; its state is saved."""


@dataclass(frozen=True)
class Tested:
    """Meta-test of the selected theta."""

    scored: engine.Evaluated
    seconds: float
    adapt_ms_per_task: float


@contextmanager
def stop_on_signal() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list, so that the loop stops between two steps; a second one kills."""
    received: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def training_tasks(experiment: Experiment, seeds: list[int], count: int, step: int) -> Tree:
    """``support`` and ``query`` of ``count`` tasks for each of ``seeds``, leaves ``[replicas, tasks, ...]``."""

    def drawn(seed: int) -> Tree:
        return experiment.family.sample("train", count, stream(seed, "train", step))._asdict()

    if len(set(seeds)) == 1:
        return tree_map(lambda leaf: leaf.expand(len(seeds), *leaf.shape), drawn(seeds[0]))
    batches = {seed: drawn(seed) for seed in sorted(set(seeds))}
    return stacked([batches[seed] for seed in seeds])


def rates_of(experiment: Experiment) -> list[Tree]:
    """What differs between replicas in each meta-step: ``lr`` ``[replicas]`` along its schedule, and other keys."""
    steps = max(experiment.config.train.steps, 1)
    dtype = torch.get_default_dtype()

    def put(values: Tensor) -> Tensor:
        return values.to(experiment.device, dtype)

    schedules = []
    for one in experiment.replicas:
        train = one.config.train
        schedule = train.schedule.name
        schedules.append(learning_rates(schedule, train.lr, steps, train.final, train.decay, train.decay_every))
    lr = put(torch.stack(schedules, 1))
    others = {
        key: put(torch.tensor([one.differs[key] for one in experiment.replicas]))
        for key in experiment.replicas[0].differs
        if key not in ("seed", "train.lr", "train.final")
    }
    return [{"lr": row, **others} for row in lr]


def episodes(experiment: Experiment, split: Split, count: int) -> Iterator[Task]:
    """The first ``count`` validation or test episodes in blocks, by ``eval.seed`` alone."""
    for index, first in enumerate(range(0, count, EPISODE_BLOCK)):
        block = experiment.family.sample(split, EPISODE_BLOCK, stream(experiment.config.eval.seed, split, index))
        rest = count - first
        if rest < EPISODE_BLOCK:
            block = Task(*(tree_map(lambda leaf: leaf[:rest], part) for part in block))  # noqa: B023
        yield block


NUMBERS_AT_ONCE = {"cpu": 4_000_000, "cuda": 64_000_000}
"""Blocks are evaluated together while their adapted parameters, and what a model makes of their inputs, are no more
than this: beyond, a CPU misses its cache; a GPU has room for more, and takes less where it has not."""


def evaluate(
    experiment: Experiment,
    replica: Replica,
    theta: Tree,
    tasks: Iterable[Task],
    second: bool = False,
) -> engine.Evaluated:
    """Losses and scores along adaptation, over blocks of tasks; second scores too if asked and if there are any.

    Raises:
        UserError: a GPU has no room for a single block.
    """
    algorithm, family, steps = replica.algorithm, experiment.family, experiment.config.eval.adapt_steps
    second_score = family.second_score if second and family.spec.second_metric else None
    rest = iter(tasks)
    first = next(rest)
    # Models make some dozen numbers of each number that they are given.
    inputs = 16 * sum(size(part) for part in first) // len(next(leaves(first.query)))
    numbers = EPISODE_BLOCK * max(engine.adapted_parameters(algorithm, theta), inputs, 1)
    at_once = max(NUMBERS_AT_ONCE[torch.device(experiment.device).type] // numbers, 1)
    if family.spec.control is not None:
        # An episode is many steps long: a block of them is large already.
        at_once = 1
    held, results = [first, *islice(rest, at_once - 1)], list[engine.Evaluated]()
    while held or (held := list(islice(rest, at_once))):
        group = zip(*held[:at_once], strict=True)
        try:
            together = Task(*(tree_map(lambda *leaves: torch.cat(leaves), *parts) for parts in group))
            results.append(engine.evaluate(algorithm, theta, together, family.loss, steps, second_score))
            held = held[at_once:]
        except torch.cuda.OutOfMemoryError as error:
            if min(at_once, len(held)) == 1:
                raise UserError(
                    f"The GPU has too little memory to evaluate {EPISODE_BLOCK} tasks at once; lower task.queries or "
                    "take a smaller model."
                ) from error
            at_once = min(at_once, len(held)) // 2
            release_gpu_memory()
    columns = zip(*(result[1:] for result in results), strict=True)
    return engine.Evaluated(results[0].adapt_steps, *(torch.cat(column).cpu() for column in columns))


def better(experiment: Experiment, score: float, than: float) -> bool:
    """Whether a validation score beats another; NaN beats nothing."""
    if math.isnan(than):
        return not math.isnan(score)
    return score > than if experiment.family.spec.higher_is_better else score < than


def validate(experiment: Experiment, replica: Replica, theta: Tree, tasks: list[Task]) -> tuple[Tree, float, float]:
    """The best of the algorithm's candidates for ``theta``, with its validation loss and score."""
    chosen, loss, score = theta, math.nan, math.nan
    for candidate in replica.algorithm.candidates(theta):
        scored = evaluate(experiment, replica, candidate, tasks)
        candidate_loss, candidate_score = scored.losses[:, -1].mean().item(), scored.scores[:, -1].mean().item()
        if better(experiment, candidate_score, score):
            chosen, loss, score = candidate, candidate_loss, candidate_score
    return chosen, loss, score


def check_finite(training: Training, directory: Path) -> None:
    """Stop a run whose losses or parameters are no longer finite, before anything bad is saved.

    Of several replicas those that are not finite are let be, as long as one is.
    """
    finite = training.state["weights"].isfinite().all(-1)
    if training.window:
        finite = finite & torch.stack(training.window)[..., 0].isfinite().all(0)
    if bool(finite.any()):
        return
    last = directory / "checkpoints" / "last.pt"
    kept = f"the last good checkpoint is {last}" if last.exists() else "there was no checkpoint yet"
    raise UserError(
        f"The training loss stopped being finite by step {training.step}; lower train.lr or algo.inner_lr, or set "
        f"train.clip=1 ({kept})."
    )


def log_rows(training: Training, val: list[tuple[float, float]] | None) -> None:
    """Close the window of steps with a row for ``metrics.csv`` of each replica."""
    means = (
        torch.stack(training.window).mean(0).tolist()
        if training.window
        else [(math.nan, math.nan)] * len(training.rows)
    )
    training.window.clear()
    for index, (loss, score) in enumerate(means):
        row: dict[str, float | int] = {"step": training.step, "train_loss": loss, "train_score": score}
        if val is not None:
            row |= {"val_loss": val[index][0], "val_score": val[index][1]}
        training.rows[index].append(row | {"seconds": round(training.seconds, 3)})


def meta_train(experiment: Experiment, directory: Path, resume: bool) -> Training:
    """Meta-train to ``train.steps``, validating and saving as it goes; ``best`` is set at the end.

    Raises:
        UserError: the loss is no longer finite, or no validation score was a number.
        Interrupted: on SIGINT or SIGTERM, after writing a checkpoint.
    """
    train, metric = experiment.config.train, experiment.family.spec.metric
    meta_step = MetaStep(experiment)
    training = restore(experiment, meta_step, directory) if resume else start(meta_step)
    steps = train.steps if experiment.algorithm.meta_learns and meta_step.layout.size else 0
    validation = list(episodes(experiment, "val", train.val_episodes))
    stepper = Stepper(experiment, meta_step, steps - training.step)
    rates = rates_of(experiment)
    compiled_before = training.compile_seconds
    # Read once: a key of the configuration costs as much as several operations of a step.
    seeds, meta_batch = [one.config.seed for one in experiment.replicas], train.meta_batch
    eval_every, log_every = train.eval_every, train.log_every

    def validate_and_save() -> None:
        check_finite(training, directory)
        values, improved = [], False
        for index, one in enumerate(experiment.replicas):
            now = meta_step.layout.theta(replica(training.state, index))
            theta, val_loss, val_score = validate(experiment, one, now, validation)
            values.append((val_loss, val_score))
            best = training.best[index]
            if best is None or better(experiment, val_score, best.val_score):
                kept = tree_map(lambda leaf: leaf.detach().clone(), theta)
                training.best[index], improved = Best(training.step, val_score, kept), True
        training.seconds += time.perf_counter() - clock[0]
        clock[0] = time.perf_counter()
        log_rows(training, values)
        if improved:
            save_best(experiment, training, directory)
        save(experiment, training, directory)
        write_metrics(directory, training.rows)
        show()

    def show() -> None:
        row, best = training.rows[0][-1], training.best[0]
        values = {"loss": f"{row['train_loss']:.4g}", metric: f"{row['train_score']:.4g}"}
        if best is not None:
            values["best val"] = f"{best.val_score:.4g}"
        progress.set_postfix(values, refresh=False)

    clock = [time.perf_counter()]
    with (
        closing(stepper),
        stop_on_signal() as stopped,
        tqdm(total=steps, initial=training.step, disable=None, unit="step") as progress,
    ):
        if steps == 0 and training.best[0] is None:
            validate_and_save()
            if stopped:
                raise Interrupted
        while training.step < steps:
            tasks = training_tasks(experiment, seeds, meta_batch, training.step)
            given = {"state": training.state, "tasks": tasks, "rates": rates[training.step]}
            out = stepper(given)
            training.state = out["state"]
            training.window.append(out["result"])
            training.step += 1
            progress.update()
            due = training.step % eval_every == 0 or training.step == steps
            if due or training.step % log_every == 0 or stopped:
                stepper.synchronize()
                elapsed = time.perf_counter() - clock[0]
                clock[0] = time.perf_counter()
                training.seconds += elapsed
                compiling = compiled_before + stepper.compile_seconds - training.compile_seconds
                training.step_seconds += elapsed - compiling
                training.compile_seconds += compiling
                training.engine, training.task_map = stepper.engine, stepper.task_map
            if due:
                validate_and_save()
            elif training.step % log_every == 0:
                check_finite(training, directory)
                log_rows(training, None)
                show()
                write_metrics(directory, training.rows)
            if stopped:
                check_finite(training, directory)
                save(experiment, training, directory)
                raise Interrupted
    if not any(best and math.isfinite(best.val_score) for best in training.best):
        raise UserError(f"No validation gave a finite {metric}; lower algo.inner_lr or eval.adapt_steps.")
    return training


def meta_test(experiment: Experiment, replica: Replica, theta: Tree) -> Tested:
    """Score ``theta`` on the test episodes along adaptation."""
    config, began = experiment.config, time.perf_counter()
    blocks = episodes(experiment, "test", config.eval.episodes)
    scored = evaluate(experiment, replica, theta, blocks, second=True)
    seconds = time.perf_counter() - began
    block = next(episodes(experiment, "test", min(EPISODE_BLOCK, config.eval.episodes)))
    began = time.perf_counter()
    timed = engine.adapt_and_score(replica.algorithm, theta, block, experiment.family.loss, config.eval.adapt_steps)
    if experiment.device != "cpu":
        torch.cuda.synchronize(experiment.device)
    milliseconds = 1000 * (time.perf_counter() - began) / len(timed)
    return Tested(scored, seconds, milliseconds)
