"""Launchers and sweepers of metarun, each a thin file over one library; none is imported before it is chosen.

Hydra builds a launcher or sweeper only under a name that begins with ``hydra_plugins.`` and that is in a table.
``register`` adds ours to that table, so that no other package and no search for plug-ins is involved.
"""

from importlib.util import find_spec
from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from omegaconf import DictConfig

from metarun.errors import UserError
from metarun.results.tables import Watcher


def processes_launcher(**keys: Any) -> Launcher:
    """Return the launcher of ``hydra/launcher=processes``."""
    from metarun.launch.processes import ProcessesLauncher

    return ProcessesLauncher(**keys)


def joblib_launcher(**keys: Any) -> Launcher:
    """Return the launcher of ``hydra/launcher=joblib``."""
    from metarun.launch.joblib import JoblibLauncher

    return JoblibLauncher(**keys)


def submitit_launcher(**keys: Any) -> Launcher:
    """Return the launcher of ``hydra/launcher=submitit``."""
    from metarun.launch.submitit import SubmititLauncher

    return SubmititLauncher(**keys)


def ray_launcher(**keys: Any) -> Launcher:
    """Return the launcher of ``hydra/launcher=ray``."""
    from metarun.launch.ray import RayLauncher

    return RayLauncher(**keys)


def optuna_sweeper(**keys: Any) -> Sweeper:
    """Return the sweeper of ``hydra/sweeper=optuna``."""
    from metarun.launch.optuna import OptunaSweeper

    return OptunaSweeper(**keys)


PREFIX = "hydra_plugins.metarun."
MEMBERS = {
    f"{PREFIX}{function.__name__}": function
    for function in (processes_launcher, joblib_launcher, submitit_launcher, ray_launcher, optuna_sweeper)
}
"""What the members of ``hydra/launcher`` and ``hydra/sweeper`` name as their target."""


def register() -> None:
    """Tell Hydra where the members are."""
    known: dict[str, Any] = Plugins.instance().class_name_to_class
    known.update(MEMBERS)


def check(config: DictConfig) -> None:
    """Raise an error if a composed configuration has a launcher or sweeper that lacks its package, or a wrong number.

    Raises:
        UserError: the command that installs the package, or the number and what it may be.
    """
    for key in ("launcher", "sweeper"):
        target = str(config.hydra[key]._target_)
        name = target.rpartition(".")[2].partition("_")[0]
        if target in MEMBERS and name == "processes":
            # It needs no package, and being made says whether its number can be.
            processes_launcher(n_jobs=config.hydra.launcher.n_jobs)
        elif target in MEMBERS and find_spec(name) is None:
            raise UserError(
                f"hydra/{key}={name} needs the package {name}, which is missing: pip install 'metarun[{name}]'."
            )


def watchers(config: DictConfig, hydra: Any) -> list[Watcher]:
    """Return what the sweeper of a run wants to know live; ``hydra`` is that section of its configuration."""
    if hydra.sweeper._target_ != f"{PREFIX}optuna_sweeper":
        return []
    from metarun.launch.optuna import pruning

    return pruning(config, hydra)
