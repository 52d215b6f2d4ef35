"""From what users have to the inputs of a family: arrays and tables of numbers, sentences, and pictures of drawings.

See `metarun.contracts.Converter`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from metarun.contracts import Examples
from metarun.data.pictures import opened, read_pictures, upright
from metarun.data.portable import portable
from metarun.data.tokens import Tokenizer
from metarun.errors import require

TEXT_NAMES = ("text", "sentence", "utterance")
"""Names of the column that holds a sentence, in any case."""
LABEL_NAMES = ("label", "class", "category", "intent")
"""Names of the column that holds its label."""
TARGET_NAMES = ("y", "target", "label", "class")
"""Names of the column that holds the target, in any case; y1, y2, … where there are several."""


def numbers_of(x: Any, dtype: torch.dtype | None = None) -> Tensor:
    """Return arrays, tensors, tables or nested lists of numbers as a tensor, by default of the default dtype.

    Raises:
        ValueError: there is something that is not a number.
    """
    dtype = dtype or torch.get_default_dtype()
    if isinstance(x, Tensor):
        return x.detach().to(dtype)
    try:
        array = np.array(x, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"these inputs are arrays, tables or lists of numbers, and this is not ({error})") from None
    return torch.from_numpy(array).to(dtype)


def moments(training: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each column of ``training [rows, columns]``, 1 where it never changes."""
    training = training.double()
    mean, std = training.mean(0), training.std(0, correction=0)
    # Rounding leaves deviations of equal numbers from their mean.
    varies = std > 1e-12 * training.abs().amax(0)
    return tuple(mean.tolist()), tuple(torch.where(varies, std, 1.0).tolist())


def table_of(path: Path, missing: Sequence[str] = (), na: bool = True) -> Any:
    """Return the table in a CSV, TSV or Parquet file.

    ``missing`` are texts that stand for a missing value, and ``na`` says whether NA, None and their like do.

    Raises:
        ValueError: the file is none of them, or cannot be read.
        UserError: its header is broken.
    """
    import csv

    import pandas as pd

    from metarun.data.tables import read_further

    require(path.suffix.lower() in (".csv", ".tsv", ".parquet"), f"{path} is no .csv, .tsv or .parquet file; name one")
    try:
        table = read_further(path, missing, na)
    except (ValueError, ImportError, csv.Error, pd.errors.ParserWarning) as error:
        raise ValueError(f"{path} cannot be read as a table: {' '.join(str(error).split())}") from error
    require(len(table) > 0, f"{path} has no rows; give it at least one")
    return table


def row_names(count: int) -> list[str]:
    """Return the numbers of rows, from 1."""
    return [str(row + 1) for row in range(count)]


@portable
@dataclass(frozen=True)
class Arrays:
    """Inputs that are arrays of numbers, as they are."""

    shape: tuple[int, ...]
    """Shape of one input."""
    outputs: int = 1
    """Number of columns of a table that are targets."""

    def inputs(self, x: Any, dtype: torch.dtype | None = None) -> Tensor:
        """Return ``x`` as ``[examples, *shape]``; where an input is one number, ``[examples]`` will do.

        Raises:
            ValueError: ``x`` has another shape, or holds something that is not a finite number.
        """
        found = numbers_of(x, dtype)
        if found.ndim == 1 and math.prod(self.shape) == 1:
            found = found.reshape(-1, *self.shape)
        wanted = f"[examples{''.join(f', {size}' for size in self.shape)}]"
        require(found.shape[1:] == self.shape, f"x must have shape {wanted}, not {list(found.shape)}")
        require(bool(found.isfinite().all()), "x must hold finite numbers alone; replace what is missing")
        return found

    def read(self, path: Path) -> Examples:
        """Read a table: one row per example, one column per number of an input, and columns of targets or none.

        Targets are in columns named y (y1, y2, … where there are several), target, label or class, or else in the last
        columns, if the table has as many more as there are targets.

        Raises:
            ValueError: the file cannot be read, or has another number of columns.
        """
        table, count = table_of(path), math.prod(self.shape)
        names = (*TARGET_NAMES, *(f"{name}{i + 1}" for name in TARGET_NAMES for i in range(self.outputs)))
        # In their order, wherever their columns are: the first target is y1.
        targets = sorted((c for c in table if str(c).lower() in names), key=lambda c: names.index(str(c).lower()))
        if not targets and table.shape[1] == count + self.outputs:
            targets = list(table.columns[count:])
        inputs = [column for column in table if column not in targets]
        require(
            len(inputs) == count,
            f"{path} has {len(inputs)} columns of inputs, and the learner takes {count}; name the column of the target "
            "y, and leave out what is no input",
        )
        y = table[targets[0]].tolist() if len(targets) == 1 else table[targets].values.tolist() if targets else None
        x = table[inputs] if len(self.shape) == 1 else table[inputs].to_numpy().reshape(-1, *self.shape)
        return Examples(x, y, row_names(len(table)))


def sentences_of(x: Any) -> list[str]:
    """Return a list (or a column of a table) of sentences, or a single one, as a list.

    Raises:
        ValueError: there is something that is not a text.
    """
    sentences = [x] if isinstance(x, str) else list(x)
    texts = len(sentences) > 0 and all(isinstance(one, str) for one in sentences)
    require(texts, "these inputs are sentences; give a list of texts with at least one")
    return sentences


def read_sentences(path: Path) -> Examples:
    """Read a table with a column ``text`` (or ``sentence``), and ``label`` where sentences have one.

    Raises:
        ValueError: the file cannot be read, or has no such column.
    """
    table = table_of(path, na=False)
    columns = {str(column).lower(): column for column in table}
    text = next((columns[name] for name in TEXT_NAMES if name in columns), None)
    require(text is not None, f"{path} has no column named text; name the column of the sentences so")
    target = next((columns[name] for name in (*TARGET_NAMES, *LABEL_NAMES) if name in columns), None)
    y = None if target is None else table[target].tolist()
    require(not table[text].isna().any(), f"{path} has a row without a text; add it, or delete the row")
    return Examples([str(one) for one in table[text]], y, row_names(len(table)))


@portable
@dataclass(frozen=True)
class Sentences:
    """Sentences as rows of token ids (`metarun.data.tokens`)."""

    tokenizer: Tokenizer
    columns: int
    """Number of ids of a row; those of longer sentences are cut off."""
    weights: Tensor | None = field(default=None, compare=False, repr=False)
    """How informative each id is ``[ids]`` (`metarun.contracts.Tokens`), for later tests on other sentences."""

    def inputs(self, x: Any) -> Tensor:
        """Return a list (or a column of a table) of sentences as rows of ids ``[sentences, columns]``.

        Raises:
            ValueError: there is something that is not a text.
        """
        rows = self.tokenizer(sentences_of(x))[:, : self.columns]
        return pad(rows, (0, self.columns - rows.shape[1])).long()

    def read(self, path: Path) -> Examples:
        """Read a table with a column ``text`` (or ``sentence``), and ``label`` where sentences have one.

        Raises:
            ValueError: the file cannot be read, or has no such column.
        """
        return read_sentences(path)


@portable
@dataclass(frozen=True)
class Drawings:
    """Drawings in dark ink on light paper, as ``[1, size, size]`` with ink 1 on 0."""

    size: int

    def inputs(self, x: Any) -> Tensor:
        """Return paths of pictures, or arrays ``[n, size, size]`` or ``[n, 1, size, size]`` with ink 1 on 0.

        Raises:
            ValueError: a picture cannot be read, or the arrays have another shape or other values.
        """
        if isinstance(x, str | Path):
            x = [x]
        if isinstance(x, Sequence) and len(x) > 0 and all(isinstance(one, str | Path) for one in x):
            return torch.stack([self._drawing(Path(one)) for one in x])
        found = numbers_of(x)
        found = Arrays((1, self.size, self.size)).inputs(found[:, None] if found.ndim == 3 else found)
        require(
            bool(((found >= 0) & (found <= 1)).all()),
            "drawings are arrays from 0 (paper) to 1 (ink); divide bytes by 255, and subtract from 1 if paper is white",
        )
        return found

    def _drawing(self, path: Path) -> Tensor:
        try:
            small = upright(opened(path.read_bytes()), 1).resize((self.size, self.size), Image.Resampling.LANCZOS)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read as a picture ({error})") from error
        return torch.from_numpy(255 - np.asarray(small)).to(torch.get_default_dtype())[None] / 255

    def read(self, path: Path) -> Examples:
        """Read a folder of pictures, or one with a folder per class (see ``read_pictures``)."""
        return read_pictures(path)
