"""Relation Networks.

Sung, Yang, Zhang, Xiang, Torr, Hospedales 2018, "Learning to Compare: Relation Network for Few-Shot Learning",
https://arxiv.org/abs/1711.06025.

    relation     r_ij = g([Σ f(x_i of class j), f(x)]) in (0, 1)                     (equation 1; sums, §3.2)
    meta-loss    mean squared error of r to 1 for the class of x, 0 for others        (equation 2)

Where we deviate: g sees vectors of features and is a multi-layer perceptron; the paper's begins with two convolutions
over maps of features.
"""

from typing import Any

import torch
from torch import Tensor, nn

from metarun.errors import require
from metarun.functional import embed_together, forward_of, keep_support, own_network, parameters_of, trunk_and_head
from metarun.types import Algorithm, Loss, Spec, Task, Tree


def relation(model: nn.Module, spec: Spec, width: int = 64) -> Algorithm:
    """Relation networks.

    Args:
        model: a module with ``trunk`` and ``head``; of the head only its width is used.
        spec: the task family's.
        width: of the hidden layer of g, at least 1.
    """
    require(width >= 1, f"width must be at least 1, not {width}")
    trunk, head = trunk_and_head(model, spec, "relation")
    embed = forward_of(trunk)

    def comparer() -> nn.Module:
        return nn.Sequential(nn.Linear(2 * head.in_features, width), nn.ReLU(), nn.Linear(width, 1), nn.Sigmoid())

    compare, drawn = own_network(comparer)

    def init(model: nn.Module, generator: torch.Generator) -> Tree:
        weights = parameters_of(trunk_and_head(model, spec, "relation")[0])
        return {"weights": weights, "relation": drawn(model, generator)}

    def predict(theta: Tree, state: Tree, x: Any) -> Tensor:
        z, queries = embed_together(embed, theta["weights"], state, x)
        classes = state["y"].T @ z
        pairs = torch.cat([classes.expand(len(queries), -1, -1), queries[:, None].expand(-1, len(classes), -1)], -1)
        relations: Tensor = compare(theta["relation"], pairs)[..., 0]
        return relations

    def meta_loss(theta: Tree, task: Task, loss: Loss) -> tuple[Tensor, Tensor]:
        relations = predict(theta, task.support, task.query["x"])
        _, score = loss(lambda x: relations, task.query)
        return (relations - task.query["y"]).square().mean(), score

    return Algorithm(
        init,
        keep_support,
        predict,
        family="dependent",
        kinds=("classification",),
        paper="https://arxiv.org/abs/1711.06025",
        meta_loss=meta_loss,
        any_ways=True,
        adapted_parameters=lambda theta: 0,
    )
