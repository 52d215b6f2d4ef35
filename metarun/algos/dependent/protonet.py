"""Prototypical Networks.

Snell, Swersky, Zemel 2017, "Prototypical Networks for Few-shot Learning", https://arxiv.org/abs/1703.05175.

    prototype    c_k = mean of the embeddings of class k's support examples       (equation 1)
    prediction   logit_k(x) = −‖f(x) − c_k‖²                                      (equation 2)
    or           logit_k(x) = τ cos(f(x), c_k)                                    (``distance=cosine``, §2.4)

f is the model's trunk. Training may use more ways than testing (``task.train_ways``, §2.7).

Support and query examples are embedded in one batch, as in the official code; with batch statistics as
normalisation they therefore share them. Where we deviate: the official code switches to running averages for
testing; here test queries too are normalised with their episode (the result row says transductive).

Squared distances favour classes whose prototype is long, that is, whose examples resemble each other. For TF-IDF
features this does more harm than good, hence the cosine, whose scale τ is learned.

Expected: 98.5 ± 0.2 % (``metarun algo=protonet task=omniglot task.split=random``, real data, 5-way 1-shot).
"""

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from metarun.contracts import Algorithm, Spec, Tree
from metarun.errors import require
from metarun.inner import by_row, keep_support, rows_together
from metarun.nn.functional import forward_of, number_like, parameters_of, trunk_and_head
from metarun.nn.ops import class_means, squared_distances, unit_rows


def protonet(
    model: nn.Module, spec: Spec, distance: Literal["euclidean", "cosine"] = "euclidean", scale: float = 10.0
) -> Algorithm:
    """Prototypical networks.

    Args:
        model: a module with ``trunk`` and ``head``; the head is not used.
        spec: that of a task with classes.
        distance: how far a query is from a prototype.
        scale: initial τ of the cosine, above 0.
    """
    require(scale > 0, f"scale must be above 0, not {scale}")
    trunk, _ = trunk_and_head(model, "protonet")
    embed = forward_of(trunk)

    def init(generator: torch.Generator) -> Tree:
        weights = parameters_of(trunk)
        if distance == "euclidean":
            return {"weights": weights}
        return {"weights": weights, "scale": number_like(model, scale)}

    def predict(theta: Tree, state: Tree, x: Any) -> Tensor:
        rows, queries = rows_together(spec, embed, theta["weights"], state, x)
        centres = class_means(rows.z, rows.y, rows.weight)

        def near(z: Tensor) -> Tensor:
            if distance == "euclidean":
                return -squared_distances(z, centres)
            return cast(Tensor, theta["scale"] * unit_rows(z) @ unit_rows(centres).T)

        return by_row(near, queries)

    return Algorithm(
        init,
        keep_support,
        predict,
        approach="dependent",
        needs="classes",
        paper="https://arxiv.org/abs/1703.05175",
        any_ways=True,
        open_ways=True,
        embed=lambda theta, x: embed(theta["weights"], x),
        adapted_parameters=lambda theta: 0,
    )
