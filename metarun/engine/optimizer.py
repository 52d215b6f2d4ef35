"""The outer optimizer as pure functions of tensors, and its learning rate along meta-training.

``torch.optim`` steps parameters in place with one learning rate for all. Here everything that a step reads and writes
is a tensor that it is given or returns, so that one step can be recorded, compiled, and mapped over replicas which
differ in their learning rates. The formulas are those of ``torch.optim`` (a test compares them).
"""

import math
from typing import Any

import torch
from torch import Tensor

from metarun.contracts import Tree

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


def initial_moments(weights: Tensor, optimizer: str) -> dict[str, Tensor]:
    """What the optimizer remembers before the first step, for ``weights [...]``."""
    if optimizer in ("sgd", "trpo"):
        return {}
    return {"mean": torch.zeros_like(weights), "square": torch.zeros_like(weights), "step": weights.new_zeros(())}


def clipped(gradient: Tensor, largest_norm: Tensor | float) -> Tensor:
    """``gradient`` scaled down to ``largest_norm`` where it is longer; torch's own rule."""
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
    """One step of ``sgd``, ``adam`` or ``adamw`` (https://arxiv.org/abs/1412.6980, https://arxiv.org/abs/1711.05101).

    Args:
        optimizer: its name.
        weights: ``[numbers]``.
        gradient: ``[numbers]``.
        moments: of ``initial_moments``, or the last step's.
        lr: learning rate of this step, a scalar.
        weight_decay: at least 0; joined to the gradient, but for adamw, which shrinks the weights by it.

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
    """The learning rate of every meta-step from ``first`` up to ``last`` (all: ``[steps]``) in float64.

    Args:
        schedule: ``constant``; ``linear`` or ``cosine``, from ``lr`` to ``lr · final``; ``step``, times ``decay`` every
            ``decay_every`` steps.
        lr: of the first step.
        steps: how many.
        final: at the end of the whole schedule, as a share of ``lr``.
        decay: a factor.
        decay_every: steps.
        first: the first step that is wanted, counted from 0.
        last: the step after the last one that is wanted; None: ``steps``.
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
