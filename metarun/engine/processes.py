"""``torchrun``: the tasks of a meta-batch, shared by several processes.

Each process samples the same meta-batch and takes its part of the tasks. The mean over all tasks is the mean of the
parts' means, summed in the order of the processes, so every process makes the same step, and the same one whenever the
run is repeated.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed

from metarun.contracts import Tree
from metarun.engine.meta_step import Step
from metarun.errors import Stopped, UserError
from metarun.system.torchrun import count, rank
from metarun.tree import leaves, like, tree_map


@contextmanager
def connected(device: str) -> Iterator[None]:
    """Inside, the processes that ``torchrun`` has started can exchange tensors."""
    if count() == 1:
        yield
        return
    distributed.init_process_group("gloo" if device == "cpu" else "nccl")
    try:
        yield
    finally:
        distributed.destroy_process_group()


def share(meta_batch: int) -> int:
    """Return how many of ``meta_batch`` tasks each process has.

    Raises:
        UserError: they cannot be shared equally.
    """
    if meta_batch % count():
        below = meta_batch - meta_batch % count()
        near = f"{below} or {below + count()}" if below else str(count())
        raise UserError(
            f"train.meta_batch={meta_batch} tasks cannot be shared equally by {count()} processes; set "
            f"train.meta_batch={near}, or start as many processes as divide it."
        )
    return meta_batch // count()


def own_part(given: Tree) -> Tree:
    """Return what a step is given, with the tasks of this process alone (leaves ``[replicas, tasks, ...]``)."""
    size = share(next(leaves(given["tasks"])).shape[1])
    tasks = tree_map(lambda leaf: leaf[:, rank() * size : (rank() + 1) * size], given["tasks"])
    return {**given, "tasks": tasks}


def gathered(vector: Tensor) -> list[Tensor]:
    """Return the vectors of all processes, in their order.

    Raises:
        UserError: another process has ended.
        Stopped: process 0 has ended, and this process with it.
    """
    parts = [torch.empty_like(vector) for _ in range(count())]
    try:
        distributed.all_gather(parts, vector)
    except RuntimeError as error:
        if rank():
            raise Stopped(signal.SIGTERM) from error
        raise UserError("A process of torchrun has ended; continue the run with resume=DIR.") from error
    return parts


def mean_over_processes(tree: Tree) -> Tree:
    """Return the mean of a tree of floating-point numbers over all processes."""
    own = list(leaves(tree))
    parts = gathered(torch.cat([leaf.flatten() for leaf in own]))
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    flat = torch.split(total / len(parts), [leaf.numel() for leaf in own])
    mean: Tree = like(tree, (one.view(leaf.shape).to(leaf.dtype) for one, leaf in zip(flat, own, strict=True)))
    return mean


def averaged(update: Step) -> Step:
    """Return ``update``, preceded by the mean over processes of what ``gradient`` has found in each."""

    def run(given: Tree) -> Tree:
        found = {key: given[key] for key in ("gradient", "result", "carried") if key in given}
        return update({**given, **mean_over_processes(found)})

    return run


def with_own_part(step: Callable[[Tree], Tree]) -> Step:
    """Return ``step``, which is given the tasks of this process alone."""
    return lambda given: step(own_part(given))
