"""``torchrun``: which of several processes this is, and how those that do not write files are kept from it.

Every process trains with the same numbers (`metarun.engine.processes`). Process 0 is the run: it owns the directory,
writes every file and listens to signals. The others follow it in a temporary directory and end with it.
"""

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from metarun.errors import UserError


def rank() -> int:
    """Return the number of this process among those that ``torchrun`` has started; 0 without ``torchrun``."""
    return int(os.environ["RANK"]) if count() > 1 else 0


def local_rank() -> int:
    """Return the same among the processes of this machine."""
    return int(os.environ["LOCAL_RANK"]) if count() > 1 else 0


def count() -> int:
    """Return how many processes ``torchrun`` has started; 1 without ``torchrun``."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


@contextmanager
def following(options: list[str], overrides: list[str]) -> Iterator[list[str]]:
    """Yield further overrides, with which a process other than 0 writes nothing that is kept.

    Raises:
        UserError: ``torchrun`` with a sweep.
    """
    if count() > 1 and {"-m", "--multirun"} & set(options):
        raise UserError("torchrun is for single runs: sweep without it, with hydra/launcher=joblib, submitit or ray.")
    if rank() == 0:
        yield []
        return
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    os.environ["TQDM_DISABLE"] = "1"
    folder = tempfile.mkdtemp(prefix="metarun")
    try:
        yield [
            f"hydra.run.dir='{folder}'",
            "hydra.output_subdir=null",
            "hydra/job_logging=none",
            "hydra/hydra_logging=none",
            *(["tracker=null"] if any(one.startswith("tracker=") for one in overrides) else []),
        ]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
