"""Curves of several kinds: a family whose tasks need different operations.

A task is one of

    sine      a sin(4 x − φ)           a period shorter than the range of x
    step      a tanh(8 (x − c))        two levels with a sharp rise
    corner    a |x − c|                two straight pieces

with a uniform on [0.5, 2], of either sign, φ on [0, 2π], c on [−1, 1] and x on [−2, 2]. All splits draw from the same
distribution, each from draws of its own. ``spec.groups`` names the kinds, and the data carry each task's.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from metarun.errors import require
from metarun.tasks.supervised import regression_loss
from metarun.types import Predict, Spec, Split, Task, Tree

CURVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sine": lambda x, place: torch.sin(4 * x - math.pi * (place + 1)),
    "step": lambda x, place: torch.tanh(8 * (x - place)),
    "corner": lambda x, place: (x - place).abs(),
}
"""(x, a number in [−1, 1] that places the curve) → y, before its factor."""


class Curves:
    """Sines, steps and corners; ``x`` and ``y`` have shape ``[points, 1]``.

    Args:
        shots: support points, at least 1.
        queries: points that score a validation or test task, at least 1.
        kinds: of curves, equally likely: some of sine, step, corner.
        device: where the tasks are put.
        data_dir: not used; every family is given it.
    """

    def __init__(
        self,
        shots: int = 20,
        queries: int = 100,
        kinds: Sequence[str] = tuple(CURVES),
        device: str = "cpu",
        data_dir: str = "data",
    ) -> None:
        for name, size in {"shots": shots, "queries": queries}.items():
            require(size >= 1, f"{name} must be at least 1, not {size}")
        known = len(kinds) > 0 and all(kind in CURVES for kind in kinds)
        require(known, f"kinds must be some of {', '.join(CURVES)}, not {list(kinds)}")
        self.curves = [CURVES[kind] for kind in kinds]
        self.device = device
        self.dataset = "curves" if tuple(kinds) == tuple(CURVES) else f"curves:{'+'.join(kinds)}"
        self.spec = Spec(
            kind="regression",
            input_shape=(1,),
            outputs=1,
            metric="mse",
            higher_is_better=False,
            shots=shots,
            queries=queries,
            groups=tuple(kinds),
        )

    def sample(self, split: Split, count: int, generator: torch.Generator) -> Task:
        """``count`` curves; ``x`` and ``y`` are ``[count, points, 1]``, ``group`` is ``[count, points]``."""
        shots = self.spec.shots
        points = shots + (shots if split == "train" else self.spec.queries)
        group = torch.randint(len(self.curves), (count, 1), generator=generator)
        size, place, sign = torch.rand(3, count, 1, 1, generator=generator)
        x = 4 * torch.rand(count, points, 1, generator=generator) - 2
        each = torch.stack([curve(x, 2 * place - 1) for curve in self.curves])
        factor = (0.5 + 1.5 * size) * torch.where(sign < 0.5, -1.0, 1.0)
        y = factor * each[group[:, 0], torch.arange(count)]
        data = {"x": x, "y": y, "group": group.expand(count, points)}
        data = {name: value.to(self.device) for name, value in data.items()}
        support = {name: value[:, :shots] for name, value in data.items()}
        return Task(support, {name: value[:, shots:] for name, value in data.items()})

    def loss(self, predict: Predict, data: Tree) -> tuple[Tensor, Tensor]:
        """Mean squared error of one task."""
        return regression_loss(predict, data)
