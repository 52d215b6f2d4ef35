"""Tensors that take seconds to compute, cached between runs.

The folder is ``METARUN_CACHE_DIR``, else ``metarun`` in the user's cache directory (``XDG_CACHE_HOME``, else
``~/.cache``). It can be deleted at any time, and where it cannot be written it is done without.
"""

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import cast

from torch import Tensor

from metarun.system import sealed
from metarun.system.files import held_or_made, remove_leftovers

log = logging.getLogger(__name__)

A_DAY = 24 * 3600.0
"""Seconds after which an unfinished file in the shared cache is assumed to belong to a process that was killed."""


def cache_dir() -> Path:
    """Where cached tensors live; a temporary folder for a user without a home directory."""
    if folder := os.environ.get("METARUN_CACHE_DIR"):
        return Path(folder)
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / "metarun"
    try:
        return Path.home() / ".cache" / "metarun"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / "metarun"


def cached(name: str, key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors that ``make()`` returns, read from the cache if it holds them under ``key``."""
    path = cache_dir() / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt"

    def made() -> dict[str, Tensor]:
        tensors = make()
        try:
            remove_leftovers(path.parent, A_DAY)
            sealed.save(path, tensors)
        except OSError as error:
            log.warning("%s cannot be cached in %s (%s), so each run makes it again.", name, path.parent, error)
        return tensors

    return held_or_made(path, partial(_read, path), made)


def _read(path: Path) -> dict[str, Tensor] | None:
    """Return the tensors in a file, or None if it is not there or damaged."""
    try:
        return cast(dict[str, Tensor], sealed.load(path))
    except FileNotFoundError:
        return None
    except sealed.Damaged as error:
        log.warning("The cached %s cannot be used (%s); it is made again.", path, error)
        with suppress(OSError):
            path.unlink()
        return None
