"""RL²: fast reinforcement learning via slow reinforcement learning.

Duan et al. 2016, https://arxiv.org/abs/1611.02779 (§2.2): a recurrent policy sees observation, previous action,
reward and end of episode. Its hidden state persists through the episodes of a trial and is reset between trials. The
policy gradient of the trial's reward teaches the policy to explore and to use what it found. Adaptation happens in the
hidden state: there is no support set, and the test score is that of a whole trial, exploration included.

Where we deviate: the authors train with TRPO, which ``train.optimizer=trpo`` selects; by default Adam minimises the
surrogate of `metarun.tasks.control` like any other loss. Their memory is a gated unit of 256 (``model=gru_policy``,
here of 64). The default here is a memory of outer products, which learns tables much sooner, though not bandits of a
hundred pulls.

Expected: 6.59 ± 0.07 (``metarun algo=rl2 task=bandit``), 151.0 ± 1.7 after 200 of 400 meta-steps (``task=mdp``). With
``task.hindsight=true``, which the paper does not have: 6.66 ± 0.06, 154.9 ± 1.8, and 76.0 ± 1.2 (``metarun
experiment=rl2_bandit_100``).
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn

from metarun.contracts import Algorithm, Loss, Seen, Tree
from metarun.errors import require
from metarun.nn.functional import forward_of, parameters_of


def rl2(model: nn.Module) -> Algorithm:
    """A recurrent policy trained across trials.

    Args:
        model: a policy with a memory, whose size is its attribute ``memory``.
    """
    memory = getattr(model, "memory", None)
    require(isinstance(memory, int), "rl2 needs a policy with a memory; choose model=fast_weights_policy")
    forward = forward_of(model)

    def init(generator: torch.Generator) -> Tree:
        return {"weights": parameters_of(model)}

    def adapt(theta: Tree, support: Tree, loss: Loss) -> Iterator[Tree]:
        yield {}

    def predict(theta: Tree, state: Tree, x: Seen) -> Any:
        return forward(theta["weights"], x)

    return Algorithm(
        init,
        adapt,
        predict,
        approach="dependent",
        needs="policy",
        paper="https://arxiv.org/abs/1611.02779",
        adapted_parameters=lambda theta: cast(int, memory),
    )
