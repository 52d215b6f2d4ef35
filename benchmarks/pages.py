"""Figures that are measured in parts, and where they stand in the documentation."""

import csv
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from metarun.system.files import write_csv, write_text

Row = dict[str, Any]


def number_or_text(value: str) -> float | int | str | None:
    """Return a cell of a table as what it was before it was written."""
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value or None


def with_others(path: Path, columns: Sequence[str], cases: Collection[str], rows: Sequence[Row]) -> list[Row]:
    """Write the rows of ``cases`` into a table, in place of their earlier rows; return all rows of the table."""
    kept: list[Row] = []
    if path.exists():
        with path.open(newline="") as file:
            read = [{key: number_or_text(value) for key, value in row.items()} for row in csv.DictReader(file)]
        kept = [row for row in read if row["case"] not in cases]
    every = [*kept, *rows]
    write_csv(path, columns, every)
    return every


def put(page: Path, texts: Mapping[str, str]) -> None:
    """Replace what stands on a page between ``<!-- NAME -->`` and ``<!-- end of NAME -->``, for each name.

    Raises:
        ValueError: the page has no such place.
    """
    content = page.read_text(encoding="utf-8")
    for name, text in texts.items():
        first, last = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        before, found, rest = content.partition(first)
        _, ended, after = rest.partition(last)
        if not found or not ended:
            raise ValueError(f"{page} has no place for {name}; write the lines {first.strip()} and {last.strip()}.")
        content = before + first + text + last + after
    write_text(page, content)
