"""Arithmetic on trees: nested dictionaries of tensors, and tasks."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast, overload

import torch
from torch import Tensor

from metarun.contracts import Task, Tree
from metarun.errors import UserError


def branches(tree: Any) -> Mapping[str, Any]:
    """The branches of a tree by name; for a ``Task`` its fields, without a missing seed."""
    if not isinstance(tree, Task):
        return cast(Mapping[str, Any], tree)
    return {name: value for name, value in tree._asdict().items() if value is not None}


def require_same_names(tree: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Raise an error unless two trees have branches of the same names, since those of one alone would be lost.

    Raises:
        UserError: the names that only one of them has.
    """
    if apart := sorted(tree.keys() ^ other.keys()):
        raise UserError(
            f"task: some batches of tasks have the leaf {apart[0]} and others have not; give it to all of them (a "
            "weight or ways of 1 where nothing is missing)."
        )


@overload
def tree_map(function: Callable[..., Any], tree: Task, *others: Task) -> Task: ...


@overload
def tree_map(function: Callable[..., Any], tree: Tree, *others: Tree) -> dict[str, Any]: ...


def tree_map(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """Apply ``function`` leaf by leaf to trees of the same structure; the result has that structure too.

    Raises:
        UserError: a tree has other branches than the first one.
    """
    other_branches = [branches(other) for other in others]
    for other in other_branches:
        require_same_names(branches(tree), other)
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


def names_of(tree: Tree, prefix: str = "") -> list[str]:
    """The dotted names of the leaves of a tree, in their order."""
    found: list[str] = []
    for key, value in tree.items():
        found += names_of(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]
    return found


def like(tree: Tree, values: Iterator[Tensor]) -> dict[str, Any]:
    """A tree with the structure of ``tree`` and ``values`` as leaves, in the order of ``leaves``."""
    return tree_map(lambda _: next(values), tree)


def subtract(a: Tree, b: Tree) -> dict[str, Any]:
    """a − b, leaf by leaf."""
    return tree_map(lambda x, y: x - y, a, b)


def dot(a: Tree, b: Tree) -> Tensor:
    """The inner product of two trees of the same structure."""
    return torch.stack([(x * y).sum() for x, y in zip(leaves(a), leaves(b), strict=True)]).sum()


def mean(tree: Tree) -> dict[str, Any]:
    """The mean of every leaf over its leading axis."""
    return tree_map(lambda x: x.mean(0), tree)


def size(tree: Tree) -> int:
    """The number of elements in all leaves of a tree."""
    return sum(leaf.numel() for leaf in leaves(tree))


def learned(theta: Tree) -> dict[str, Any]:
    """The part of ``theta`` that the outer optimizer updates: everything except ``carried``."""
    return {key: value for key, value in theta.items() if key != "carried"}


def first_tasks(tasks: Task, count: int) -> Task:
    """The first ``count`` tasks of a batch."""
    return tree_map(lambda leaf: leaf[:count], tasks)
