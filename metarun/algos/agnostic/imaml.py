"""Implicit MAML.

Rajeswaran, Finn, Kakade, Levine 2019, "Meta-Learning with Implicit Gradients", https://arxiv.org/abs/1909.04630.

    inner problem   φ = argmin L_support(w) + λ/2 ‖w − θ‖²                           (equation 4)
    meta-gradient   (I + ∇²L_support(φ) / λ)⁻¹ ∇L_query(φ), mean over tasks          (equation 6)

The linear system is solved by conjugate gradients, which need products with the Hessian alone. Nothing of the path to
φ is kept: memory does not grow with the steps.

The defaults are those of the official code, https://github.com/aravindr93/imaml_dev (``examples/
omniglot_implicit_maml.py`` and ``implicit_maml/learner_model.py``), which differs from the equations in three points:

- ``inner="descent"``: the support loss alone is descended. In meta-training one step of size ``inner_lr`` on the
  proximal term alone follows, φ ← φ − inner_lr λ (φ − θ); validation and test do without it, as in the code's test
  command (λ = 0).
- ``hessian_damping``: the Hessian is divided by λ + 10, not by λ (``lam_damping``).
- ``damping``: 1 is added to the system's identity.

The paper's equations are ``inner="proximal"``, which descends the whole inner problem in training and test alike, with
``hessian_damping=0`` and ``damping=0``. Unlike the official code's, our conjugate gradients stop where the Hessian has
negative curvature. Policies are left out: the loss of a rollout changes with each step, and has no minimum to be
implicit about.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from metarun.contracts import Algorithm, Loss, MetaGradient, Scores, Spec, Task, Tree, Weights
from metarun.errors import require
from metarun.inner import descent, gradient_descent, support_gradient
from metarun.nn.functional import forward_of, parameters_of
from metarun.nn.transforms import gradient, over_tasks
from metarun.tree import dot, mean


def conjugate_gradients(product: Callable[[Weights], Weights], b: Weights, steps: int) -> Weights:
    """An approximate solution of A x = b for symmetric A, from x = 0.

    It stops where it is solved, or where A is not above 0 along the next direction, since far from a minimum the
    Hessian of the support loss need not be; if that is so along the first, ``b`` itself is returned.

    Args:
        product: x → A x.
        b: the right-hand side.
        steps: how many products; with 0 the result is ``b``.
    """
    x, residual, direction = {name: torch.zeros_like(value) for name, value in b.items()}, b, b
    squared = dot(b, b)
    solved = torch.finfo(squared.dtype).eps ** 2 * squared
    going, moved = torch.ones_like(squared, dtype=torch.bool), torch.zeros_like(squared, dtype=torch.bool)
    for _ in range(steps):
        along = product(direction)
        curvature = dot(direction, along)
        going = going & (curvature > 0) & (squared > solved)
        moved = moved | going
        step = torch.where(going, squared / curvature, 0.0)
        x = {name: x[name] + step * direction[name] for name in x}
        residual = {name: residual[name] - step * along[name] for name in x}
        before, squared = squared, dot(residual, residual)
        ratio = torch.where(going, squared / before, 0.0)
        direction = {name: residual[name] + ratio * direction[name] for name in x}
    return {name: torch.where(moved, x[name], b[name]) for name in x}


def imaml(
    model: nn.Module,
    spec: Spec,
    inner_lr: float = 0.1,
    inner_steps: int = 16,
    strength: float = 2.0,
    cg_steps: int = 5,
    damping: float = 1.0,
    inner: Literal["descent", "proximal"] = "descent",
    hessian_damping: float = 10.0,
) -> Algorithm:
    """MAML whose inner problem is held to the start, with its implicit gradient.

    Args:
        model: any differentiable module.
        spec: the task family's; one without a policy.
        inner_lr: step size of the inner problem, above 0, for mean losses.
        inner_steps: steps on it, at least 1.
        strength: λ, above 0.
        cg_steps: conjugate-gradient steps, each of one product with the Hessian, at least 0; 0 takes the query gradient
            as it is.
        damping: added to the system's identity, at least 0.
        inner: ``descent`` (the official code's) or ``proximal`` (equation 4).
        hessian_damping: added to the λ that divides the Hessian, at least 0.
    """
    require(inner_lr > 0, f"inner_lr must be above 0, not {inner_lr}")
    require(inner_steps >= 1, f"inner_steps must be at least 1, not {inner_steps}")
    require(strength > 0, f"strength must be above 0, not {strength}")
    require(cg_steps >= 0, f"cg_steps must be at least 0, not {cg_steps}")
    require(damping >= 0, f"damping must be at least 0, not {damping}")
    require(hessian_damping >= 0, f"hessian_damping must be at least 0, not {hessian_damping}")
    require(
        not spec.offers("policy"),
        "imaml needs a support loss that stays the same, and that of a policy does not; choose maml",
    )
    forward = forward_of(model)

    def init(generator: torch.Generator) -> Tree:
        return {"weights": parameters_of(model)}

    def pulled(weights: Weights, at: Weights, start: Weights) -> Weights:
        """``weights`` after a step on the proximal term, whose gradient is taken where the weights are ``at``."""
        return {name: w - inner_lr * strength * (at[name] - start[name]) for name, w in weights.items()}

    def adapt(theta: Tree, support: Tree, loss: Loss) -> Iterator[Weights]:
        start, descend = theta["weights"], descent(inner_lr)

        def proximal(weights: Weights, slope: Weights, step: int) -> Weights:
            return pulled(descend(weights, slope, step), weights, start)

        return gradient_descent(forward, start, support, loss, proximal if inner == "proximal" else descend)

    def predict(theta: Tree, state: Weights, x: Any) -> Tensor:
        return forward(state, x)

    def meta_grad(theta: Tree, tasks: Task, loss: Loss) -> MetaGradient:
        def one_task(task: Task) -> tuple[Weights, Tensor, Scores]:
            *_, solved = islice(adapt(theta, task.support, loss), inner_steps + 1)
            if inner == "descent":
                solved = pulled(solved, solved, theta["weights"])

            def query_loss(weights: Weights) -> tuple[Tensor, tuple[Tensor, Scores]]:
                value, scores = loss(partial(forward, weights), task.query)
                return value, (value, scores)

            slope, (value, scores) = gradient(query_loss, solved, has_aux=True)
            if cg_steps == 0:
                return slope, value, scores

            def product(v: Weights) -> Weights:
                def along(weights: Weights) -> Tensor:
                    return dot(support_gradient(forward, weights, task.support, loss), v)

                hessian_v = cast(Weights, gradient(along, solved))
                scale = strength + hessian_damping
                return {name: (1 + damping) * v[name] + hessian_v[name] / scale for name in v}

            return conjugate_gradients(product, slope, cg_steps), value, scores

        with torch.no_grad():
            grads, losses, scores = over_tasks(one_task, tasks, training=True)
            return MetaGradient({"weights": mean(grads)}, losses.mean(), mean(scores), {})

    return Algorithm(
        init,
        adapt,
        predict,
        approach="agnostic",
        needs="loss",
        paper="https://arxiv.org/abs/1909.04630",
        train_steps=inner_steps,
        meta_grad=meta_grad,
    )
