"""The outer optimizer as pure functions of tensors, and its learning-rate schedule.

``torch.optim`` steps parameters in place with one learning rate for all. Here everything that a step reads is a tensor
that is passed in, and everything that it writes is a tensor that it returns, so that a step can be recorded, compiled,
and mapped over replicas that differ in their learning rates. The formulas are those of ``torch.optim`` (a test compares
them).
"""

import math
from typing import Any

import torch
from torch import Tensor

from metarun.contracts import Tree

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


def initial_moments(weights: Tensor, optimizer: str) -> dict[str, Tensor]:
    """Return the optimizer's state before the first step, for ``weights [...]``."""
    if optimizer in ("sgd", "trpo"):
        return {}
    return {"mean": torch.zeros_like(weights), "square": torch.zeros_like(weights), "step": weights.new_zeros(())}


def clipped(gradient: Tensor, largest_norm: Tensor | float) -> Tensor:
    """Return ``gradient`` scaled down to ``largest_norm`` where it is longer, by torch's own rule."""
    scale: Tensor = largest_norm / (gradient.norm() + 1e-6)
    return gradient * scale.clamp(max=1.0)


def outer_step(
    optimizer: str,
    weights: Tensor,
    gradient: Tensor,
    moments: Tree,
    lr: Tensor,
    weight_decay: Tensor | float,
) -> tuple[Tensor, dict[str, Any]]:
    """Take one ``sgd``, ``adam`` or ``adamw`` step (https://arxiv.org/abs/1412.6980, https://arxiv.org/abs/1711.05101).

    Args:
        optimizer: name of the optimizer.
        weights: ``[numbers]``.
        gradient: ``[numbers]``.
        moments: those of ``initial_moments``, or of the last step.
        lr: learning rate of this step, a scalar.
        weight_decay: at least 0; added to the gradient, except by adamw, which shrinks the weights by it.

    Returns:
        New weights and moments.
    """
    if optimizer == "adamw":
        weights = weights * (1 - lr * weight_decay)
    elif not isinstance(weight_decay, float) or weight_decay > 0:
        gradient = gradient + weight_decay * weights
    if optimizer == "sgd":
        return weights - lr * gradient, {}
    step = moments["step"] + 1
    mean = torch.lerp(moments["mean"], gradient, 1 - BETA1)
    square = BETA2 * moments["square"] + (1 - BETA2) * gradient * gradient
    # Both corrections act on scalars: dividing the moments themselves would cost two passes over all weights.
    size = lr / (1 - BETA1**step)
    root = square.sqrt() / (1 - BETA2**step).sqrt() + EPSILON
    return weights - size * mean / root, {"mean": mean, "square": square, "step": step}


def learning_rates(
    schedule: str,
    lr: float,
    steps: int,
    final: float = 0.0,
    decay: float = 0.5,
    decay_every: int = 2000,
    first: int = 0,
    last: int | None = None,
) -> Tensor:
    """Return the learning rate of every meta-step from ``first`` up to ``last`` (all: ``[steps]``) in float64.

    Args:
        schedule: ``constant``; ``linear`` or ``cosine``, from ``lr`` to ``lr · final``; ``step``, times ``decay`` every
            ``decay_every`` steps.
        lr: learning rate of the first step.
        steps: number of steps of the whole schedule.
        final: learning rate at the end of the whole schedule, as a share of ``lr``.
        decay: factor of each decay.
        decay_every: number of steps between decays.
        first: first step to return, counted from 0.
        last: step after the last one to return; None: ``steps``.
    """
    time = torch.arange(first, steps if last is None else last, dtype=torch.float64)
    match schedule:
        case "linear":
            return lr * (1 + (final - 1) * time / steps)
        case "cosine":
            return lr * (final + (1 - final) * (1 + torch.cos(math.pi * time / steps)) / 2)
        case "step":
            return lr * decay ** (time // decay_every)
        case _:
            return torch.full_like(time, lr)
