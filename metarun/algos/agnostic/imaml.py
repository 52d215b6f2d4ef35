"""Implicit MAML.

Rajeswaran, Finn, Kakade, Levine 2019, "Meta-Learning with Implicit Gradients", https://arxiv.org/abs/1909.04630.

    inner problem   φ = argmin L_support(w) + λ/2 ‖w − θ‖²                           (equation 4)
    meta-gradient   (I + ∇²L_support(φ) / λ)⁻¹ ∇L_query(φ), mean over tasks          (equation 6)

The linear system is solved by conjugate gradients, which need only products with the Hessian. Nothing of the path to
φ is kept, so memory does not grow with the number of inner steps.

The defaults are those of the official code, https://github.com/aravindr93/imaml_dev (``examples/
omniglot_implicit_maml.py`` and ``implicit_maml/learner_model.py``), which differs from the equations in three points:

- ``inner="descent"``: gradient descent minimises the support loss alone. In meta-training it is followed by one step of
  size ``inner_lr`` on the proximal term, φ ← φ − inner_lr λ (φ − θ). Validation and test omit this step, as does the
  code's test command (λ = 0).
- ``hessian_damping``: the Hessian is divided by λ + 10, not by λ (``lam_damping``).
- ``damping``: 1 is added to the system's identity.

The paper's equations are ``inner="proximal"``, which minimises the whole inner objective in training and test alike,
with ``hessian_damping=0`` and ``damping=0``. Unlike the official code, our conjugate gradients stop before a direction
along which the Hessian is so negative that less than half of the identity's part is left: an almost singular system
would give a huge step, and the equations hold at a minimum, where the Hessian is not negative. Policies are not
supported: the loss of a rollout changes with each step, so it has no fixed minimum to differentiate implicitly.

The meta-gradient holds at the minimum, and means little where the inner steps do not come near it. They oscillate if
``inner_lr`` is above 2 divided by the largest curvature, which a linear head on many features has at once and which
grows in meta-training: a smaller ``inner_lr`` with more steps is then better, and not only slower.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from metarun.contracts import Algorithm, Loss, MetaGradient, Scores, Task, Tree, Weights
from metarun.errors import require
from metarun.inner import descent, gradient_descent, support_gradient
from metarun.nn.functional import forward_of, parameters_of
from metarun.nn.transforms import gradient, over_tasks
from metarun.random import drawing_again, drawn_so_far
from metarun.tree import dot, mean


def conjugate_gradients(product: Callable[[Weights], Weights], b: Weights, steps: int, least: float = 0.0) -> Weights:
    """Return an approximate solution of A x = b for symmetric A, starting from x = 0.

    Iteration stops once the system is solved, or where vᵀ A v ≤ ``least`` vᵀ v for the next direction v: far from a
    minimum the Hessian of the support loss need not be positive definite. If that is so for the first direction, ``b``
    itself is returned.

    Args:
        product: the map x → A x.
        b: the right-hand side.
        steps: number of products; with 0 the result is ``b``.
        least: the smallest vᵀ A v of a vector of length 1 that is trusted.
    """
    x, residual, direction = {name: torch.zeros_like(value) for name, value in b.items()}, b, b
    squared = dot(b, b)
    solved = torch.finfo(squared.dtype).eps ** 2 * squared
    going, moved = torch.ones_like(squared, dtype=torch.bool), torch.zeros_like(squared, dtype=torch.bool)
    for _ in range(steps):
        along = product(direction)
        curvature = dot(direction, along)
        going = going & (curvature > least * dot(direction, direction)) & (squared > solved)
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
    inner_lr: float = 0.1,
    inner_steps: int = 16,
    strength: float = 2.0,
    cg_steps: int = 5,
    damping: float = 1.0,
    inner: Literal["descent", "proximal"] = "descent",
    hessian_damping: float = 10.0,
) -> Algorithm:
    """MAML with a proximal inner problem, differentiated implicitly.

    Args:
        model: any differentiable module.
        inner_lr: step size of the inner problem, above 0, for mean losses.
        inner_steps: number of steps on the inner problem, at least 1.
        strength: λ, above 0.
        cg_steps: number of conjugate-gradient steps, each of one product with the Hessian, at least 0; 0 takes the
            query gradient as it is.
        damping: number added to the system's identity, at least 0.
        inner: ``descent`` (the official code's) or ``proximal`` (equation 4).
        hessian_damping: number added to the λ that divides the Hessian, at least 0.
    """
    require(inner_lr > 0, f"inner_lr must be above 0, not {inner_lr}")
    require(inner_steps >= 1, f"inner_steps must be at least 1, not {inner_steps}")
    require(strength > 0, f"strength must be above 0, not {strength}")
    require(cg_steps >= 0, f"cg_steps must be at least 0, not {cg_steps}")
    require(damping >= 0, f"damping must be at least 0, not {damping}")
    require(hessian_damping >= 0, f"hessian_damping must be at least 0, not {hessian_damping}")
    forward = forward_of(model)

    def init(generator: torch.Generator) -> Tree:
        return {"weights": parameters_of(model)}

    def pulled(weights: Weights, at: Weights, start: Weights) -> Weights:
        """Return ``weights`` after a step on the proximal term, whose gradient is taken at the weights ``at``."""
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

            drawn = drawn_so_far()

            def product(v: Weights) -> Weights:
                def along(weights: Weights) -> Tensor:
                    return dot(support_gradient(forward, weights, task.support, loss), v)

                # One system for all steps: with dropout, every product would otherwise be with another Hessian.
                with drawing_again(drawn):
                    hessian_v = cast(Weights, gradient(along, solved))
                scale = strength + hessian_damping
                return {name: (1 + damping) * v[name] + hessian_v[name] / scale for name in v}

            return conjugate_gradients(product, slope, cg_steps, (1 + damping) / 2), value, scores

        with torch.no_grad():
            grads, losses, scores = over_tasks(one_task, tasks, training=True)
            return MetaGradient({"weights": mean(grads)}, losses.mean(), mean(scores), {})

    return Algorithm(
        init,
        adapt,
        predict,
        approach="agnostic",
        needs="examples",
        paper="https://arxiv.org/abs/1909.04630",
        train_steps=inner_steps,
        meta_grad=meta_grad,
    )
