"""Deep kernel transfer: a Gaussian process per task whose kernel is learned from all tasks.

Patacchiola, Turner, Crowley, O'Boyle, Storkey 2020, "Bayesian Meta-Learning for the Few-Shot Setting via Deep Kernels",
https://arxiv.org/abs/1910.05199.

    kernel       k(x, x') = s κ(f(x), f(x')) + c
    meta-loss    −log p(y | X) of support set and queries together, per example
    prediction   m(x) = kₓᵀ (K + σ² I)⁻¹ y,  v(x) = k(x, x) + σ² − kₓᵀ (K + σ² I)⁻¹ kₓ

f is the model's trunk (``deep=true``), or multiplies each number of the input by a learned weight (``deep=false``). The
weights of f and s, c, σ² and ℓ are shared by all tasks and learned. Nothing is fitted per task. κ is one of:

    rbf          exp(−‖z − z'‖² / (2 ℓ² d)), d being the length of z
    linear       zᵀz' / d
    cosine       zᵀz' / (‖z‖ ‖z'‖)
    tanimoto     zᵀz' / (‖z‖² + ‖z'‖² − zᵀz'), the share of common bits for fingerprints (Ralaivola et al. 2005,
                 https://doi.org/10.1016/j.neunet.2005.07.009)

For classes there is a Gaussian process for each, on targets of 1 for the class and −1 for the others as in the paper.
Where we deviate: the output for a class is m / v instead of m, so that for two classes the softmax is the
posterior odds of the two targets, N(1; m, v) to N(−1; m, v).
"""

import math
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from metarun.algos.dependent.cnp import LOG_LIKELIHOOD
from metarun.contracts import Algorithm, Loss, MetaLoss, RowTarget, Scores, Spec, Task, Tree, flat
from metarun.errors import require
from metarun.inner import both, by_row, embed_together, keep_support
from metarun.nn.functional import forward_of, number_like, parameters_of, trunk_and_head
from metarun.nn.ops import full_precision, mean_row, squared_distances, unit_rows
from metarun.nn.padding import weighing
from metarun.targets.weights import mean_over

LEAST_NOISE = 1e-4
"""Added to the learned variance of the noise, so that kernel matrices can be inverted in float32."""

Name = Literal["rbf", "linear", "cosine", "tanimoto"]


def similarity(name: str, a: Tensor, b: Tensor, length: Tensor) -> Tensor:
    """Return κ ``[n, m]`` between features ``a [n, d]`` and ``b [m, d]``; ``length`` is ℓ."""
    if name == "rbf":
        return (-squared_distances(a, b) / (2 * length.square() * a.shape[1])).exp()
    if name == "cosine":
        return unit_rows(a) @ unit_rows(b).T
    common = a @ b.T
    if name == "linear":
        return common / a.shape[1]
    return common / (a.square().sum(1)[:, None] + b.square().sum(1) - common).clamp(min=1e-12)


def self_similarity(name: str, a: Tensor) -> Tensor:
    """Return κ of each row of ``a [n, d]`` with itself ``[n]``; for ``cosine`` and ``tanimoto`` 0 of a row of zeros."""
    if name == "rbf":
        return a.new_ones(len(a))
    if name == "cosine":
        return unit_rows(a).square().sum(1)
    lengths = a.square().sum(1)
    return lengths / a.shape[1] if name == "linear" else lengths / lengths.clamp(min=1e-12)


class Process(NamedTuple):
    """A Gaussian process on the rows of one task, for each output a separate one with the same kernel."""

    name: str
    length: Tensor
    scale: Tensor
    """s."""
    constant: Tensor
    """c."""
    noise: Tensor
    """σ²."""
    z: Tensor
    """Features ``[rows, d]``."""
    y: Tensor
    """Targets ``[rows, outputs]``; 0 for padding."""
    weight: Tensor | None
    """1, or 0 for padding ``[rows]``."""
    ways: Tensor | None = None
    """1, or 0 for a class that the task lacks ``[outputs]``; None: all outputs count."""

    def to_rows(self, x: Tensor) -> Tensor:
        """Return the covariance ``[n, rows]`` of features ``x [n, d]`` with the rows; 0 for padding."""
        found = self.scale * similarity(self.name, x, self.z, self.length) + self.constant
        return found if self.weight is None else found * self.weight

    def factor(self) -> Tensor:
        """Return the Cholesky factor of K + σ² I ``[rows, rows]``; padding has that of the identity."""
        gram, noise = self.to_rows(self.z), self.noise.expand(len(self.z))
        if self.weight is not None:
            gram, noise = gram * self.weight[:, None], torch.where(self.weight > 0, noise, 1.0)
        factor: Tensor = torch.linalg.cholesky(gram + torch.diag_embed(noise))
        return factor

    def log_likelihood(self) -> Tensor:
        """Return log p(y | X) in nats, per row and output."""
        factor = self.factor()
        white: Tensor = torch.linalg.solve_triangular(factor, self.y, upper=False)
        rows = len(self.y) if self.weight is None else self.weight.sum()
        misfit = mean_row(white.square().sum(0), self.ways) / 2
        nats: Tensor = -(misfit + factor.diagonal().log().sum()) / rows - 0.5 * math.log(2 * math.pi)
        return nats

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean ``[n, outputs]`` and variance ``[n, 1]`` of the targets, noise included, at features ``x``."""
        factor, outputs = self.factor(), self.y.shape[1]
        white: Tensor = torch.linalg.solve_triangular(factor, torch.cat([self.y, self.to_rows(x).T], 1), upper=False)
        own, across = white[:, :outputs], white[:, outputs:]
        prior = self.scale * self_similarity(self.name, x) + self.constant
        return across.T @ own, (prior - across.square().sum(0)).clamp(min=0)[:, None] + self.noise


def dkt(
    model: nn.Module, spec: Spec, kernel: Name = "rbf", deep: bool = True, length: float = 1.0, noise: float = 0.1
) -> Algorithm:
    """Deep kernel transfer.

    Args:
        model: a module with ``trunk`` and ``head``; of the head only its width is used.
        spec: the task family's.
        kernel: κ.
        deep: whether κ compares features of the trunk; else the inputs, each number with a learned weight.
        length: initial ℓ of ``rbf``, above 0.
        noise: initial σ², above 0.
    """
    require(length > 0, f"length must be above 0, not {length}")
    require(noise > 0, f"noise must be above 0, not {noise}")
    trunk, _ = trunk_and_head(model, "dkt")
    forward, classes = forward_of(trunk), spec.offers("classes")

    zero = number_like(model, 0.0)

    def embed(weights: Tree, x: Tensor) -> Tensor:
        # Kernel matrices of features in low precision would not be positive definite.
        return forward(dict(weights), x).to(zero.dtype) if deep else flat(x) * weights["log_weight"].exp()

    def init(generator: torch.Generator) -> Tree:
        weights = parameters_of(trunk) if deep else {"log_weight": zero.new_zeros(math.prod(spec.inputs.shape))}
        logs = {"scale": 0.0, "constant": 0.0, "noise": math.log(noise), "length": math.log(length)}
        return {"weights": weights, "kernel": {name: zero.new_tensor(value) for name, value in logs.items()}}

    def process(theta: Tree, z: Tensor, data: Tree) -> Process:
        rows = cast(RowTarget, spec.target).rows(z, data)
        logs = {name: value.exp() for name, value in theta["kernel"].items()}
        y = 2 * rows.y - 1 if classes else rows.y
        if classes and rows.weight is not None:
            y = y * rows.weight[:, None]
        parts = logs["length"], logs["scale"], logs["constant"], logs["noise"] + LEAST_NOISE
        return Process(kernel, *parts, rows.z, y, rows.weight, data["ways"][0] if "ways" in data else None)

    def answer(found: tuple[Tensor, Tensor]) -> Tensor:
        mean, variance = found
        return mean / variance if classes else mean

    def posterior(theta: Tree, support: Tree, x: Tensor) -> tuple[Process, Tensor]:
        z, queries = embed_together(embed, theta["weights"], support, x)
        return process(theta, z, support), queries

    def predict(theta: Tree, state: Tree, x: Any) -> Tensor:
        own, queries = posterior(theta, state, x)
        with full_precision(own.z):
            return by_row(lambda z: answer(own.posterior(z)), queries)

    def likelihood(theta: Tree, state: Tree, data: Tree) -> Scores:
        with weighing(data.get("weight")):
            own, queries = posterior(theta, state, data["x"])
        mean, variance = own.posterior(queries)
        nats = (data["y"] - mean).square() / variance + variance.log() + math.log(2 * math.pi)
        return {LOG_LIKELIHOOD.name: mean_over(-0.5 * nats.sum(-1), data)}

    def meta_loss(theta: Tree, task: Task, loss: Loss) -> MetaLoss:
        data, size = both(task), len(task.support["x"])
        with weighing(data.get("weight")):
            z = embed(theta["weights"], data["x"])
        with full_precision(z):
            known = process(theta, z[:size].detach(), task.support)
            answers = by_row(lambda rows: answer(known.posterior(rows)), z[size:].detach())
            _, scores = loss(lambda x: answers, task.query)
            return MetaLoss(-process(theta, z, data).log_likelihood(), scores)

    with_likelihood = spec.offers("numbers")
    return Algorithm(
        init,
        keep_support,
        predict,
        approach="dependent",
        needs="targets",
        paper="https://arxiv.org/abs/1910.05199",
        meta_loss=meta_loss,
        any_ways=True,
        open_ways=True,
        metrics=(LOG_LIKELIHOOD,) if with_likelihood else (),
        scores=likelihood if with_likelihood else None,
        adapted_parameters=lambda theta: 0,
    )
