"""Planning in a known table, and random numbers for planners that draw the table."""

import math

import torch
from torch import Tensor


def action_values(transitions: Tensor, rewards: Tensor, horizon: int) -> Tensor:
    """Expected reward to the end of an episode by backward induction.

    Args:
        transitions: ``[..., states, actions, states]``.
        rewards: mean rewards ``[..., states, actions]``.
        horizon: steps of an episode.

    Returns:
        ``[..., horizon, states, actions]``, the first being the values at the beginning.
    """
    values, backwards = torch.zeros_like(rewards[..., 0]), []
    for _ in range(horizon):
        backwards.append(rewards + (transitions * values[..., None, None, :]).sum(-1))
        values = backwards[-1].amax(-1)
    return torch.stack(backwards[::-1], -3)


def uniforms(seed: Tensor, count: int) -> Tensor:
    """``count`` numbers inside (0, 1) for every integer of ``seed [...]``: ``[..., count]``, in the default dtype.

    SplitMix64 (Steele, Lea, Flood 2014, https://doi.org/10.1145/2660193.2660195) of the seed and a counter; plain
    arithmetic, so that it works where a generator does not, under ``torch.func.vmap``.
    """

    def shifted(z: Tensor, bits: int) -> Tensor:
        # Logical shift to the right: the sign's copies are masked away.
        return (z >> bits) & ((1 << (64 - bits)) - 1)

    steps = torch.arange(1, count + 1, device=seed.device)
    z = seed[..., None] + steps * -7046029254386353131
    z = (z ^ shifted(z, 30)) * -4658895280553007687
    z = (z ^ shifted(z, 27)) * -7723592293110705685
    z = z ^ shifted(z, 31)
    return (shifted(z, 41).to(torch.get_default_dtype()) + 0.5) / 2**23


LARGEST_SUM = 8


def gamma(shape: Tensor, uniform: Tensor) -> Tensor:
    """Numbers of the Gamma distribution with whole ``shape [...]`` ≥ 1, from ``uniform [..., LARGEST_SUM]``.

    Up to ``LARGEST_SUM`` a sum of that many exponential numbers, beyond the cube of a normal one (Wilson and
    Hilferty 1931), whose error there is below a thousandth.
    """
    terms = torch.arange(LARGEST_SUM, device=shape.device) < shape[..., None]
    exact = -(uniform.log() * terms).sum(-1)
    normal = (-2 * uniform[..., 0].log()).sqrt() * (2 * math.pi * uniform[..., 1]).cos()
    cube = shape * (1 - 1 / (9 * shape) + normal / (3 * shape.sqrt())) ** 3
    return torch.where(shape <= LARGEST_SUM, exact, cube.clamp_min(1e-6))
