"""Tasks from a table: a column names each row's task, and another one holds the target.

Rows are numbers and categories (`metarun.data.columns`). Targets are numbers (mean squared error in their unit), or
classes with the same meaning in all tasks. Rows are indexed by task once, and a batch is gathered by index.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from metarun.contracts import Numbers, Predict, Report, Scores, Sizes, Spec, Split, Task, Tree
from metarun.data import tables
from metarun.data.columns import Columns, fitted, said
from metarun.data.recipe import History, Recipe, TableRows, class_names
from metarun.data.splits import listed, warn_of_like
from metarun.errors import UserError, require
from metarun.targets.labels import Labels
from metarun.targets.metric import Metric
from metarun.targets.real import Measured
from metarun.tasks.cells import Cells, Drawn, Draws
from metarun.tasks.few_shot import Shots, shot_ranges, units_of, with_padding
from metarun.tasks.table_splits import (
    SHARES,
    Parts,
    dealt,
    dealt_among,
    left_out,
    named_splits,
    of_tasks,
    split_file_of,
)
from metarun.tasks.units import with_unit

log = logging.getLogger(__name__)

MOST_CLASSES = 200
COUNT = Metric("rows", higher_is_better=True)


class TableTasks:
    """Tasks whose rows are known: ``x [rows, features]``, and ``y [rows, 1]`` or one-hot ``[rows, classes]``.

    Args:
        dataset: what makes scores incomparable.
        features: number of features.
        inputs: rows ``[...]`` → inputs ``[..., features]`` on ``device``.
        values: targets that are numbers ``[rows]`` on ``device``; None for classes.
        target: what a model has to predict.
        draws: how tasks of each split are drawn.
        device: where tasks are put.
        recipe: how further rows are read; None where inputs are not columns of a table.
        units: the names of the tasks of each split, with their source.
    """

    def __init__(
        self,
        dataset: str,
        features: int,
        inputs: Callable[[Tensor], Tensor],
        values: Tensor | None,
        target: Measured | Labels,
        draws: Mapping[Split, Draws],
        device: str,
        recipe: Recipe | None = None,
        *,
        units: Mapping[Split, frozenset[str]],
    ) -> None:
        self.dataset, self.device, self.recipe, self.units = dataset, device, recipe, units
        if recipe is not None:
            self.converter = TableRows(recipe)
        self.inputs, self.values, self.target, self.draws = inputs, values, target, draws
        self.different_tests = len(draws["test"].tasks)
        evaluated = [draws["val"], draws["test"]]
        ways = target.outputs if isinstance(target, Labels) else None
        self.spec = Spec(
            Numbers((features,)),
            target,
            Sizes(max(d.shots.most for d in evaluated), max(d.most_queries for d in evaluated), ways),
            metrics=target.metrics,
        )
        if isinstance(target, Labels):
            self.report = Report(
                "confusion", {"class": target.names, "chosen": target.names}, COUNT, self._confusion, matrix=True
            )

    def _confusion(self, predict: Predict, task: Task) -> Tensor:
        assert isinstance(self.target, Labels)
        return self.target.confusion(predict(task.query["x"]), task.query)

    def scores(self, predict: Predict, data: Tree) -> Scores:
        """Return the metrics that only tests need."""
        return self.target.further(predict(data["x"]), data)

    def sample(self, split: Split, count: int, generator: torch.Generator) -> Task:
        """Draw ``count`` tasks; leaves ``[count, rows, ...]``, with ``weight`` where tasks differ in size."""
        draws = self.draws[split]
        task = draws.draw_tasks(count, generator)
        ways = draws.ways(task) if isinstance(self.target, Labels) else None
        support, query = (self._part(part, ways) for part in draws.draw_rows(task, generator))
        return Task(support, with_unit(query, task) if split == "test" else query)

    def _part(self, drawn: Drawn, ways: Tensor | None) -> Tree:
        row = drawn.row.to(self.device)
        x = self.inputs(row)
        if self.values is None:
            y = one_hot(drawn.label, self.target.outputs).to(x.device, x.dtype)
        else:
            y = self.values[row][..., None].to(x.dtype)
        return with_padding(x, y, drawn.real, None if ways is None else ways.to(x.device))


class Loaded(NamedTuple):
    """The rows that tasks are made of."""

    rows: pd.DataFrame
    source: tables.Source
    time: Any
    """By what rows are ordered ``[rows]``; None where they have no order."""
    goal: str
    """The column with the target."""
    history: History | None


def loaded(
    rows: pd.DataFrame,
    source: tables.Source,
    by: str,
    target: str,
    order: str | None,
    unlabelled: str,
    series: tuple[int, int, float | None] | None,
) -> Loaded:
    """Return the rows that have a target, with their history if ``series`` (history, ahead, step) is given.

    Raises:
        UserError: a cell that must not be empty is, a time is not a number, or no row is left.
    """
    time = None if order is None else tables.numbers(rows[order], source, "give times as numbers, such as days")
    if unlabelled == "refuse":
        tables.require_filled(rows[target], source, "fill it, or set task.unlabelled=drop")
    elif (missing := rows[target].isna().to_numpy()).any():
        log.info("%d of %d rows have no %s and are left out.", missing.sum(), len(rows), target)
        if missing.all():
            raise UserError(f"{source}: column {target!r} is empty in every row.")
        rows, source = rows[~missing], source.of(np.flatnonzero(~missing))
        time = None if time is None else time[~missing]
    if series is None:
        return Loaded(rows, source, time, target, None)
    assert order is not None
    history = History(by, order, target, *series)
    values = tables.numbers(rows[target], source, "a history is made of numbers")
    rows = history.of(rows.assign(**{target: values, order: time}).reset_index(drop=True))
    rows = rows[rows[history.target].notna()]
    if not len(rows):
        raise UserError(
            f"{source} has no row with {series[0]} values up to it and one {series[1]} rows later; lower task.history, "
            "or see task.step."
        )
    source = source.of(rows.index.to_numpy())
    return Loaded(rows.reset_index(drop=True), source, rows[order].to_numpy(), history.target, history)


def classes_of(data: Loaded, kind: str, threshold: float | None) -> list[str] | None:
    """Return the names of the classes of a target; None where targets are numbers.

    Raises:
        UserError: the target holds text among numbers, or a single value.
    """
    values, source = data.rows[data.goal], data.source
    different = values.nunique()
    if different < 2:
        raise UserError(
            f"{source}: the target {data.goal!r} has a single value, {values.iloc[0]}; choose another task.target."
        )
    if threshold is not None:
        numbers = tables.numbers(values, source, "a threshold needs numbers")
        above = numbers > threshold
        if above.all() or not above.any():
            raise UserError(
                f"{source}: the target {data.goal!r} is from {numbers.min():g} to {numbers.max():g}, so "
                f"task.threshold={threshold:g} makes a single class; choose another threshold."
            )
        return [f"up to {threshold:g}", f"above {threshold:g}"]
    text = not pd.api.types.is_numeric_dtype(values) or pd.api.types.is_bool_dtype(values)
    if kind == "auto":
        tables.require_points(values, source, "set task.kind=classes if these are names")
    if kind == "auto" and text and 0 < np.isnan(tables.as_numbers(values)).sum() < len(values) / 2:
        tables.numbers(values, source, "mend it, or set task.kind=classes if numbers are names")
    if kind == "numbers" or (kind == "auto" and not text and set(values.unique()) != {0, 1}):
        tables.numbers(values, source, "mend it, or set task.kind=classes")
        return None
    if different > MOST_CLASSES:
        raise UserError(
            f"{source}: the target {data.goal!r} has {different} different values, too many for classes (at most "
            f"{MOST_CLASSES}); set task.kind=numbers, or choose another task.target."
        )
    return class_names(values)


def usable(cells: Cells, names: Sequence[str], classes: int, smallest: int, source: tables.Source) -> Any:
    """Return the tasks that have enough rows, as an array, and log which have not.

    Raises:
        UserError: there are none.
    """
    enough = (cells.size > 0).sum(1) >= min(classes, 2)
    each = "rows" if classes == 1 else "rows in each of at least two classes"
    if small := [name for name, fits in zip(names, enough.tolist(), strict=True) if not fits]:
        if len(small) == len(names):
            raise UserError(
                f"{source}: no task has {smallest} {each}, one more than task.shots; the tasks are {listed(names)}: "
                "lower task.shots or task.smallest, or choose another task.by."
            )
        log.info(
            "%d of %d tasks have fewer than %d %s, and are left out: %s",
            len(small),
            len(names),
            smallest,
            each,
            listed(small),
        )
    return np.flatnonzero(enough.numpy())


class Splitting(NamedTuple):
    """The keys that say which tasks are tested on; see ``table``."""

    shares: tuple[float, float, float]
    seed: int
    column: str | None
    file: str | None
    leave_out: str | int | float | None
    group: str
    validate: str


def split_of(data: Loaded, task: Any, names: Sequence[str], tasks: Any, how: Splitting, data_dir: str) -> Parts:
    """Return the usable ``tasks`` of each split.

    Raises:
        UserError: the split is broken, or has too few tasks.
    """

    def of_column(column: str) -> list[str]:
        return of_tasks(tables.words(data.rows[column]).to_numpy(), task, names, data.source, column)

    chosen, source = [names[i] for i in tasks], str(data.source)
    if how.column is not None:
        parts = named_splits(chosen, dict(zip(names, of_column(how.column), strict=True)), f"{source}, {how.column!r},")
    elif how.file is not None:
        parts = named_splits(chosen, split_file_of(how.file, data_dir), how.file)
    elif how.leave_out is not None:
        groups = of_column(how.group)
        others, test = left_out([groups[i] for i in tasks], how.leave_out, how.group, source)
        if how.validate == "rows":
            parts = {"train": others, "val": others, "test": test}
        else:
            parts = {**dealt(others, how.shares[:2], how.seed, source), "test": test}
    else:
        every, member = np.unique(np.array(of_column(how.group), dtype=object), return_inverse=True)
        if len(every) == len(names):
            return dealt_among(np.arange(len(names)), tasks, how.shares, how.seed, source)
        dealt_groups = dealt_among(np.arange(len(every)), np.unique(member[tasks]), how.shares, how.seed, source)
        return {part: tasks[np.isin(member[tasks], own)] for part, own in dealt_groups.items()}
    return {part: tasks[index] for part, index in parts.items()}


def held_out(cell: Any, share: float, seed: int) -> Any:
    """Return whether each row is among a ``share`` of its cell, at least two rows, drawn by ``seed``."""
    shuffled = np.random.default_rng(seed).permutation(len(cell))
    order = shuffled[np.argsort(cell[shuffled], kind="stable")]
    size = np.bincount(cell)
    begins = np.cumsum(size) - size
    rank = np.empty(len(cell), dtype=np.int64)
    rank[order] = np.arange(len(cell)) - begins[cell[order]]
    return rank < np.maximum(np.round(share * size), 2)[cell]


def table(
    path: str | Mapping[str, str] | None = None,
    by: str | None = None,
    target: str | None = None,
    shots: Shots = 10,
    queries: int | None = None,
    train_shots: Shots | None = None,
    train_queries: int | None = 20,
    kind: Literal["auto", "numbers", "classes"] = "auto",
    threshold: float | None = None,
    features: Sequence[str] | None = None,
    drop: Sequence[str] = (),
    categorical: Sequence[str] = (),
    missing: Sequence[str] = (),
    order: str | None = None,
    history: int | None = None,
    ahead: int = 1,
    step: float | None = None,
    unlabelled: Literal["refuse", "drop"] = "refuse",
    smallest: int | None = None,
    shares: tuple[float, float, float] = SHARES,
    split_seed: int = 0,
    split: str | None = None,
    split_file: str | None = None,
    leave_out: str | int | float | None = None,
    leave_out_column: str | None = None,
    validate: Literal["tasks", "rows"] = "tasks",
    separator: str = ",",
    columns: Sequence[str] | None = None,
    name: str | None = None,
    device: str = "cpu",
    data_dir: str = "data",
    converter: TableRows | None = None,
) -> TableTasks:
    """Tasks from a CSV or Parquet file: one for each value of the column ``by``.

    A column that says where a row belongs (``by``, ``order``, ``split``, ``leave_out_column``) is no feature, unless
    ``features`` names it.

    Args:
        path: a file, a folder of ``.csv`` or ``.parquet`` files, or a mapping from names to files, here or in
            ``data_dir``; of several files, the column ``file`` names the one of a row.
        by: the column that names a row's task.
        target: the column to be predicted.
        shots: number of support rows, at least 1, or a range from which each task draws it; for classes, per class.
        queries: largest number of query rows of a validation or test task, for classes per class; null: all the rest.
        train_shots: the same as ``shots`` in training; null: ``shots``.
        train_queries: the same as ``queries`` in training.
        kind: whether targets are numbers or classes; ``auto``: classes if they are text, true and false, or 0 and 1.
        threshold: turns a target of numbers into two classes, up to it and above it.
        features: the columns that describe a row; null: all others.
        drop: columns that are not used.
        categorical: columns whose numbers are names of categories.
        missing: texts that stand for a missing value, besides nothing and NA.
        order: the column with the time of a row: support rows come before query rows, and in validation and test they
            are the first ones.
        history: number of the latest values of ``target`` as features, for series; null: none.
        ahead: with ``history``, how many rows later the value to be predicted is.
        step: with ``history``, the time between two rows; rows whose history has a gap are left out. Null: any.
        unlabelled: whether rows without a target are refused or dropped.
        smallest: smallest number of rows of a task, for classes of each class in a task, at least 2; what is smaller is
            left out. Null: one more than ``shots``.
        shares: of training, validation and test tasks in a random split, above 0.
        split_seed: seed of the random split.
        split: the column that says train, val or test, the same for all rows of a task.
        split_file: a CSV file with a line per task: its name and train, val or test.
        leave_out: tests on the tasks whose ``leave_out_column`` holds this, and trains on the others.
        leave_out_column: null: ``by``. Without ``leave_out``, a random split deals whole groups of this column.
        validate: with ``leave_out``, whether other tasks are validated on, or other rows of the training tasks.
        separator: what stands between the cells of a CSV file.
        columns: names of the columns of files without a header line.
        name: of the data set in results; null: that of the file.
        device: where the rows live.
        data_dir: where else files are looked for.
        converter: what another run has fitted; null: it is fitted to the training rows.

    Raises:
        UserError: a file or column is missing or broken, or a split has too few tasks.
    """
    if path is None or by is None or target is None:
        raise ValueError(
            "a table needs path, its file; by, the column that names the task of a row; and target, the column to be "
            "predicted: set task.path, task.by and task.target"
        )
    require_sizes(queries, train_queries, smallest, shares)
    of_shots, of_training = shot_ranges(shots, train_shots)
    given = [key for key in (split, split_file, leave_out) if key is not None]
    require(len(given) <= 1, "only one of split, split_file and leave_out can say which tasks are tested on")
    require(
        validate == "tasks" or leave_out is not None,
        "validate=rows goes with leave_out; a split has tasks for validation",
    )
    require(history is None or order is not None, "history needs order, the column with the time of a row")
    require(history is None or (history >= 1 and ahead >= 1), "history and ahead must be at least 1")
    require(history is None or (threshold is None and kind != "classes"), "history needs a target that is a number")
    files = tables.files_of(path, data_dir)
    rows, source = tables.gather(files, separator, columns, missing)
    group = leave_out_column or by
    placing = {"by": by, "order": order, "split": split, "leave_out_column": group}
    describing = {"features": features or (), "drop": drop, "categorical": categorical}
    check_columns(rows, source, target, placing, describing)
    if copies := tables.copies_in(rows):
        log.warning(
            "%s: %d rows are copies of others in every column, and a task may both show and ask for them; if these are "
            "the same observation, take them out.",
            *(source, copies),
        )
    series = None if history is None else (history, ahead, step)
    data = loaded(rows, source, by, target, order, unlabelled, series)
    del rows
    names = classes_of(data, kind, threshold)
    task, of_task = pd.factorize(tables.words(data.rows[by]), sort=True)
    tasks_by_name = [str(one) for one in of_task]
    warn_of_like(tasks_by_name, str(data.source), "tasks")
    recipe = Recipe(Columns([], []), data.goal, names, threshold, history=data.history)
    classes = 1 if names is None else len(names)
    label = np.zeros(len(task), dtype=np.int64) if names is None else recipe.class_of(data.rows[data.goal])
    if converter is not None:
        names, label = classes_as_known(converter.recipe, data, threshold)
        classes = 1 if names is None else len(names)
    gap = 0 if history is None else ahead - 1
    least = max(smallest or of_shots.most + 1, 2) + gap
    every = Cells(np.arange(len(task)), task, label, (len(tasks_by_name), classes), data.time)
    cells = every.without_small(least)
    how = Splitting(shares, split_seed, split, split_file, leave_out, group, validate)
    parts = split_of(
        data, task, tasks_by_name, usable(cells, tasks_by_name, classes, least, data.source), how, data_dir
    )
    of_split, held = dict.fromkeys(parts, cells), np.zeros(len(task), dtype=bool)
    if validate == "rows":
        held = held_out(task * classes + label, shares[1] / (shares[0] + shares[1]), split_seed)
        rows_of: dict[Split, Any] = {"train": ~held, "val": held}
        for part, own in rows_of.items():
            index = np.flatnonzero(own)
            time = None if data.time is None else data.time[index]
            inside = Cells(index, task[index], label[index], (len(tasks_by_name), classes), time).without_small(2 + gap)
            check_enough(inside, parts["train"], classes, data.source)
            of_split[part] = inside
    training = np.isin(task, parts["train"]) & ~held
    if converter is None:
        described = described_by(data, features, {by, target, order, split, group, tables.FILE, *drop})
        encoder, left = fitted(data.rows, training, described, categorical, data.source)
        log.info(said(encoder, left))
        shift, scale = (0.0, 1.0) if names is not None else moments(data, training)
        recipe = Recipe(encoder, data.goal, names, threshold, shift, scale, data.history, list(missing))
    else:
        recipe = converter.recipe
    x = recipe.inputs(data.rows)
    y = recipe.targets(data.rows)[:, 0] if names is None else torch.from_numpy(label)
    say(parts, cells, names)
    facts = [
        name or next(iter(files)),
        target,
        *([] if leave_out is None else [f"without {leave_out}"]),
        *of_shots.text("shots"),
        *([] if order is None else ["in time"]),
        content_of(x, y, cells, parts),
    ]
    x, y = x.to(device), y.to(device)
    ways = [(of_training, train_queries), (of_shots, queries), (of_shots, queries)]
    draws = {
        part: Draws(of_split[part], torch.from_numpy(own), *sizes, moving=part == "train", gap=gap)
        for (part, own), sizes in zip(parts.items(), ways, strict=True)
    }
    goal = Labels.of(tuple(names)) if names is not None else Measured(shift=recipe.shift, scale=recipe.scale)
    read_from = ", ".join(str(file.resolve()) for file in files.values())
    return TableTasks(
        *(":".join(facts), x.shape[1], lambda row: x[row], None if names is not None else y, goal),
        *(draws, device, recipe),
        units={part: units_of(read_from, (tasks_by_name[i] for i in own)) for part, own in parts.items()},
    )


def classes_as_known(recipe: Recipe, data: Loaded, threshold: float | None) -> tuple[list[str] | None, Any]:
    """Return the classes that a run has been trained with, None where targets are numbers, and the class of each row.

    Raises:
        ValueError: a row is of another class, or the target is another one than that of the run.
    """
    require(
        (data.goal, threshold) == (recipe.target, recipe.threshold),
        f"target and threshold must be those that the learner was trained with, {recipe.target} and "
        f"{'null' if recipe.threshold is None else f'{recipe.threshold:g}'}",
    )
    values = data.rows[data.goal]
    if recipe.classes is None:
        return None, np.zeros(len(values), dtype=np.int64)
    label = recipe.class_of(values)
    strange = values[label < 0]
    require(
        len(strange) == 0,
        f"the learner knows the classes {', '.join(recipe.classes)}, and {data.source} has "
        f"{strange.iloc[0] if len(strange) else ''!r} in the column {data.goal!r}",
    )
    return recipe.classes, label


def check_columns(
    rows: pd.DataFrame,
    source: tables.Source,
    target: str,
    placing: Mapping[str, str | None],
    describing: Mapping[str, Sequence[str]],
) -> None:
    """Raise an error if a key names a column that is not there, or a column that places rows has an empty cell.

    Raises:
        UserError: the column, and the line of the cell.
        ValueError: the target is named as a feature.
    """
    for key, column in {"target": target, **placing}.items():
        if column is not None:
            tables.column(rows, source, key, column)
    for key, several in describing.items():
        for column in several:
            tables.column(rows, source, key, column)
    require(target not in describing["features"], f"features must not name the target, {target}")
    for column in dict.fromkeys(column for column in placing.values() if column is not None):
        tables.require_filled(rows[column], source, "it says where a row belongs, so fill it, or take the row out")


def check_enough(cells: Cells, tasks: Any, classes: int, source: tables.Source) -> None:
    """Raise an error if one of ``tasks`` has become too small by rows that are held out.

    Raises:
        UserError: the source, and the remedy.
    """
    if not ((cells.size[tasks] > 0).sum(1) >= min(classes, 2)).all():
        raise UserError(
            f"{source} has too few rows in a task to hold some of them out; raise task.smallest, or set "
            "task.validate=tasks."
        )


def require_sizes(
    queries: int | None, train_queries: int | None, smallest: int | None, shares: Sequence[float]
) -> None:
    """Raise an error if a size is out of range.

    Raises:
        ValueError: the key and its range.
    """
    for key, value in {"queries": queries, "train_queries": train_queries}.items():
        require(value is None or value >= 1, f"{key} must be at least 1, or null for all that are left, not {value}")
    require(smallest is None or smallest >= 2, f"smallest must be at least 2, not {smallest}")
    require(min(shares) > 0, f"shares must all be above 0, not {list(shares)}")


def described_by(data: Loaded, features: Sequence[str] | None, aside: set[str | None]) -> list[str]:
    """Return the columns that describe a row: those that are asked for, or all but those ``aside``; and its history."""
    chosen = [str(c) for c in data.rows.columns if c not in aside] if features is None else list(features)
    if data.history is None:
        return chosen
    return list(dict.fromkeys([*data.history.features, *(c for c in chosen if c != data.goal)]))


def moments(data: Loaded, training: Any) -> tuple[float, float]:
    """Return mean and standard deviation of the target in training rows.

    Raises:
        UserError: the target does not vary there.
    """
    values = tables.as_numbers(data.rows[data.goal])[training]
    if not values.std() > 0:
        raise UserError(f"{data.source}: the target {data.goal!r} is the same in all training rows; change the split.")
    return float(values.mean()), float(values.std())


def content_of(x: Tensor, y: Tensor, cells: Cells, parts: Parts) -> str:
    """Return a short hash of rows, targets, tasks and splits."""
    digest = sha256()
    for tensor in (x, y, cells.row, cells.size):
        digest.update(tensor.contiguous().numpy().tobytes())
    for tasks in parts.values():
        digest.update(np.ascontiguousarray(tasks).tobytes())
    return digest.hexdigest()[:6]


def say(parts: Parts, cells: Cells, names: Sequence[str] | None) -> None:
    """Log how many tasks each split has, how large they are, and which classes there are."""
    counts = ", ".join(f"{len(tasks)} for {part}" for part, tasks in parts.items())
    tasks = np.unique(np.concatenate(list(parts.values())))
    rows = cells.size[torch.from_numpy(tasks)].sum(1)
    least, most = int(rows.min()), int(rows.max())
    log.info(
        "Tasks: %s, with %s rows%s.",
        counts,
        least if least == most else f"{least} to {most}",
        "" if names is None else f", of the classes {listed(names)}",
    )
