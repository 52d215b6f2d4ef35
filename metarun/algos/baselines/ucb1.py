"""Upper confidence bounds for Bernoulli bandits.

Auer, Cesa-Bianchi, Fischer 2002, https://doi.org/10.1023/A:1013689704352, in the form that reproduces the column
"UCB1" of Duan et al. 2016, RL² (https://arxiv.org/abs/1611.02779, table 1):

    pull the arm with the largest (1 + S) / (2 + C) + √(2 c ln t / (C + 2))

after S successes in C pulls of an arm, at the t-th pull; ties are broken at random. c is ``exploration``: 1 is the
textbook value, 0.05 is tuned for short trials, 0 is greedy (``algo=greedy``).

Expected: 6.60 ± 0.06 and 78.4 ± 0.5 (``metarun algo=ucb1 task=bandit task.pulls=10 eval.episodes=4000``, 100); the
table has 6.7 and 78.0.
"""

from typing import NamedTuple

from torch import Tensor

from metarun.algos.baselines.random_policy import environment_of, fixed_policy
from metarun.contracts import Algorithm, Seen, Spec
from metarun.errors import require


class ArmCounts(NamedTuple):
    """What a player of a bandit remembers, leaves ``[episodes, arms]``."""

    successes: Tensor
    pulls: Tensor


def arm_counts(seen: Seen) -> tuple[ArmCounts, ArmCounts]:
    """Return the counts before each step, leaves ``[steps, episodes, arms]``, and the final counts to carry on."""
    successes, pulls = (seen.action * seen.reward).cumsum(0), seen.action.cumsum(0)
    if seen.carry is not None:
        successes, pulls = successes + seen.carry.successes, pulls + seen.carry.pulls
    return ArmCounts(successes, pulls), ArmCounts(successes[-1], pulls[-1])


def ucb1(spec: Spec, exploration: float = 0.05) -> Algorithm:
    """UCB1 with means shrunk towards one half.

    Args:
        spec: that of a bandit.
        exploration: c, at least 0.
    """
    environment_of(spec, "ucb1", "bandit")
    require(exploration >= 0, f"exploration must be at least 0, not {exploration}")

    def policy(seen: Seen) -> tuple[Tensor, ArmCounts]:
        (successes, pulls), carry = arm_counts(seen)
        log_time = (pulls.sum(-1, keepdim=True) + 1).log()
        index = (1 + successes) / (2 + pulls) + (2 * exploration * log_time / (pulls + 2)).sqrt()
        # All arms but the best get a logit so low that sampling never picks them.
        return -1e6 * (index < index.amax(-1, keepdim=True)).to(index.dtype), carry

    return fixed_policy(policy, "https://doi.org/10.1023/A:1013689704352")
