"""The commands: ``metarun`` (also ``python -m metarun``), and those for what comes after a run.

Before anything else is imported, stopping signals are made to end the process silently: there is nothing to save, and
an interrupted import would print a traceback.
"""

import os
import signal
import sys
from importlib import import_module
from io import TextIOWrapper
from types import FrameType


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)


for _name in ("SIGINT", "SIGTERM", "SIGHUP"):
    # Windows has no SIGHUP. A signal that nohup has set to be ignored stays ignored.
    if hasattr(signal, _name) and signal.getsignal(getattr(signal, _name)) != signal.SIG_IGN:
        signal.signal(getattr(signal, _name), _leave)


def _run(module: str) -> None:
    """Run the command of a module."""
    from metarun.system.importing import importing

    if isinstance(sys.stdout, TextIOWrapper):
        # A terminal or a pipe that knows no ± still gets the line.
        sys.stdout.reconfigure(errors="backslashreplace")
    with importing():
        command = import_module(module).main
    command()


def main() -> None:
    """Entry point of ``metarun``."""
    _run("metarun.cli")


def compare() -> None:
    """Entry point of ``metarun-compare``."""
    _run("metarun.results.compare")


def report() -> None:
    """Entry point of ``metarun-report``."""
    _run("metarun.results.report")


def status() -> None:
    """Entry point of ``metarun-status``."""
    _run("metarun.results.status")


def test() -> None:
    """Entry point of ``metarun-test``."""
    _run("metarun.after.later_test")


def predict() -> None:
    """Entry point of ``metarun-predict``."""
    _run("metarun.after.predict")


if __name__ == "__main__":
    main()
