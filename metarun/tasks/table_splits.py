"""Which tasks of a table are trained, validated and tested on."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from metarun.contracts import Split
from metarun.data import tables
from metarun.data.files import found
from metarun.data.splits import listed
from metarun.errors import UserError

SHARES = (0.6, 0.2, 0.2)
"""Shares of training, validation and test tasks in a random split."""
SPLITS: dict[str, Split] = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}

Parts = dict[Split, Any]
"""The tasks of each split, as arrays of their indices."""


def dealt(tasks: Any, shares: Sequence[float], seed: int, source: str) -> Parts:
    """Return ``tasks`` dealt at random into train, val and, if there is a third share, test; at least one to each.

    Raises:
        UserError: there are fewer tasks than shares.
    """
    splits: list[Split] = ["train", "val", "test"][: len(shares)]  # type: ignore[assignment]
    if len(tasks) < len(shares):
        raise UserError(
            f"{source} leaves {len(tasks)} task{'s' * (len(tasks) != 1)} for {', '.join(splits)}, and each takes at "
            "least one; lower task.shots or task.smallest, or set task.leave_out with task.validate=rows."
        )
    shuffled = np.random.default_rng(seed).permutation(tasks)
    parts: Parts = {}
    for index in range(len(shares) - 1, 0, -1):
        count = min(max(1, round(shares[index] / sum(shares) * len(tasks))), len(shuffled) - index)
        parts[splits[index]], shuffled = shuffled[-count:], shuffled[:-count]
    return {"train": shuffled, **dict(reversed(parts.items()))}


def dealt_among(every: Any, usable: Any, shares: Sequence[float], seed: int, source: str) -> Parts:
    """Return ``usable`` tasks as `dealt` does, and if possible so that the split of one does not depend on the others.

    All tasks are dealt, and then those that are of no use are left out. What is of use depends on the size of tasks: a
    learner that was trained with few rows must not find its training tasks among the test tasks with more. Where this
    leaves a split without a task, those of use alone are dealt.
    """
    if len(every) > len(usable) >= len(shares):
        parts = {part: own[np.isin(own, usable)] for part, own in dealt(every, shares, seed, source).items()}
        if all(map(len, parts.values())):
            return parts
    return dealt(usable, shares, seed, source)


def of_tasks(values: Any, task: Any, names: Sequence[str], source: tables.Source, column: str) -> list[str]:
    """Return the one value of a column in each task.

    Raises:
        UserError: rows of one task have different values.
    """
    first = np.full(len(names), len(task), dtype=np.int64)
    np.minimum.at(first, task, np.arange(len(task)))
    own = values[first]
    if (row := tables.first_where(own[task] != values)) is not None:
        raise UserError(
            f"{source.place(row)}: column {column!r} holds {values[row]!r}, and another row of the same task, "
            f"{names[task[row]]!r}, holds {own[task[row]]!r}; a task belongs to one of them, so give all of its rows "
            "the same value."
        )
    return list(own)


def named_splits(names: Sequence[str], split: Mapping[str, str], where: str) -> Parts:
    """Return the tasks of each split, by the name of the split that each task has in ``split``.

    Raises:
        UserError: a task has no split, a name is none of ``SPLITS``, or a split has no task.
    """
    parts: dict[Split, list[int]] = {"train": [], "val": [], "test": []}
    for index, name in enumerate(names):
        if name not in split:
            raise UserError(f"{where} gives no split for the task {name!r}; name train, val or test for each task.")
        if split[name] not in SPLITS:
            raise UserError(f"{where} gives {split[name]!r} for the task {name!r}; name train, val or test.")
        parts[SPLITS[split[name]]].append(index)
    for part, tasks in parts.items():
        if not tasks:
            raise UserError(f"{where} has no task for {part}; name train, val and test for at least one task each.")
    return {part: np.array(tasks) for part, tasks in parts.items()}


def split_file_of(path: str, data_dir: str) -> dict[str, str]:
    """Return the split of each task, from a CSV file with two columns: task and split.

    Raises:
        UserError: the file does not exist or has other columns, or a task has two splits.
    """
    place = found(path, data_dir, "task.split_file")
    table = tables.read(place, ",", None, ())
    if table.shape[1] != 2:
        raise UserError(f"{place} must have two columns, the task and its split, and has {table.shape[1]}.")
    keys, values = (tables.words(table[name]) for name in table.columns)
    split: dict[str, str] = {}
    for key, value in zip(keys, values, strict=True):
        if split.setdefault(key, value) != value:
            raise UserError(
                f"{place} gives {split[key]!r} and {value!r} for the task {key!r}; leave one of these lines out."
            )
    return split


def left_out(groups: Sequence[str], value: str | int | float, column: str, source: str) -> tuple[Any, Any]:
    """Return the tasks outside and inside the group ``value``.

    Raises:
        UserError: no task is in it, or all are.
    """
    name = tables.word(value)
    inside = np.array([group == name for group in groups])
    if not inside.any() or inside.all():
        there = listed(sorted(set(groups)))
        raise UserError(
            f"task.leave_out={value} must be one of at least two values of {column!r} in {source}, which are {there}."
        )
    return np.flatnonzero(~inside), np.flatnonzero(inside)
