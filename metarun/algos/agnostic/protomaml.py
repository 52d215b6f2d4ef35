"""Proto-MAML: MAML whose head is set from each task's prototypes before the inner loop.

Triantafillou, Zhu, Dumoulin, Lamblin, Evci, Xu, Goroshin, Gelada, Swersky, Manzagol, Larochelle 2020, "Meta-Dataset: A
Dataset of Datasets for Learning to Learn from Few Examples", https://arxiv.org/abs/1903.03096 (§3).

    prototype    c_k = mean of the embeddings of class k's support examples
    head         W_k = 2 c_k,  b_k = −‖c_k‖²,  which is the classifier of prototypical networks up to a constant
    inner step   w ← w − α ∇ L_support(w) for the trunk and the head                                   (as in MAML)
    meta-loss    mean over tasks of L_query(w_K), differentiated through the prototypes as well

Without inner steps this is `protonet`. Tasks may have any number of classes.

Where we deviate: α is one fixed number, and the number of steps is the same in training and validation unless
``eval.adapt_steps`` says otherwise.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from metarun.contracts import Algorithm, Loss, RowTarget, Spec, Tree, Weights
from metarun.errors import require
from metarun.inner import descent, gradient_descent
from metarun.nn.functional import forward_of, parameters_of, trunk_and_head
from metarun.nn.ops import class_means
from metarun.nn.padding import weighing
from metarun.tree import size


def protomaml(
    model: nn.Module, spec: Spec, inner_lr: float = 0.01, inner_steps: int = 1, first_order: bool = False
) -> Algorithm:
    """Proto-MAML, second or first order.

    Args:
        model: a module with ``trunk`` and ``head``; of the head only its width is used.
        spec: that of a task with classes.
        inner_lr: α, above 0, for mean losses.
        inner_steps: K, number of inner steps in meta-training, at least 0; 0 are prototypical networks.
        first_order: whether the inner gradient is treated as a constant; the prototypes are differentiated anyway.
    """
    require(inner_lr > 0, f"inner_lr must be above 0, not {inner_lr}")
    require(inner_steps >= 0, f"inner_steps must be at least 0, not {inner_steps}")
    trunk, head = trunk_and_head(model, "protomaml")
    embed = forward_of(trunk)

    def init(generator: torch.Generator) -> Tree:
        return {"weights": parameters_of(trunk)}

    def forward(weights: Weights, x: Any) -> Tensor:
        own = {name.removeprefix("trunk."): w for name, w in weights.items() if name.startswith("trunk.")}
        return embed(own, x) @ weights["head.weight"].T + weights["head.bias"]

    def adapt(theta: Tree, support: Tree, loss: Loss) -> Iterator[Weights]:
        with weighing(support.get("weight")):
            z = embed(theta["weights"], support["x"])
        rows = cast(RowTarget, spec.target).rows(z, support)
        centres = class_means(rows.z, rows.y, rows.weight)
        start = {f"trunk.{name}": w for name, w in theta["weights"].items()}
        start |= {"head.weight": 2 * centres, "head.bias": -centres.square().sum(1)}
        return gradient_descent(forward, start, support, loss, descent(inner_lr), first_order)

    def predict(theta: Tree, state: Weights, x: Any) -> Tensor:
        return forward(state, x)

    return Algorithm(
        init,
        adapt,
        predict,
        approach="agnostic",
        needs="labels",
        paper="https://arxiv.org/abs/1903.03096",
        train_steps=inner_steps,
        any_ways=True,
        open_ways=True,
        embed=lambda theta, x: embed(theta["weights"], x),
        adapted_parameters=lambda theta: size(theta["weights"]) + spec.target.outputs * (head.in_features + 1),
    )
