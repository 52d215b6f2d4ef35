"""The columns of a table as the numbers that a model takes, with plain numbers and lists learned from training rows."""

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from metarun.data.portable import portable
from metarun.data.tables import Source, are_truths, as_numbers, first_where, places, require_points, words
from metarun.errors import UserError

log = logging.getLogger(__name__)

MOST_VALUES = 64
"""Columns of text with more different values than this are left out, since they identify rows instead of describing
them."""
LIMIT = 5.0
"""Numbers further from the mean than this many standard deviations are cut there, since one such row can make gradient
descent on a small support set diverge."""
MOSTLY = 0.5
"""A column of text of which at least this share are numbers is meant to hold numbers."""


@portable
class Number(NamedTuple):
    """A column of numbers: (number − mean) / std, cut at ± ``LIMIT``, and 0 where it is missing."""

    name: str
    mean: float
    std: float
    flagged: bool
    """Whether a further feature says where the number is missing: 1 there, else 0."""


@portable
class Category(NamedTuple):
    """A column of categories: a feature for each value, all 0 where it is missing or a value that training lacks."""

    name: str
    values: list[str]


@portable
@dataclass(frozen=True)
class Columns:
    """How rows become features.

    All that is needed is in these fields, which are plain numbers, text and lists, so that a checkpoint can hold them
    (`metarun.data.portable`) and rows can be encoded without the training data.
    """

    numbers: list[Number]
    categories: list[Category]

    @property
    def names(self) -> list[str]:
        """The name of each feature."""
        found = [name for n in self.numbers for name in ([n.name, f"{n.name} missing"] if n.flagged else [n.name])]
        return found + [f"{c.name}={value}" for c in self.categories for value in c.values]

    def encode(self, table: pd.DataFrame) -> Tensor:
        """Return features ``[rows, features]`` of the rows of ``table``, in the default dtype.

        Raises:
            UserError: the table lacks a column, or a column of numbers holds text.
        """
        features = np.zeros((len(table), len(self.names)), dtype=str(torch.get_default_dtype()).partition(".")[2])
        place = 0
        for name in [n.name for n in self.numbers] + [c.name for c in self.categories]:
            if name not in table:
                raise UserError(
                    f"The rows lack the column {name!r}; give them all columns that the model was trained on."
                )
        for number in self.numbers:
            values = as_numbers(table[number.name])
            wrong = ~np.isfinite(values) & table[number.name].notna().to_numpy()
            if (row := first_where(wrong)) is not None:
                raise UserError(
                    f"Row {row + 1} of the rows: column {number.name!r} must hold numbers, and this cell holds "
                    f"{table[number.name].iloc[row]!r}."
                )
            features[:, place] = np.nan_to_num(((values - number.mean) / number.std).clip(-LIMIT, LIMIT))
            if number.flagged:
                features[:, place + 1] = np.isnan(values)
            place += 1 + number.flagged
        for category in self.categories:
            codes = places(words(table[category.name]), category.values)
            known = np.flatnonzero(codes >= 0)
            features[known, place + codes[known]] = 1
            place += len(category.values)
        return torch.from_numpy(features)


def _is_number(values: pd.Series, source: Source) -> bool:
    """Whether a column holds numbers.

    Raises:
        UserError: it holds text among numbers.
    """
    if are_truths(values):
        return False
    if pd.api.types.is_numeric_dtype(values):
        return True
    if values.isna().all():
        return False
    require_points(values, source, "add the column to task.categorical or task.drop")
    text = np.isnan(as_numbers(values)) & values.notna().to_numpy()
    if not text.any():
        return True
    if text.sum() > (1 - MOSTLY) * values.notna().sum():
        return False
    row = first_where(text)
    assert row is not None
    raise UserError(
        f"{source.place(row)}: column {values.name!r} holds {values.iloc[row]!r} among numbers; add it to task.missing,"
        " or the column to task.categorical or task.drop."
    )


def fitted(
    table: pd.DataFrame, training: Any, chosen: Sequence[str], categorical: Collection[str], source: Source
) -> tuple[Columns, dict[str, str]]:
    """Return how to encode rows, and why columns are left out.

    Args:
        table: all rows.
        training: True for the rows of training tasks ``[rows]``; statistics and categories come from these alone.
        chosen: the columns that describe a row.
        categorical: those of them whose numbers are names.
        source: where the rows come from.

    Raises:
        UserError: a column holds text among numbers or infinity, or no column is left.
    """
    numbers, categories, dropped = list[Number](), list[Category](), dict[str, str]()
    for name in chosen:
        if name not in categorical and _is_number(table[name], source):
            values = as_numbers(table[name])
            if (row := first_where(np.isinf(values))) is not None:
                raise UserError(f"{source.place(row)}: column {name!r} holds infinity; write a number, or nothing.")
            own = values[training]
            known = own[~np.isnan(own)]
            std = float(known.std()) if len(known) else 0.0
            if len(known) and std <= 1e-9 * np.abs(known).max():
                # Rounding leaves deviations of equal numbers from their mean.
                std = 0.0
            missing = bool(np.isnan(own).any())
            if not len(known) or (std == 0 and not missing):
                dropped[name] = "the same in all training rows" if len(known) else "empty"
            else:
                numbers.append(Number(name, float(known.mean()), std if std > 0 else 1.0, missing))
            continue
        values_there = words(table[name][training]).dropna()
        values_found = sorted(values_there.unique())
        if len(values_found) > MOST_VALUES:
            dropped[name] = f"{len(values_found)} different texts"
        elif len(values_found) < 2 and not (values_found and len(values_there) < int(np.sum(training))):
            dropped[name] = "the same in all training rows" if values_found else "empty"
        else:
            categories.append(Category(name, values_found))
    if not numbers and not categories:
        why = "; ".join(f"{name}: {reason}" for name, reason in dropped.items())
        raise UserError(
            f"{source} leaves no column that describes a row{f' ({why})' if why else ''}; see task.features."
        )
    return Columns(numbers, categories), dropped


def said(columns: Columns, dropped: dict[str, str]) -> str:
    """Return a line that says what became of each column."""
    parts = []
    if columns.numbers:
        parts.append(
            f"numbers, standardised and cut at {LIMIT:g} deviations: " + ", ".join(n.name for n in columns.numbers)
        )
    if flagged := [n.name for n in columns.numbers if n.flagged]:
        parts.append(f"where missing, the training mean and a feature that says so: {', '.join(flagged)}")
    if columns.categories:
        sizes = ", ".join(f"{c.name} ({len(c.values)})" for c in columns.categories)
        parts.append(f"categories, one-hot, zeros where missing or new: {sizes}")
    if dropped:
        parts.append("left out: " + ", ".join(f"{name} ({why})" for name, why in dropped.items()))
    return f"{len(columns.names)} features, by statistics of training tasks alone. " + "; ".join(parts)
