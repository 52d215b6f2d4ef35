"""Planning in a known table, and Gamma random numbers for planners that draw the table."""

import math

import torch
from torch import Tensor


def action_values(transitions: Tensor, rewards: Tensor, horizon: int) -> Tensor:
    """Return the expected reward to the end of an episode, by backward induction.

    Args:
        transitions: probabilities ``[..., states, actions, states]``.
        rewards: mean rewards ``[..., states, actions]``.
        horizon: number of steps of an episode.

    Returns:
        ``[..., horizon, states, actions]``, the first being the values at the beginning.
    """
    values, backwards = torch.zeros_like(rewards[..., 0]), []
    for _ in range(horizon):
        backwards.append(rewards + (transitions * values[..., None, None, :]).sum(-1))
        values = backwards[-1].amax(-1)
    return torch.stack(backwards[::-1], -3)


LARGEST_SUM = 8


def gamma(shape: Tensor, uniform: Tensor) -> Tensor:
    """Draw from the Gamma distribution with integer ``shape [...]`` ≥ 1, from ``uniform [..., LARGEST_SUM]``.

    Up to ``LARGEST_SUM`` the draw is a sum of that many exponential numbers. Beyond, it is the cube of a normal number
    (Wilson and Hilferty 1931), whose error there is below a thousandth.
    """
    terms = torch.arange(LARGEST_SUM, device=shape.device) < shape[..., None]
    exact = -(uniform.log() * terms).sum(-1)
    normal = (-2 * uniform[..., 0].log()).sqrt() * (2 * math.pi * uniform[..., 1]).cos()
    cube = shape * (1 - 1 / (9 * shape) + normal / (3 * shape.sqrt())) ** 3
    return torch.where(shape <= LARGEST_SUM, exact, cube.clamp_min(1e-6))
