"""Matching Networks.

Vinyals, Blundell, Lillicrap, Kavukcuoglu, Wierstra 2016, "Matching Networks for One Shot Learning",
https://arxiv.org/abs/1606.04080.

    P(y | x) = Σ_i a(x, x_i) y_i,   a = softmax over the support set of c(f(x), f(x_i))       (equations 1 and 2)

c is the cosine, as in the paper, or minus the squared distance, which independent re-implementations prefer. There is
no full context embedding (§2.1.2): support and query examples are embedded each by itself, but for batch statistics.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from metarun.functional import (
    embed_together,
    forward_of,
    keep_support,
    parameters_of,
    squared_distances,
    trunk_and_head,
    unit_rows,
)
from metarun.types import Algorithm, Spec, Tree

LEAST_CHANCE = 1e-6
"""Added to each chance: a class to which no attention goes at all still has a logarithm."""


def matching(model: nn.Module, spec: Spec, distance: Literal["cosine", "euclidean"] = "cosine") -> Algorithm:
    """Matching networks without full context embeddings.

    Args:
        model: a module with ``trunk`` and ``head``; the head is not used.
        spec: the task family's.
        distance: of a query from a support example.
    """
    trunk, _ = trunk_and_head(model, spec, "matching")
    embed = forward_of(trunk)

    def init(model: nn.Module, generator: torch.Generator) -> Tree:
        return {"weights": parameters_of(trunk_and_head(model, spec, "matching")[0])}

    def predict(theta: Tree, state: Tree, x: Any) -> Tensor:
        z, queries = embed_together(embed, theta["weights"], state, x)
        near = unit_rows(queries) @ unit_rows(z).T if distance == "cosine" else -squared_distances(queries, z)
        chances: Tensor = near.softmax(-1) @ state["y"] + LEAST_CHANCE
        return chances.log()

    return Algorithm(
        init,
        keep_support,
        predict,
        family="dependent",
        kinds=("classification",),
        paper="https://arxiv.org/abs/1606.04080",
        any_ways=True,
        adapted_parameters=lambda theta: 0,
    )
