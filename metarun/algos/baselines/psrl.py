"""Posterior sampling for tabular reinforcement learning.

Strens 2000; Osband, Russo, Van Roy 2013, https://arxiv.org/abs/1306.0940: at the start of each episode draw one
table from the posterior, find its best policy, and follow it to the episode's end (algorithm 1).

The prior is the one that tables are drawn from (`metarun.tasks.mdp`): flat Dirichlet transitions, normal mean rewards
of unit variance, unit noise. Only the prior mean of rewards differs: tables are drawn with 1, and the default here is
0, as in the authors' code (https://github.com/iosband/TabulaRL, ``mu0``). Pessimism about untried actions costs nothing
at first: with 1 the score of ten episodes is lower, and only with 0 do 10, 25 and 50 episodes all come within 1 % of
the RL² paper's 138.1, 408.8 and 904.4.

Expected: 137.5 ± 0.6 (``metarun algo=psrl task=mdp eval.episodes=4000``).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from metarun.algos.baselines.random_policy import environment_of, fixed_policy
from metarun.contracts import Algorithm, Seen, Spec
from metarun.nn.ops import one_hot
from metarun.nn.planning import action_values
from metarun.random import LARGEST_SUM, gamma, uniform


class Memory(NamedTuple):
    """What is remembered of a trial, leaves ``[trials, ...]``."""

    time: int
    state: Tensor
    moves: Tensor
    """How often each state followed each state and action ``[trials, states, actions, states]``."""
    visits: Tensor
    """Number of rewards seen for each state and action ``[trials, states, actions]``."""
    paid: Tensor
    """Sum of the rewards of each state and action, of the same shape."""
    values: Tensor
    """Action values of the most recently drawn table ``[trials, horizon, states, actions]``."""


def draw_table(memory: Memory, seed: Tensor, prior_mean: float) -> tuple[Tensor, Tensor]:
    """Draw transitions and mean rewards from the posterior, by one integer per trial."""
    trials, states, actions = memory.visits.shape
    needed = states * actions * states * LARGEST_SUM
    numbers = uniform(seed, (needed + 2 * states * actions,))
    weights = gamma(1 + memory.moves, numbers[:, :needed].view(*memory.moves.shape, LARGEST_SUM))
    radius, angle = numbers[:, needed:].view(trials, 2, states, actions).unbind(1)
    normal = (-2 * radius.log()).sqrt() * (2 * torch.pi * angle).cos()
    precision = 1 + memory.visits
    return weights / weights.sum(-1, keepdim=True), (prior_mean + memory.paid) / precision + normal / precision.sqrt()


def psrl(spec: Spec, prior_mean: float = 0.0) -> Algorithm:
    """Posterior sampling.

    Args:
        spec: that of ``task=mdp``.
        prior_mean: prior mean of the mean rewards.
    """
    horizon, actions = environment_of(spec, "psrl", "mdp").horizon, spec.target.outputs

    def remember(memory: Memory, now: Seen) -> Memory:
        """Return ``memory`` updated with what the last action led to; ``now`` holds one step without its axis."""
        used = memory.state[:, :, None] * now.action[:, None, :]
        # After the end of an episode comes the start of the next, not the state that the action led to.
        followed = now.observation * (1 - now.done)
        return memory._replace(
            state=now.observation,
            moves=memory.moves + used[..., None] * followed[:, None, None, :],
            visits=memory.visits + used,
            paid=memory.paid + used * now.reward[..., None],
        )

    def policy(seen: Seen) -> tuple[Tensor, Memory]:
        trials, states = seen.observation.shape[1:]
        memory: Memory | None = seen.carry
        outputs = []
        for moment in zip(*seen[:5], strict=True):
            now = Seen(*moment)
            if memory is None:
                empty = now.observation.new_zeros(trials, states, actions, states)
                counts = empty[..., 0]
                memory = Memory(0, torch.zeros_like(now.observation), empty, counts, counts, counts[:, None])
            memory = remember(memory, now)
            if memory.time % horizon == 0:
                memory = memory._replace(values=action_values(*draw_table(memory, now.seed, prior_mean), horizon))
            values = (memory.values[:, memory.time % horizon] * now.observation[..., None]).sum(1)
            outputs.append(1e6 * one_hot(values.argmax(-1), actions, values))
            memory = memory._replace(time=memory.time + 1)
        assert memory is not None
        return torch.stack(outputs), memory

    return fixed_policy(policy, "https://arxiv.org/abs/1306.0940")
