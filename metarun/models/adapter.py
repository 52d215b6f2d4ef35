"""A learned correction of vectors that are good features already."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from metarun.contracts import Numbers, Spec
from metarun.errors import require
from metarun.nn.ops import unit_rows

Norm = Literal["none", "batch"]


class Residual(nn.Module):
    """Vectors, scaled to length one, plus a learned residual.

        z = x / ‖x‖, or with ``norm="batch"`` first x ← (x − m) / √(v + 1)
        features = scale · (z + V relu(U z) / width),   V = 0 at the start

    Before training the features are the vectors themselves, so that a nearest class mean by cosine starts where that of
    the frozen model does. m and v are means and variances over the examples of a task. The 1 is the variance of
    standardised vectors, so that numbers which hardly vary within the task stay small.
    """

    def __init__(self, numbers: int, width: int, scale: float, norm: Norm) -> None:
        super().__init__()
        self.norm: nn.Module = nn.Identity()
        if norm == "batch":
            self.norm = nn.BatchNorm1d(numbers, eps=1.0, affine=False, track_running_stats=False)
        self.into = nn.Linear(numbers, width)
        # Of unit vectors, whose numbers are small: hidden numbers of size one.
        nn.init.normal_(self.into.weight)
        nn.init.zeros_(self.into.bias)
        self.out = nn.Linear(width, numbers)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))

    def forward(self, x: Tensor) -> Tensor:
        """``[examples, numbers]`` → the same shape."""
        z = unit_rows(self.norm(x))
        # A step of Adam changes each weight by the learning rate; divided by the width, unit vectors change by little.
        residual = self.out(self.into(z).relu()) / self.into.out_features
        out: Tensor = self.log_scale.exp() * (z + residual)
        return out


class Adapter(nn.Module):
    """Vectors with a learned residual, then a linear head.

    Args:
        spec: that of a task whose inputs are vectors.
        width: width of the residual's hidden layer, at least 1.
        scale: initial length of the features, above 0; learned.
        norm: ``batch`` standardises vectors by those of the same task, queries included (transductive): for tasks that
            lie far from what the vectors were standardised by, such as pictures of another kind.
    """

    def __init__(self, spec: Spec, width: int = 128, scale: float = 4.0, norm: Norm = "none") -> None:
        super().__init__()
        shape = spec.inputs.shape
        require(
            isinstance(spec.inputs, Numbers) and len(shape) == 1,
            "adapter needs vectors; set task.embed, or choose another model",
        )
        require(width >= 1, f"width must be at least 1, not {width}")
        require(scale > 0, f"scale must be above 0, not {scale}")
        self.trunk = Residual(shape[0], width, scale, norm)
        self.head = nn.Linear(shape[0], spec.target.outputs)

    def forward(self, x: Tensor) -> Tensor:
        """``[examples, numbers]`` → ``[examples, outputs]``."""
        out: Tensor = self.head(self.trunk(x))
        return out
