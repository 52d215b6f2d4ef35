"""One meta-step and one evaluation over many tasks.

An algorithm is written for one task; this module maps it over the tasks of a batch and differentiates the mean.
"""

from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metarun.contracts import Algorithm, Loss, MetaGradient, Task, Tree
from metarun.nn.transforms import gradient, over_tasks
from metarun.tree import learned, leaves, like, size, tree_map
from metarun.tree import mean as mean_over_tasks


def query_loss(algorithm: Algorithm, theta: Tree, task: Task, loss: Loss) -> tuple[Tensor, Tensor, Tree]:
    """Meta-loss of one task, its score and what is carried on: the algorithm's own, or those after ``train_steps``."""
    if algorithm.carrying_loss is not None:
        return algorithm.carrying_loss(theta, task, loss)
    if algorithm.meta_loss is not None:
        return *algorithm.meta_loss(theta, task, loss), {}
    state = adapted(algorithm, theta, task.support, loss, algorithm.train_steps)
    return *loss(partial(algorithm.predict, theta, state), task.query), {}


def adapted(algorithm: Algorithm, theta: Tree, support: Tree, loss: Loss, steps: int) -> Any:
    """State of one task after ``steps`` steps (or as many as it takes to have one), or the last if there are fewer."""
    state = None
    for step, state in enumerate(algorithm.adapt(theta, support, loss)):
        if step >= steps and state is not None:
            break
    return state


def meta_gradient(
    algorithm: Algorithm, theta: Tree, tasks: Task, loss: Loss, transformed: bool = False
) -> MetaGradient:
    """Gradient of the mean meta-loss over ``tasks`` (leaves ``[tasks, ...]``), or the algorithm's own.

    ``transformed`` says that the call stands inside a transform of ``torch.func``, where plain autograd, which is
    faster by a third, cannot go.
    """
    if algorithm.meta_grad is not None:
        return algorithm.meta_grad(theta, tasks, loss)

    def mean_loss(variables: Tree) -> tuple[Tensor, tuple[Tensor, Tensor, Tree]]:
        def one_task(task: Task) -> tuple[Tensor, Tensor, Tree]:
            return query_loss(algorithm, {**theta, **variables}, task, loss)

        losses, scores, renewed = over_tasks(one_task, tasks, training=True)
        return losses.mean(), (losses.mean(), scores.mean(), mean_over_tasks(renewed))

    if transformed:
        gradients, (mean, score, renewed) = gradient(mean_loss, learned(theta), has_aux=True)
    else:
        variables = tree_map(lambda leaf: leaf.detach().requires_grad_(), learned(theta))
        with torch.enable_grad():
            mean, (_, score, renewed) = mean_loss(variables)
        # A leaf that the meta-loss does not use (a head that only fine-tuning touches) has a gradient of zero.
        found = torch.autograd.grad(mean, list(leaves(variables)), materialize_grads=True)
        gradients = like(variables, iter(found))
    carried = tree_map(torch.detach, renewed) or theta.get("carried", {})
    return MetaGradient(gradients, mean.detach(), score.detach(), carried)


class Evaluated(NamedTuple):
    """Query losses and scores along adaptation, each ``[tasks, states]``."""

    adapt_steps: list[int]
    """Those that have a state: 0 to the last for a gradient learner, 1 for a learner that needs a support set."""
    losses: Tensor
    scores: Tensor
    second_scores: Tensor
    """NaN where there is no second score."""


@torch.no_grad()
def evaluate(
    algorithm: Algorithm,
    theta: Tree,
    tasks: Task,
    loss: Loss,
    steps: int,
    second_score: Callable[[Tree, Any, Tree], Tensor] | None = None,
) -> Evaluated:
    """Query losses and scores along ``steps`` steps of adaptation, and second scores by (theta, state, query)."""
    reached: list[int] = []

    def one_task(task: Task) -> tuple[Tensor, ...]:
        reached.clear()
        results = []
        for step, state in enumerate(islice(algorithm.adapt(theta, task.support, loss), max(steps, 1) + 1)):
            if state is not None and (step <= steps or not reached):
                reached.append(step)
                predict = partial(algorithm.predict, theta, state)
                value, score = loss(predict, task.query)
                none = torch.full_like(score, torch.nan)
                second = none if second_score is None else second_score(theta, state, task.query)
                results.append((value, score, second))
        return tuple(torch.stack(column) for column in zip(*results, strict=True))

    return Evaluated(reached, *over_tasks(one_task, tasks, training=False))


@torch.no_grad()
def adapt_and_score(algorithm: Algorithm, theta: Tree, tasks: Task, loss: Loss, steps: int) -> Tensor:
    """Query loss after ``steps`` steps ``[tasks]``, and nothing on the way: the work to be timed."""

    def one_task(task: Task) -> Tensor:
        state = adapted(algorithm, theta, task.support, loss, steps)
        return loss(partial(algorithm.predict, theta, state), task.query)[0]

    scored: Tensor = over_tasks(one_task, tasks, training=False)
    return scored


def adapted_parameters(algorithm: Algorithm, theta: Tree) -> int:
    """How many numbers adaptation sets for one task."""
    if algorithm.adapted_parameters is not None:
        return algorithm.adapted_parameters(theta)
    return size(learned(theta))
