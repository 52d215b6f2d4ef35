"""A trust-region outer step for policies, as in MAML's reinforcement-learning experiments.

Schulman et al. 2015, "Trust Region Policy Optimization", https://arxiv.org/abs/1502.05477 (§6 and appendix C); as the
outer step of MAML: Finn, Abbeel, Levine 2017, https://arxiv.org/abs/1703.03400 (§5.3).

    direction    s = (H + damping · I)⁻¹ g,  by conjugate gradients
    length       β = √(2 δ / sᵀ(H + damping · I) s)
    step         θ − r β s for the first r of 1, 0.8, 0.8², … where the surrogate falls and KL ≤ δ; if none: θ stays

g is the gradient of the surrogate query loss after adaptation, and H the Hessian at θ of the mean divergence of adapted
policies from those that played the query episodes. All episodes are played once, at θ, and other parameters are
evaluated on them: adaptation weights the kept support episodes by likelihood ratios, and so does the query loss
(`metarun.tasks.control`).

δ, the number of conjugate gradients, the damping and the search are those of the official code
(https://github.com/cbfinn/maml_rl); H may be estimated on fewer episodes than g (``cg_episodes``). Where we deviate:
that code computes Hessian products by finite differences, and its inner gradient, of log π · A, loses the
score-function terms; here products are exact and these terms are kept.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metarun.assemble import Experiment
from metarun.contracts import Algorithm, Task, Tree
from metarun.engine.batch import adapted, meta_gradient
from metarun.engine.replicas import OF_THE_OUTER_STEP
from metarun.errors import UserError
from metarun.inner import at_step
from metarun.nn.transforms import over_tasks
from metarun.targets.actions import RETURN
from metarun.tasks.control import ControlFamily
from metarun.tree import tree_map


class TrustRegion(NamedTuple):
    """Settings of the step; ``conf/config.yaml`` explains each."""

    kl: float
    cg_steps: int
    cg_episodes: int | None
    damping: float
    backtrack: float
    backtracks: int


def check_trust_region(experiment: Experiment) -> None:
    """Raise an error if the step does not fit the experiment.

    Raises:
        UserError: tasks have no policies, the algorithm has its own meta-gradient, or a setting has no meaning here.
    """
    train, engine, algorithm = experiment.config.train, experiment.config.engine, experiment.algorithm
    if not isinstance(experiment.family, ControlFamily):
        raise UserError(
            f"train.optimizer=trpo bounds how far policies move, and task={experiment.names['task']} has none that it "
            "can bound; choose train.optimizer=adam."
        )
    if algorithm.meta_grad is not None or algorithm.meta_loss is not None:
        raise UserError(
            f"train.optimizer=trpo steps along the gradient of the query loss after adaptation, and "
            f"algo={experiment.names['algo']} has its own meta-gradient; choose algo=maml, or train.optimizer=adam."
        )
    if engine.mode.name not in ("auto", "eager") or engine.task_map.name == "threads":
        raise UserError(
            "train.optimizer=trpo searches along its step, which no recording can follow; choose engine=auto or eager, "
            "with engine.task_map=auto."
        )
    if without := set(OF_THE_OUTER_STEP) & set(experiment.replicas[0].differs):
        raise UserError(
            f"train.optimizer=trpo does not depend on {' or '.join(sorted(without))}; vary numbers of algo."
        )
    if train.weight_decay > 0:
        raise UserError("train.optimizer=trpo has no weight decay; set train.weight_decay=0.")
    if train.task_chunk is not None:
        raise UserError("train.optimizer=trpo takes all tasks at once; set train.task_chunk=null.")


def conjugate_gradients(product: Callable[[Tensor], Tensor], b: Tensor, steps: int) -> Tensor:
    """Return an approximate solution ``[numbers]`` of A x = b for symmetric positive A, starting from x = 0.

    Args:
        product: the map x → A x.
        b: the right-hand side ``[numbers]``.
        steps: largest number of products; fewer if the system is solved, or if rounding has made A not positive.
    """
    x, residual = torch.zeros_like(b), b.clone()
    direction, squared = residual, residual @ residual
    solved = torch.finfo(b.dtype).eps ** 2 * squared
    for _ in range(steps):
        if squared <= solved:
            break
        along = product(direction)
        curvature = direction @ along
        if not curvature > 0:
            break
        x = x + squared / curvature * direction
        residual = residual - squared / curvature * along
        before, squared = squared, residual @ residual
        direction = residual + squared / before * direction
    return x


def natural_step(product: Callable[[Tensor], Tensor], gradient: Tensor, settings: TrustRegion) -> Tensor:
    """Return the step ``[numbers]`` against ``gradient`` whose divergence is δ to second order; zero if there is none.

    Args:
        product: the map v → (H + damping · I) v.
        gradient: gradient of the surrogate ``[numbers]``.
        settings: δ and the number of conjugate gradients.
    """
    direction = conjugate_gradients(product, gradient, settings.cg_steps)
    curvature = direction @ product(direction)
    if not curvature > 0:
        return torch.zeros_like(gradient)
    return -(2 * settings.kl / curvature).sqrt() * direction


def line_search(
    weights: Tensor, step: Tensor, judge: Callable[[Tensor], tuple[float, float]], settings: TrustRegion
) -> Tensor:
    """Return the first ``weights + rᵏ · step``, k = 0, 1, …, that improves within the trust region, else ``weights``.

    Args:
        weights: ``[numbers]``.
        step: ``[numbers]``.
        judge: weights → surrogate loss and divergence.
        settings: δ, r, and the number of lengths to try.
    """
    before, _ = judge(weights)
    for k in range(settings.backtracks):
        candidate = weights + settings.backtrack**k * step
        loss, kl = judge(candidate)
        if loss < before and kl <= settings.kl:
            return candidate
    return weights


def with_kept_episodes(algorithm: Algorithm, family: ControlFamily, theta: Tree, tasks: Task) -> Task:
    """Return ``tasks`` with the episodes that the policies along adaptation play: ``kept`` in support and query."""

    def one_task(task: Task) -> tuple[Tree, Tree]:
        kept: dict[str, Tree] = {}
        # The episodes of an adaptation step are added once the policy that plays them is known, before the step.
        states = algorithm.adapt(theta, {**task.support, "kept": kept}, family.loss)
        state: Any = None
        for step, state in enumerate(states):
            if step == algorithm.train_steps:
                break
            policy = partial(algorithm.predict, theta, state)
            kept[str(step)] = family.keep(policy, at_step(task.support, step))
        return kept, {"0": family.keep(partial(algorithm.predict, theta, state), task.query)}

    with torch.no_grad():
        support, query = over_tasks(one_task, tasks, training=True)
    return tasks._replace(support={**tasks.support, "kept": support}, query={**tasks.query, "kept": query})


def with_fewer_episodes(algorithm: Algorithm, family: ControlFamily, theta: Tree, tasks: Task, count: int) -> Task:
    """Return ``tasks`` with only the first ``count`` kept episodes of each, on which Hessian products cost less.

    Fewer support episodes lead to other adapted policies, and divergences are measured from these.
    """

    def first(leaf: Tensor) -> Tensor:
        # Leaves are [tasks, steps, episodes, ...], and the score of a task is a number.
        return leaf[:, :, :count] if leaf.ndim > 1 else leaf

    support, query = ({**part, "kept": tree_map(first, part["kept"])} for part in (tasks.support, tasks.query))
    fewer = tasks._replace(support=support, query=query)

    def one_task(task: Task) -> Tensor:
        state = adapted(algorithm, theta, task.support, family.loss, algorithm.train_steps)
        return family.outputs(partial(algorithm.predict, theta, state), task.query["kept"]["0"])

    with torch.no_grad():
        output = over_tasks(one_task, fewer, training=True)
    return fewer._replace(query={**query, "kept": {"0": {**query["kept"]["0"], "output": output}}})


def mean_divergence(algorithm: Algorithm, family: ControlFamily, theta: Tree, tasks: Task) -> Tensor:
    """Return the mean divergence of adapted policies from those that played the kept query episodes."""

    def one_task(task: Task) -> Tensor:
        state = adapted(algorithm, theta, task.support, family.loss, algorithm.train_steps)
        return family.divergence(partial(algorithm.predict, theta, state), task.query["kept"]["0"])

    mean: Tensor = over_tasks(one_task, tasks, training=True).mean()
    return mean


def fisher_product(
    divergence: Callable[[Tensor], Tensor], weights: Tensor, damping: float
) -> Callable[[Tensor], Tensor]:
    """Return the map v → (H + damping · I) v, with H the Hessian of ``divergence`` at ``weights [numbers]``."""
    variable = weights.detach().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(divergence(variable), variable, create_graph=True)

    def product(v: Tensor) -> Tensor:
        (along,) = torch.autograd.grad(slope, variable, v, retain_graph=True)
        return along + damping * v

    return product


def trust_region_step(
    algorithm: Algorithm,
    family: ControlFamily,
    theta_of: Callable[[Tensor], Tree],
    vector_of: Callable[[Tree], Tensor],
    settings: TrustRegion,
    weights: Tensor,
    tasks: Task,
) -> tuple[Tensor, Tensor]:
    """Take one outer step on a batch of tasks.

    Args:
        algorithm: the meta-learner.
        family: the family of the tasks.
        theta_of: maps learned numbers in a vector to theta.
        vector_of: maps gradients in a tree to a vector in the same order.
        settings: settings of the step.
        weights: the learned numbers ``[numbers]``.
        tasks: leaves ``[tasks, ...]``.

    Returns:
        New weights ``[numbers]``, and surrogate loss and mean return before the step ``[2]``.
    """
    tasks = with_kept_episodes(algorithm, family, theta_of(weights), tasks)
    found = meta_gradient(algorithm, theta_of(weights), tasks, family.loss)
    fewer = tasks
    if settings.cg_episodes is not None:
        fewer = with_fewer_episodes(algorithm, family, theta_of(weights), tasks, settings.cg_episodes)

    def apart(candidate: Tensor) -> Tensor:
        return mean_divergence(algorithm, family, theta_of(candidate), fewer)

    step = natural_step(fisher_product(apart, weights, settings.damping), vector_of(found.grads), settings)

    @torch.no_grad()
    def judge(candidate: Tensor) -> tuple[float, float]:
        theta = theta_of(candidate)

        def one_task(task: Task) -> tuple[Tensor, Tensor]:
            state = adapted(algorithm, theta, task.support, family.loss, algorithm.train_steps)
            policy = partial(algorithm.predict, theta, state)
            return family.loss(policy, task.query)[0], family.divergence(policy, task.query["kept"]["0"])

        losses, distances = over_tasks(one_task, tasks, training=True)
        return losses.mean().item(), distances.mean().item()

    return line_search(weights, step, judge, settings), torch.stack([found.loss, found.scores[RETURN.name]])
