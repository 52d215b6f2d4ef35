"""Drawing N-way K-shot tasks from pools of classes, and how many examples a task has."""

from typing import NamedTuple

import torch
from torch import Tensor

from metarun.errors import require

Shots = int | tuple[int, int]
"""A number of support examples, or the range [least, most] from which each task draws its number."""
Ways = int | tuple[int, int]
"""A number of classes, or the range [least, most] from which each task draws its number."""


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


def range_of(name: str, value: Shots | Ways, smallest: int = 1) -> Range:
    """Return the value of the key ``name`` as a range.

    Raises:
        ValueError: a number is below ``smallest``, or the range is not rising.
    """
    if isinstance(value, int):
        require(value >= smallest, f"{name} must be at least {smallest}, not {value}")
        return Range(value, value)
    least, most = value
    rising = smallest <= least <= most
    require(rising, f"{name} must be a rising range [least, most] from {smallest} on, not {list(value)}")
    return Range(least, most)


def with_padding(x: Tensor, y: Tensor, real: Tensor | None, ways: Tensor | None = None) -> dict[str, Tensor]:
    """Return leaves of tasks, zero and of weight 0 where ``real [tasks, examples]`` is False; None: all are real.

    ``ways [tasks, ways]`` says which classes each task has; None: all.
    """
    if real is None:
        return {"x": x, "y": y}
    real = real.to(x.device)
    own = {} if ways is None else {"ways": ways[:, None].expand(-1, y.shape[1], -1).to(y)}

    def blank(leaf: Tensor) -> Tensor:
        return leaf.masked_fill(~real.view(*real.shape, *[1] * (leaf.ndim - 2)), 0)

    return {"x": blank(x), "y": blank(y), "weight": real.to(y.dtype), **own}


class TaskSizes(NamedTuple):
    """Sizes of a task: classes, support examples per class, query examples per class."""

    ways: int
    shots: Range
    queries: int
    uneven: bool = False
    """Whether each class, instead of each task, draws its number of support examples."""
    fewest_ways: int | None = None
    """The smallest number of classes where tasks draw theirs, ``ways`` being the largest; None: they do not."""

    @property
    def examples(self) -> int:
        """The largest number of examples per class, support set and queries together."""
        return self.shots.most + self.queries

    def text(self) -> list[str]:
        """Return what makes scores incomparable and is not visible in the number of shots."""
        ways = [] if self.fewest_ways is None else [f"ways={self.fewest_ways}-{self.ways}"]
        return [*ways, *self.shots.text("uneven_shots" if self.uneven else "shots")]


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
    ways: Tensor | None = None
    """True for the classes of each task ``[tasks, ways]``; None where it has all."""


def task_sizes(
    ways: Ways,
    shots: Shots,
    queries: int,
    train_ways: Ways | None,
    train_shots: Shots | None,
    train_queries: int | None,
    uneven: bool,
) -> dict[bool, TaskSizes]:
    """Return the sizes of training tasks (True) and of others (False); None in training means as in the others.

    Raises:
        ValueError: fewer than 2 ways, fewer than 1 of anything else, a range that is not rising, or ``uneven`` without
            a range.
    """
    other_ways = range_of("ways", ways, 2)
    own_ways = other_ways if train_ways is None else range_of("train_ways", train_ways, 2)
    for name, value in {"queries": queries, "train_queries": train_queries}.items():
        require(value is None or value >= 1, f"{name} must be at least 1, not {value}")
    others = range_of("shots", shots)
    train = others if train_shots is None else range_of("train_shots", train_shots)
    require(
        not (uneven and others.fixed and train.fixed),
        "uneven=true draws the shots of each class from a range; set shots or train_shots to one, such as [1, 5]",
    )

    def sizes(ways: Range, shots: Range, queries: int) -> TaskSizes:
        return TaskSizes(ways.most, shots, queries, uneven, None if ways.fixed else ways.least)

    return {
        False: sizes(other_ways, others, queries),
        True: sizes(own_ways, train, train_queries or queries),
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
    if sizes.shots.fixed and sizes.fewest_ways is None:
        return support, query
    # Drawn last, so that tasks with fewer shots are those with the most, less some of their support examples.
    count = sizes.shots.draw((len(classes), classes.shape[1] if sizes.uneven else 1, 1), generator)
    real = (torch.arange(most) < count).expand(-1, classes.shape[1], -1).flatten(1).gather(1, order)
    if sizes.fewest_ways is None:
        return support._replace(real=real), query._replace(real=torch.ones_like(query.label, dtype=torch.bool))
    number = Range(sizes.fewest_ways, sizes.ways).draw((len(classes), 1), generator)
    own = torch.arange(sizes.ways) < number
    return (
        support._replace(real=real & own.gather(1, support.label), ways=own),
        query._replace(real=own.gather(1, query.label), ways=own),
    )
