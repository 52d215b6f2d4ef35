"""Multi-task learning: one trunk for all tasks, a head for each, trained jointly on whole tasks.

Wang, Zhao, Li 2021, "Bridging Multi-Task Learning and Meta-Learning", https://arxiv.org/abs/2106.09017 (§3 and §4.1):
what is left of ANIL when a task's head is fitted on all of its data and nothing is differentiated through the fit.

    head of a task    h_τ = K steps of gradient descent on L(trunk, h; support and query), from h = 0
    joint loss        mean over tasks of L(trunk, h_τ; support and query), over the trunk alone, h_τ being constant

At a head that has converged this is the gradient of min_h L (the envelope theorem). A new task gets a head fitted on
its support set with the trunk as it is. Against `anil` it tells what the split into support and query and the
derivative of the inner loop are worth.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from metarun.algos.baselines.transfer import both
from metarun.errors import require
from metarun.functional import forward_of, head_names, parameters_of, part_descent
from metarun.tree import size
from metarun.types import Algorithm, Loss, Spec, Task, Tree, Weights


def multitask(model: nn.Module, spec: Spec, head_lr: float = 0.1, head_steps: int = 10) -> Algorithm:
    """Joint training of a trunk under heads of each task's own.

    Args:
        model: a module with a part ``head``.
        spec: the task family's; nothing is asked of it.
        head_lr: step size of fitting heads, above 0, for mean losses.
        head_steps: K, at least 1.
    """
    require(head_lr > 0, f"head_lr must be above 0, not {head_lr}")
    require(head_steps >= 1, f"head_steps must be at least 1, not {head_steps}")
    forward = forward_of(model)
    heads = head_names(model, "multitask")

    def init(model: nn.Module, generator: torch.Generator) -> Tree:
        weights = parameters_of(model)
        return {"weights": {name: w for name, w in weights.items() if name not in heads}}

    def start(theta: Tree) -> Weights:
        like = next(iter(theta["weights"].values()))
        shapes = {name: p.shape for name, p in model.named_parameters() if name in heads}
        return {name: like.new_zeros(shape) for name, shape in shapes.items()}

    def adapt(theta: Tree, support: Tree, loss: Loss) -> Iterator[Weights]:
        return part_descent(forward, theta["weights"], start(theta), support, loss, head_lr, first_order=True)

    def predict(theta: Tree, state: Weights, x: Any) -> Tensor:
        return forward({**theta["weights"], **state}, x)

    def meta_loss(theta: Tree, task: Task, loss: Loss) -> tuple[Tensor, Tensor]:
        data = both(task)
        *_, head = islice(adapt(theta, data, loss), head_steps + 1)
        return loss(lambda x: predict(theta, {name: w.detach() for name, w in head.items()}, x), data)

    return Algorithm(
        init,
        adapt,
        predict,
        family="baseline",
        kinds=("regression", "classification", "sequence", "control"),
        paper="https://arxiv.org/abs/2106.09017",
        train_steps=head_steps,
        meta_loss=meta_loss,
        adapted_parameters=lambda theta: size(start(theta)),
    )
