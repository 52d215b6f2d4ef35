"""The training loop: meta-train, validate, keep the best."""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor
from tqdm import tqdm

from metarun.assemble import Experiment, training_tasks
from metarun.checks.diagnosis import blame, step_size_remedy
from metarun.checks.family import check_family
from metarun.contracts import Task, Tree
from metarun.engine.ahead import Ahead
from metarun.engine.choose import Stepper
from metarun.engine.meta_step import MetaStep, replica
from metarun.engine.optimizer import learning_rates
from metarun.errors import Stopped, UserError
from metarun.evaluation import better, episodes, validate
from metarun.results.tables import Watcher, write_metrics
from metarun.state import Best, Training, restore, save, save_best, start
from metarun.system.signals import handled_by
from metarun.system.torchrun import rank
from metarun.tree import tree_map

log = logging.getLogger(__name__)


class Interrupted(Stopped):
    """The user stopped the run; its state is saved."""


@contextmanager
def stop_on_signal() -> Iterator[list[int]]:
    """Collect signals that ask to stop in a list, so that the loop stops between two steps; a second one kills.

    What comes within a second of the first is the same request: a group of processes is often told twice.
    """
    received: list[int] = []
    first = 0.0

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if received and time.monotonic() - first > 1:
            raise Stopped(number)
        if not received:
            first = time.monotonic()
            received.append(number)

    with handled_by(handler):
        yield received


class Rates:
    """What differs between replicas in each meta-step: ``lr`` ``[replicas]`` along its schedule, and other keys.

    The schedule is computed for a block of steps at a time, with the numbers of the whole one.
    """

    BLOCK = 4096

    def __init__(self, experiment: Experiment) -> None:
        self.device, self.first, self.block = experiment.device, -1, torch.empty(0)
        self.steps = max(experiment.config.train.steps, 1)
        self.schedules = [
            (train.schedule.name, train.lr, self.steps, train.final, train.decay, train.decay_every)
            for train in (one.config.train for one in experiment.replicas)
        ]
        self.others = {
            key: self._put(torch.tensor([one.differs[key] for one in experiment.replicas]))
            for key in experiment.replicas[0].differs
            if key not in ("seed", "train.lr", "train.final")
        }

    def _put(self, values: Tensor) -> Tensor:
        return values.to(self.device, torch.get_default_dtype())

    def __getitem__(self, step: int) -> Tree:
        """Return the rates of a step, from 0 to ``train.steps`` − 1."""
        first = step - step % self.BLOCK
        if first != self.first:
            last = min(first + self.BLOCK, self.steps)
            rates = [learning_rates(*schedule, first=first, last=last) for schedule in self.schedules]
            self.first, self.block = first, self._put(torch.stack(rates, 1))
        return {"lr": self.block[step - first], **self.others}


def rates_of(experiment: Experiment) -> Rates:
    """Return the learning rates of every meta-step, and what else differs between replicas."""
    return Rates(experiment)


def check_finite(experiment: Experiment, training: Training, directory: Path) -> None:
    """Stop a run whose losses or parameters are no longer finite, before they are saved.

    Of several replicas, some may diverge: the run stops only when none is finite.
    """
    finite = training.train_state["weights"].isfinite().all(-1)
    if training.window:
        finite = finite & torch.stack(training.window)[..., 0].isfinite().all(0)
    if bool(finite.any()):
        return
    last = directory / "checkpoints" / "last.pt"
    kept = f"the last good checkpoint is {last}" if last.exists() else "there was no checkpoint yet"
    raise UserError(
        f"The training loss stopped being finite by step {training.step}: {blame(experiment, training)} ({kept})."
    )


def log_rows(training: Training, val: list[tuple[float, float]] | None) -> None:
    """Close the window of steps: add one row for ``metrics.csv`` per replica."""
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


def select(
    experiment: Experiment, meta_step: MetaStep, training: Training, validation: list[Task]
) -> tuple[list[tuple[float, float]], bool]:
    """Validate every replica, and keep its parameters if they are the best so far.

    Returns:
        Validation loss and score of each replica, and whether any has improved.
    """
    values, improved = [], False
    for index, one in enumerate(experiment.replicas):
        now = meta_step.layout.theta(replica(training.train_state, index))
        theta, val_loss, val_score = validate(experiment, one, now, validation)
        values.append((val_loss, val_score))
        best = training.best[index]
        if best is None or better(experiment, val_score, best.val_score):
            kept = tree_map(lambda leaf: leaf.detach().clone(), theta)
            training.best[index], improved = Best(training.step, val_score, kept), True
    return values, improved


class Clock:
    """Seconds since it was last read."""

    def __init__(self) -> None:
        self.last = time.perf_counter()

    def read(self) -> float:
        """Return those seconds, and start counting again from zero."""
        before, self.last = self.last, time.perf_counter()
        return self.last - before


def account(training: Training, stepper: Stepper, seconds: float, compiled: float) -> None:
    """Add ``seconds`` of meta-steps, with compilation counted separately; ``compiled`` is from before this process."""
    compiling = compiled + stepper.compile_seconds - training.compile_seconds
    training.seconds += seconds
    training.step_seconds += seconds - compiling
    training.compile_seconds += compiling
    training.engine, training.task_map = stepper.engine, stepper.task_map
    training.device, training.threads = torch.device(stepper.experiment.device).type, torch.get_num_threads()


def newest(training: Training, metric: str) -> dict[str, str]:
    """Return what the progress bar shows of the first replica."""
    row, best = training.rows[0][-1], training.best[0]
    values = {"loss": f"{row['train_loss']:.4g}", metric: f"{row['train_score']:.4g}"}
    return values if best is None else {**values, "best val": f"{best.val_score:.4g}"}


def meta_train(experiment: Experiment, directory: Path, resume: bool, watchers: Sequence[Watcher] = ()) -> Training:
    """Meta-train for ``train.steps`` with regular validation and checkpoints; ``best`` is set at the end.

    ``watchers`` are called whenever ``metrics.csv`` has been written.

    Raises:
        UserError: the loss is no longer finite, or no validation score was finite.
        Interrupted: on SIGINT, SIGTERM or SIGHUP, after a checkpoint was written.
        Pruned: a watcher has ended the run.
    """
    train, metric = experiment.config.train, experiment.family.spec.metrics[0].name
    meta_step = MetaStep(experiment)
    # Under torchrun, the directory of the other processes is not that of the run.
    place = Path(experiment.config.resume) if rank() and resume else directory
    training = restore(experiment, meta_step, place) if resume else start(meta_step)
    if any(training.best):
        # The run may have been stopped after it had written better ones, which another machine need not find again.
        save_best(experiment, training, directory)
    steps = train.steps if experiment.algorithm.meta_learns and meta_step.layout.size else 0
    check_family(experiment, episodes(experiment, "test", experiment.config.eval.episodes))
    validation = list(episodes(experiment, "val", train.val_episodes))
    same_device = training.device == torch.device(experiment.device).type
    kept = (training.engine, training.task_map) if training.step and same_device else None
    if kept is not None:
        # Set here, so that validation and test use it even if no step is left to do.
        torch.set_num_threads(training.threads)
    stepper, compiled = Stepper(experiment, meta_step, kept), training.compile_seconds
    ahead = Ahead(experiment.device)
    rates = rates_of(experiment)
    # Read once, because reading a key of the configuration costs as much as several operations of a step.
    seeds, meta_batch = [one.config.seed for one in experiment.replicas], train.meta_batch
    eval_every, log_every = train.eval_every, train.log_every

    def validate_and_save() -> None:
        check_finite(experiment, training, directory)
        values, improved = select(experiment, meta_step, training, validation)
        training.seconds += clock.read()
        log_rows(training, values)
        if improved:
            save_best(experiment, training, directory)
        save(experiment, training, directory)

    clock = Clock()
    with (
        closing(stepper),
        stop_on_signal() as stopped,
        tqdm(total=steps, initial=training.step, disable=None, unit="step") as progress,
    ):
        if steps == 0 and training.best[0] is None:
            validate_and_save()
            write_metrics(directory, training.rows)
            if stopped:
                raise Interrupted(stopped[0])
        if training.step:
            # The run may have been killed after its checkpoint and before this table.
            write_metrics(directory, training.rows)
        while training.step < steps:
            tasks = ahead(partial(training_tasks, experiment, seeds, meta_batch, training.step))
            out = stepper({"train_state": training.train_state, "tasks": tasks, "rates": rates[training.step]})
            training.train_state = out["train_state"]
            training.window.append(out["result"])
            training.step += 1
            progress.update()
            due = training.step % eval_every == 0 or training.step == steps
            if not (due or training.step % log_every == 0 or stopped):
                continue
            stepper.synchronize()
            account(training, stepper, clock.read(), compiled)
            if due:
                validate_and_save()
            elif training.step % log_every == 0:
                check_finite(experiment, training, directory)
                log_rows(training, None)
            if due or training.step % log_every == 0:
                write_metrics(directory, training.rows)
                for watch in watchers:
                    watch([rows[-1] for rows in training.rows])
                progress.set_postfix(newest(training, metric), refresh=False)
            if stopped:
                check_finite(experiment, training, directory)
                save(experiment, training, directory)
                raise Interrupted(stopped[0])
    if not any(best and math.isfinite(best.val_score) for best in training.best):
        raise UserError(f"No validation gave a finite {metric}; {step_size_remedy(experiment, testing=True)}.")
    return training
