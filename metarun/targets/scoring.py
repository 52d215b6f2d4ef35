"""How the tasks of a family are scored."""

from typing import cast

from torch import Tensor

from metarun.contracts import Family, Loss, Predict, RowTarget, Scores, Tree
from metarun.nn.padding import weighing


def loss_of(family: Family) -> Loss:
    """Return the family's own loss, or its target's, by default on ``predict(data["x"])``.

    Models leave padding out in all of them.
    """
    own: Loss | None = getattr(family, "loss", None) or getattr(family.spec.target, "task_loss", None)

    def of_target(predict: Predict, data: Tree) -> tuple[Tensor, Scores]:
        target, output = cast(RowTarget, family.spec.target), predict(data["x"])
        return target.loss(output, data), target.scores(output, data)

    def loss(predict: Predict, data: Tree) -> tuple[Tensor, Scores]:
        with weighing(data.get("weight")):
            return (own or of_target)(predict, data)

    return loss


def scores_in_test(family: Family, predict: Predict, data: Tree) -> Scores:
    """Return the scores that the family gives only in tests; empty where it has no such method."""
    own = getattr(family, "scores", None)
    with weighing(data.get("weight")):
        return own(predict, data) if own is not None else {}
