"""The commands: ``metarun`` (also ``python -m metarun``), and those for what comes after a run.

Before anything else is imported, stopping signals are made to end the process silently: there is nothing to save, and
an interrupted import would print a traceback.
"""

import os
import signal
from types import FrameType


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)


for _name in ("SIGINT", "SIGTERM", "SIGHUP"):
    # Windows has no SIGHUP. A signal that nohup has set to be ignored stays ignored.
    if hasattr(signal, _name) and signal.getsignal(getattr(signal, _name)) != signal.SIG_IGN:
        signal.signal(getattr(signal, _name), _leave)


def main() -> None:
    """Entry point of ``metarun``."""
    from metarun.cli import main as command

    command()


def compare() -> None:
    """Entry point of ``metarun-compare``."""
    from metarun.results.compare import main as command

    command()


def report() -> None:
    """Entry point of ``metarun-report``."""
    from metarun.results.report import main as command

    command()


def status() -> None:
    """Entry point of ``metarun-status``."""
    from metarun.results.status import main as command

    command()


def test() -> None:
    """Entry point of ``metarun-test``."""
    from metarun.after.later_test import main as command

    command()


def predict() -> None:
    """Entry point of ``metarun-predict``."""
    from metarun.after.predict import main as command

    command()


if __name__ == "__main__":
    main()
