"""Multi-task learning: one trunk for all tasks and one head per task, trained jointly on whole tasks.

Wang, Zhao, Li 2021, "Bridging Multi-Task Learning and Meta-Learning", https://arxiv.org/abs/2106.09017 (§3 and §4.1):
this is ANIL with a task's head fitted on all of its data and without differentiation through the fit.

    head of a task    h_τ = K steps of gradient descent on L(trunk, h; support and query), from h = 0
    joint loss        mean over tasks of L(trunk, h_τ; support and query), over the trunk alone, h_τ being constant

The step size is ``head_lr`` divided by the mean squared length of the features with their constant 1. The curvature of
a mean squared error is at most twice that, so descent with ``head_lr`` up to 1 cannot diverge whatever the trunk does
(up to 4 for a cross-entropy, whose curvature is at most half of it).

At a head that has converged this is the gradient of min_h L (the envelope theorem). A new task gets a head fitted on
its support set with the trunk frozen; support and query examples are embedded in one batch. The comparison with `anil`
shows what the split into support and query and the derivative of the inner loop are worth.
"""

from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from metarun.contracts import Algorithm, Loss, MetaLoss, Task, Tree, Weights
from metarun.errors import require
from metarun.inner import Fit, answer, both, fit_head, fits
from metarun.nn.functional import forward_of, parameters_of, trunk_and_head
from metarun.nn.padding import weighing
from metarun.targets.weights import mean_over


def multitask(model: nn.Module, head_lr: float = 1.0, head_steps: int = 10) -> Algorithm:
    """Joint training of a trunk with a separate head per task.

    Args:
        model: a module with ``trunk`` and ``head``.
        head_lr: step size of fitting heads, relative to the largest that their features admit, above 0, for mean
            losses.
        head_steps: K, number of steps of fitting a head, at least 1.
    """
    require(head_lr > 0, f"head_lr must be above 0, not {head_lr}")
    require(head_steps >= 1, f"head_steps must be at least 1, not {head_steps}")
    trunk, head = trunk_and_head(model, "multitask")
    embed, read_out = forward_of(trunk), forward_of(head)

    def init(generator: torch.Generator) -> Tree:
        return {"weights": parameters_of(trunk)}

    def heads(fit: Fit, z: Tensor) -> Iterator[Weights]:
        """Yield heads fitted on features ``z``, starting from zero."""
        outputs = fit.support["y"].shape[-1]
        start = {name: z.new_zeros(outputs, *p.shape[1:]) for name, p in head.named_parameters()}
        return fit_head(fit, read_out, start, z, head_lr / (1 + mean_over(z.square().sum(-1), fit.support)))

    def predict(theta: Tree, state: Fit, x: Any) -> Tensor:
        return answer(state, embed, theta["weights"], x, partial(heads, state), read_out)

    def meta_loss(theta: Tree, task: Task, loss: Loss) -> MetaLoss:
        data = both(task)
        with weighing(data.get("weight")):
            z = embed(theta["weights"], data["x"])
        fitted = next(islice(heads(next(fits(theta, data, loss)), z.detach()), head_steps, None))
        return MetaLoss(*loss(lambda x: read_out({name: w.detach() for name, w in fitted.items()}, z), data))

    return Algorithm(
        init,
        fits,
        predict,
        approach="baseline",
        needs="targets",
        paper="https://arxiv.org/abs/2106.09017",
        train_steps=head_steps,
        meta_loss=meta_loss,
        any_ways=True,
        open_ways=True,
        adapted_parameters=lambda theta: sum(p.numel() for p in head.parameters()),
    )
