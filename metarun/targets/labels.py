"""Labels: classes whose meaning is the same in every task, such as ill and healthy."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from metarun.contracts import Scores, Tree
from metarun.data.portable import portable
from metarun.errors import require
from metarun.targets.certainty import (
    CALIBRATION_ERROR,
    LOG_LOSS,
    MACRO_F1,
    calibration_error,
    confusion,
    macro_f1,
)
from metarun.targets.classes import ACCURACY, Classes, own_classes
from metarun.targets.ranking import AUROC, PRECISION_GAIN, auroc, average_precision, base_rate
from metarun.targets.weights import mean_over, weight_of


@portable
@dataclass(frozen=True)
class Labels(Classes):
    """Targets ``y [examples, classes]`` that are one-hot classes, where class j means the same in every task.

    A learner may therefore know a class before it has seen a support set. Of two classes, the second one is the
    positive, and the area under the ROC curve comes first, since it does not depend on how frequent positives are.
    """

    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(len(self.names) == self.ways, f"names must name {self.ways} classes, not {len(self.names)}")

    @classmethod
    def of(cls, names: tuple[str, ...]) -> "Labels":
        """Return the target for classes of these names."""
        first = (AUROC, ACCURACY, PRECISION_GAIN) if len(names) == 2 else (ACCURACY, MACRO_F1)
        return cls(len(names), (*first, LOG_LOSS, CALIBRATION_ERROR), names=names)

    def scores(self, output: Tensor, data: Tree) -> Scores:
        """Return the accuracy, and for two classes the AUROC: what is computed in every meta-step."""
        found = super().scores(output, data)
        if self.ways > 2:
            return found
        return {AUROC.name: auroc(self.margin(output), data["y"][:, 1], weight_of(data)), **found}

    def further(self, output: Tensor, data: Tree) -> Scores:
        """Return the other metrics, which only tests need.

        The likelihood of an output that is not finite is not a number, and to calibration such an output is a certain
        error.
        """
        output, weight = own_classes(output.detach(), data), weight_of(data)
        sound = output.isfinite().all(-1, keepdim=True)
        probability = torch.where(sound, output.softmax(-1), 1 - data["y"])
        nats = cross_entropy(output, data["y"], reduction="none")
        found = {
            LOG_LOSS.name: mean_over(nats, data),
            CALIBRATION_ERROR.name: calibration_error(probability, data["y"], weight),
        }
        if self.ways > 2:
            return {MACRO_F1.name: macro_f1(self.confusion(output, data)), **found}
        positive = data["y"][:, 1]
        gain = average_precision(self.margin(output), positive, weight) - base_rate(positive, weight)
        return {PRECISION_GAIN.name: gain, **found}

    def margin(self, output: Tensor) -> Tensor:
        """Return the log odds of the second of two classes ``[examples]``; an output that is not finite ranks last."""
        odds = (output[:, 1] - output[:, 0]).detach()
        return torch.where(odds.isfinite(), odds, -torch.inf)

    def confusion(self, output: Tensor, data: Tree) -> Tensor:
        """Return the number of examples of each class that each class was chosen for ``[classes, classes]``.

        An output that is not finite chooses none.
        """
        output = own_classes(output, data)
        chosen = torch.where(output.isfinite().all(-1), output.argmax(-1), -1)
        return confusion(chosen, data["y"], weight_of(data))
