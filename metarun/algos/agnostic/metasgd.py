"""Meta-SGD.

Li, Zhou, Chen, Li 2017, "Meta-SGD: Learning to Learn Quickly for Few-Shot Learning",
https://arxiv.org/abs/1707.09835.

    inner step   w = θ − α ∘ ∇ L_support(θ)                               (equation 3)
    meta-loss    mean over tasks of L_query(w), over θ and α              (algorithm 1)

α has one entry per weight: the direction and length of the step are learned together with its starting point.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from metarun.contracts import Algorithm, Loss, Tree, Weights
from metarun.errors import require
from metarun.inner import descent, gradient_descent
from metarun.nn.functional import forward_of, parameters_of
from metarun.tree import size


def metasgd(
    model: nn.Module,
    initial_lr: tuple[float, float] = (0.005, 0.1),
    inner_steps: int = 1,
    first_order: bool = False,
) -> Algorithm:
    """MAML with a learned step size for every weight.

    Args:
        model: any differentiable module.
        initial_lr: range from which the initial α is drawn, above 0, for mean losses.
        inner_steps: number of inner steps in meta-training, at least 0; 1 in the paper.
        first_order: whether the inner gradient is treated as a constant.
    """
    low, high = initial_lr
    require(0 < low <= high, f"initial_lr must be a range above 0, not {list(initial_lr)}")
    require(inner_steps >= 0, f"inner_steps must be at least 0, not {inner_steps}")
    forward = forward_of(model)

    def init(generator: torch.Generator) -> Tree:
        weights = parameters_of(model)
        rates = {n: low + (high - low) * torch.rand(w.shape, generator=generator).to(w) for n, w in weights.items()}
        return {"weights": weights, "rates": rates}

    def adapt(theta: Tree, support: Tree, loss: Loss) -> Iterator[Weights]:
        return gradient_descent(forward, theta["weights"], support, loss, descent(theta["rates"]), first_order)

    def predict(theta: Tree, state: Weights, x: Any) -> Tensor:
        return forward(state, x)

    return Algorithm(
        init,
        adapt,
        predict,
        approach="agnostic",
        needs="loss",
        paper="https://arxiv.org/abs/1707.09835",
        train_steps=inner_steps,
        adapted_parameters=lambda theta: size(theta["weights"]),
    )
