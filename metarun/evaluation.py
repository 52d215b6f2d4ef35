"""Validation and test: the episodes, the scores along adaptation, and what validation selects."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from metarun.assemble import Experiment, Replica, sample_tasks
from metarun.checks.family import check_tasks
from metarun.checks.fingerprint import Fingerprint
from metarun.checks.transduction import is_transductive
from metarun.contracts import Algorithm, Family, Loss, Pooled, Predict, Report, Scores, Split, Task, Tree
from metarun.engine import batch
from metarun.engine.recording import release_gpu_memory
from metarun.errors import UserError
from metarun.nn.padding import weighing
from metarun.nn.transforms import over_tasks
from metarun.random import stream
from metarun.results.reports import Measured
from metarun.results.tables import PooledScore
from metarun.targets.classes import chosen_classes
from metarun.targets.metric import Metric
from metarun.targets.scoring import scores_in_test
from metarun.tasks.units import units_of_tasks
from metarun.tree import first_tasks, leaves, size, tree_map

EPISODE_BLOCK = 50
"""Number of validation or test episodes in a block. Each block has its own generator, so that an episode does not
depend on how many are requested."""


@dataclass(frozen=True)
class Tested:
    """Results of meta-testing the selected theta."""

    scored: batch.Evaluated
    seconds: float
    adapt_ms_per_task: float
    episodes_hash: str
    """A hash that is equal for two runs tested on the same episodes."""
    transductive: bool
    """Whether the queries of an episode see each other."""
    pooled: dict[str, PooledScore]
    """Each metric of all test episodes together."""


def episodes(experiment: Experiment, split: Split, count: int) -> Iterator[Task]:
    """Yield the first ``count`` validation or test episodes in blocks, which depend only on ``eval.seed``.

    Raises:
        UserError: a block does not agree with the spec.
    """
    family = experiment.family
    for index, first in enumerate(range(0, count, EPISODE_BLOCK)):
        block = sample_tasks(experiment, split, EPISODE_BLOCK, stream(experiment.config.eval.seed, split, index))
        check_tasks(block, family.spec, split, EPISODE_BLOCK, experiment.device)
        yield first_tasks(block, count - first)


def metrics_of(experiment: Experiment) -> tuple[Metric, ...]:
    """Return all metrics of test tasks: the family's, that of its control, and those that only the algorithm has."""
    control: Metric | None = getattr(experiment.family, "control", None)
    return (*experiment.family.spec.metrics, *([control] if control else []), *experiment.algorithm.metrics)


def pooled_metrics(experiment: Experiment) -> tuple[Metric, ...]:
    """Return the metrics of all test tasks together."""
    own: Pooled | None = getattr(experiment.family, "pooled", None)
    return () if own is None else own.metrics


def in_test(algorithm: Algorithm, family: Family) -> Algorithm:
    """Return ``algorithm`` with the scores that the family gives only in tests added to its own."""

    def scores(theta: Tree, state: Any, data: Tree) -> Scores:
        found = {} if algorithm.scores is None else algorithm.scores(theta, state, data)
        return {**scores_in_test(family, partial(algorithm.predict, theta, state), data), **found}

    return algorithm._replace(scores=scores)


NUMBERS_AT_ONCE = {"cpu": 4_000_000, "cuda": 64_000_000}
"""Blocks are evaluated together as long as their adapted parameters and activations are no more than this. Beyond it, a
CPU misses its cache. A GPU has room for more, and takes fewer blocks at once where memory runs out."""


MOST_NUMBERS = 400_000_000
"""A block with more numbers than this, about 1.6 GB, is evaluated in parts; colour pictures of 84 pixels have more."""


def numbers_per_task(algorithm: Algorithm, theta: Tree, tasks: Task) -> int:
    """Return about how many numbers it takes to evaluate one of ``tasks``."""
    # Models compute about a dozen activations per input number.
    inputs = 16 * (size(tasks.support) + size(tasks.query)) // len(next(leaves(tasks.query)))
    return max(batch.adapted_parameters(algorithm, theta), inputs, 1)


def in_parts(blocks: Iterable[Task], most: int) -> Iterator[Task]:
    """Yield the tasks of each block, at most ``most`` at a time."""
    for block in blocks:
        count = len(next(leaves(block.query)))
        for first in range(0, count, most):
            yield block if count <= most else tree_map(lambda leaf, i=first: leaf[i : i + most], block)


def in_fitting_parts(algorithm: Algorithm, theta: Tree, tasks: Iterable[Task]) -> tuple[int, Iterator[Task]]:
    """Return about how many numbers a task takes, and the blocks of tasks in parts of which each fits into memory."""
    blocks = iter(tasks)
    first = next(blocks)
    of_task = numbers_per_task(algorithm, theta, first)
    return of_task, in_parts(chain([first], blocks), max(MOST_NUMBERS // of_task, 1))


def evaluate(
    experiment: Experiment,
    replica: Replica,
    theta: Tree,
    tasks: Iterable[Task],
    testing: bool = False,
    only_last: bool = False,
) -> batch.Evaluated:
    """Return losses and scores along adaptation, over blocks of tasks; with ``testing``, all metrics of a test.

    ``only_last`` skips scoring before the last step, where that changes nothing.

    Raises:
        UserError: a GPU has no room for a single block.
    """
    algorithm, family, steps = replica.algorithm, experiment.family, experiment.config.eval.adapt_steps
    control: Metric | None = getattr(family, "control", None)
    if testing:
        algorithm = in_test(algorithm, family)
    of_task, rest = in_fitting_parts(algorithm, theta, tasks)
    at_once = max(NUMBERS_AT_ONCE[torch.device(experiment.device).type] // (EPISODE_BLOCK * of_task), 1)
    if family.spec.offers("policy") and experiment.device == "cpu":
        # An episode is many steps long, so a single block is already large.
        at_once = 1
    held, results = list[Task](), list[batch.Evaluated]()
    while held or (held := list(islice(rest, at_once))):
        try:
            together = tree_map(lambda *leaves: torch.cat(leaves), *held[:at_once])
            keep = chosen_classes if testing and hasattr(family, "class_names") else None
            result = batch.evaluate(algorithm, theta, together, experiment.loss, steps, testing, keep, only_last)
            if testing and control:
                elsewhere = together._replace(support=together.query["control"])
                other = batch.evaluate(replica.algorithm, theta, elsewhere, experiment.loss, steps)
                result.scores[control.name] = other.scores[family.spec.metrics[0].name]
            results.append(result._replace(units=units_of_tasks(together.query)))
            held = held[at_once:]
        except torch.cuda.OutOfMemoryError as error:
            if min(at_once, len(held)) == 1:
                raise UserError(
                    f"The GPU has too little memory to evaluate {EPISODE_BLOCK} tasks at once; lower task.queries or "
                    "take a smaller model."
                ) from error
            at_once = min(at_once, len(held)) // 2
            release_gpu_memory()
    return batch.Evaluated(
        results[0].adapt_steps,
        torch.cat([result.losses for result in results]).cpu(),
        {name: torch.cat([result.scores[name] for result in results]).cpu() for name in results[0].scores},
        None if results[0].answers is None else torch.cat([one.answers for one in results if one.answers is not None]),
        None if results[0].units is None else torch.cat([one.units for one in results if one.units is not None]).cpu(),
    )


def better(experiment: Experiment, score: float, than: float) -> bool:
    """Whether a validation score beats another; NaN beats nothing."""
    if math.isnan(than):
        return not math.isnan(score)
    return score > than if experiment.family.spec.metrics[0].higher_is_better else score < than


def validate(experiment: Experiment, replica: Replica, theta: Tree, tasks: list[Task]) -> tuple[Tree, float, float]:
    """Return the best of the algorithm's candidates for ``theta``, with its validation loss and score."""
    chosen, loss, score = theta, math.nan, math.nan
    metric = experiment.family.spec.metrics[0].name
    for candidate in replica.algorithm.candidates(theta):
        scored = evaluate(experiment, replica, candidate, tasks, only_last=True)
        candidate_loss, candidate_score = scored.losses[:, -1].mean().item(), scored.scores[metric][:, -1].mean().item()
        if better(experiment, candidate_score, score):
            chosen, loss, score = candidate, candidate_loss, candidate_score
    return chosen, loss, score


def once_adapted(
    algorithm: Algorithm, measure: Callable[[Predict, Task], Tensor]
) -> Callable[[Tree, Task, Loss, int], Tensor]:
    """Return (theta, task, loss, adaptation steps) → what ``measure`` finds of the adapted learner."""

    def of_task(theta: Tree, task: Task, loss: Loss, steps: int) -> Tensor:
        state = batch.adapted(algorithm, theta, task.support, loss, steps)
        with weighing(task.query.get("weight")):
            return measure(partial(algorithm.predict, theta, state), task)

    return of_task


def reports_of(experiment: Experiment, index: int) -> list[Report]:
    """Return the reports of the ``index``-th replica's algorithm and of the family.

    The function of each report takes (theta, task, loss, adaptation steps).
    """
    algorithm, family = experiment.replicas[index].algorithm, experiment.family
    found = [] if algorithm.report is None else [algorithm.report]
    own: Report | None = getattr(family, "report", None)
    if own is not None:
        found.append(own._replace(measure=once_adapted(algorithm, own.measure)))
    return found


def groups_of(tasks: Task) -> list[int]:
    """Return the kind of each task, read from its first example that is not padding."""
    group: Tensor = tasks.support["group"]
    first = tasks.support["weight"].argmax(1) if "weight" in tasks.support else group.new_zeros(len(group))
    found: list[int] = group.gather(1, first[:, None])[:, 0].tolist()
    return found


def measured(experiment: Experiment, index: int, theta: Tree, report: Report) -> Measured:
    """Measure a report's numbers on the test episodes."""
    family, eval_config, replica = experiment.family, experiment.config.eval, experiment.replicas[index]
    numbers, groups = [], list[str]()
    for block in episodes(experiment, "test", eval_config.episodes):
        found = over_tasks(
            lambda task: report.measure(theta, task, experiment.loss, eval_config.adapt_steps), block, training=False
        )
        numbers.append(found.cpu())
        names = family.spec.facts.groups
        groups += [names[i] for i in groups_of(block)] if names else [""] * len(found)
    return Measured(replica.number, report.axes, report.value, torch.cat(numbers).numpy(), groups, report.matrix)


RESAMPLINGS = 200
"""Number of resamplings of the test episodes for the interval of a pooled metric."""


def pooled_scores(experiment: Experiment, replica: Replica, theta: Tree) -> dict[str, PooledScore]:
    """Return each metric of all test episodes together, and of resamplings of them with replacement.

    Runs with the same number of episodes and the same ``eval.seed`` have the same resamplings, so that a difference of
    two runs can be taken resampling by resampling.
    """
    own: Pooled | None = getattr(experiment.family, "pooled", None)
    if own is None:
        return {}
    algorithm, config, count = replica.algorithm, experiment.config.eval, once_adapted(replica.algorithm, own.counts)

    def of_task(task: Task) -> Tensor:
        return count(theta, task, experiment.loss, config.adapt_steps)

    _, parts = in_fitting_parts(algorithm, theta, episodes(experiment, "test", config.episodes))
    with torch.no_grad():
        found = torch.cat([over_tasks(of_task, part, training=False).cpu() for part in parts])
    generator = stream(config.seed, "resampling")
    drawn = torch.randint(len(found), (RESAMPLINGS, len(found)), generator=generator)
    spread = [own.scores(found[rows]) for rows in drawn]
    return {name: PooledScore(score, [again[name] for again in spread]) for name, score in own.scores(found).items()}


def meta_test(experiment: Experiment, replica: Replica, theta: Tree) -> Tested:
    """Return the scores of ``theta`` on the test episodes along adaptation."""
    config, family, began = experiment.config, experiment.family, time.perf_counter()
    fingerprint = Fingerprint(family)
    blocks = fingerprint.over(episodes(experiment, "test", config.eval.episodes))
    scored = evaluate(experiment, replica, theta, blocks, testing=True)
    seconds = time.perf_counter() - began
    block = next(episodes(experiment, "test", min(EPISODE_BLOCK, config.eval.episodes)))
    block = first_tasks(block, max(MOST_NUMBERS // numbers_per_task(replica.algorithm, theta, block), 1))
    began = time.perf_counter()
    timed = batch.adapt_and_score(replica.algorithm, theta, block, experiment.loss, config.eval.adapt_steps)
    if experiment.device != "cpu":
        torch.cuda.synchronize(experiment.device)
    milliseconds = 1000 * (time.perf_counter() - began) / len(timed)
    transductive = is_transductive(replica.algorithm, theta, family, block, config.eval.adapt_steps)
    pooled = pooled_scores(experiment, replica, theta)
    return Tested(scored, seconds, milliseconds, fingerprint.text(), transductive, pooled)
