"""How the tasks of a family are scored."""

from typing import cast

from torch import Tensor

from metarun.contracts import Family, Loss, Predict, RowTarget, Scores, Tree


def loss_of(family: Family) -> Loss:
    """The family's own loss, or else its target's on ``predict(data["x"])``."""
    own: Loss | None = getattr(family, "loss", None)
    if own is not None:
        return own
    target = cast(RowTarget, family.spec.target)

    def loss(predict: Predict, data: Tree) -> tuple[Tensor, Scores]:
        output = predict(data["x"])
        return target.loss(output, data), target.scores(output, data)

    return loss


def scores_in_test(family: Family, predict: Predict, data: Tree) -> Scores:
    """Scores that the family gives in tests alone; none where it has no such method."""
    own = getattr(family, "scores", None)
    return own(predict, data) if own is not None else {}
