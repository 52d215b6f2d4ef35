"""Which of the few test tasks there are an episode belongs to, where episodes are other examples of the same ones."""

from torch import Tensor

from metarun.contracts import Tree
from metarun.tree import leaves

UNIT = "unit"
"""The leaf of queries of test tasks that says so."""


def with_unit(query: Tree, unit: Tensor) -> Tree:
    """Return queries ``[tasks, examples, ...]`` that say the number of the task that each example is of.

    Args:
        query: leaves of the queries of test tasks.
        unit: the number of each task among those that the test has ``[tasks]``.
    """
    first = next(leaves(query))
    return {**query, UNIT: unit.to(first.device)[:, None].expand(-1, first.shape[1])}


def units_of_tasks(query: Tree) -> Tensor | None:
    """Return the number of each task of queries ``[tasks, examples, ...]``; None where all tasks are different."""
    unit: Tensor | None = query.get(UNIT)
    return None if unit is None else unit[:, 0]
