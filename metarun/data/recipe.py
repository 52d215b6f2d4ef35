"""How the rows of a table become inputs and targets, in plain numbers and lists.

A run's ``Recipe`` is all that is needed to read further rows of the same columns, without the data of the run.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from metarun.contracts import Examples
from metarun.data.columns import Columns
from metarun.data.converters import numbers_of, row_names, table_of
from metarun.data.portable import portable
from metarun.data.tables import as_numbers, places, words
from metarun.errors import UserError, require


@portable
@dataclass(frozen=True)
class History:
    """Earlier values of the target as features, and a later one as the target."""

    by: str
    """The column that names the series of a row."""
    order: str
    """The column with the time of a row."""
    value: str
    """The column with the values."""
    history: int
    """Number of values up to the row's own, at least 1."""
    ahead: int
    """How many rows later the target is, at least 1."""
    step: float | None
    """Time between rows: values across a gap are not used; None: any."""

    @property
    def target(self) -> str:
        """The name of the new column with the target."""
        return f"{self.value} +{self.ahead}"

    @property
    def features(self) -> list[str]:
        """The names of the columns with the values, the row's own first."""
        return [self.value, *(f"{self.value} -{k}" for k in range(1, self.history))]

    def of(self, table: pd.DataFrame) -> pd.DataFrame:
        """Return the rows that have a whole history, by series and time, with these columns added.

        The target is empty in the last rows of a series, and before a gap.

        Raises:
            UserError: a column is missing.
        """
        for column in (self.by, self.order, self.value):
            if column not in table:
                raise UserError(f"The rows lack the column {column!r}, which a series needs; add it.")
        # Text would be sorted letter by letter.
        table = table.assign(**{column: as_numbers(table[column]) for column in (self.order, self.value)})
        if table[self.order].isna().any():
            row = int(table[self.order].isna().to_numpy().argmax())
            raise UserError(
                f"Row {row + 1} of the rows: column {self.order!r}, the time, must hold a number or a date."
            )
        table = table.sort_values([self.by, self.order], kind="stable")
        series, time = pd.factorize(table[self.by])[0], table[self.order].to_numpy()
        value = table[self.value].to_numpy()

        def moved(rows: int) -> Any:
            """Values so many rows later; NaN in another series or across a gap."""
            place = np.arange(len(table)) + rows
            inside = (place >= 0) & (place < len(table))
            other = np.where(inside, place, 0)
            near = inside & (series[other] == series)
            if self.step is not None:
                near &= np.abs(time[other] - time - rows * self.step) < self.step / 2
            return np.where(near, value[other], np.nan)

        columns = {name: moved(-k) for k, name in enumerate(self.features) if k}
        table = table.assign(**columns, **{self.target: moved(self.ahead)})
        whole = ~np.isnan(np.stack([table[name].to_numpy(dtype=float) for name in self.features])).any(0)
        return table[whole]


@portable
@dataclass(frozen=True)
class Recipe:
    """How rows are read: features, and targets as numbers or as classes."""

    columns: Columns
    target: str
    classes: list[str] | None = None
    """The names of the classes; None where targets are numbers."""
    threshold: float | None = None
    """Targets are two classes: numbers up to this, and above it."""
    shift: float = 0.0
    """Targets that are numbers are seen as (number − shift) / scale."""
    scale: float = 1.0
    history: History | None = None
    missing: list[str] = field(default_factory=list)
    """Texts that stand for a missing value in files, besides nothing and NA."""

    def prepared(self, table: pd.DataFrame) -> pd.DataFrame:
        """Return the rows that inputs and targets are read from: ``table`` itself, or its rows with a history."""
        return table if self.history is None else self.history.of(table)

    def inputs(self, table: pd.DataFrame) -> Tensor:
        """Return inputs ``[rows, features]`` of prepared rows, in the default dtype.

        Raises:
            UserError: a column is missing, or a column of numbers holds text.
        """
        return self.columns.encode(table)

    def targets(self, table: pd.DataFrame) -> Tensor:
        """Return targets of prepared rows, in the default dtype: ``[rows, 1]``, or one-hot ``[rows, classes]``.

        Raises:
            UserError: the target's column is missing, or a cell is empty, is not a number or is an unknown class.
        """
        if self.target not in table:
            raise UserError(f"The rows lack the column {self.target!r}, the target.")
        values = table[self.target]
        if self.classes is None:
            numbers = as_numbers(values)
            self._require(np.isfinite(numbers), values, "must be a number")
            y = torch.from_numpy((numbers - self.shift) / self.scale)
            return y.to(torch.get_default_dtype())[:, None]
        index = self.class_of(values)
        self._require(
            index >= 0,
            values,
            f"must be one of {', '.join(self.classes)}" if self.threshold is None else "must be a number",
        )
        return one_hot(torch.from_numpy(index), len(self.classes)).to(torch.get_default_dtype())

    def class_of(self, values: pd.Series) -> Any:
        """Return the class of each target as an array of integers; −1 where it is none."""
        if self.threshold is not None:
            numbers = as_numbers(values)
            return np.where(np.isnan(numbers), -1, numbers > self.threshold).astype(np.int64)
        return places(words(values), self.classes or [])

    def _require(self, holds: Any, values: pd.Series, what: str) -> None:
        if not holds.all():
            row = int(np.argmin(holds))
            raise UserError(f"Row {row + 1} of the rows: the target {self.target!r} {what}, not {values.iloc[row]!r}.")


@portable
@dataclass(frozen=True)
class TableRows:
    """Rows of a table as their owner has them (`metarun.contracts.Converter`)."""

    recipe: Recipe

    def inputs(self, x: Any) -> Tensor:
        """Return the rows of a table, or of a list of dictionaries, as inputs ``[rows, features]``.

        Where the run's features are a history, rows that lack these columns are a series, and only those with a whole
        history count, in the order in which they are given.

        Raises:
            ValueError: ``x`` is no table.
            UserError: a column is missing, or a column of numbers holds text.
        """
        try:
            table = pd.DataFrame(x)
        except (ValueError, TypeError) as error:
            raise ValueError(f"these inputs are rows of a table: give a DataFrame ({error})") from None
        require(len(table) > 0, "x must hold at least one row")
        history = self.recipe.history
        if history is not None and not set(history.features) <= set(table):
            table = self.recipe.prepared(table.reset_index(drop=True)).sort_index()
        return self.recipe.inputs(table)

    def read(self, path: Path) -> Examples:
        """Read a CSV, TSV or Parquet file with the run's columns; targets are in the run's target column.

        Raises:
            ValueError: the file cannot be read.
        """
        table = table_of(path, self.recipe.missing)
        table = self.recipe.prepared(table.rename(index=dict(zip(table.index, row_names(len(table)), strict=True))))
        goal = self.recipe.target
        return Examples(table, table[goal].tolist() if goal in table else None, [str(name) for name in table.index])

    def targets(self, y: Any) -> Tensor:
        """Return targets in the column's unit as the model sees them ``[rows, 1]``.

        Raises:
            ValueError: there is something that is not a finite number.
        """
        found = numbers_of(y).reshape(-1, 1)
        require(bool(found.isfinite().all()), "y must hold finite numbers alone")
        return (found - self.recipe.shift) / self.recipe.scale

    def answers(self, output: Tensor) -> Any:
        """Return outputs in the unit of the column ``[rows]``."""
        return (output[:, 0] * self.recipe.scale + self.recipe.shift).numpy()

    def class_of(self, labels: Sequence[Any]) -> list[int]:
        """Return the class of each target, in the order of the run's classes.

        Raises:
            ValueError: a target is none of the classes.
        """
        found = [int(place) for place in self.recipe.class_of(pd.Series(list(labels)))]
        wrong = next((label for label, place in zip(labels, found, strict=True) if place < 0), None)
        require(wrong is None, f"the classes are {', '.join(self.recipe.classes or [])}, and y holds {wrong!r}")
        return found


def class_names(values: pd.Series) -> list[str]:
    """Return the different values of a column as text, numbers in their order."""
    found: Sequence[str] = words(values).dropna().unique()
    try:
        return sorted(found, key=float)
    except ValueError:
        return sorted(found)
