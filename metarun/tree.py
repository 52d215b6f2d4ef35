"""Arithmetic on trees: nested dictionaries of tensors, and tasks."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast, overload

import torch
from torch import Tensor

from metarun.contracts import Task, Tree


def branches(tree: Any) -> Mapping[str, Any]:
    """What a tree holds, by name: of a ``Task`` its fields, but for a seed that it has not."""
    if not isinstance(tree, Task):
        return cast(Mapping[str, Any], tree)
    return {name: value for name, value in tree._asdict().items() if value is not None}


@overload
def tree_map(function: Callable[..., Any], tree: Task, *others: Task) -> Task: ...


@overload
def tree_map(function: Callable[..., Any], tree: Tree, *others: Tree) -> dict[str, Any]: ...


def tree_map(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """Apply ``function`` leaf by leaf to trees of one structure (the first one's), which is that of the result."""
    other_branches = [branches(other) for other in others]
    mapped: dict[str, Any] = {
        key: tree_map(function, value, *(other[key] for other in other_branches))
        if isinstance(value, dict | Task)
        else function(value, *(other[key] for other in other_branches))
        for key, value in branches(tree).items()
    }
    return tree._replace(**mapped) if isinstance(tree, Task) else mapped


def leaves(tree: Tree | Task) -> Iterator[Tensor]:
    """The tensors of a tree, in the order of its keys."""
    for value in branches(tree).values():
        if isinstance(value, dict | Task):
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
    return tree_map(lambda leaf: leaf[:count], tasks)
