"""Means over the examples of a task that leave padding out."""

from torch import Tensor

from metarun.contracts import Tree


def weight_of(data: Tree) -> Tensor:
    """The weight of each example ``[examples]``, all 1 where the data have none."""
    weight: Tensor = data["weight"] if "weight" in data else data["y"].new_ones(len(data["y"]))
    return weight


def mean_over(values: Tensor, data: Tree) -> Tensor:
    """Mean of ``values [examples]``, each by its weight in ``data``."""
    if "weight" not in data:
        return values.mean()
    weight: Tensor = data["weight"]
    # Padding may hold anything, infinity included, which a product with 0 would keep.
    return values.masked_fill(weight == 0, 0.0) @ weight / weight.sum()
