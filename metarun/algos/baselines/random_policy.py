"""Actions at random: what any policy must beat.

Discrete actions are equally likely; continuous ones are normal with mean 0 and the spread of the largest one.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from metarun.contracts import Algorithm, Control, Loss, Seen, Spec, Tree
from metarun.errors import require


def environment_of(spec: Spec, algorithm: str, environment: str | None = None) -> Control:
    """The environment of ``spec``, refused if it is not the one that ``algorithm`` is for."""
    needed = f"task={environment}" if environment else "a task with actions"
    fits = spec.control is not None and environment in (None, spec.control.environment)
    require(fits, f"{algorithm} is a policy for {needed}")
    assert spec.control is not None
    return spec.control


def fixed_policy(policy: Callable[[Seen], Any], paper: str = "") -> Algorithm:
    """A policy that learns nothing but what it sees in a trial."""

    def init(model: nn.Module, generator: torch.Generator) -> Tree:
        return {"carried": {}}

    def adapt(theta: Tree, support: Tree, loss: Loss) -> Iterator[Tree]:
        yield {}

    def predict(theta: Tree, state: Tree, x: Seen) -> Any:
        return policy(x)

    return Algorithm(
        init,
        adapt,
        predict,
        family="baseline",
        kinds=("control",),
        paper=paper,
        meta_learns=False,
        adapted_parameters=lambda theta: 0,
    )


def random_policy(model: nn.Module, spec: Spec) -> Algorithm:
    """Uniform or standard normal actions.

    Args:
        model: not used.
        spec: of a control task.
    """
    control = environment_of(spec, "random")

    def policy(seen: Seen) -> Tensor:
        return seen.action.new_zeros(*seen.action.shape[:2], spec.outputs * (2 if control.continuous else 1))

    return fixed_policy(policy)
