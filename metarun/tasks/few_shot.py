"""Drawing N-way K-shot tasks from pools of classes, and how many examples a task has."""

from typing import NamedTuple

import torch
from torch import Tensor

from metarun.errors import require

Shots = int | tuple[int, int]
"""A number of support examples, or the range [least, most] from which each task draws its number."""


class Range(NamedTuple):
    """A range from which a number of examples is drawn uniformly."""

    least: int
    most: int

    @property
    def fixed(self) -> bool:
        """Whether the range holds a single number."""
        return self.least == self.most

    def text(self, name: str) -> list[str]:
        """Return what the range adds to the name of a data set: nothing where the number is fixed."""
        return [] if self.fixed else [f"{name}={self.least}-{self.most}"]

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Draw numbers of examples ``[*shape]``."""
        return torch.randint(self.least, self.most + 1, shape, generator=generator)


def range_of(name: str, shots: Shots) -> Range:
    """Return ``shots``, the value of the key ``name``, as a range.

    Raises:
        ValueError: a number is below 1, or the range is not rising.
    """
    if isinstance(shots, int):
        require(shots >= 1, f"{name} must be at least 1, not {shots}")
        return Range(shots, shots)
    least, most = shots
    require(1 <= least <= most, f"{name} must be a rising range [least, most] from 1 on, not {list(shots)}")
    return Range(least, most)


def with_padding(x: Tensor, y: Tensor, real: Tensor | None) -> dict[str, Tensor]:
    """Return leaves of tasks, zero and of weight 0 where ``real [tasks, examples]`` is False; None: all are real."""
    if real is None:
        return {"x": x, "y": y}
    real = real.to(x.device)

    def blank(leaf: Tensor) -> Tensor:
        return leaf.masked_fill(~real.view(*real.shape, *[1] * (leaf.ndim - 2)), 0)

    return {"x": blank(x), "y": blank(y), "weight": real.to(y.dtype)}


class TaskSizes(NamedTuple):
    """Sizes of a task: classes, support examples per class, query examples per class."""

    ways: int
    shots: Range
    queries: int
    uneven: bool = False
    """Whether each class, instead of each task, draws its number of support examples."""

    @property
    def examples(self) -> int:
        """The largest number of examples per class, support set and queries together."""
        return self.shots.most + self.queries

    def text(self) -> list[str]:
        """Return what makes scores incomparable and is not visible in the number of shots."""
        return self.shots.text("uneven_shots" if self.uneven else "shots")


class Dealt(NamedTuple):
    """The examples of one part of each task, in random order; all ``[tasks, examples]``."""

    label: Tensor
    """From 0 to ways − 1, in the order in which the task's classes were drawn."""
    identity: Tensor
    """Identity of the class."""
    example: Tensor
    """Identity of the example within the class."""
    real: Tensor | None
    """True for examples, False for padding; None where there is no padding."""


def task_sizes(
    ways: int,
    shots: Shots,
    queries: int,
    train_ways: int | None,
    train_shots: Shots | None,
    train_queries: int | None,
    uneven: bool,
) -> dict[bool, TaskSizes]:
    """Return the sizes of training tasks (True) and of others (False); None in training means as in the others.

    Raises:
        ValueError: fewer than 2 ways, fewer than 1 of anything else, a range that is not rising, or ``uneven`` without
            a range.
    """
    for name, value in {"ways": ways, "train_ways": train_ways}.items():
        require(value is None or value >= 2, f"{name} must be at least 2, not {value}")
    for name, value in {"queries": queries, "train_queries": train_queries}.items():
        require(value is None or value >= 1, f"{name} must be at least 1, not {value}")
    others = range_of("shots", shots)
    train = others if train_shots is None else range_of("train_shots", train_shots)
    require(
        not (uneven and others.fixed and train.fixed),
        "uneven=true draws the shots of each class from a range; set shots or train_shots to one, such as [1, 5]",
    )
    return {
        False: TaskSizes(ways, others, queries, uneven),
        True: TaskSizes(train_ways or ways, train, train_queries or queries, uneven),
    }


def draw(allowed: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Draw ``size`` different positions in each row of ``allowed [..., pool]``, uniformly among the True ones."""
    # Positions that are not allowed sort after all those that are.
    return torch.rand(allowed.shape, generator=generator).masked_fill(~allowed, -1.0).topk(size).indices


def deal(classes: Tensor, examples: Tensor, sizes: TaskSizes, generator: torch.Generator) -> tuple[Dealt, Dealt]:
    """Deal drawn examples into the support and query parts of tasks, each in its own random order.

    Args:
        classes: identity of each task's classes ``[tasks, ways]``.
        examples: the examples drawn from each class ``[tasks, ways, sizes.examples]``.
        sizes: sizes of the tasks.
        generator: source of the order, and of the number of support examples.
    """
    labels = torch.arange(classes.shape[1])[None, :, None].expand(examples.shape)
    most = sizes.shots.most

    def part(columns: slice) -> tuple[Dealt, Tensor]:
        label, example = (values[:, :, columns].flatten(1) for values in (labels, examples))
        order = draw(torch.ones_like(label, dtype=torch.bool), label.shape[1], generator)
        label = label.gather(1, order)
        return Dealt(label, classes.gather(1, label), example.gather(1, order), None), order

    (support, order), (query, _) = part(slice(most)), part(slice(most, None))
    if sizes.shots.fixed:
        return support, query
    # Drawn last, so that tasks with fewer shots are those with the most, less some of their support examples.
    count = sizes.shots.draw((len(classes), classes.shape[1] if sizes.uneven else 1, 1), generator)
    real = (torch.arange(most) < count).expand(-1, classes.shape[1], -1).flatten(1).gather(1, order)
    return support._replace(real=real), query._replace(real=torch.ones_like(query.label, dtype=torch.bool))
