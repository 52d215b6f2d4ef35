"""Meta-learning experiments: the command ``metarun`` (see ``metarun --help``), and what can be done with its runs.

    >>> import metarun
    >>> learner = metarun.load("outputs/first")
    >>> adapted = learner.adapt(x, y)
    >>> adapted.predict(new_x)

The names below are imported when they are first used, so that ``import metarun`` takes no time.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["Adapted", "AdaptedPolicy", "AdaptedTasks", "Learner", "Run", "UserError", "load", "train"]

if TYPE_CHECKING:
    from metarun.after.learner import Adapted, AdaptedTasks, Learner, load
    from metarun.after.policy import AdaptedPolicy
    from metarun.after.train import Run, train
    from metarun.errors import UserError

HOMES = {
    **dict.fromkeys(["Adapted", "AdaptedTasks", "Learner", "load"], "metarun.after.learner"),
    "AdaptedPolicy": "metarun.after.policy",
    **dict.fromkeys(["Run", "train"], "metarun.after.train"),
    "UserError": "metarun.errors",
}
"""The module of each name of the public interface."""


# Threads of torch that wait for each other spin, by default for so long that two runs on the same cores take several
# times as long as one after the other. A thousand turns cost a run by itself nothing. Torch reads this when it is
# imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'metarun' has no attribute {name!r}")
    return getattr(import_module(HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
