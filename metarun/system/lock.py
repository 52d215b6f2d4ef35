"""One owner per directory: a lock file that names the process which writes there.

The file ``.metarun.lock`` holds the host, the process id and the time at which that process started. A lock is stale
if it names this host, and the process is gone or started at another time (its id has been reused since). A stale lock
is taken over. A process on another host cannot be inspected, so its lock remains valid until it is deleted. One
exception: SLURM runs a job that it has queued again only after the former process has ended, wherever that was.
"""

import json
import logging
import os
import platform
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from metarun.errors import UserError

FILE = ".metarun.lock"
HALF_WRITTEN_SECONDS = 10.0
"""Seconds for which an unreadable lock is assumed to be still being written."""

POLL_SECONDS = 1.0
"""Seconds between two looks at a lock that this process waits for."""

log = logging.getLogger(__name__)

_held: set[Path] = set()


def started_at(pid: int) -> str | None:
    """Return when a process of this host started, as reported by the system; None if there is no such process.

    Linux counts clock ticks since the boot, so the result includes the boot's identifier; elsewhere ``ps`` is asked.
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
    job: str = ""
    """The job's number in SLURM's queue, if any."""
    restarts: int = 0
    """How often SLURM had queued the job again."""

    def is_gone(self) -> bool:
        """Whether the process is certainly no longer running."""
        own_job, restarts = job_of_slurm()
        if self.job and self.job == own_job and self.restarts < restarts:
            return True
        return self.host == platform.node() and started_at(self.pid) != self.started


def job_of_slurm() -> tuple[str, int]:
    """Return the number of the SLURM job that this process belongs to, and how often the job was queued again."""
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    return os.environ.get("SLURM_JOB_ID", ""), int(restarts) if restarts.isdecimal() else 0


def this_process() -> Owner:
    """Return this process as an owner."""
    return Owner(platform.node(), os.getpid(), started_at(os.getpid()) or "unknown", *job_of_slurm())


def read(path: Path) -> Owner | None:
    """Return the owner that a lock file names; None if there is no such file.

    An unreadable file names an owner that is gone, unless the file is so new that it may be half written.
    """
    try:
        text, age = path.read_text(errors="replace"), time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return None
    try:
        owner = Owner(**json.loads(text))
        texts = (owner.host, owner.started, owner.job)
        if all(isinstance(text, str) for text in texts) and {type(owner.pid), type(owner.restarts)} == {int}:
            return owner
    except (ValueError, TypeError, RecursionError):
        pass
    return Owner("another host" if abs(age) < HALF_WRITTEN_SECONDS else platform.node(), 0, "unknown")


def _create(path: Path) -> None:
    """Create the lock of this process atomically; raise FileExistsError if there is a lock already."""
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
    """Remove the lock of ``stale``; if another process has just replaced it with its own lock, that lock stays."""
    aside = path.with_name(f"{FILE}.{os.getpid()}.stale")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
    if read(aside) != stale:
        aside.rename(path)
        return
    aside.unlink()


def acquire(directory: Path, wait: bool = False) -> None:
    """Make this process the owner of ``directory``, which is created; nothing happens if this process owns it already.

    ``wait`` says to wait for another process of this host, if it owns the directory: the job of a sweep that was killed
    may outlive the sweep.

    Raises:
        UserError: another process owns the directory.
        OSError: the directory cannot be written.
    """
    path = directory.absolute() / FILE
    if path in _held:
        return
    directory.mkdir(parents=True, exist_ok=True)
    said = False
    while True:
        try:
            _create(path)
        except FileExistsError:
            owner = read(path)
            if owner is not None and not owner.is_gone():
                if wait and owner.host == platform.node():
                    if not said:
                        log.info("Waiting for process %d, which still works in %s.", owner.pid, directory)
                    said = True
                    time.sleep(POLL_SECONDS)
                    continue
                raise UserError(
                    f"{directory} belongs to a process that is running (process {owner.pid} on {owner.host}); wait "
                    f"until it ends, or choose another directory. (If that process is gone, delete {path}.)"
                ) from None
            if owner is not None:
                _take_away(path, owner)
            continue
        _held.add(path)
        return


def release(directory: Path) -> None:
    """Release ``directory``, if this process owns it."""
    path = directory.absolute() / FILE
    if path in _held:
        _held.discard(path)
        owner = read(path)
        # A forked process has inherited the set, but not the lock.
        if owner is not None and owner.pid == os.getpid():
            path.unlink(missing_ok=True)


def release_all() -> None:
    """Release every directory that this process owns."""
    for path in list(_held):
        release(path.parent)


def owner_of(directory: Path) -> Owner | None:
    """Return the process that currently works in ``directory``; None if there is none."""
    owner = read(directory / FILE)
    return None if owner is None or owner.is_gone() else owner
