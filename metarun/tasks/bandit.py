"""Bernoulli bandits with unknown arms.

Duan et al. 2016, RL² (https://arxiv.org/abs/1611.02779, §3.1): each arm pays 1 with its
own probability, uniform on [0, 1]. A trial is a number of pulls, and the score is the sum of their rewards.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from metarun.contracts import Moments, Seen, Sizes, Spec, Split, Task, Tree
from metarun.nn.ops import one_hot
from metarun.random import fold, uniform
from metarun.targets.actions import RETURN, Actions
from metarun.tasks import control


class Arms:
    """The environment, which has no state: every observation is a constant."""

    continuous = False

    def initial(self, data: Tree) -> Tensor:
        """Return a constant ``[episodes, 1]``."""
        return torch.ones_like(data["payout"][:, :1])

    def observe(self, state: Tensor) -> Tensor:
        """The constant."""
        return state

    def step(self, data: Tree, time: int, state: Tensor, action: Tensor) -> control.Outcome:
        """Pull an arm; every pull ends an episode."""
        expected = (action * data["payout"]).sum(-1)
        paid = data["luck"][:, time] < expected
        never = torch.zeros_like(paid)
        return control.Outcome(state, paid.to(action.dtype), expected, torch.ones_like(expected), never)


def best_arm(data: Tree) -> Callable[[Seen], Tensor]:
    """Return the policy that knows which arm pays best."""

    def policy(seen: Seen) -> Tensor:
        best = one_hot(data["payout"].argmax(-1), data["payout"].shape[-1], seen.action)
        return (1e6 * best).expand_as(seen.action)

    return policy


class Bandit(control.ControlFamily):
    """Bernoulli bandits; a trial has ``pulls`` steps.

    Args:
        arms: number of arms, at least 2.
        pulls: number of steps of a trial, at least 1.
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
        arms: int = 5,
        pulls: int = 10,
        shots: int = 20,
        queries: int = 20,
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
        learning = control.Learning(discount, trace, entropy, normalise)
        control.check(shots, queries, train_queries, learning, arms=(arms, 2), pulls=(pulls, 1))
        super().__init__(learning, queries, train_queries, fresh_tapes, hindsight, device)
        self.arms, self.pulls = arms, pulls
        self.environment = Arms()
        self.dataset = self.named(f"bandit:arms={arms}:pulls={pulls}")
        self.spec = Spec(
            Moments(1, "bandit", 1, pulls, best_arm),
            Actions(arms, continuous=False),
            Sizes(shots, queries),
            metrics=(RETURN,),
        )

    def sample(self, split: Split, count: int, generator: torch.Generator) -> Task:
        """Draw ``count`` bandits with trials; leaves ``[count, trials, ...]``."""
        return self.tasks(split, {"payout": torch.rand(count, 1, self.arms, generator=generator)}, generator)

    def tape(self, seed: Tensor) -> Tree:
        """Draw Gumbel ``noise [..., pulls, arms]`` for actions, and ``luck [..., pulls]``, which decides rewards."""
        return {
            "noise": control.gumbel(fold(seed, 0), (self.pulls, self.arms)),
            "luck": uniform(fold(seed, 1), (self.pulls,)),
        }
