"""A point in the plane moves to a goal that it does not see.

Finn, Abbeel, Levine 2017 (https://arxiv.org/abs/1703.03400, §5.3, and https://github.com/cbfinn/maml_rl): the point
starts at the origin, observes its position, moves at most 0.1 per step in each direction, and is rewarded with
minus its distance from the goal. An episode ends within 0.01 of the goal in both directions, or at the horizon.
Actions are in units of the largest move, as in the authors' normalised environment.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from metarun.contracts import Moments, Predict, Scores, Seen, Sizes, Spec, Split, Task, Tree
from metarun.random import normal
from metarun.targets.actions import RETURN, Actions
from metarun.targets.metric import Metric
from metarun.tasks import control

LARGEST_MOVE, REACHED = 0.1, 0.01
SQUARE, RADIUS = 0.5, 1.0

MEAN_ACTIONS = Metric("return of mean actions", higher_is_better=True)


class Walk:
    """The environment; a state is a position ``[episodes, 2]``."""

    continuous = True

    def initial(self, data: Tree) -> Tensor:
        """The origin."""
        return torch.zeros_like(data["goal"])

    def observe(self, state: Tensor) -> Tensor:
        """The position."""
        return state

    def step(self, data: Tree, time: int, state: Tensor, action: Tensor) -> control.Outcome:
        """Move, then measure the distance."""
        state = state + LARGEST_MOVE * action.clamp(-1, 1)
        away = state - data["goal"]
        over = (away.abs() < REACHED).all(-1)
        reward = -away.norm(dim=-1)
        return control.Outcome(state, reward, reward, torch.zeros_like(reward), over)


def straight_to_the_goal(data: Tree) -> Callable[[Seen], Tensor]:
    """Return the best policy of one task, almost without noise."""

    def policy(seen: Seen) -> Tensor:
        move = ((data["goal"] - seen.observation) / LARGEST_MOVE).clamp(-1, 1)
        return torch.cat([move, torch.full_like(move, -6.0)], -1)

    return policy


class Navigation(control.ControlFamily):
    """Goals anywhere in a square around the start, or on a half circle, scored by the return of an episode.

    Args:
        goals: ``square`` (±0.5 in both directions) or ``circle`` (radius 1, upper half).
        horizon: largest number of steps of an episode, at least 1.
        shots: number of episodes per adaptation step, at least 2.
        queries: number of episodes that score a task, at least 2.
        train_queries: number of query episodes of a training task; null: ``queries``.
        discount: discount factor of rewards, above 0 and at most 1; for advantages, never for scores.
        trace: λ of generalised advantage estimation, from 0 to 1.
        fresh_tapes: whether every adaptation step collects new episodes; otherwise all steps share the first tape.
        device: where the tasks are put.
        data_dir: not used; every family receives it.
    """

    def __init__(
        self,
        goals: Literal["square", "circle"] = "square",
        horizon: int = 100,
        shots: int = 20,
        queries: int = 20,
        train_queries: int | None = None,
        discount: float = 0.99,
        trace: float = 1.0,
        fresh_tapes: bool = True,
        device: str = "cpu",
        data_dir: str = "data",
    ) -> None:
        learning = control.Learning(discount, trace)
        control.check(shots, queries, train_queries, learning, horizon=(horizon, 1))
        # Rewards are not random, so there is no hindsight.
        super().__init__(learning, queries, train_queries, fresh_tapes, False, device)
        self.goals, self.horizon = goals, horizon
        self.environment = Walk()
        self.dataset = self.named(f"navigation:{goals}:horizon={horizon}")
        self.spec = Spec(
            Moments(2, "navigation", horizon, optimal=straight_to_the_goal),
            Actions(2, continuous=True),
            Sizes(shots, queries),
            metrics=(RETURN, MEAN_ACTIONS),
        )

    def sample(self, split: Split, count: int, generator: torch.Generator) -> Task:
        """Draw ``count`` goals with episodes; leaves ``[count, episodes, ...]``."""
        if self.goals == "square":
            goal = (2 * torch.rand(count, 1, 2, generator=generator) - 1) * SQUARE
        else:
            angle = math.pi * torch.rand(count, 1, generator=generator)
            goal = RADIUS * torch.stack([angle.cos(), angle.sin()], -1)

        return self.tasks(split, {"goal": goal}, generator)

    def tape(self, seed: Tensor) -> Tree:
        """Draw normal ``noise [..., horizon, 2]`` for actions."""
        return {"noise": normal(seed, (self.horizon, 2))}

    def scores(self, predict: Predict, data: Tree) -> Scores:
        """Score the policy that always takes its mean action by its return."""
        # Without noise all episodes are the same.
        quiet = {name: leaf[:1] for name, leaf in data.items()} | {"noise": torch.zeros_like(data["noise"][:1])}
        return {MEAN_ACTIONS.name: control.total_return(control.rollout(self.environment, predict, quiet))}

    def paths(self, predict: Predict, data: Tree) -> Tree:
        """Return where the policy walks, and the goal of the task."""
        walk = control.rollout(self.environment, predict, data)
        path = torch.where(walk.counts[..., None] > 0, walk.seen.observation, torch.nan)
        return {"path": path.transpose(0, 1), "goal": data["goal"][0]}
