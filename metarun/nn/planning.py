"""Planning in a known table."""

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
