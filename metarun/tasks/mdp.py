"""Tabular Markov decision processes with unknown transitions and rewards.

Duan et al. 2016, RL² (https://arxiv.org/abs/1611.02779, §3.2), after Osband et al. 2013: transitions from a flat
Dirichlet distribution, mean rewards normal with mean 1 and unit variance, unit noise on every reward. Each
episode starts in state 0; a trial is a number of episodes, and the score is the sum of its rewards.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from metarun.contracts import Moments, Seen, Sizes, Spec, Split, Task, Tree
from metarun.nn.ops import one_hot
from metarun.nn.planning import action_values
from metarun.random import fold, normal, uniform
from metarun.targets.actions import RETURN, Actions
from metarun.tasks import control


class Table:
    """The environment; a state is one-hot ``[trials, states]``.

    Args:
        horizon: number of steps of an episode.
    """

    continuous = False

    def __init__(self, horizon: int) -> None:
        self.horizon = horizon

    def initial(self, data: Tree) -> Tensor:
        """State 0."""
        start = torch.zeros_like(data["rewards"][:, :, 0])
        start[:, 0] = 1
        return start

    def observe(self, state: Tensor) -> Tensor:
        """The state."""
        return state

    def step(self, data: Tree, time: int, state: Tensor, action: Tensor) -> control.Outcome:
        """Draw the next state and the reward; after ``horizon`` steps go back to state 0."""
        chosen = state[:, :, None] * action[:, None, :]
        expected = (chosen * data["rewards"]).sum((1, 2))
        reward = expected + data["reward_noise"][:, time]
        chances = (chosen[..., None] * data["transitions"]).sum((1, 2))
        # The first state whose cumulative probability exceeds a uniform number.
        following = (chances.cumsum(-1) < data["luck"][:, time, None]).sum(-1)
        state = one_hot(following.clamp_max(chances.shape[-1] - 1), chances.shape[-1], action)
        never = torch.zeros_like(reward, dtype=torch.bool)
        if (time + 1) % self.horizon:
            return control.Outcome(state, reward, expected, torch.zeros_like(reward), never)
        return control.Outcome(self.initial(data), reward, expected, torch.ones_like(reward), never)


class MDP(control.ControlFamily):
    """Random tables; a trial has ``episodes`` episodes of ``horizon`` steps.

    Args:
        states: number of states, at least 2.
        actions: number of actions, at least 2.
        episodes: number of episodes of a trial, at least 1.
        horizon: number of steps of an episode, at least 1.
        shots: number of trials per adaptation step, at least 2.
        queries: number of trials that score a task, at least 2.
        train_queries: number of query trials of a training task; null: ``queries``.
        discount: discount factor of rewards, above 0 and at most 1; for advantages, never for scores.
        trace: λ of generalised advantage estimation, from 0 to 1.
        entropy: weight of the policy's entropy in the loss, at least 0.
        normalise: whether advantages are scaled to variance 1 within a task.
        fresh_tapes: whether every adaptation step collects new trials; otherwise all steps share the first tape.
        hindsight: whether training queries are credited with expected rewards, which no learner of the papers knows.
        device: where the tasks are put.
        data_dir: not used; every family receives it.
    """

    def __init__(
        self,
        states: int = 10,
        actions: int = 5,
        episodes: int = 10,
        horizon: int = 10,
        shots: int = 4,
        queries: int = 4,
        train_queries: int | None = None,
        discount: float = 0.99,
        trace: float = 1.0,
        entropy: float = 0.0,
        normalise: bool = True,
        fresh_tapes: bool = True,
        hindsight: bool = False,
        device: str = "cpu",
        data_dir: str = "data",
    ) -> None:
        sizes = {"states": (states, 2), "actions": (actions, 2), "episodes": (episodes, 1), "horizon": (horizon, 1)}
        learning = control.Learning(discount, trace, entropy, normalise)
        control.check(shots, queries, train_queries, learning, **sizes)
        super().__init__(learning, queries, train_queries, fresh_tapes, hindsight, device)
        self.states, self.actions, self.steps = states, actions, episodes * horizon
        self.environment = Table(horizon)
        self.dataset = self.named(f"mdp:states={states}:actions={actions}:episodes={episodes}:horizon={horizon}")

        def optimal(data: Tree) -> Callable[[Seen], tuple[Tensor, int]]:
            values = action_values(data["transitions"][0], data["rewards"][0], horizon)

            def policy(seen: Seen) -> tuple[Tensor, int]:
                begin = seen.carry or 0
                times = [(begin + step) % horizon for step in range(len(seen.observation))]
                now = torch.einsum("tes,tsa->tea", seen.observation, torch.stack([values[time] for time in times]))
                return 1e6 * one_hot(now.argmax(-1), actions, now), times[-1] + 1

            return policy

        self.spec = Spec(
            Moments(states, "mdp", horizon, episodes, optimal),
            Actions(actions, continuous=False),
            Sizes(shots, queries),
            metrics=(RETURN,),
        )

    def sample(self, split: Split, count: int, generator: torch.Generator) -> Task:
        """Draw ``count`` tables with trials; leaves ``[count, trials, ...]``."""
        states, actions = self.states, self.actions
        # A draw from a flat Dirichlet is a set of exponential numbers divided by their sum.
        weights = -torch.rand(count, 1, states, actions, states, generator=generator).clamp_min(1e-12).log()
        transitions = weights / weights.sum(-1, keepdim=True)
        rewards = 1 + torch.randn(count, 1, states, actions, generator=generator)

        return self.tasks(split, {"transitions": transitions, "rewards": rewards}, generator)

    def tape(self, seed: Tensor) -> Tree:
        """Draw for every step Gumbel ``noise`` for actions, uniform ``luck`` for transitions, normal ``reward_noise``,
        and a ``seed`` for policies that draw more than their action."""
        return {
            "noise": control.gumbel(fold(seed, 0), (self.steps, self.actions)),
            "luck": uniform(fold(seed, 1), (self.steps,)),
            "reward_noise": normal(fold(seed, 2), (self.steps,)),
            "seed": fold(fold(seed, 3)[..., None], torch.arange(self.steps, device=seed.device)) & (2**62 - 1),
        }
