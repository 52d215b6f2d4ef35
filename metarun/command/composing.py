"""Configurations composed outside the command, wherever Python calls for them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hydra import version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.singleton import Singleton
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from metarun.command.sentences import sentence_of
from metarun.config import register_schema
from metarun.errors import UserError

CHOICES = ("algo", "task", "model")
"""The groups whose members a run is named by."""


@contextmanager
def hydra_of(config_dir: str | Path | None) -> Iterator[Hydra]:
    """Provide a Hydra that knows metarun's configuration and the user's; a Hydra of the caller's stays as it was.

    Errors of Hydra become sentences.

    Raises:
        UserError: there is no such directory, or what is done inside fails in Hydra.
    """
    if config_dir is not None and not Path(config_dir).is_dir():
        raise UserError(f"There is no directory {config_dir}; name that of your configuration.")
    own = [] if config_dir is None else [Path(config_dir).absolute()]
    register_schema(*own)
    path = create_config_search_path("pkg://metarun.conf")
    for folder in own:
        # Where Hydra itself puts the folder of --config-dir.
        path.prepend("command-line", f"file://{folder}", SearchPathQuery(provider="schema"))
    before = Singleton._instances.pop(GlobalHydra, None)
    version.setbase("1.3")
    try:
        yield Hydra.create_main_hydra2("metarun", path)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(sentence_of(error)) from error
    finally:
        Singleton._instances.pop(GlobalHydra, None)
        if before is not None:
            Singleton._instances[GlobalHydra] = before


def composed(overrides: Sequence[str], config_dir: str | Path | None = None) -> tuple[DictConfig, dict[str, str]]:
    """Compose the configuration of ``overrides``; also return the names chosen for ``algo``, ``task`` and ``model``.

    Raises:
        UserError: an override cannot be read, or names nothing that is installed.
    """
    with hydra_of(config_dir) as hydra:
        config = hydra.compose_config("config", list(overrides), RunMode.RUN, from_shell=False)
        names = {group: str(config.hydra.runtime.choices[group]) for group in CHOICES}
        return OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"]), names


def quoted(value: str | Path) -> str:
    """Return a text as the value of an override."""
    return "'" + str(value).replace("\\", "\\\\").replace("'", "\\'") + "'"
