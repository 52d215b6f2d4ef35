"""Arithmetic on trees: nested dictionaries of tensors."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from metarun.types import Task, Tree


def tree_map(function: Callable[..., Any], tree: Tree, *others: Tree) -> dict[str, Any]:
    """Apply ``function`` leaf by leaf to trees of one structure (the first one's)."""
    return {
        key: tree_map(function, value, *(other[key] for other in others))
        if isinstance(value, dict)
        else function(value, *(other[key] for other in others))
        for key, value in tree.items()
    }


def leaves(tree: Tree) -> Iterator[Tensor]:
    """The tensors of a tree, in the order of its keys."""
    for value in tree.values():
        if isinstance(value, dict):
            yield from leaves(value)
        else:
            yield value


def like(tree: Tree, values: Iterator[Tensor]) -> dict[str, Any]:
    """A tree of ``tree``'s structure with ``values`` as leaves, in the order of ``leaves``."""
    return tree_map(lambda _: next(values), tree)


def subtract(a: Tree, b: Tree) -> dict[str, Any]:
    """a − b, leaf by leaf."""
    return tree_map(lambda x, y: x - y, a, b)


def dot(a: Tree, b: Tree) -> Tensor:
    """The inner product of two trees of one structure."""
    return torch.stack([(x * y).sum() for x, y in zip(leaves(a), leaves(b), strict=True)]).sum()


def mean(tree: Tree) -> dict[str, Any]:
    """Mean of every leaf over its leading axis."""
    return tree_map(lambda x: x.mean(0), tree)


def size(tree: Tree) -> int:
    """How many numbers a tree holds."""
    return sum(leaf.numel() for leaf in leaves(tree))


def learned(theta: Tree) -> dict[str, Any]:
    """The part of ``theta`` that the outer optimizer steps: all but ``carried``."""
    return {key: value for key, value in theta.items() if key != "carried"}


def first_tasks(tasks: Task, count: int) -> Task:
    """The first ``count`` tasks of a batch."""

    support, query = (tree_map(lambda leaf: leaf[:count], part) for part in (tasks.support, tasks.query))
    return Task(support, query, None if tasks.seed is None else tasks.seed[:count])
