"""Validation and test: the episodes, the scores along adaptation, and what validation selects."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from metarun.assemble import Experiment, Replica, sample_tasks
from metarun.checks.family import check_tasks
from metarun.checks.fingerprint import Fingerprint
from metarun.checks.transduction import is_transductive
from metarun.contracts import Algorithm, Family, Split, Task, Tree
from metarun.engine import batch
from metarun.engine.recording import release_gpu_memory
from metarun.errors import UserError
from metarun.nn.transforms import over_tasks
from metarun.random import stream
from metarun.results.observations import Observed
from metarun.tree import first_tasks, leaves, size, tree_map

EPISODE_BLOCK = 50
"""Validation and test episodes come in blocks of this many, each from its own generator: an episode does not
depend on how many are asked for."""


@dataclass(frozen=True)
class Tested:
    """Meta-test of the selected theta."""

    scored: batch.Evaluated
    seconds: float
    adapt_ms_per_task: float
    episodes_hash: str
    """Equal for two runs that are tested on the same episodes."""
    transductive: bool
    """Whether the queries of an episode see each other."""


def episodes(experiment: Experiment, split: Split, count: int) -> Iterator[Task]:
    """The first ``count`` validation or test episodes in blocks, by ``eval.seed`` alone.

    Raises:
        UserError: a block that is not what the spec says.
    """
    family = experiment.family
    for index, first in enumerate(range(0, count, EPISODE_BLOCK)):
        block = sample_tasks(experiment, split, EPISODE_BLOCK, stream(experiment.config.eval.seed, split, index))
        check_tasks(block, family.spec, split, EPISODE_BLOCK, experiment.device)
        yield first_tasks(block, count - first)


def second_metric(experiment: Experiment) -> str | None:
    """The name of the second metric of test tasks: the family's or, if it has none, the algorithm's."""
    return experiment.family.spec.second_metric or experiment.algorithm.second_metric


def second_score(algorithm: Algorithm, family: Family) -> Callable[[Tree, Any, Tree], Tensor] | None:
    """(theta, state, data of one task) → ``second_metric``, if there is one."""
    if family.spec.second_metric is None:
        return algorithm.second_score

    def score(theta: Tree, state: Any, data: Tree) -> Tensor:
        return family.second_score(partial(algorithm.predict, theta, state), data)

    return score


NUMBERS_AT_ONCE = {"cpu": 4_000_000, "cuda": 64_000_000}
"""Blocks are evaluated together while their adapted parameters, and what a model makes of their inputs, are no more
than this: beyond, a CPU misses its cache; a GPU has room for more, and takes less where it has not."""


def evaluate(
    experiment: Experiment,
    replica: Replica,
    theta: Tree,
    tasks: Iterable[Task],
    second: bool = False,
) -> batch.Evaluated:
    """Losses and scores along adaptation, over blocks of tasks; second scores too if asked and if there are any.

    Raises:
        UserError: a GPU has no room for a single block.
    """
    algorithm, family, steps = replica.algorithm, experiment.family, experiment.config.eval.adapt_steps
    scored_second = second_score(algorithm, family) if second else None
    rest = iter(tasks)
    first = next(rest)
    # Models make some dozen numbers of each number that they are given.
    inputs = 16 * (size(first.support) + size(first.query)) // len(next(leaves(first.query)))
    numbers = EPISODE_BLOCK * max(batch.adapted_parameters(algorithm, theta), inputs, 1)
    at_once = max(NUMBERS_AT_ONCE[torch.device(experiment.device).type] // numbers, 1)
    if family.spec.control is not None:
        # An episode is many steps long: a block of them is large already.
        at_once = 1
    held, results = [first, *islice(rest, at_once - 1)], list[batch.Evaluated]()
    while held or (held := list(islice(rest, at_once))):
        try:
            together = tree_map(lambda *leaves: torch.cat(leaves), *held[:at_once])
            results.append(batch.evaluate(algorithm, theta, together, family.loss, steps, scored_second))
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
    return batch.Evaluated(results[0].adapt_steps, *(torch.cat(column).cpu() for column in columns))


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


def observe(experiment: Experiment, index: int, theta: Tree) -> Observed:
    """What the algorithm of the ``index``-th replica shows of the test episodes."""
    family, eval_config = experiment.family, experiment.config.eval
    observation = experiment.replicas[index].algorithm.observation
    assert observation is not None
    numbers, groups = [], list[str]()
    for block in episodes(experiment, "test", eval_config.episodes):
        measured = over_tasks(
            lambda task: observation.measure(theta, task, family.loss, eval_config.adapt_steps), block, training=False
        )
        numbers.append(measured.cpu())
        names = family.spec.groups
        groups += [names[i] for i in block.support["group"][:, 0].tolist()] if names else [""] * len(measured)
    return Observed(index, observation.axes, observation.value, torch.cat(numbers).numpy(), groups)


def meta_test(experiment: Experiment, replica: Replica, theta: Tree) -> Tested:
    """Score ``theta`` on the test episodes along adaptation."""
    config, family, began = experiment.config, experiment.family, time.perf_counter()
    fingerprint = Fingerprint(family)
    blocks = fingerprint.over(episodes(experiment, "test", config.eval.episodes))
    scored = evaluate(experiment, replica, theta, blocks, second=True)
    seconds = time.perf_counter() - began
    block = next(episodes(experiment, "test", min(EPISODE_BLOCK, config.eval.episodes)))
    began = time.perf_counter()
    timed = batch.adapt_and_score(replica.algorithm, theta, block, family.loss, config.eval.adapt_steps)
    if experiment.device != "cpu":
        torch.cuda.synchronize(experiment.device)
    milliseconds = 1000 * (time.perf_counter() - began) / len(timed)
    transductive = is_transductive(replica.algorithm, theta, family, block, config.eval.adapt_steps)
    return Tested(scored, seconds, milliseconds, fingerprint.text(), transductive)
