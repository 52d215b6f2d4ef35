"""Actions at random: what any policy must beat.

Discrete actions are equally likely; continuous ones are normal with mean 0 and the spread of the largest one.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from metarun.contracts import Algorithm, Loss, Moments, Seen, Spec, Tree
from metarun.errors import require


def environment_of(spec: Spec, algorithm: str, environment: str | None = None) -> Moments:
    """Return the environment of ``spec``; raise an error if it is not the one that ``algorithm`` is for."""
    needed = f"task={environment}" if environment else "a task with actions"
    inputs = spec.inputs
    fits = isinstance(inputs, Moments) and environment in (None, inputs.environment)
    require(fits, f"{algorithm} is a policy for {needed}")
    assert isinstance(inputs, Moments)
    return inputs


def fixed_policy(policy: Callable[[Seen], Any], paper: str = "") -> Algorithm:
    """Wrap ``policy``, which has nothing to learn except within a trial, as an algorithm."""

    def init(generator: torch.Generator) -> Tree:
        return {"carried": {}}

    def adapt(theta: Tree, support: Tree, loss: Loss) -> Iterator[Tree]:
        yield {}

    def predict(theta: Tree, state: Tree, x: Seen) -> Any:
        return policy(x)

    return Algorithm(
        init,
        adapt,
        predict,
        approach="baseline",
        needs="policy",
        paper=paper,
        meta_learns=False,
        adapted_parameters=lambda theta: 0,
    )


def random_policy(spec: Spec) -> Algorithm:
    """Uniform or normal actions.

    Args:
        spec: that of a control task.
    """
    environment_of(spec, "random")

    def policy(seen: Seen) -> Tensor:
        return seen.action.new_zeros(*seen.action.shape[:2], spec.target.outputs)

    return fixed_policy(policy)
