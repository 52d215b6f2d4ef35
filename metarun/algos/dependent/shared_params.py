"""Shared parameters with a separate head per task, fitted in closed form (R2-D2).

Bertinetto, Henriques, Torr, Vedaldi 2019, "Meta-learning with differentiable closed-form solvers",
https://arxiv.org/abs/1805.08136.

    head         W = argmin ‖Z W − Y‖² + λ ‖W‖² = Zᵀ (Z Zᵀ + λ I)⁻¹ Y             (equations 4 and 6)
    prediction   a · f(x) W + b                                                   (equation 7)

Z holds the trunk's features of the support set, with a column of ones, scaled by 1/√n for n examples (as in
the official code); Y are one-hot classes or regression targets. The trunk, λ, the scale a and the shift b are
shared by all tasks and learned; only W is fitted per task. Equation 6 (Woodbury) is used where the support
set is no larger than the number of features, the primal form elsewhere.

As in `protonet`, support and query examples are embedded in one batch.

Expected: MSE 0.007 ± 0.004 (``metarun algo=shared_params task=sinusoid``), 97.1 ± 0.3 % (``metarun
algo=shared_params task=omniglot task.split=random``, real data, 5-way 1-shot).
"""

from math import log
from typing import Any, cast

import torch
from torch import Tensor, nn

from metarun.contracts import Algorithm, Spec, Tree
from metarun.errors import require
from metarun.inner import by_row, keep_support, rows_together
from metarun.nn.functional import forward_of, number_like, parameters_of, trunk_and_head
from metarun.nn.ops import full_precision, without_padding


def ridge(z: Tensor, y: Tensor, strength: Tensor) -> Tensor:
    """Return the weights ``[d, outputs]`` of ridge regression of ``y [n, outputs]`` on ``z [n, d]``."""
    n, d = z.shape
    identity = torch.eye(min(n, d), dtype=z.dtype, device=z.device)
    if n <= d:
        return z.T.matmul(torch.linalg.solve(z @ z.T + strength * identity, y))
    return cast(Tensor, torch.linalg.solve(z.T @ z + strength * identity, z.T @ y))


def with_bias(z: Tensor) -> Tensor:
    """Return ``z [n, d]`` with a column of ones appended."""
    return torch.cat([z, z.new_ones(len(z), 1)], 1)


def shared_params(model: nn.Module, spec: Spec, strength: float = 50.0, scale: float = 10.0) -> Algorithm:
    """R2-D2: shared trunk, ridge-regression head per task.

    Args:
        model: a module with ``trunk`` and ``head``; of the head only its width is used.
        spec: the task family's.
        strength: initial λ, above 0 (50 in the official code).
        scale: initial a, above 0 (10 in the official code; 1 suits regression).
    """
    require(strength > 0, f"strength must be above 0, not {strength}")
    require(scale > 0, f"scale must be above 0, not {scale}")
    trunk, head = trunk_and_head(model, "shared_params")
    embed = forward_of(trunk)

    def init(generator: torch.Generator) -> Tree:
        weights = parameters_of(trunk)
        first = number_like(model, 0.0)
        solver = {
            "log_strength": first.new_tensor(log(strength)),
            "scale": first.new_tensor(scale),
            "shift": first.new_tensor(0.0),
        }
        return {"weights": weights, "solver": solver}

    def predict(theta: Tree, state: Tree, x: Any) -> Tensor:
        rows, features = rows_together(spec, embed, theta["weights"], state, x)
        solver, root = theta["solver"], (len(rows.y) if rows.weight is None else rows.weight.sum()) ** 0.5
        # In low precision, a small λ would be lost when it is added to products of features.
        with full_precision(rows.z):
            z = without_padding(with_bias(rows.z.to(rows.y.dtype)), rows.weight)
            w = ridge(z / root, rows.y, solver["log_strength"].exp())

        def read_out(queries: Tensor) -> Tensor:
            return cast(Tensor, solver["scale"] * (with_bias(queries) / root) @ w + solver["shift"])

        return by_row(read_out, features)

    return Algorithm(
        init,
        keep_support,
        predict,
        approach="dependent",
        needs="rows",
        paper="https://arxiv.org/abs/1805.08136",
        any_ways=True,
        open_ways=True,
        embed=lambda theta, x: embed(theta["weights"], x),
        adapted_parameters=lambda theta: (head.in_features + 1) * spec.row_outputs,
    )
