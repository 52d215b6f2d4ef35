"""Implicit MAML.

Rajeswaran, Finn, Kakade, Levine 2019, "Meta-Learning with Implicit Gradients", https://arxiv.org/abs/1909.04630.

    inner problem   φ = argmin L_support(w) + λ/2 ‖w − θ‖²                           (equation 4)
    meta-gradient   (I + ∇²L_support(φ) / λ)⁻¹ ∇L_query(φ), mean over tasks          (equation 6)

The inner problem is solved by ``inner_steps`` steps of gradient descent, the linear system by conjugate gradients,
which need products with the Hessian alone. Nothing of the path to φ is kept: memory does not grow with the steps.

As in the official code (https://github.com/aravindr93/imaml_dev) a multiple ``damping`` of the identity is added to
the system; 0 is the exact meta-gradient. Policies are left out: the loss of a rollout changes with each step, and
has no minimum to be implicit about.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn

from metarun.errors import require
from metarun.functional import forward_of, parameters_of, support_gradient
from metarun.transforms import gradient, over_tasks
from metarun.tree import dot, mean
from metarun.types import Algorithm, Loss, MetaGradient, Spec, Task, Tree, Weights


def conjugate_gradients(product: Callable[[Weights], Weights], b: Weights, steps: int) -> Weights:
    """An approximate solution of A x = b for symmetric A, from x = b.

    It stops where it is solved, or where A is not above 0 along the next direction: far from a minimum of the support
    loss its Hessian is not.

    Args:
        product: x → A x.
        b: the right-hand side.
        steps: how many products beside the first.
    """
    x = b
    residual = {name: b[name] - a for name, a in product(x).items()}
    direction, squared = residual, dot(residual, residual)
    solved = torch.finfo(squared.dtype).eps ** 2 * dot(b, b)
    going = torch.ones_like(squared, dtype=torch.bool)
    for _ in range(steps):
        along = product(direction)
        curvature = dot(direction, along)
        going = going & (curvature > 0) & (squared > solved)
        step = torch.where(going, squared / curvature, 0.0)
        x = {name: x[name] + step * direction[name] for name in x}
        residual = {name: residual[name] - step * along[name] for name in x}
        before, squared = squared, dot(residual, residual)
        ratio = torch.where(going, squared / before, 0.0)
        direction = {name: residual[name] + ratio * direction[name] for name in x}
    return x


def imaml(
    model: nn.Module,
    spec: Spec,
    inner_lr: float = 0.1,
    inner_steps: int = 16,
    strength: float = 2.0,
    cg_steps: int = 5,
    damping: float = 1.0,
) -> Algorithm:
    """MAML with a proximal inner problem and its implicit gradient.

    Args:
        model: any differentiable module.
        spec: the task family's; nothing is asked of it.
        inner_lr: step size of the inner problem, above 0, for mean losses.
        inner_steps: steps on it, at least 1.
        strength: λ, above 0.
        cg_steps: conjugate-gradient steps, at least 0; 0 takes the query gradient as it is.
        damping: added to the system's identity, at least 0.
    """
    require(inner_lr > 0, f"inner_lr must be above 0, not {inner_lr}")
    require(inner_steps >= 1, f"inner_steps must be at least 1, not {inner_steps}")
    require(strength > 0, f"strength must be above 0, not {strength}")
    require(cg_steps >= 0, f"cg_steps must be at least 0, not {cg_steps}")
    require(damping >= 0, f"damping must be at least 0, not {damping}")
    forward = forward_of(model)

    def init(model: nn.Module, generator: torch.Generator) -> Tree:
        return {"weights": parameters_of(model)}

    def adapt(theta: Tree, support: Tree, loss: Loss) -> Iterator[Weights]:
        start = weights = theta["weights"]
        while True:
            yield weights
            slope = support_gradient(forward, weights, support, loss)
            weights = {n: w - inner_lr * (slope[n] + strength * (w - start[n])) for n, w in weights.items()}

    def predict(theta: Tree, state: Weights, x: Any) -> Tensor:
        return forward(state, x)

    def meta_grad(theta: Tree, tasks: Task, loss: Loss) -> MetaGradient:
        def one_task(task: Task) -> tuple[Weights, Tensor, Tensor]:
            *_, solved = islice(adapt(theta, task.support, loss), inner_steps + 1)

            def query_loss(weights: Weights) -> tuple[Tensor, tuple[Tensor, Tensor]]:
                value, score = loss(partial(forward, weights), task.query)
                return value, (value, score)

            slope, (value, score) = gradient(query_loss, solved, has_aux=True)
            if cg_steps == 0:
                return slope, value, score

            def product(v: Weights) -> Weights:
                def along(weights: Weights) -> Tensor:
                    return dot(support_gradient(forward, weights, task.support, loss), v)

                hessian_v = cast(Weights, gradient(along, solved))
                return {name: (1 + damping) * v[name] + hessian_v[name] / strength for name in v}

            return conjugate_gradients(product, slope, cg_steps), value, score

        with torch.no_grad():
            grads, losses, scores = over_tasks(one_task, tasks, training=True)
            return MetaGradient({"weights": mean(grads)}, losses.mean(), scores.mean(), {})

    return Algorithm(
        init,
        adapt,
        predict,
        family="agnostic",
        kinds=("regression", "classification", "sequence"),
        paper="https://arxiv.org/abs/1909.04630",
        train_steps=inner_steps,
        meta_grad=meta_grad,
    )
