"""Signals that ask a process to stop: Ctrl-C, what a batch system sends, and the end of a terminal.

The exit code is 128 + the signal's number, by the convention of shells.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from metarun.errors import Stopped

Handler = Callable[[int, FrameType | None], None]


def stop(number: int, frame: FrameType | None) -> None:
    """Raise ``Stopped`` from a signal handler, so that the work in progress can report how far it has come."""
    raise Stopped(number)


def install(handler: Handler) -> dict[int, object]:
    """Give the stopping signals to ``handler``; return the previous handlers.

    A signal that the process was told to ignore (``nohup``) stays ignored. Only the main thread can install a handler.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    # Windows has no SIGHUP.
    known = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    return {number: signal.signal(number, handler) for number in known if signal.getsignal(number) != signal.SIG_IGN}


@contextmanager
def handled_by(handler: Handler) -> Iterator[None]:
    """Inside, ``handler`` handles the stopping signals."""
    before = install(handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)  # type: ignore[arg-type]
