"""Files of the user: folders and zip archives whose files are read one at a time, and tables."""

import csv
import hashlib
import io
import json
import os
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from metarun.errors import UserError

LARGEST_FILE = 2**28
"""Bytes of the largest file that is read from a folder or an archive; none of them needs more."""
LARGEST_TABLE = 2**31
"""Bytes of the largest table."""
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError, ValueError)
"""What reading a damaged or an encrypted archive raises."""
PARTS = {
    **{"train": "train", "training": "train"},
    **{"val": "val", "valid": "val", "validation": "val", "dev": "val"},
    **{"test": "test", "testing": "test"},
}
"""Split by the names that it is given in folders and tables."""


def found(path: str, data_dir: str, key: str = "task.path") -> Path:
    """Return ``path``, or ``data_dir/path`` if only that exists.

    Raises:
        UserError: neither exists.
    """
    for place in (Path(path).expanduser(), Path(data_dir) / path):
        if place.exists():
            return place
    raise UserError(f"There is no {path}, neither here nor in {data_dir}; set {key} to where the data are.")


def _visible(name: str) -> bool:
    """Whether a path has no part that systems hide, or add to archives by themselves."""
    return not any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def visible(folder: Path, pattern: str = "*") -> list[Path]:
    """Return what matches a pattern below a folder, sorted, without what systems hide or add by themselves."""
    return sorted(path for path in folder.glob(pattern) if _visible(path.relative_to(folder).as_posix()))


def _walked(root: Path) -> Iterator[str]:
    """Yield the paths of all files below ``root``, through links to folders, each folder once."""
    seen = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        for name in names:
            yield Path(folder, name).relative_to(root).as_posix()


class Files:
    """The files below a folder, or in a zip archive, which is not unpacked.

    Args:
        source: the folder or the archive.
        remedy: what to do about a damaged archive, as the end of a sentence.

    Raises:
        UserError: the archive is damaged, or has an entry that points outside of it.
    """

    def __init__(self, source: Path, remedy: str = "pack it again") -> None:
        self.source, self.remedy = source, remedy
        self.archive: zipfile.ZipFile | None = None
        if source.is_dir():
            return
        try:
            self.archive = zipfile.ZipFile(source)
        except DAMAGED as error:
            raise UserError(f"{source} cannot be opened as a zip ({error}); {remedy}.") from error
        for name in self.archive.namelist():
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
                raise UserError(f"{source} has an entry that points outside of it ({name!r}); {remedy}.")

    def __enter__(self) -> "Files":
        return self

    def __exit__(self, *error: object) -> None:
        if self.archive is not None:
            self.archive.close()

    def names(self) -> list[str]:
        """Return the paths of all visible files, sorted."""
        if self.archive is None:
            return sorted(filter(_visible, _walked(self.source)))
        return sorted(
            info.filename for info in self.archive.infolist() if not info.is_dir() and _visible(info.filename)
        )

    def stamp(self, names: Sequence[str]) -> str:
        """Return a text that changes when one of the files does, by their sizes and times of change."""
        if self.archive is not None:
            status = self.source.stat()
            return f"{self.source.resolve()} {status.st_size} {status.st_mtime_ns} {_hash(names)}"
        return f"{self.source.resolve()} {_hash(self._stamp_of(name) for name in names)}"

    def _stamp_of(self, name: str) -> str:
        try:
            status = (self.source / name).stat()
        except OSError:
            return f"{name} missing"
        return f"{name} {status.st_size} {status.st_mtime_ns}"

    def read(self, name: str) -> bytes:
        """Return the content of a file.

        Raises:
            UserError: it does not exist, cannot be read, or is larger than ``LARGEST_FILE``.
        """
        path = self.source / name
        try:
            size = path.stat().st_size if self.archive is None else self.archive.getinfo(name).file_size
            if size > LARGEST_FILE:
                raise UserError(f"{path} has {size} bytes, and at most {LARGEST_FILE} are read; make it smaller.")
            return path.read_bytes() if self.archive is None else self.archive.read(name)
        except KeyError as error:
            raise UserError(f"There is no {name} in {self.source}; add it, or change what names it.") from error
        except DAMAGED as error:
            if self.archive is not None:
                raise UserError(f"{self.source} is damaged at {name} ({error}); {self.remedy}.") from error
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{path} cannot be read ({reason}); make it readable, or change what names it.") from error


def read_file(path: Path) -> bytes:
    """Return the content of a file.

    Raises:
        UserError: it cannot be read, or is larger than ``LARGEST_TABLE``.
    """
    try:
        if (size := path.stat().st_size) > LARGEST_TABLE:
            raise UserError(f"{path} has {size} bytes, and at most {LARGEST_TABLE} are read; make it smaller.")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); make it readable, or choose another.") from error


def json_of(text: str) -> Any:
    """Return what a JSON text holds. Halves of characters (lone surrogates), which no encoding has, become U+FFFD.

    Raises:
        json.JSONDecodeError: it is not JSON.
    """

    def whole(value: Any) -> Any:
        if isinstance(value, str):
            return re.sub("[\ud800-\udfff]", "\ufffd", value)
        if isinstance(value, list):
            return [whole(one) for one in value]
        return {whole(key): whole(one) for key, one in value.items()} if isinstance(value, dict) else value

    found = json.loads(text)
    return whole(found) if re.search(r"\\u[dD][89a-fA-F]", text) else found


def _hash(texts: Iterable[str]) -> str:
    """Return a hash of texts."""
    found = hashlib.sha256()
    for text in texts:
        found.update(f"{len(text)}:{text}".encode())
    return found.hexdigest()


class Row(NamedTuple):
    """A row of a table."""

    line: int
    """The number of the line on which it ends, counted from 1."""
    values: dict[str, str]


def table(content: bytes, place: str, columns: Mapping[str, Sequence[str]], optional: Sequence[str] = ()) -> list[Row]:
    """Return the rows of a CSV text, separated by commas, semicolons or tabs, whose first line names the columns.

    Args:
        content: the text in UTF-8.
        place: the file, for messages.
        columns: the names that each column may have, in any case; other columns are ignored.
        optional: columns that may be missing.

    Raises:
        UserError: the text is not such a table, or a cell is empty.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{place}, line {line}, is not text in UTF-8; save the file in this encoding.") from error
    head = text.partition("\n")[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=head.count))
    try:
        names = [name.strip().lower() for name in next(reader, [])]
        position: dict[str, int] = {}
        for column, known in columns.items():
            at = [names.index(name) for name in known if name in names]
            if not at and column not in optional:
                raise UserError(f"{place} has no column {column} in its first line; name its columns there.")
            position |= {column: at[0]} if at else {}
        rows = []
        for cells in reader:
            if not any(map(str.strip, cells)):
                continue
            if len(cells) != len(names):
                raise UserError(
                    f"{place}, line {reader.line_num}, has {len(cells)} values, and the first line names {len(names)} "
                    "columns; put values that contain the separator in quotes."
                )
            values = {column: cells[at].strip() for column, at in position.items()}
            empty = [column for column, value in values.items() if not value]
            if empty:
                raise UserError(f"{place}, line {reader.line_num}, has no {empty[0]}; add it, or delete the line.")
            rows.append(Row(reader.line_num, values))
    except csv.Error as error:
        raise UserError(f"{place}, line {reader.line_num}, cannot be read ({error}); mend or delete it.") from error
    if not rows:
        raise UserError(f"{place} has no row after its first line; add some.")
    return rows


def split_in(row: Row, place: str) -> str | None:
    """Return the split that a row of a table names, None if it names none.

    Raises:
        UserError: there is no such split.
    """
    value = row.values.get("split")
    if value is None:
        return None
    if value.lower() not in PARTS:
        raise UserError(f"{place}, line {row.line}, has the split {value!r}; write train, val or test.")
    return PARTS[value.lower()]
