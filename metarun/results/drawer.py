"""Pictures drawn by another process, while the run goes on.

Importing matplotlib takes half a second, and a picture a third of one, as long as all else that a short run does. The
process is started by the command before torch is imported, and draws one picture after the other for all runs of the
command. Without it, pictures are drawn where they are asked for.
"""

import atexit
import contextlib
import logging
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from metarun.errors import first_line

log = logging.getLogger(__name__)

SERVE = "import sys; sys.path[:] = {path!r}; from metarun.results.drawer import serve; serve()"
FORGIVEN = (RuntimeError, ValueError, TypeError, LookupError)
"""Errors of a picture that must not cost a finished run its results."""


class Picture(NamedTuple):
    """Something to be drawn and written."""

    name: str
    function: Callable[..., object]
    arguments: tuple[Any, ...]


_process: "subprocess.Popen[bytes] | None" = None
_asked: deque[Picture] = deque()
"""What the process has been asked for, and has not answered yet."""


def start() -> None:
    """Start the process, unless it runs, or matplotlib has been imported here already."""
    global _process
    if _process is None and "matplotlib" not in sys.modules and sys.executable:
        with contextlib.suppress(OSError):
            command = [sys.executable, "-c", SERVE.format(path=sys.path)]
            _process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            atexit.register(stop)


def stop() -> None:
    """End the process; what it has been asked for is drawn here, if anyone waits for it."""
    global _process
    if _process is not None:
        _process.kill()
        for pipe in (_process.stdin, _process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()
        _process.wait()
        _process = None


def draw(name: str, function: Callable[..., object], *arguments: Any) -> None:
    """Have ``function(*arguments)`` called by the process, or call it now if there is none.

    ``function`` is found by its name in its module, and neither it nor an argument needs torch. A warning says that
    ``name`` cannot be shown if that is so; see also ``finish``.

    Raises:
        OSError: the picture cannot be written.
    """
    # The process may have another working directory.
    picture = Picture(name, function, tuple(one.absolute() if isinstance(one, Path) else one for one in arguments))
    if _process is None:
        report(picture, called(picture))
        return
    _asked.append(picture)
    try:
        assert _process.stdin is not None
        _process.stdin.write(pickle.dumps(picture))
        _process.stdin.flush()
    except OSError:
        stop()


def called(picture: Picture) -> Exception | None:
    """Draw a picture here; return the error that it has ended with."""
    try:
        picture.function(*picture.arguments)
    except Exception as error:
        return error
    return None


def report(picture: Picture, error: Exception | None) -> None:
    """Warn of a picture that cannot be drawn; raise any other error."""
    if isinstance(error, FORGIVEN):
        log.warning("  %s cannot be shown: %s", picture.name, first_line(error))
    elif error is not None:
        raise error


def answer(picture: Picture) -> Exception | None:
    """Return the error that a picture has ended with, once it is drawn; if the process has died, draw it here."""
    if _process is not None:
        assert _process.stdout is not None
        try:
            found: Exception | None = pickle.load(_process.stdout)
        except Exception:
            # The process has been killed, or an error cannot be passed on.
            stop()
        else:
            return found
    return called(picture)


def finish() -> None:
    """Wait until all pictures have been drawn.

    Raises:
        OSError: a picture cannot be written.
    """
    while _asked:
        picture = _asked.popleft()
        report(picture, answer(picture))


def forget() -> None:
    """Wait for pictures of a run that has failed, whatever becomes of them."""
    while _asked:
        picture = _asked.popleft()
        if _process is not None:
            answer(picture)


def serve() -> None:
    """Draw what comes in until there is no more; answer None, or the error of a picture."""
    import gc
    import io
    import os
    import signal

    gc.disable()
    # The process that asks decides when to stop.
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    source, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    # Whatever matplotlib prints must not get between the answers.
    os.dup2(2, 1)
    from metarun.results.plots import new_figure

    # The first picture reads the fonts, which need not wait until there is something to show.
    figure, axis = new_figure()
    axis.set(title="title", xlabel="x", ylabel="y")
    figure.savefig(io.BytesIO(), format="png", dpi=150)
    with contextlib.suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        while True:
            found = called(pickle.load(source))
            pickle.dump(found, answers)
            answers.flush()
