"""Mapping a function over tasks and differentiating it: with ``torch.func``, or with plain autograd as a check.

Algorithms map and differentiate with ``over_tasks`` and ``gradient`` alone. Inside ``plainly``, neither uses a
transform of ``torch.func``: tasks are looped over, and ``torch.autograd.grad`` works on a graph. The results must be
the same.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap

from metarun.contracts import Task, Tree
from metarun.random import drawing
from metarun.tree import leaves, like, require_same_names, tree_map


class Late:
    """Stands for a module that is imported when anything but what is ready here is asked of it."""

    def __init__(self, module: str, **ready: Any) -> None:
        self.module = module
        self.__dict__.update(ready)

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.module), name)


if "torch._dynamo" not in sys.modules:
    # torch.func.grad switches compiled autograd off while it differentiates, and for that imports all of torch's
    # compiler: a third of the time that a short run takes to its first step. What has not been imported is off already.
    # When torch._dynamo is imported, it takes the place of its stand-in.
    torch.__dict__.setdefault(
        "_dynamo",
        Late("torch._dynamo", compiled_autograd=Late("torch._dynamo.compiled_autograd", _disable=nullcontext)),
    )

plain: ContextVar[bool] = ContextVar("plain", default=False)


@contextmanager
def plainly() -> Iterator[None]:
    """Inside, ``over_tasks`` loops over tasks and ``gradient`` uses plain autograd."""
    token = plain.set(True)
    try:
        yield
    finally:
        plain.reset(token)


def gradient(function: Callable[..., Any], at: Tree, has_aux: bool = False) -> Any:
    """The derivative of ``function`` (tree → scalar) at the tree ``at``, a tree of the same structure.

    The derivative can be differentiated again. With ``has_aux``, ``function`` returns a pair (scalar, anything), and
    the result is the pair (derivative, anything).
    """
    if not plain.get():
        return grad(function, has_aux=has_aux)(at)
    with torch.enable_grad():
        # A view, so that only the dependence on the argument counts, and not tensors that the function closes over.
        variables = tree_map(lambda w: w.view_as(w) if w.requires_grad else w.detach().requires_grad_(), at)
        out = function(variables)
        value, aux = out if has_aux else (out, None)
        found = torch.autograd.grad(value, list(leaves(variables)), create_graph=True, materialize_grads=True)
    derivative = like(at, iter(found))
    return (derivative, aux) if has_aux else derivative


def stacked(results: list[Any]) -> Any:
    """Results of the same structure (tensors in tuples and dictionaries), stacked along a new leading axis."""
    first = results[0]
    if isinstance(first, Tensor):
        return torch.stack(results)
    if isinstance(first, dict):
        for other in results[1:]:
            require_same_names(first, other)
        return {key: stacked([result[key] for result in results]) for key in first}
    columns = [stacked(list(column)) for column in zip(*results, strict=True)]
    return type(first)(*columns) if hasattr(first, "_fields") else type(first)(columns)


def over_tasks(function: Callable[[Task], Any], tasks: Task, training: bool) -> Any:
    """Apply ``function``, written for one task, to each of ``tasks``: its results with a leading axis of tasks.

    Leaves of ``tasks`` are ``[tasks, ...]``. Random numbers are drawn from each task's own seed (`metarun.random`), and
    ``training`` says whether this is meta-training.
    """

    def one(task: Task) -> Any:
        with drawing(task.seed, training):
            return function(task)

    if plain.get():
        count = len(next(leaves(tasks.support)))
        return stacked([one(task_of(tasks, index)) for index in range(count)])
    if tasks.seed is None:
        return vmap(lambda support, query: one(Task(support, query)))(tasks.support, tasks.query)
    return vmap(one)(tasks)


def task_of(tasks: Task, index: int) -> Task:
    """The task at ``index`` of a batch."""
    return tree_map(lambda leaf: leaf[index], tasks)
