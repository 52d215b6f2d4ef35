"""ANIL and BOIL: MAML whose inner loop changes only a part of the model.

- ANIL, "almost no inner loop", adapts the head. Raghu, Raghu, Bengio, Vinyals 2020, "Rapid Learning or Feature Reuse?",
  https://arxiv.org/abs/1909.09157 (§4): most of what MAML learns is features, which need no adaptation.
- BOIL, "body only", adapts all but the head. Oh, Yoo, Kim, Yun 2021, "BOIL: Towards Representation Change for Few-shot
  Learning", https://arxiv.org/abs/2008.08882 (§3): features that do change generalise better.

    inner step   w_part ← w_part − α ∇ L_support with respect to w_part alone
    meta-loss    as in MAML, over all weights
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metarun.contracts import Algorithm, Loss, Tree, Weights
from metarun.errors import require
from metarun.inner import part_descent
from metarun.nn.functional import forward_of, head_names, parameters_of
from metarun.tree import size

PAPERS = {"head": "https://arxiv.org/abs/1909.09157", "body": "https://arxiv.org/abs/2008.08882"}


def anil(
    model: nn.Module,
    adapts: Literal["head", "body"] = "head",
    inner_lr: float = 0.01,
    inner_steps: int = 1,
    first_order: bool = False,
) -> Algorithm:
    """MAML with an inner loop over the head or over the body.

    Args:
        model: a module with a part called ``head``.
        adapts: the part that the inner loop changes.
        inner_lr: α, above 0, for mean losses.
        inner_steps: number of inner steps in meta-training, at least 1.
        first_order: whether the inner gradient is treated as a constant.
    """
    require(inner_lr > 0, f"inner_lr must be above 0, not {inner_lr}")
    require(inner_steps >= 1, f"inner_steps must be at least 1, not {inner_steps}")
    forward = forward_of(model)
    heads = head_names(model, "anil")
    learned = set(parameters_of(model))
    names = learned & heads if adapts == "head" else learned - heads
    require(len(names) > 0, f"the {adapts} of {type(model).__name__} is frozen, so there is nothing to adapt")

    def init(generator: torch.Generator) -> Tree:
        return {"weights": parameters_of(model)}

    def adapt(theta: Tree, support: Tree, loss: Loss) -> Iterator[Weights]:
        part = {name: theta["weights"][name] for name in sorted(names)}
        return part_descent(forward, theta["weights"], part, support, loss, inner_lr, first_order)

    def predict(theta: Tree, state: Weights, x: Any) -> Tensor:
        return forward({**theta["weights"], **state}, x)

    return Algorithm(
        init,
        adapt,
        predict,
        approach="agnostic",
        needs="loss",
        paper=PAPERS[adapts],
        train_steps=inner_steps,
        adapted_parameters=lambda theta: size({name: theta["weights"][name] for name in names}),
    )
