"""Drawing N-way K-shot tasks from pools of classes, and how many examples a task has."""

from typing import NamedTuple

import torch
from torch import Tensor

from metarun.errors import require

Shots = int | tuple[int, int]
"""Support examples, or the range [least, most] from which each task draws how many it has."""


class Range(NamedTuple):
    """From which a number of examples is drawn, all of them equally likely."""

    least: int
    most: int

    @property
    def fixed(self) -> bool:
        """Whether there is nothing to draw."""
        return self.least == self.most

    def text(self, name: str) -> list[str]:
        """What it adds to the name of a data set: nothing where the number is fixed."""
        return [] if self.fixed else [f"{name}={self.least}-{self.most}"]

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Numbers of examples ``[*shape]``."""
        return torch.randint(self.least, self.most + 1, shape, generator=generator)


def range_of(name: str, shots: Shots) -> Range:
    """``shots``, the key ``name``, as a range.

    Raises:
        ValueError: a number below 1, or a range that falls.
    """
    if isinstance(shots, int):
        require(shots >= 1, f"{name} must be at least 1, not {shots}")
        return Range(shots, shots)
    least, most = shots
    require(1 <= least <= most, f"{name} must be a rising range [least, most] from 1 on, not {list(shots)}")
    return Range(least, most)


def with_padding(x: Tensor, y: Tensor, real: Tensor | None) -> dict[str, Tensor]:
    """Examples as leaves of tasks, blank and of weight 0 where ``real [tasks, examples]`` is False; None: all real."""
    if real is None:
        return {"x": x, "y": y}
    real = real.to(x.device)

    def blank(leaf: Tensor) -> Tensor:
        return leaf.masked_fill(~real.view(*real.shape, *[1] * (leaf.ndim - 2)), 0)

    return {"x": blank(x), "y": blank(y), "weight": real.to(y.dtype)}


class TaskSizes(NamedTuple):
    """Of a task: classes, support examples per class, query examples per class."""

    ways: int
    shots: Range
    queries: int
    uneven: bool = False
    """Whether each class, and not each task, draws its number of support examples."""

    @property
    def examples(self) -> int:
        """The most per class, of support set and queries together."""
        return self.shots.most + self.queries

    def text(self) -> list[str]:
        """What makes scores incomparable and is told by no number of shots."""
        return self.shots.text("uneven_shots" if self.uneven else "shots")


class Dealt(NamedTuple):
    """The examples of one part of each task, in random order; all ``[tasks, examples]``."""

    label: Tensor
    """From 0 to ways − 1, in the order in which the task's classes were drawn."""
    identity: Tensor
    """Of the class."""
    example: Tensor
    """Within the class."""
    real: Tensor | None
    """False where there is none, but padding; None where there is no padding."""


def task_sizes(
    ways: int,
    shots: Shots,
    queries: int,
    train_ways: int | None,
    train_shots: Shots | None,
    train_queries: int | None,
    uneven: bool,
) -> dict[bool, TaskSizes]:
    """Sizes of a training task (True) and of others (False); what is None in training is as in the others.

    Raises:
        ValueError: fewer than 2 ways, fewer than 1 of anything else, a range that falls, or none with ``uneven``.
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
    """``size`` different positions of each row of ``allowed [..., pool]``, all True ones equally likely."""
    # A number that is not allowed sorts behind all of those that are.
    return torch.rand(allowed.shape, generator=generator).masked_fill(~allowed, -1.0).topk(size).indices


def deal(classes: Tensor, examples: Tensor, sizes: TaskSizes, generator: torch.Generator) -> tuple[Dealt, Dealt]:
    """Support and query part of tasks, each in an order of its own.

    Args:
        classes: identity of each task's classes ``[tasks, ways]``.
        examples: the examples drawn of each class ``[tasks, ways, sizes.examples]``.
        sizes: of the tasks.
        generator: of the order, and of the number of support examples.
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
    # Drawn last: tasks with fewer shots are those with the most, less some of their support examples.
    count = sizes.shots.draw((len(classes), classes.shape[1] if sizes.uneven else 1, 1), generator)
    real = (torch.arange(most) < count).expand(-1, classes.shape[1], -1).flatten(1).gather(1, order)
    return support._replace(real=real), query._replace(real=torch.ones_like(query.label, dtype=torch.bool))
