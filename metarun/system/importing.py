"""Imports of many modules in less time."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Inside, Python does not search for garbage, and what has been imported is left out of all later searches.

    Modules are hardly ever garbage. Without this, Python would look through a million of their objects several times
    while torch is imported, and again during the run.
    """
    known, enabled = len(sys.modules), gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > known:
            gc.freeze()
        if enabled:
            gc.enable()
