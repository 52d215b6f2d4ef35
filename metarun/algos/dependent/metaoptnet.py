"""MetaOptNet: a shared trunk with a separate convex classifier per task.

Lee, Maji, Ravichandran, Soatto 2019, "Meta-Learning with Differentiable Convex Optimization",
https://arxiv.org/abs/1904.03758.

    head=svm     Crammer and Singer's multi-class support vector machine (equations 5 to 7), in its dual
    head=ridge   W = Zᵀ (Z Zᵀ + λ I)⁻¹ Y                                              (appendix; λ constant)
    prediction   a · f(x) W                                                           (equation 12)

The dual over the support features Z: with α_i = C (e_yi − β_i), every β_i a distribution over the classes,

    min over β   ½ tr(αᵀ G α) − Σ α_i,yi,    G = Z Zᵀ + I as in the authors' code,    W = Zᵀ α

The dual is solved without an external solver and for all tasks at once. Accelerated projected gradient descent and a
few corrections find which β are 0. Linear solves of the optimality conditions with these fixed then give the solution
and, differentiated, its exact derivative (the implicit one of the paper, §3.2). Gradients flow only through these
solves. In float32 their relative error is about 10⁻⁶ C ‖f(x)‖²: features longer than a hundred should be scaled.
"""

import math
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from metarun.algos.dependent.shared_params import ridge
from metarun.contracts import Algorithm, Spec, Tree
from metarun.errors import require
from metarun.inner import by_row, keep_support, rows_together
from metarun.nn.functional import forward_of, number_like, parameters_of, trunk_and_head
from metarun.nn.ops import full_precision, without_padding

CORRECTIONS = 4
"""Number of corrections of the active set: variables below their bound leave it, and those that gain by leaving their
bound enter it."""


def on_simplex(v: Tensor) -> Tensor:
    """Project the rows of ``v [n, ways]`` onto the probability simplex."""
    descending = v.sort(-1, descending=True).values
    position = torch.arange(1, v.shape[-1] + 1, device=v.device)
    excess = (descending.cumsum(-1) - 1) / position
    # In sorted order the excess rises while entries are above it, and falls afterwards.
    return (v - excess.amax(-1, keepdim=True)).clamp(min=0)


def active_set(gram: Tensor, y: Tensor, reach: float, steps: int, ways: Tensor | None = None) -> Tensor:
    """Return which entries of β are above 0 at the optimum ``[n, ways]``: 1 or 0, and 0 for classes not in ``ways``.

    FISTA (Beck and Teboulle 2009) on the dual, restarted where it overshoots (O'Donoghue and Candès 2015).
    """
    # The largest absolute row sum bounds every eigenvalue.
    length = 1 / gram.abs().sum(-1).amax(-1)

    def down(beta: Tensor) -> Tensor:
        # Gradient of the dual over C²: −(G α)/C + 1/C at the true class.
        new = beta - length * (y / reach - gram @ (y - beta))
        return on_simplex(new if ways is None else new.masked_fill(ways == 0, -math.inf))

    beta = ahead = torch.full_like(y, 1 / y.shape[-1]) if ways is None else ways / ways.sum(-1, keepdim=True)
    momentum = gram.new_ones(())
    for _ in range(steps):
        new = down(ahead)
        overshot = ((ahead - new) * (new - beta)).sum() > 0
        momentum = torch.where(overshot, 1.0, momentum)
        following = (1 + torch.sqrt(1 + 4 * momentum**2)) / 2
        ahead = new + (momentum - 1) / following * (new - beta)
        beta, momentum = new, following
    return (beta > 1e-6).to(y.dtype)


def with_active_set(gram: Tensor, y: Tensor, reach: float, free: Tensor) -> tuple[Tensor, Tensor]:
    """Return β ``[n, ways]`` and multipliers ν ``[n]`` that solve the optimality conditions for a given active set.

    (G (y − β))_ik − y_ik / C = ν_i where β_ik is free, β_ik = 0 elsewhere, Σ_k β_ik = 1. Classes are coupled only by ν:
    given ν each class has a separate linear system, and the sum of their solutions determines ν.
    """
    of_class = free.T
    own = of_class[:, :, None] * gram * of_class[:, None] + torch.diag_embed(1 - of_class)
    inverse = torch.linalg.inv(own) * of_class[:, None]
    target = (gram @ y - y / reach).T[..., None]
    multipliers = torch.linalg.solve(inverse.sum(0), (inverse @ target).sum(0) - 1)
    beta: Tensor = (inverse @ (target - multipliers))[..., 0].T
    return beta, multipliers[:, 0]


def support_vectors(gram: Tensor, y: Tensor, reach: float, steps: int, ways: Tensor | None = None) -> Tensor:
    """Return the dual variables α ``[n, ways]`` of the support vector machine, differentiable in ``gram [n, n]``.

    Args:
        gram: positive definite Gram matrix of the examples.
        y: one-hot classes ``[n, ways]``.
        reach: C, above 0.
        steps: number of steps that find the active set.
        ways: 1 for the classes that the task has ``[n, ways]``; None: all.
    """
    fixed = gram.detach()
    free = active_set(fixed, y, reach, steps, ways)
    for _ in range(CORRECTIONS):
        beta, multipliers = with_active_set(fixed, y, reach, free)
        pays = y / reach - fixed @ (y - beta) + multipliers[:, None] < 0
        free = torch.where(free > 0, beta > 0, pays).to(y.dtype)
        if ways is not None:
            free = free * ways
    return reach * (y - with_active_set(gram, y, reach, free)[0])


def metaoptnet(
    model: nn.Module,
    spec: Spec,
    head: Literal["svm", "ridge"] = "svm",
    reach: float = 0.1,
    strength: float = 50.0,
    scale: float = 1.0,
    solver_steps: int = 250,
) -> Algorithm:
    """A convex head for each task.

    Args:
        model: a module with ``trunk`` and ``head``; of the head only its width is used.
        spec: that of a classification task.
        head: the convex classifier, ``svm`` or ``ridge``.
        reach: C of the support vector machine, above 0 (0.1 in the paper).
        strength: λ of ridge regression, above 0 (50 in the authors' code).
        scale: initial a, above 0; learned.
        solver_steps: number of steps that find which dual variables are at their bound, at least 1.
    """
    require(reach > 0, f"reach must be above 0, not {reach}")
    require(strength > 0, f"strength must be above 0, not {strength}")
    require(scale > 0, f"scale must be above 0, not {scale}")
    require(solver_steps >= 1, f"solver_steps must be at least 1, not {solver_steps}")
    trunk, linear = trunk_and_head(model, "metaoptnet")
    embed = forward_of(trunk)

    def init(generator: torch.Generator) -> Tree:
        weights = parameters_of(trunk)
        return {"weights": weights, "scale": number_like(model, scale)}

    def classifier(z: Tensor, y: Tensor, ways: Tensor | None) -> Tensor:
        if head == "ridge":
            return ridge(z, y, torch.as_tensor(strength, dtype=z.dtype, device=z.device))
        gram = z @ z.T + torch.eye(len(z), dtype=z.dtype, device=z.device)
        return z.T @ support_vectors(gram, y, reach, solver_steps, ways)

    def predict(theta: Tree, state: Tree, x: Any) -> Tensor:
        rows, features = rows_together(spec, embed, theta["weights"], state, x)
        # Low-precision products cannot tell which dual variables are zero.
        with full_precision(rows.z):
            # A row of zeros is orthogonal to all others in the Gram matrix, and contributes nothing to W.
            z = without_padding(rows.z.to(theta["scale"].dtype), rows.weight)
            weights = classifier(z, rows.y, state["ways"][:1].expand_as(rows.y) if "ways" in state else None)
        return by_row(lambda queries: cast(Tensor, theta["scale"] * queries @ weights), features)

    return Algorithm(
        init,
        keep_support,
        predict,
        approach="dependent",
        needs="classes",
        paper="https://arxiv.org/abs/1904.03758",
        any_ways=True,
        open_ways=True,
        embed=lambda theta, x: embed(theta["weights"], x),
        adapted_parameters=lambda theta: linear.in_features * spec.row_outputs,
    )
