"""Bernoulli bandits with unknown arms.

Duan et al. 2016, RL² (https://arxiv.org/abs/1611.02779, §3.1): each arm pays 1 with a probability of its own,
uniform on [0, 1]; a trial is a number of pulls, and the score is the sum of what they pay.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from metarun.functional import one_hot
from metarun.tasks import control
from metarun.types import Control, Predict, Seen, Spec, Split, Task, Tree


class Arms:
    """The environment; it has no state, and shows nothing but a constant."""

    continuous = False

    def initial(self, data: Tree) -> Tensor:
        """A constant ``[episodes, 1]``."""
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
    """The policy that knows which arm pays best."""

    def policy(seen: Seen) -> Tensor:
        best = one_hot(data["payout"].argmax(-1), data["payout"].shape[-1], seen.action)
        return (1e6 * best).expand_as(seen.action)

    return policy


class Bandit:
    """Bernoulli bandits; a trial has ``pulls`` steps.

    Args:
        arms: at least 2.
        pulls: steps of a trial, at least 1.
        shots: trials of an adaptation step, at least 2.
        queries: trials that score a task, at least 2.
        train_queries: those of a training task; null: ``queries``.
        discount: of rewards to come, above 0 and at most 1; for advantages, never for scores.
        trace: λ of generalised advantage estimation, from 0 to 1.
        entropy: weight of the policy's entropy in the loss, at least 0.
        normalise: whether advantages are scaled to variance 1 within a task.
        device: where the tasks are put.
        data_dir: not used; every family is given it.
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
        device: str = "cpu",
        data_dir: str = "data",
    ) -> None:
        self.learning = control.Learning(discount, trace, entropy, normalise)
        control.check(shots, queries, train_queries, self.learning, arms=(arms, 2), pulls=(pulls, 1))
        self.arms, self.pulls, self.device = arms, pulls, device
        self.train_queries = train_queries or queries
        self.environment = Arms()
        self.dataset = f"bandit:arms={arms}:pulls={pulls}"
        self.spec = Spec(
            kind="control",
            input_shape=(1,),
            outputs=arms,
            metric="return",
            higher_is_better=True,
            shots=shots,
            queries=queries,
            control=Control("bandit", False, 1, pulls, best_arm),
        )

    def sample(self, split: Split, count: int, generator: torch.Generator) -> Task:
        """``count`` bandits with tapes; leaves ``[count, trials, ...]``."""
        payout = torch.rand(count, 1, self.arms, generator=generator)

        def part(trials: int) -> Tree:
            tape = {
                "noise": control.gumbel((count, trials, self.pulls, self.arms), generator),
                "luck": torch.rand(count, trials, self.pulls, generator=generator),
            }
            return {name: leaf.to(self.device) for name, leaf in tape.items()} | {
                "payout": payout.expand(-1, trials, -1).to(self.device)
            }

        return control.sampled(part, split, self.spec.shots, self.spec.queries, self.train_queries)

    def loss(self, predict: Predict, data: Tree) -> tuple[Tensor, Tensor]:
        """Surrogate loss and mean total reward of a trial."""
        return control.policy_gradient_loss(self.environment, predict, data, self.learning)
