"""Drawing tasks from rows that belong to given tasks and, in classification, to classes that all tasks share."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from metarun.tasks.few_shot import Range

FEW = 200_000
"""Random numbers that are cheaper than drawing one row after the other."""


def subsets(size: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw ``count`` different numbers from 0 to size − 1, in random order, for each ``size [...]``: ``[..., count]``.

    Where ``size`` is smaller, all numbers come first, and what follows means nothing. The work does not grow with large
    sizes (Floyd's algorithm, Bentley and Floyd 1987, https://doi.org/10.1145/30401.315746).
    """
    largest = max(int(size.max()), 1)
    if count >= largest or size.numel() * largest <= FEW:
        keys = torch.rand(*size.shape, largest, generator=generator)
        keys = keys.masked_fill(torch.arange(largest) >= size[..., None], -1.0)
        chosen = keys.topk(min(count, largest)).indices
        return torch.nn.functional.pad(chosen, (0, count - chosen.shape[-1]))
    chosen = torch.full((*size.shape, count), -1)
    uniform = torch.rand(*size.shape, count, generator=generator, dtype=torch.float64)
    for i in range(count):
        last = size - count + i
        drawn = torch.minimum((uniform[..., i] * (last + 1).clamp(min=1)).long(), last)
        taken = (chosen == drawn[..., None]).any(-1)
        chosen[..., i] = torch.where(last < 0, -1, torch.where(taken, last, drawn))
    keys = torch.rand(chosen.shape, generator=generator).masked_fill(chosen < 0, -1.0)
    return chosen.gather(-1, keys.topk(count).indices).clamp(min=0)


class Cells:
    """Rows by task and class; numbers as targets make one class.

    Attributes:
        row: rows ``[entries]``, by task, then by class, then by time.
        first: index in ``row`` at which each cell begins ``[tasks, classes]``.
        size: number of rows of each cell ``[tasks, classes]``.
        when: rank in time of each entry within its task ``[entries]``; None where rows have no order.
    """

    def __init__(self, row: Any, task: Any, label: Any, shape: tuple[int, int], time: Any | None = None) -> None:
        """Index rows once.

        Args:
            row: which row each entry is ``[entries]``; all arguments are NumPy arrays.
            task: its task, from 0 ``[entries]``.
            label: its class, from 0 ``[entries]``.
            shape: number of tasks and of classes.
            time: by what rows are ordered ``[entries]``; equal times keep the order of the rows.
        """
        cell = task.astype(np.int64) * shape[1] + label
        order = np.argsort(cell, kind="stable") if time is None else np.lexsort((time, cell))
        size = np.bincount(cell, minlength=shape[0] * shape[1])
        self.row = torch.from_numpy(np.ascontiguousarray(row[order]).astype(np.int64))
        self.size = torch.from_numpy(size).view(shape)
        self.first = (self.size.flatten().cumsum(0) - self.size.flatten()).view(shape)
        self.when: Tensor | None = None
        if time is not None:
            by_time = np.lexsort((time, task))
            begins = np.cumsum(np.bincount(task, minlength=shape[0])) - np.bincount(task, minlength=shape[0])
            rank = np.empty(len(task), dtype=np.int64)
            rank[by_time] = np.arange(len(task)) - begins[task[by_time]]
            self.when = torch.from_numpy(rank[order])

    def without_small(self, smallest: int) -> "Cells":
        """Return the cells with at least ``smallest`` rows; the others count as empty."""
        kept = object.__new__(Cells)
        kept.row, kept.first, kept.when = self.row, self.first, self.when
        kept.size = self.size.masked_fill(self.size < smallest, 0)
        return kept

    def from_rank(self, cell: Tensor, rank: Tensor) -> Tensor:
        """Return how many rows of each ``cell [...]`` have a smaller rank in time than ``rank [...]``."""
        assert self.when is not None
        span = int(self.when.max()) + 2
        if not hasattr(self, "keys"):
            which = torch.repeat_interleave(torch.arange(self.first.numel()), self._whole_size())
            self.keys = which * span + self.when
        return torch.searchsorted(self.keys, cell * span + rank) - self.first.flatten()[cell]

    def _whole_size(self) -> Tensor:
        ends = torch.cat([self.first.flatten()[1:], torch.tensor([len(self.row)])])
        return ends - self.first.flatten()


class Drawn(NamedTuple):
    """One part of each task, in random order; all ``[tasks, examples]``."""

    row: Tensor
    label: Tensor
    real: Tensor | None
    """False for padding; None where there is no padding."""


class Draws(NamedTuple):
    """How tasks of one split are drawn."""

    cells: Cells
    tasks: Tensor
    """The tasks of the split ``[tasks of the split]``."""
    shots: Range
    """Support rows per class."""
    queries: int | None
    """Query rows per class, or fewer where a class has no more; None: all that are left."""
    moving: bool = False
    """Whether support sets of ordered rows begin anywhere in time, instead of with the first row."""
    gap: int = 0
    """Number of ordered rows between the support set and the queries, whose targets are not known in time."""

    @property
    def most_queries(self) -> int:
        """The largest number of query rows per class."""
        return self.queries or max(int(self.cells.size[self.tasks].max()) - self.shots.least - self.gap, 1)

    @property
    def uneven(self) -> bool:
        """Whether tasks differ in size, so that they are padded."""
        size = self.cells.size[self.tasks]
        ordered_classes = self.cells.when is not None and size.shape[1] > 1
        asked = self.most_queries * (2 if self.moving else 1)
        return not self.shots.fixed or ordered_classes or int(size.min()) < self.shots.most + self.gap + asked

    def ways(self, task: Tensor) -> Tensor | None:
        """Return which classes each task has ``[tasks, classes]``; None where every task of the split has all."""
        return self.cells.size[task] > 0 if bool((self.cells.size[self.tasks] == 0).any()) else None

    def draw_tasks(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw tasks ``[count]``, each as often as any other, up to once."""
        rounds = -(-count // len(self.tasks))
        order = torch.cat([torch.randperm(len(self.tasks), generator=generator) for _ in range(rounds)])
        return self.tasks[order[:count]]

    def draw_rows(self, task: Tensor, generator: torch.Generator) -> tuple[Drawn, Drawn]:
        """Draw support and query rows of each ``task [tasks]``; no row is in both."""
        size, most, asked = self.cells.size[task], self.shots.most, self.most_queries
        shots = torch.minimum(self.shots.draw((len(task), 1), generator), (size - 1 - self.gap).clamp(min=0))
        if self.cells.when is None:
            drawn = subsets(size, most + asked, generator)
            support, query = drawn[..., :most], drawn.gather(-1, shots[..., None] + torch.arange(asked))
            available = size - shots
        else:
            start, later = self._in_time(task, size, shots, generator)
            support = start[..., None] + torch.arange(most)
            available = (size - later).clamp(min=0)
            query = later[..., None] + subsets(available, asked, generator)
        return (
            self._part(task, support, shots, generator),
            self._part(task, query, available.clamp(max=asked), generator),
        )

    def _in_time(self, task: Tensor, size: Tensor, shots: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return where in each cell the support set begins, and where queries do, after all support rows in time."""
        cells = self.cells
        assert cells.when is not None
        cell = task[:, None] * size.shape[1] + torch.arange(size.shape[1])
        first, there, never = cells.first[task], size > 0, len(cells.row)
        start = torch.zeros_like(size)
        if self.moving:
            # In small tasks half of what is not support may come before it, so that not all begin with the first row.
            before = shots + self.gap
            whole = before + ((size - before + 1) // 2).clamp(max=self.most_queries)
            last_start = cells.when[(first + size - whole).clamp(max=never - 1)].masked_fill(~there, never).amin(1)
            rank = (torch.rand(len(task), generator=generator, dtype=torch.float64) * (last_start + 1)).long()
            start = cells.from_rank(cell, rank[:, None].expand_as(cell)).masked_fill(~there, 0)
        last = cells.when[(first + start + shots - 1).clamp(0, never - 1)].masked_fill(~there, -1).amax(1)
        return start, cells.from_rank(cell, last[:, None].expand_as(cell) + 1 + self.gap)

    def _part(self, task: Tensor, position: Tensor, number: Tensor, generator: torch.Generator) -> Drawn:
        """Return the first ``number`` rows of each cell at ``position [tasks, classes, rows]`` in random order."""
        tasks, classes, each = position.shape
        real = torch.arange(each) < number[..., None]
        index = (self.cells.first[task][..., None] + position).clamp(max=len(self.cells.row) - 1)
        label = torch.arange(classes)[:, None].expand(tasks, classes, each)
        order = torch.rand(tasks, classes * each, generator=generator).argsort(1)
        row, label, real = (leaf.flatten(1).gather(1, order) for leaf in (self.cells.row[index], label, real))
        return Drawn(row, label, real if self.uneven else None)
