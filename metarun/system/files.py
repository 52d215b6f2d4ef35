"""Atomic writing of files: a file is either complete or absent."""

import csv
import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

LAST, PREVIOUS = "last.pt", "previous.pt"
"""The newest checkpoint of a run and the one before it."""


def has_checkpoint(directory: Path) -> bool:
    """Whether the run in ``directory`` has left a checkpoint from which it can go on."""
    return any((directory / "checkpoints" / name).is_file() for name in (LAST, PREVIOUS))


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a binary file that replaces ``path`` when the block ends without an error; otherwise ``path`` stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        Path(name).chmod(0o666 & ~umask)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def remove_leftovers(directory: Path, age: float = 0.0) -> None:
    """Delete unfinished files that killed processes left in ``directory``, if older than ``age`` seconds."""
    for path in directory.glob(".*.part"):
        # Another process may be faster, or own the file.
        with suppress(OSError):
            if time.time() - path.stat().st_mtime >= age:
                path.unlink()


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Wait for other processes of this machine that are inside for the same ``path``; the system lets go of dead ones.

    Where the folder cannot be written, or the system has no such locks (Windows, some file servers), nobody waits.
    """
    try:
        import fcntl

        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.with_name(f".{path.name}.lock").open("wb")
    except (ImportError, OSError):
        yield
        return
    with file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


Held = TypeVar("Held")


def held_or_made(path: Path, read: Callable[[], Held | None], make: Callable[[], Held]) -> Held:
    """Return what ``read()`` finds at ``path``, or what one process at a time makes; the others then read that."""
    if (held := read()) is not None:
        return held
    with one_at_a_time(path):
        held = read()
        return make() if held is None else held


def write_text(path: Path, text: str) -> None:
    """Write ``text`` atomically; bytes of file names that are no text are escaped."""
    with atomic_write(path) as file:
        file.write(text.encode(errors="backslashreplace"))


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a table with a header; values that are None or missing are left empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        missing = {key for key, value in row.items() if value is None}
        writer.writerow({key: "" if key in missing else value for key, value in row.items()})
    write_text(path, text.getvalue())
