"""Tensors that take seconds to compute, cached between runs.

The folder is ``METARUN_CACHE_DIR``, else ``metarun`` in the user's cache directory (``XDG_CACHE_HOME``, else
``~/.cache``). It can be deleted at any time.
"""

import hashlib
import logging
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from metarun.results.files import atomic_write

log = logging.getLogger(__name__)


def cache_dir() -> Path:
    """Where cached tensors live."""
    if folder := os.environ.get("METARUN_CACHE_DIR"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metarun"


def cached(name: str, key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors that ``make()`` returns, read from the cache if it holds them under ``key``."""
    path = cache_dir() / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt"
    try:
        return cast(dict[str, Tensor], torch.load(path, weights_only=True))
    except FileNotFoundError:
        pass
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        log.warning("The cached %s cannot be read (%s); it is made again.", path, error)
    tensors = make()
    try:
        with atomic_write(path) as file:
            torch.save(tensors, file)
    except OSError as error:
        log.warning("%s cannot be cached in %s (%s), so each run makes it again.", name, path.parent, error)
    return tensors
