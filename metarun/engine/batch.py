"""One meta-step and one evaluation over many tasks.

An algorithm is written for one task; this module maps it over the tasks of a batch and differentiates the mean.
"""

from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metarun.contracts import Algorithm, Loss, MetaGradient, MetaLoss, Predict, Scores, Task, Tree
from metarun.nn.transforms import gradient, over_tasks
from metarun.random import drawn_so_far
from metarun.tree import learned, leaves, like, size, tree_map
from metarun.tree import mean as mean_over_tasks


def query_loss(algorithm: Algorithm, theta: Tree, task: Task, loss: Loss) -> MetaLoss:
    """Return the meta-loss of one task: the algorithm's own, or the query loss after ``train_steps``.

    ``carried`` is a tree in the result, never None.
    """
    if algorithm.meta_loss is not None:
        found = algorithm.meta_loss(theta, task, loss)
        return found._replace(carried=found.carried or {})
    state = adapted(algorithm, theta, task.support, loss, algorithm.train_steps)
    return MetaLoss(*loss(partial(algorithm.predict, theta, state), task.query), {})


def adapted(algorithm: Algorithm, theta: Tree, support: Tree, loss: Loss, steps: int) -> Any:
    """Return the state of one task after ``steps`` steps, or after the first that yields a state, or the last one."""
    state = None
    for step, state in enumerate(algorithm.adapt(theta, support, loss)):
        if step >= steps and state is not None:
            break
    return state


def meta_gradient(
    algorithm: Algorithm, theta: Tree, tasks: Task, loss: Loss, transformed: bool = False
) -> MetaGradient:
    """Return the gradient of the mean meta-loss over ``tasks`` (leaves ``[tasks, ...]``), or the algorithm's own.

    ``transformed`` says that the call is inside a transform of ``torch.func``, where plain autograd, which is faster by
    a third, cannot be used.
    """
    if algorithm.meta_grad is not None:
        return algorithm.meta_grad(theta, tasks, loss)

    def mean_loss(variables: Tree) -> tuple[Tensor, tuple[Tensor, Scores, Tree]]:
        def one_task(task: Task) -> MetaLoss:
            return query_loss(algorithm, {**theta, **variables}, task, loss)

        losses, scores, renewed = over_tasks(one_task, tasks, training=True)
        return losses.mean(), (losses.mean(), mean_over_tasks(scores), mean_over_tasks(renewed))

    if transformed:
        gradients, (mean, scores, renewed) = gradient(mean_loss, learned(theta), has_aux=True)
    else:
        variables = tree_map(lambda leaf: leaf.detach().requires_grad_(), learned(theta))
        with torch.enable_grad():
            mean, (_, scores, renewed) = mean_loss(variables)
        # A leaf that the meta-loss does not use (a head that only fine-tuning changes) has a gradient of zero.
        found = torch.autograd.grad(mean, list(leaves(variables)), materialize_grads=True)
        gradients = like(variables, iter(found))
    carried = tree_map(torch.detach, renewed) or theta.get("carried", {})
    return MetaGradient(gradients, mean.detach(), tree_map(torch.detach, scores), carried)


class Evaluated(NamedTuple):
    """Query losses and scores along adaptation, each ``[tasks, states]``."""

    adapt_steps: list[int]
    """Steps that have a state: 0 to the last for a gradient learner, 1 for a learner that needs a support set."""
    losses: Tensor
    scores: Scores
    """Scores by metric, in the order of the metrics."""
    answers: Tensor | None = None
    """What was kept of the last outputs ``[tasks, ...]``."""
    units: Tensor | None = None
    """The number of each task among the few that there are ``[tasks]`` (`metarun.tasks.units`); None: all differ."""


class Listening:
    """A learner whose last output is kept."""

    def __init__(self, predict: Predict) -> None:
        self.predict = predict
        self.output: Any = None

    def __call__(self, x: Any) -> Any:
        """Return what the learner says of ``x``."""
        self.output = self.predict(x)
        return self.output


@torch.no_grad()
def evaluate(
    algorithm: Algorithm,
    theta: Tree,
    tasks: Task,
    loss: Loss,
    steps: int,
    with_own_scores: bool = False,
    keep: Callable[[Any, Tree], Tensor] | None = None,
    only_last: bool = False,
) -> Evaluated:
    """Return query losses and scores along ``steps`` adaptation steps; if asked, also scores of the algorithm alone.

    ``keep`` says what is kept of the output for the queries after the last step, of which the loss has been computed.
    ``only_last`` leaves out steps before the last, unless scoring them draws random numbers: then later ones would
    differ.
    """
    reached: list[int] = []

    def one_task(task: Task) -> tuple[Tensor, Scores, Scores]:
        reached.clear()
        losses, scores, kept = list[Tensor](), list[Scores](), Scores()

        def score(step: int, state: Any) -> None:
            nonlocal kept
            reached.append(step)
            predict = Listening(partial(algorithm.predict, theta, state))
            value, found = loss(predict, task.query)
            kept = {} if keep is None else {"answers": keep(predict.output, task.query)}
            if with_own_scores and algorithm.scores is not None:
                found = {**found, **algorithm.scores(theta, state, task.query)}
            losses.append(value)
            scores.append(found)

        latest, skips = None, False
        for step, state in enumerate(islice(algorithm.adapt(theta, task.support, loss), max(steps, 1) + 1)):
            if state is not None and (step <= steps or not reached):
                latest = step, state
                if not skips or step == steps:
                    drawn = drawn_so_far()
                    score(*latest)
                    skips = only_last and drawn == drawn_so_far()
        if latest is not None and latest[0] != reached[-1]:
            score(*latest)
        together = {name: torch.stack([found[name] for found in scores]) for name in scores[0]}
        return torch.stack(losses), together, kept

    losses, scores, kept = over_tasks(one_task, tasks, training=False)
    return Evaluated(reached, losses, scores, kept.get("answers"))


@torch.no_grad()
def adapt_and_score(algorithm: Algorithm, theta: Tree, tasks: Task, loss: Loss, steps: int) -> Tensor:
    """Return the query loss after ``steps`` steps ``[tasks]`` and nothing before it: the work to be timed."""

    def one_task(task: Task) -> Tensor:
        state = adapted(algorithm, theta, task.support, loss, steps)
        return loss(partial(algorithm.predict, theta, state), task.query)[0]

    scored: Tensor = over_tasks(one_task, tasks, training=False)
    return scored


def adapted_parameters(algorithm: Algorithm, theta: Tree) -> int:
    """Return how many numbers adaptation sets per task."""
    if algorithm.adapted_parameters is not None:
        return algorithm.adapted_parameters(theta)
    return size(learned(theta))
