"""Rows of bytes that are computed once, one by one, and read from a mapped file of the cache afterwards."""

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from metarun.data.cache import A_DAY, cache_dir
from metarun.system.files import atomic_write, held_or_made, remove_leftovers

log = logging.getLogger(__name__)

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
DIGEST = 16
"""Bytes of the hash of a row."""
LOOKED_AT = 64
"""Number of rows that are compared with their hashes when a file is read."""


class Store(NamedTuple):
    """Rows of bytes."""

    rows: Tensor
    """uint8 ``[rows, *shape]``; in memory only as far as it is used."""
    digests: list[bytes]
    """A hash of each row."""


def digest(row: Bytes) -> bytes:
    """Return the hash of a row."""
    return hashlib.blake2b(row.tobytes(), digest_size=DIGEST).digest()


def different(digests: Sequence[bytes]) -> list[int]:
    """Return the rows that are no copies of earlier ones, given the hashes of all."""
    first = dict[bytes, int]()
    for row, own in enumerate(digests):
        first.setdefault(own, row)
    return list(first.values())


def _read(path: Path, count: int, shape: tuple[int, ...]) -> Store | None:
    """Return the rows in a file, or None if it is not there or not whole."""
    size = count * int(np.prod(shape))
    if not path.is_file() or path.stat().st_size != size + count * DIGEST:
        return None
    # Copy on write, since torch wants memory that can be written; nothing writes it.
    data: Bytes = np.memmap(path, np.uint8, "c")
    rows = data[:size].reshape(count, *shape)
    tail = data[size:].tobytes()
    digests = [tail[at : at + DIGEST] for at in range(0, len(tail), DIGEST)]
    if any(digest(rows[i]) != digests[i] for i in range(0, count, count // LOOKED_AT + 1)):
        log.warning("The cached %s is damaged; it is made again.", path)
        return None
    return Store(torch.from_numpy(rows), digests)


def stored(
    name: str, key: str, count: int, shape: tuple[int, ...], make: Callable[[], Iterator[Bytes]], say: str
) -> Store:
    """Return the rows that ``make()`` yields, read from the cache if it holds them under ``key``.

    Args:
        name: the beginning of the file's name.
        key: all that determines the rows.
        count: number of rows.
        shape: shape of a row.
        make: makes an iterator of the rows.
        say: a line for the log before rows are made.
    """
    path = cache_dir() / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.bytes"
    read = partial(_read, path, count, shape)

    def made() -> Store | None:
        remove_leftovers(path.parent, A_DAY)
        log.info("%s", say)
        with atomic_write(path) as file:
            digests = []
            for row in make():
                file.write(row.tobytes())
                digests.append(digest(row))
            file.write(b"".join(digests))
        return read()

    try:
        if (held := held_or_made(path, read, made)) is not None:
            return held
        reason = "it changed while it was written"
    except OSError as error:
        reason = str(error)
    log.warning("%s cannot be cached in %s (%s), so each run makes it again, in memory.", name, path.parent, reason)
    rows = np.empty((count, *shape), np.uint8)
    for i, row in enumerate(make()):
        rows[i] = row
    return Store(torch.from_numpy(rows), [digest(row) for row in rows])
