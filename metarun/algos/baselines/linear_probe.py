"""Linear probe: logistic regression per task on the family's own features, without any meta-learning.

Tian, Wang, Krishnan, Tenenbaum, Isola 2020, "Rethinking Few-Shot Image Classification: a Good Embedding Is All You
Need?", https://arxiv.org/abs/2003.11539 (§3.2 and 3.3).

    z        = [f(x) / ‖f(x)‖, 1]
    W        = argmin  Σ_i −log softmax(W z_i)[y_i] + λ/2 ‖W‖²
    logits   W z

f is fixed by the task family: the features of a frozen model with ``task.embed``, TF-IDF of character n-grams for
sentences, histograms of colour for pictures. λ is chosen from ``strengths`` on validation tasks.

W = Aᵀ Z is found in the span of the n support examples Z. Böhning's bound on the Hessian (1992,
https://doi.org/10.1007/BF00048682), ½ I for each example, gives steps that never raise the loss:

    A ← A − (½ Z Zᵀ + λ I)⁻¹ (softmax(Z Zᵀ A) − Y + λ A)

They are accelerated by momentum (Nesterov 1983), which begins again where it leads uphill (O'Donoghue and Candès 2015,
https://arxiv.org/abs/1204.3982): without it, a hundred steps end far from the minimum where λ is small.

Where we deviate: the bias is part of the penalty, and the paper's code chooses no λ (it is 1).
"""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from metarun.contracts import Algorithm, Loss, RowTarget, Spec, Tree
from metarun.errors import require
from metarun.nn.ops import full_precision, unit_rows, without_padding

STRENGTHS = (0.001, 0.01, 0.1, 1.0)


def with_one(z: Tensor) -> Tensor:
    """Return rows of length one with a 1 appended: ``[n, d]`` → ``[n, d + 1]``."""
    return torch.cat([unit_rows(z), z.new_ones(len(z), 1)], 1)


def logistic(z: Tensor, y: Tensor, strength: Tensor, steps: int, weight: Tensor | None = None) -> Tensor:
    """Return the weights ``[ways, d]`` of logistic regression.

    Args:
        z: examples ``[n, d]``.
        y: one-hot classes ``[n, ways]``, zero for padding.
        strength: λ.
        steps: number of steps.
        weight: 1, or 0 for padding ``[n]``.
    """
    z = without_padding(z, weight)
    real = z.new_ones(len(z), 1) if weight is None else weight[:, None]
    # A class that has no examples is none of the task's, and takes no probability.
    absent = torch.where(y.sum(0) > 0, 0.0, -torch.inf)
    gram = z @ z.T
    bound = torch.linalg.cholesky(gram / 2 + strength * torch.eye(len(z), dtype=z.dtype, device=z.device))
    a = ahead = torch.zeros_like(y)
    momentum = gram.new_ones(())
    for _ in range(steps):
        slope = ((gram @ ahead + absent).softmax(1) - y) * real + strength * ahead
        new = ahead - torch.cholesky_solve(slope, bound)
        # The slope of the loss along W − W_before.
        uphill = (slope * (gram @ (new - a))).sum() > 0
        momentum = torch.where(uphill, 1.0, momentum)
        following = (1 + torch.sqrt(1 + 4 * momentum**2)) / 2
        ahead = new + (momentum - 1) / following * (new - a)
        a, momentum = new, following
    return a.T @ z


def linear_probe(spec: Spec, strengths: Sequence[float] = STRENGTHS, solver_steps: int = 100) -> Algorithm:
    """Logistic regression on the family's own features.

    Args:
        spec: the task family's, whose ``features`` are classified.
        strengths: candidates for λ, each above 0.
        solver_steps: number of steps of the solver, at least 1.
    """
    require(bool(strengths) and all(s > 0 for s in strengths), f"strengths must be above 0, not {list(strengths)}")
    require(solver_steps >= 1, f"solver_steps must be at least 1, not {solver_steps}")

    def init(generator: torch.Generator) -> Tree:
        return {"carried": {"strength": torch.tensor(float(strengths[0]))}}

    def features(x: Any) -> Tensor:
        return spec.facts.features(x)

    def adapt(theta: Tree, support: Tree, loss: Loss) -> Iterator[Tensor | None]:
        yield None
        rows = cast(RowTarget, spec.target).rows(with_one(features(support["x"])), support)
        with full_precision(rows.z):
            yield logistic(rows.z, rows.y, theta["carried"]["strength"].to(rows.z), solver_steps, rows.weight)

    def predict(theta: Tree, state: Tensor, x: Any) -> Tensor:
        return with_one(features(x)) @ state.T

    def candidates(theta: Tree) -> list[Tree]:
        return [{"carried": {"strength": theta["carried"]["strength"].new_tensor(s)}} for s in strengths]

    return Algorithm(
        init,
        adapt,
        predict,
        approach="baseline",
        needs="labels",
        paper="https://arxiv.org/abs/2003.11539",
        meta_learns=False,
        candidates=candidates,
        open_ways=True,
        adapted_parameters=lambda theta: 0,
    )
