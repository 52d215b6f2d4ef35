"""Functions computed by small networks: a family whose tasks need different operations.

    y = Σ_j v_j g(s (u_j · x + b_j))       v_j normal, of variance 1 / units;   x standard normal

All tasks share the first layer (u, b), which is drawn once from a fixed seed. Each task has its own read-out weights v
and its own operation g: relu or sine (or tanh). With the right operation a model of this size only needs to fit v; with
the same operation for all tasks it must hold features for the others too. The splits are separate draws of v and g from
the same distribution. ``spec.facts.groups`` names the operations, and the data carry each task's.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from metarun.contracts import Facts, Numbers, Sizes, Spec, Split, Task
from metarun.errors import require
from metarun.targets.real import MSE, Real

OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "tanh": torch.tanh, "sine": torch.sin}
TEACHER_SEED = 20201124
"""Seed of the first layer, which all tasks share."""


class Teachers:
    """Networks with one hidden layer; ``x [points, inputs]``, ``y [points, 1]``.

    Args:
        shots: number of support points, at least 1.
        queries: number of points that score a validation or test task, at least 1.
        inputs: number of dimensions of x, at least 1.
        units: number of units of the hidden layer, at least 1.
        scale: s, scale of the hidden units' inputs, above 0; with a small one tanh and sine are alike.
        operations: operations of the tasks, equally likely: some of relu, tanh, sine.
        device: where the tasks are put.
        data_dir: not used; every family receives it.
    """

    def __init__(
        self,
        shots: int = 20,
        queries: int = 100,
        inputs: int = 2,
        units: int = 8,
        scale: float = 1.0,
        operations: Sequence[str] = ("relu", "sine"),
        device: str = "cpu",
        data_dir: str = "data",
    ) -> None:
        for name, size in {"shots": shots, "queries": queries, "inputs": inputs, "units": units}.items():
            require(size >= 1, f"{name} must be at least 1, not {size}")
        require(scale > 0, f"scale must be above 0, not {scale}")
        known = (
            len(operations) > 0
            and len(set(operations)) == len(operations)
            and all(name in OPERATIONS for name in operations)
        )
        require(known, f"operations must be different ones of {', '.join(OPERATIONS)}, not {list(operations)}")
        drawn = torch.randn(units, inputs + 1, generator=torch.Generator().manual_seed(TEACHER_SEED))
        self.scale = scale
        self.first, self.bias = drawn[:, :inputs], drawn[:, inputs]
        self.operations = [OPERATIONS[name] for name in operations]
        self.device = device
        self.dataset = f"teachers:{inputs}-{units}:{scale:g}:{'+'.join(operations)}"
        self.spec = Spec(
            Numbers((inputs,)),
            Real(1),
            Sizes(shots, queries),
            metrics=(MSE,),
            facts=Facts(groups=tuple(operations)),
        )

    def sample(self, split: Split, count: int, generator: torch.Generator) -> Task:
        """Draw ``count`` tasks: ``x [count, points, inputs]``, ``y [count, points, 1]``, ``group [count, points]``."""
        shots, (units, inputs) = self.spec.sizes.shots, self.first.shape
        points = shots + (shots if split == "train" else self.spec.sizes.queries)
        group = torch.randint(len(self.operations), (count, 1), generator=generator)
        read_out = torch.randn(count, units, 1, generator=generator) / units**0.5
        x = torch.randn(count, points, inputs, generator=generator)
        hidden = self.scale * (x @ self.first.T + self.bias)
        of_operation = torch.stack([operation(hidden) for operation in self.operations])
        y = of_operation[group[:, 0], torch.arange(count)] @ read_out
        data = {"x": x, "y": y, "group": group.expand(count, points)}
        data = {name: value.to(self.device) for name, value in data.items()}
        support = {name: value[:, :shots] for name, value in data.items()}
        return Task(support, {name: value[:, shots:] for name, value in data.items()})
