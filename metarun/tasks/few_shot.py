"""Drawing N-way K-shot tasks from pools of classes."""

from typing import NamedTuple

import torch
from torch import Tensor

from metarun.errors import require


class TaskSizes(NamedTuple):
    """Of a task: classes, support examples a class, query examples a class."""

    ways: int
    shots: int
    queries: int


class Dealt(NamedTuple):
    """The examples of one part of each task, in random order; all ``[tasks, examples]``."""

    label: Tensor
    """From 0 to ways − 1, in the order in which the task's classes were drawn."""
    identity: Tensor
    """Of the class."""
    example: Tensor
    """Within the class."""


def task_sizes(
    ways: int,
    shots: int,
    queries: int,
    train_ways: int | None,
    train_shots: int | None,
    train_queries: int | None,
) -> dict[bool, TaskSizes]:
    """Sizes of a training task (True) and of others (False); what is None in training is as in the others.

    Raises:
        ValueError: fewer than 2 ways, or fewer than 1 of anything else.
    """
    for name, value in {"ways": ways, "train_ways": train_ways}.items():
        require(value is None or value >= 2, f"{name} must be at least 2, not {value}")
    others = {"shots": shots, "queries": queries, "train_shots": train_shots, "train_queries": train_queries}
    for name, value in others.items():
        require(value is None or value >= 1, f"{name} must be at least 1, not {value}")
    train = TaskSizes(train_ways or ways, train_shots or shots, train_queries or queries)
    return {False: TaskSizes(ways, shots, queries), True: train}


def draw(allowed: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """``size`` different positions of each row of ``allowed [..., pool]``, all True ones equally likely."""
    # A number that is not allowed sorts behind all of those that are.
    return torch.rand(allowed.shape, generator=generator).masked_fill(~allowed, -1.0).topk(size).indices


def deal(classes: Tensor, examples: Tensor, shots: int, generator: torch.Generator) -> tuple[Dealt, Dealt]:
    """Support and query part of tasks, each in an order of its own.

    Args:
        classes: identity of each task's classes ``[tasks, ways]``.
        examples: the examples drawn of each class ``[tasks, ways, shots + queries]``.
        shots: how many of them are the support set's.
        generator: of the order.
    """
    labels = torch.arange(classes.shape[1])[None, :, None].expand(examples.shape)

    def part(columns: slice) -> Dealt:
        label, example = (values[:, :, columns].flatten(1) for values in (labels, examples))
        order = draw(torch.ones_like(label, dtype=torch.bool), label.shape[1], generator)
        label = label.gather(1, order)
        return Dealt(label, classes.gather(1, label), example.gather(1, order))

    return part(slice(shots)), part(slice(shots, None))
