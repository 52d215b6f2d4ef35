"""The loop: meta-train, validate, keep the best, meta-test."""

import logging
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from tqdm import tqdm

from metarun import engine
from metarun.assemble import Experiment, stream
from metarun.errors import UserError
from metarun.results.tables import write_metrics
from metarun.training import Best, Training, restore, save, save_best, start
from metarun.tree import learned, leaves, tree_map
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


def meta_step(experiment: Experiment, training: Training) -> None:
    """One meta-step in place: sample tasks, meta-gradient, clip, outer step."""
    config, theta = experiment.config, training.theta
    tasks = experiment.family.sample("train", config.train.meta_batch, stream(config.seed, "train", training.step))
    result = engine.meta_gradient(experiment.algorithm, theta, tasks, experiment.family.loss)
    variables = list(leaves(learned(theta)))
    for variable, gradient in zip(variables, leaves(result.grads), strict=True):
        variable.grad = gradient
    if config.train.clip is not None:
        torch.nn.utils.clip_grad_norm_(variables, config.train.clip)
    assert training.optimizer is not None
    training.optimizer.step()
    if training.schedule is not None:
        training.schedule.step()
    for old, new in zip(leaves(theta.get("carried", {})), leaves(result.carried), strict=True):
        old.copy_(new)
    training.window.append(torch.stack([result.loss, result.score]))
    training.step += 1


def episodes(experiment: Experiment, split: Split, count: int) -> Iterator[Task]:
    """The first ``count`` validation or test episodes in blocks, by ``eval.seed`` alone."""
    for index, first in enumerate(range(0, count, EPISODE_BLOCK)):
        block = experiment.family.sample(split, EPISODE_BLOCK, stream(experiment.config.eval.seed, split, index))
        rest = count - first
        if rest < EPISODE_BLOCK:
            block = Task(*(tree_map(lambda leaf: leaf[:rest], part) for part in block))  # noqa: B023
        yield block


def evaluate(
    experiment: Experiment, theta: Tree, tasks: Iterator[Task] | list[Task], second: bool = False
) -> engine.Evaluated:
    """Losses and scores along adaptation, over blocks of tasks; second scores too if asked and if there are any."""
    algorithm, family, steps = experiment.algorithm, experiment.family, experiment.config.eval.adapt_steps
    second_score = family.second_score if second and family.spec.second_metric else None
    blocks = [engine.evaluate(algorithm, theta, block, family.loss, steps, second_score) for block in tasks]
    columns = zip(*(block[1:] for block in blocks), strict=True)
    return engine.Evaluated(blocks[0].adapt_steps, *(torch.cat(column).cpu() for column in columns))


def better(experiment: Experiment, score: float, than: float) -> bool:
    """Whether a validation score beats another; NaN beats nothing."""
    if math.isnan(than):
        return not math.isnan(score)
    return score > than if experiment.family.spec.higher_is_better else score < than


def validate(experiment: Experiment, theta: Tree, tasks: list[Task]) -> tuple[Tree, float, float]:
    """The best of the algorithm's candidates for ``theta``, with its validation loss and score."""
    chosen, loss, score = theta, math.nan, math.nan
    for candidate in experiment.algorithm.candidates(theta):
        scored = evaluate(experiment, candidate, tasks)
        candidate_loss, candidate_score = scored.losses[:, -1].mean().item(), scored.scores[:, -1].mean().item()
        if better(experiment, candidate_score, score):
            chosen, loss, score = candidate, candidate_loss, candidate_score
    return chosen, loss, score


def check_finite(training: Training, directory: Path) -> None:
    """Stop a run whose loss or parameters are no longer finite, before anything bad is saved."""
    finite = all(bool(leaf.isfinite().all()) for leaf in leaves(learned(training.theta)))
    if finite and all(bool(pair[0].isfinite()) for pair in training.window):
        return
    last = directory / "checkpoints" / "last.pt"
    kept = f"the last good checkpoint is {last}" if last.exists() else "there was no checkpoint yet"
    raise UserError(
        f"The training loss stopped being finite by step {training.step}; lower train.lr or algo.inner_lr, or set "
        f"train.clip=1 ({kept})."
    )


def log_row(training: Training, val: tuple[float, float] | None) -> dict[str, float | int]:
    """Close the window of steps with a row for ``metrics.csv``."""
    loss, score = torch.stack(training.window).mean(0).tolist() if training.window else (math.nan, math.nan)
    training.window.clear()
    row: dict[str, float | int] = {"step": training.step, "train_loss": loss, "train_score": score}
    if val is not None:
        row |= {"val_loss": val[0], "val_score": val[1]}
    row["seconds"] = round(training.seconds, 3)
    training.rows.append(row)
    return row


def meta_train(experiment: Experiment, directory: Path, resume: bool) -> Training:
    """Meta-train to ``train.steps``, validating and saving as it goes; ``best`` is set at the end.

    Raises:
        UserError: the loss is no longer finite, or no validation score was a number.
        Interrupted: on SIGINT or SIGTERM, after writing a checkpoint.
    """
    train, metric = experiment.config.train, experiment.family.spec.metric
    training = restore(experiment, directory) if resume else start(experiment)
    steps = train.steps if experiment.algorithm.meta_learns else 0
    validation = list(episodes(experiment, "val", train.val_episodes))

    def validate_and_save() -> None:
        check_finite(training, directory)
        theta, val_loss, val_score = validate(experiment, training.theta, validation)
        training.seconds += time.perf_counter() - clock[0]
        clock[0] = time.perf_counter()
        row = log_row(training, (val_loss, val_score))
        best = training.best
        if best is None or better(experiment, val_score, best.val_score):
            best = training.best = Best(training.step, val_score, tree_map(lambda t: t.detach().clone(), theta))
            save_best(experiment, best, directory)
        save(experiment, training, directory)
        write_metrics(directory, training.rows)
        show(row)

    def show(row: dict[str, float | int]) -> None:
        values = {"loss": f"{row['train_loss']:.4g}", metric: f"{row['train_score']:.4g}"}
        if training.best is not None:
            values["best val"] = f"{training.best.val_score:.4g}"
        progress.set_postfix(values, refresh=False)

    clock = [time.perf_counter()]
    with (
        stop_on_signal() as stopped,
        tqdm(total=steps, initial=training.step, disable=None, unit="step") as progress,
    ):
        if steps == 0 and training.best is None:
            validate_and_save()
            if stopped:
                raise Interrupted
        while training.step < steps:
            meta_step(experiment, training)
            progress.update()
            due = training.step % train.eval_every == 0 or training.step == steps
            if due or training.step % train.log_every == 0 or stopped:
                if experiment.device != "cpu":
                    torch.cuda.synchronize(experiment.device)
                elapsed = time.perf_counter() - clock[0]
                clock[0] = time.perf_counter()
                training.seconds += elapsed
                training.step_seconds += elapsed
            if due:
                validate_and_save()
            elif training.step % train.log_every == 0:
                check_finite(training, directory)
                show(log_row(training, None))
                write_metrics(directory, training.rows)
            if stopped:
                check_finite(training, directory)
                save(experiment, training, directory)
                raise Interrupted
    if training.best is None or not math.isfinite(training.best.val_score):
        raise UserError(f"No validation gave a finite {metric}; lower algo.inner_lr or eval.adapt_steps.")
    return training


def meta_test(experiment: Experiment, theta: Tree) -> Tested:
    """Score ``theta`` on the test episodes along adaptation."""
    config, began = experiment.config, time.perf_counter()
    scored = evaluate(experiment, theta, episodes(experiment, "test", config.eval.episodes), second=True)
    seconds = time.perf_counter() - began
    block = next(episodes(experiment, "test", min(EPISODE_BLOCK, config.eval.episodes)))
    began = time.perf_counter()
    timed = engine.adapt_and_score(experiment.algorithm, theta, block, experiment.family.loss, config.eval.adapt_steps)
    if experiment.device != "cpu":
        torch.cuda.synchronize(experiment.device)
    milliseconds = 1000 * (time.perf_counter() - began) / len(timed)
    return Tested(scored, seconds, milliseconds)
