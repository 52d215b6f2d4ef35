"""No meta-learning: random initial weights, adapted by gradient descent on each task.

It has an adaptation budget too (``eval.adapt_steps``), and its step size is chosen from ``step_sizes`` on validation
tasks, so that it loses for want of meta-learning and not for want of tuning.

Expected: MSE 3.7 ± 0.3 after 10 steps (``metarun algo=scratch task=sinusoid``).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metarun.contracts import Algorithm, Loss, Tree, Weights
from metarun.errors import require
from metarun.inner import descent, gradient_descent
from metarun.nn.functional import forward_of, number_like, parameters_of

STEP_SIZES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


def check_step_sizes(step_sizes: Sequence[float]) -> None:
    """Raise an error if the list is empty or a size is not above 0."""
    require(len(step_sizes) > 0 and min(step_sizes) > 0, f"step_sizes must all be above 0, not {list(step_sizes)}")


def with_step_size(theta: Tree, step_size: float) -> Tree:
    """Return ``theta`` with the step size of adaptation replaced."""
    carried = theta["carried"]
    return {**theta, "carried": {**carried, "step_size": torch.full_like(carried["step_size"], step_size)}}


def scratch(model: nn.Module, step_sizes: Sequence[float] = STEP_SIZES) -> Algorithm:
    """Gradient descent from a random initialisation.

    Args:
        model: any differentiable module.
        step_sizes: candidate step sizes, each above 0.
    """
    check_step_sizes(step_sizes)
    forward = forward_of(model)

    def init(generator: torch.Generator) -> Tree:
        weights = parameters_of(model)
        step_size = number_like(model, step_sizes[0])
        return {"weights": weights, "carried": {"step_size": step_size}}

    def adapt(theta: Tree, support: Tree, loss: Loss) -> Iterator[Weights]:
        return gradient_descent(forward, theta["weights"], support, loss, descent(theta["carried"]["step_size"]))

    def predict(theta: Tree, state: Weights, x: Any) -> Tensor:
        return forward(state, x)

    return Algorithm(
        init,
        adapt,
        predict,
        approach="baseline",
        needs="slope",
        paper="",
        candidates=lambda theta: [with_step_size(theta, size) for size in step_sizes],
        meta_learns=False,
    )
