"""One model for all tasks, whose parameters a hypernetwork generates per task.

Ha, Dai, Le 2017, "HyperNetworks", https://arxiv.org/abs/1609.09106, conditioned on the support set as in Zhmoginov,
Sandler, Vladymyrov 2022, "HyperTransformer: Model Generation for Supervised and Semi-Supervised Few-Shot Learning",
https://arxiv.org/abs/2201.04182.

    code of a task       c = mean of e(f(x), y) over the support set, or of e(z_k) over its classes
    matrix of a layer    W = W_0 + U diag(S c) V                                       rank r, for any shape [out, …]
    vector of a layer    b = b_0 + B c
    rows of a classifier w_k, b_k = G(z_k, c)                     z_k: mean of f(x) over class k

f is a copy of the model's trunk with separate weights; e and G are perceptrons. They generate exactly the parameters of
the configured model, and that model makes the predictions. U, V and B are shared by all tasks, so that conv4 costs
r·(out + in·9) numbers per layer instead of a code's length times all of its weights. All classes are generated in the
same way, so relabelling a task relabels its predictions.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from metarun.contracts import Algorithm, Loss, Spec, Tree, Weights
from metarun.errors import require
from metarun.nn.functional import forward_of, parameters_of, require_own_head, seeded, trunk_and_head
from metarun.nn.ops import class_means, mean_row
from metarun.nn.padding import weighing
from metarun.tree import size


def perceptron(inputs: int, width: int, outputs: int) -> nn.Sequential:
    """Return two linear layers with ReLU between them."""
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, outputs))


def blank_writer(w: Tensor, code: int, rank: int, generator: torch.Generator) -> Tree:
    """Return how a parameter depends on the code: in low rank through ``left`` and ``right``, at first not at all."""
    if w.ndim < 2:
        return {"shift": w.new_zeros(w.numel(), code)}
    rows, columns = len(w), w[0].numel()
    r = min(rank, rows, columns)

    def normal(*shape: int) -> Tensor:
        drawn: Tensor = torch.randn(*shape, generator=generator) / shape[1] ** 0.5
        return drawn.to(w)

    # One of the three factors starts at zero: the first task sees the shared weights, and every factor gets a gradient
    # after the first step.
    return {"left": normal(rows, r), "scale": w.new_zeros(r, code), "right": normal(r, columns)}


def written(shared: Tensor, writer: Tree, code: Tensor) -> Tensor:
    """Return a task's parameter, generated from its code."""
    if "shift" in writer:
        return cast(Tensor, shared + (writer["shift"] @ code).view(shared.shape))
    change: Tensor = (writer["left"] * (writer["scale"] @ code)) @ writer["right"]
    return shared + change.view(shared.shape)


def shared_model(model: nn.Module, spec: Spec, code: int = 32, rank: int = 8, width: int = 128) -> Algorithm:
    """A hypernetwork that generates the parameters of one model.

    Args:
        model: a module with ``trunk`` and a linear ``head``.
        spec: that of a regression or classification task.
        code: length of a task's code, at least 1.
        rank: rank of a matrix's change, at least 1.
        width: width of the hypernetwork's perceptrons, at least 1.
    """
    for name, value in {"code": code, "rank": rank, "width": width}.items():
        require(value >= 1, f"{name} must be at least 1, not {value}")
    trunk, head = trunk_and_head(model, "shared_model")
    forward, embed, features = forward_of(model), forward_of(trunk), head.in_features
    classes = spec.offers("classes")
    if classes:
        require_own_head(model, "shared_model")

    def encoder() -> nn.Module:
        return perceptron(features if classes else features + spec.target.outputs, width, code)

    def class_writer() -> nn.Module:
        return perceptron(features + code, width, features + 1)

    with torch.random.fork_rng(devices=[]):
        encode, write_class = forward_of(encoder()), forward_of(class_writer())

    def init(generator: torch.Generator) -> Tree:
        weights = parameters_of(model)
        like = next(iter(weights.values()))
        if classes:
            # Only the class writer generates the rows of the head.
            weights = {name: w for name, w in weights.items() if not name.startswith("head.")}
        writers = {name: blank_writer(w, code, rank, generator) for name, w in weights.items()}
        with seeded(generator):
            theta = {
                "weights": weights,
                "reader": parameters_of(trunk),
                "encoder": parameters_of(encoder().to(like)),
                "writers": writers,
            }
            return {**theta, "class_writer": parameters_of(class_writer().to(like))} if classes else theta

    def adapt(theta: Tree, support: Tree, loss: Loss) -> Iterator[Weights | None]:
        yield None
        y, weight = support["y"], support.get("weight")
        with weighing(weight):
            z = embed(theta["reader"], support["x"])
        examples = class_means(z, y, weight) if classes else torch.cat([z, y], -1)
        rows = support["ways"][0] if classes and "ways" in support else None if classes else weight
        of_task = mean_row(encode(theta["encoder"], examples), rows)
        weights = {name: written(w, theta["writers"][name], of_task) for name, w in theta["weights"].items()}
        if classes:
            head = write_class(theta["class_writer"], torch.cat([examples, of_task.expand(len(examples), -1)], -1))
            weights |= {"head.weight": head[:, :-1], "head.bias": head[:, -1]}
        yield weights

    def predict(theta: Tree, state: Weights, x: Any) -> Tensor:
        return forward(state, x)

    return Algorithm(
        init,
        adapt,
        predict,
        approach="dependent",
        needs="targets",
        paper="https://arxiv.org/abs/1609.09106",
        any_ways=classes,
        open_ways=classes,
        adapted_parameters=lambda theta: size(parameters_of(model)),
    )
