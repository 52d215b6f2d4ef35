"""One owner per directory: a lock file that names the process which writes there.

The file ``.metarun.lock`` holds the host, the process id and the time at which that process started. A lock is stale
if the host is this one and the process is gone, or has started at another time (the id has been given to another one
since); a stale lock is taken over. A process on another host cannot be looked at, so its lock holds until it is
deleted.
"""

import json
import os
import platform
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from metarun.errors import UserError

FILE = ".metarun.lock"
HALF_WRITTEN_SECONDS = 10.0
"""How long an unreadable lock is believed to be one that is being written at this moment."""

_held: set[Path] = set()


def started_at(pid: int) -> str | None:
    """When a process of this host started, as the system tells it; None if there is no such process.

    Linux counts clock ticks since the boot, so the boot's identifier belongs to the answer; elsewhere ``ps`` knows.
    """
    if Path("/proc/self/stat").exists():
        try:
            # The second field is the command's name in parentheses, which may hold spaces and parentheses itself.
            state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        boot = Path("/proc/sys/kernel/random/boot_id")
        return None if state in "ZX" else f"{boot.read_text().strip() if boot.exists() else ''} {fields[18]}"
    try:
        found = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return found.stdout.strip() or None


@dataclass(frozen=True)
class Owner:
    """A process that owns a directory."""

    host: str
    pid: int
    started: str

    def is_gone(self) -> bool:
        """Whether it certainly runs no more."""
        return self.host == platform.node() and started_at(self.pid) != self.started


def this_process() -> Owner:
    """The owner that this process would be."""
    return Owner(platform.node(), os.getpid(), started_at(os.getpid()) or "unknown")


def read(path: Path) -> Owner | None:
    """The owner that a lock file names; None if there is no such file.

    What cannot be read names an owner that is gone, unless the file is so new that it may be half written.
    """
    try:
        text, age = path.read_text(errors="replace"), time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return None
    try:
        owner = Owner(**json.loads(text))
        if isinstance(owner.host, str) and type(owner.pid) is int and isinstance(owner.started, str):
            return owner
    except (ValueError, TypeError, RecursionError):
        pass
    return Owner("another host" if abs(age) < HALF_WRITTEN_SECONDS else platform.node(), 0, "unknown")


def _create(path: Path) -> None:
    """Make the lock of this process, whole at once; FileExistsError if there is one."""
    text = json.dumps(asdict(this_process()))
    complete = path.with_name(f"{FILE}.{os.getpid()}.new")
    try:
        complete.write_text(text)
        os.link(complete, path)
    except FileExistsError:
        raise
    except OSError:
        # A file system without links.
        with path.open("x") as file:
            file.write(text)
    finally:
        complete.unlink(missing_ok=True)


def _take_away(path: Path, stale: Owner) -> None:
    """Remove the lock of ``stale``; another process may just have done the same and made its own, which stays."""
    aside = path.with_name(f"{FILE}.{os.getpid()}.stale")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
    if read(aside) != stale:
        aside.rename(path)
        return
    aside.unlink()


def acquire(directory: Path) -> None:
    """Make this process the owner of ``directory``, which is created; no effect if it is already.

    Raises:
        UserError: another process owns it.
        OSError: nothing can be written there.
    """
    path = directory.absolute() / FILE
    if path in _held:
        return
    directory.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            _create(path)
        except FileExistsError:
            owner = read(path)
            if owner is not None and not owner.is_gone():
                raise UserError(
                    f"{directory} belongs to a process that is running (process {owner.pid} on {owner.host}); wait for "
                    f"its end or choose another directory. (If that process is gone, delete {path}.)"
                ) from None
            if owner is not None:
                _take_away(path, owner)
            continue
        _held.add(path)
        return


def release(directory: Path) -> None:
    """Give ``directory`` up, if this process owns it."""
    path = directory.absolute() / FILE
    if path in _held:
        _held.discard(path)
        owner = read(path)
        # A process that was forked off has inherited the set, and not the lock.
        if owner is not None and owner.pid == os.getpid():
            path.unlink(missing_ok=True)


def release_all() -> None:
    """Give up every directory that this process owns."""
    for path in list(_held):
        release(path.parent)


def owner_of(directory: Path) -> Owner | None:
    """The process that works in ``directory`` now; None if there is none."""
    owner = read(directory / FILE)
    return None if owner is None or owner.is_gone() else owner
