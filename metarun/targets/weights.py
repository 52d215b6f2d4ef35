"""Means over the examples of a task that leave padding out."""

from torch import Tensor

from metarun.contracts import Tree


def weight_of(data: Tree) -> Tensor:
    """Return the weight of each example ``[examples]``, all 1 where the data have none."""
    weight: Tensor = data["weight"] if "weight" in data else data["y"].new_ones(len(data["y"]))
    return weight


def mean_over(values: Tensor, data: Tree) -> Tensor:
    """Return the mean of ``values [examples, ...]`` over examples, weighted as in ``data``, and over all other axes."""
    if "weight" not in data:
        return values.mean()
    weight: Tensor = data["weight"]
    # Padding may hold anything, including infinity, whose product with 0 is not 0.
    of_example = values if values.ndim == 1 else values.flatten(1).mean(1)
    return of_example.masked_fill(weight == 0, 0.0) @ weight / weight.sum()


def count_of(data: Tree) -> Tensor | int:
    """Return the number of examples without padding."""
    return data["weight"].sum() if "weight" in data else len(data["y"])
