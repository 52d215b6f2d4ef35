"""Classes: cross-entropy and accuracy."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from metarun.contracts import Need, Rows, Scores, Tree
from metarun.data.portable import portable
from metarun.targets.metric import Metric
from metarun.targets.weights import mean_over

NO_CHANCE = -1e9
"""The logit of a class that a task lacks: its probability is 0 to the bit, and its gradient too."""


def own_classes(output: Tensor, data: Tree) -> Tensor:
    """Return the logits ``output [examples, ways]`` without chances for the classes that the task lacks.

    Tasks with fewer classes than the largest one say in ``ways [examples, ways]`` which they have.
    """
    return output.masked_fill(data["ways"] == 0, NO_CHANCE) if "ways" in data else output


def chosen_classes(output: Tensor, data: Tree) -> Tensor:
    """Return which class each example is of, and which was chosen for it ``[examples, 2]``; −1 for padding.

    Classes are numbered as in ``identity [examples]``, whatever their columns in this task are. The data hold an
    example of each class of the task.
    """
    y, identity = data["y"], data["identity"]
    of_column = torch.where(y > 0, identity[:, None], -1).amax(0)
    chosen = of_column[own_classes(output, data).nan_to_num().argmax(-1)]
    both = torch.stack([identity, chosen], -1)
    return both if "weight" not in data else torch.where(data["weight"][:, None] > 0, both, -1)


ACCURACY = Metric("accuracy", higher_is_better=True, percent=True)


@portable
@dataclass(frozen=True)
class Classes:
    """Targets ``y [examples, ways]`` that are one-hot classes."""

    ways: int
    metrics: tuple[Metric, ...] = (ACCURACY,)
    offers: tuple[Need, ...] = ("loss", "examples", "rows", "classes", "targets", "labels")

    @property
    def outputs(self) -> int:
        """The number of logits, one per class."""
        return self.ways

    def loss(self, output: Tensor, data: Tree) -> Tensor:
        """Return the mean cross-entropy in nats."""
        return mean_over(-(data["y"] * log_softmax(own_classes(output, data), -1)).sum(-1), data)

    def scores(self, output: Tensor, data: Tree) -> Scores:
        """Return the accuracy, a fraction; an output that is not finite counts as wrong."""
        output = own_classes(output, data)
        correct = (output.argmax(-1) == data["y"].argmax(-1)) & output.isfinite().all(-1)
        return {ACCURACY.name: mean_over(correct.to(output.dtype), data)}

    def rows(self, z: Tensor, data: Tree) -> Rows:
        """Return a row per example."""
        return Rows(z, data["y"], data.get("weight"))
