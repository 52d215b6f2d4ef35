"""Tables from files: what is read, and what is wrong with it, by file, line and column."""

import csv
import logging
import warnings
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from metarun.data.files import found, visible
from metarun.errors import UserError

log = logging.getLogger(__name__)

BINARY = (".parquet", ".pq")
FILE = "file"
"""The column that says which file a row comes from, where a table has several files."""


def is_binary(path: Path) -> bool:
    """Whether a file is a table in Parquet, by its ending in any case."""
    return path.suffix.lower() in BINARY


def files_of(path: str | Mapping[str, str], data_dir: str) -> dict[str, Path]:
    """Return the files of a table by name: one file, those of a folder by their stems, or those that are named.

    Raises:
        UserError: a file does not exist, or a folder has no tables, or two of one name.
    """
    if not isinstance(path, str):
        return {name: found(one, data_dir) for name, one in path.items()}
    place = found(path, data_dir)
    if not place.is_dir():
        return {place.stem: place}
    inside = [path for path in visible(place) if path.suffix.lower() == ".csv" or is_binary(path)]
    if not inside:
        raise UserError(f"{place} has no .csv and no .parquet file; set task.path to one file, or to a folder of them.")
    by_name: dict[str, Path] = {}
    for one in inside:
        if (other := by_name.setdefault(one.stem, one)) is not one:
            raise UserError(
                f"{place} has two tables named {one.stem!r}, {other.name} and {one.name}; take one away, or rename it."
            )
    return by_name


def _names(path: Path, separator: str, columns: Sequence[str] | None, several: bool = True) -> list[str]:
    """Return the names of a CSV file's columns, checked against the first line; ``several``: it must have two."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        first = next((row for row in csv.reader(file, delimiter=separator) if row), None)
    if first is None:
        raise UserError(
            f"{path} is empty; it must hold a header line with the names of the columns, then a line per row."
        )
    if columns is not None:
        if len(columns) != len(first):
            raise UserError(
                f"{path} has {len(first)} cells in line 1, and task.columns names {len(columns)}; name each column."
            )
        return list(columns)
    names = [name.strip() for name in first]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"{path} has two columns {twice[0]!r} in its header; rename one of them.")
    if len(names) == 1 and several:
        other = next((s for s in (",", ";", "\t", "|") if s != separator and s in names[0]), None)
        remedy = f"set task.separator={other!r}" if other else "set task.separator to what stands between its cells"
        raise UserError(f"{path} has a single column, {names[0]!r}; {remedy}.")
    return names


def _csv(
    path: Path,
    separator: str,
    columns: Sequence[str] | None,
    missing: Sequence[str],
    several: bool = True,
    na: bool = True,
) -> pd.DataFrame:
    names = _names(path, separator, columns, several)
    with warnings.catch_warnings():
        # Cells beyond the last column would be dropped with a warning, or become an index.
        warnings.simplefilter("error", pd.errors.ParserWarning)
        return pd.read_csv(
            path,
            sep=separator,
            names=names,
            header=0 if columns is None else None,
            index_col=False,
            na_values=["", *missing],
            keep_default_na=na,
            skipinitialspace=True,
            low_memory=False,
            encoding="utf-8-sig",
        )


def read_further(path: Path, missing: Sequence[str], na: bool = True) -> pd.DataFrame:
    """Return the table in a file of a learner's user, separated by commas, semicolons, tabs or bars, as `read` would.

    ``na`` says whether NA, None and their like stand for a missing value, or are texts.

    Raises:
        UserError: its header is broken.
        ValueError: it cannot be read.
    """
    if is_binary(path):
        return _parquet(path)
    with path.open(encoding="utf-8-sig", newline="") as file:
        head = file.readline()
    return _csv(path, max(",;\t|", key=head.count), None, missing, several=False, na=na)


def _parquet(path: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(path)
    except ImportError as error:
        raise UserError(
            f"{path} needs pyarrow to be read; pip install 'metarun[parquet]', or save it as CSV."
        ) from error


def read(path: Path, separator: str, columns: Sequence[str] | None, missing: Sequence[str]) -> pd.DataFrame:
    """Return the table in a file.

    Args:
        path: a ``.parquet`` file, or text with a separator.
        separator: what stands between the cells of a text file.
        columns: names of the columns of a text file that has no header; None: the first line is the header.
        missing: what a cell holds where nothing is known, besides nothing and NA.

    A column without a name is that of the numbers of rows which tools write, and is left out.

    Raises:
        UserError: the file is not such a table; the sentence names the file and, where there is one, the line.
    """
    if path.suffix.lower() == ".npz":
        raise UserError(f"{path} is not a table; choose task=molecules for packed fingerprints with labels.")
    try:
        table = _parquet(path) if is_binary(path) else _csv(path, separator, columns, missing)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8 ({error.reason}); save it as CSV in UTF-8.") from error
    except (pd.errors.ParserError, pd.errors.ParserWarning, csv.Error) as error:
        reason = str(error).replace("Error tokenizing data. C error: ", "").strip().rstrip(".")
        raise UserError(f"{path} has lines with other numbers of cells ({reason}); mend that line.") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); set task.path to a CSV or Parquet file.") from error
    if not len(table):
        raise UserError(f"{path} has a header and no rows; it must hold a line per row.")
    if "" in table:
        # Where rows lie in a file tells nothing of further rows, and much of a target by which they are sorted.
        log.info("%s: the column without a name numbers the rows, and is left out; a name would keep it.", path)
        table = table.drop(columns="")
    return table


class Source:
    """Where the rows of a table come from, for sentences that name a row."""

    def __init__(self, paths: Sequence[Path], sizes: Sequence[int], header: bool, rows: Any = None) -> None:
        self.paths, self.sizes, self.header = paths, sizes, header
        self.rows = np.arange(sum(sizes)) if rows is None else rows

    def of(self, rows: Any) -> "Source":
        """Return the source of the rows with these indices alone."""
        return Source(self.paths, self.sizes, self.header, self.rows[rows])

    def place(self, row: int) -> str:
        """Return file and line of the row of this index."""
        place, ends = int(self.rows[row]), np.cumsum(self.sizes)
        index = int(np.searchsorted(ends, place, side="right"))
        path, within = self.paths[index], place - int(ends[index]) + self.sizes[index]
        if is_binary(path):
            return f"{path} row {within + 1}"
        return f"{path} line {within + 1 + self.header}"

    def __str__(self) -> str:
        folder = self.paths[0].parent
        if len(self.paths) > 1 and all(path.parent == folder for path in self.paths):
            return f"{folder} ({len(self.paths)} files)"
        return ", ".join(map(str, self.paths))


def gather(
    files: Mapping[str, Path], separator: str, columns: Sequence[str] | None, missing: Sequence[str]
) -> tuple[pd.DataFrame, Source]:
    """Return the rows of all files, with a column ``FILE`` where there are several, and where each comes from.

    Raises:
        UserError: a file is not a table, or files have other columns than the first one.
    """
    tables = {name: read(path, separator, columns, missing) for name, path in files.items()}
    source = Source(list(files.values()), [len(table) for table in tables.values()], columns is None)
    if len(tables) == 1:
        return next(iter(tables.values())), source
    first, *others = tables.items()
    for name, table in others:
        if different := set(first[1].columns) ^ set(table.columns):
            raise UserError(
                f"{files[name]} and {files[first[0]]} have different columns: only one of them has "
                f"{sorted(map(str, different))[0]!r}; give all files the same columns."
            )
    parts = [table.assign(**{FILE: name}) for name, table in tables.items()]
    return pd.concat(parts, ignore_index=True), source


def column(table: pd.DataFrame, source: Source, key: str, name: str) -> pd.Series:
    """Return a column that a key of the task names.

    Raises:
        UserError: there is no such column.
    """
    if name not in table:
        raise UserError(f"{source} has no column {name!r}, which task.{key} names; it has {', '.join(table.columns)}.")
    return table[name]


def first_where(wrong: Any) -> int | None:
    """Return the index of the first True of an array; None where there is none."""
    wrong = np.asarray(wrong, dtype=bool)
    return int(wrong.argmax()) if wrong.any() else None


def require_filled(values: pd.Series, source: Source, remedy: str) -> None:
    """Raise an error if a cell of a column is empty.

    Raises:
        UserError: the first such cell.
    """
    if (row := first_where(values.isna())) is not None:
        raise UserError(f"{source.place(row)}: the cell of column {values.name!r} is empty; {remedy}.")


def numbers(values: pd.Series, source: Source, remedy: str) -> Any:
    """Return a column as an array of float64, NaN where a cell is empty.

    Raises:
        UserError: a cell holds text, or infinity.
    """
    found = as_numbers(values)
    if (row := first_where(np.isnan(found) & values.notna().to_numpy())) is not None:
        raise UserError(
            f"{source.place(row)}: column {values.name!r} must hold numbers, and this cell holds {values.iloc[row]!r}; "
            f"{remedy}."
        )
    if (row := first_where(np.isinf(found))) is not None:
        raise UserError(f"{source.place(row)}: column {values.name!r} holds infinity; {remedy}.")
    return found


def copies_in(table: pd.DataFrame) -> int:
    """Return how many rows are equal to an earlier one in every column."""
    try:
        # By their hashes, which takes a tenth of the time of comparing them.
        hashes = pd.util.hash_pandas_object(table, index=False)
    except TypeError:
        # Lists, which have no hash.
        hashes = pd.util.hash_pandas_object(table.astype(str), index=False)
    return int(hashes.duplicated().sum())


def as_numbers(values: pd.Series) -> Any:
    """Return a column as an array of float64, NaN where a cell is empty or is no number.

    Dates are days since 1970, and durations are days, whatever unit a file has them in.
    """
    if pd.api.types.is_datetime64_any_dtype(values):
        values = (values - pd.Timestamp(0, tz=values.dt.tz)) / pd.Timedelta(days=1)
    elif pd.api.types.is_timedelta64_dtype(values):
        values = values / pd.Timedelta(days=1)
    elif isinstance(values.dtype, pd.CategoricalDtype):
        values = values.astype(object)
    return pd.to_numeric(values, errors="coerce").to_numpy(dtype=float, na_value=np.nan)


def are_truths(values: pd.Series) -> bool:
    """Whether all cells of a column that are not empty are true or false."""
    return bool(pd.api.types.infer_dtype(values, skipna=True) == "boolean")


def require_points(values: pd.Series, source: Source, remedy: str) -> None:
    """Raise an error if a column of text holds nothing but numbers, and some of them have a decimal comma.

    Raises:
        UserError: the first such cell.
    """
    if pd.api.types.is_numeric_dtype(values) or not len(text := values.dropna().astype(str)):
        return
    commas = text.str.fullmatch(r"\s*[+-]?\d+,\d+\s*")
    if commas.any() and not np.isnan(as_numbers(text[~commas])).any():
        row = first_where(values.index.isin(text.index[commas]))
        assert row is not None
        raise UserError(
            f"{source.place(row)}: column {values.name!r} holds {values.iloc[row]!r}, which looks like a number with a "
            f"decimal comma; save the file with decimal points, or {remedy}."
        )


def word(value: Any) -> str:
    """Return a cell as text without spaces around it; 1, 1.0, true and "1" are the same."""
    if isinstance(value, Integral | np.bool_):
        return str(int(value))
    if isinstance(value, Real):
        number = float(value)
        return str(int(number)) if number.is_integer() else f"{number:.15g}"
    return str(value).strip()


def words(values: pd.Series) -> pd.Series:
    """Return the cells of a column as text, None where a cell is empty (see ``word``)."""
    try:
        codes, unique = pd.factorize(values)
    except TypeError:
        # Lists, which cannot be compared with each other.
        codes, unique = pd.factorize(values.map(str, na_action="ignore"))
    names = np.array([*map(word, unique), None], dtype=object)
    return pd.Series(names[codes], index=values.index, name=values.name, dtype=object)


def places(values: pd.Series, known: Sequence[str]) -> Any:
    """Return the index of each text in ``known`` as an array of integers; −1 where it is empty or not among them."""
    return pd.Index(known, dtype=object).get_indexer(values.to_numpy(dtype=object)).astype(np.int64)
