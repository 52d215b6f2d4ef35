"""Trust in directories that somebody else may have written: only values for existing keys are accepted, never code.

SECURITY.md says what is trusted and what is not.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, Override
from hydra.errors import HydraException

from metarun.data.sources import names_code
from metarun.errors import UserError
from metarun.system.terminal import printable

KEYS = (
    "seed",
    "device",
    "data_dir",
    "resume",
    "tracker",
    "train",
    "eval",
    "engine",
    "replicas",
    "task",
    "model",
    "algo",
)
GROUPS = ("task", "model", "algo", "engine", "eval", "experiment", "preset")
TAKE_MORE = ("task", "model", "algo")
"""Groups whose target may take arguments that its YAML does not list, given as ``+algo.name=value``."""
MEMBER = re.compile(r"null|[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*")
IMPORTING = ("task.environment", "task.embed", "model.source")
"""Keys in whose values a colon names a Python module to be imported (gymnasium's ``module:Name-v0``)."""


NAMED = (
    *("hydra.sweeper.sampler", "hydra.sweeper.pruner", "hydra.launcher.cluster"),
    *(f"hydra.launcher.slurm.{key}" for key in ("partition", "account", "qos", "constraint")),
)
"""Keys of launchers and sweepers whose values are names."""


def imports(key: str, value: object) -> bool:
    """Whether the value of a key names a Python module to be imported."""
    if key in ("task.embed", "model.source"):
        return names_code(str(value))
    return key in IMPORTING and ":" in str(value)


def values_of(override: Override) -> list[object]:
    """Return the value of an override, or the values that it sweeps over."""
    value: Any = override._value
    if isinstance(value, Glob):
        # Patterns stand for members that are installed, whatever the stars stand for.
        return [re.sub("[*?]", "_", pattern) for pattern in (*value.include, *value.exclude)]
    return list(value.list) if isinstance(value, ChoiceSweep) else [value]


def distrusted_of_hydra(key: str, override: Override) -> str | None:
    """Return why an override of Hydra itself is refused: only names and numbers of a launcher or sweeper are taken."""
    if key in ("hydra/launcher", "hydra/sweeper") or (key in NAMED and not override.is_add()):
        return None if MEMBER.fullmatch(override.get_value_element_as_str()) else "which names no member of the group"
    numbers = isinstance(override.value(), int | float | None)
    if key.startswith(("hydra.launcher.", "hydra.sweeper.")) and numbers and not override.is_add():
        return None
    return "which changes how Hydra works"


def distrusted(text: str) -> str | None:
    """Return why an override from a directory is refused; None if it is a plain value for an existing key."""
    if "${" in text:
        return "which asks for a resolver"
    if re.search(r"(?<![A-Za-z0-9])_(target|args|partial|recursive|convert)_(?![A-Za-z0-9])", text):
        return "which names code to be run"
    try:
        override = OverridesParser.create().parse_overrides([text])[0]
    except HydraException:
        return "which is not an override"
    key = override.key_or_group
    top, _, rest = key.replace("/", ".").partition(".")
    if override.is_delete() or override.package is not None:
        return "which would change the structure of the configuration"
    if top == "hydra":
        return distrusted_of_hydra(key, override)
    if key in GROUPS or (top in GROUPS and "/" in key):
        members = all(
            MEMBER.fullmatch(str(value)) for value in [v if v is not None else "null" for v in values_of(override)]
        )
        return None if members else "which names no member of the group"
    if top not in KEYS:
        return "and there is no such key"
    if override.is_add() and not (top in TAKE_MORE and rest.isidentifier()):
        return "which adds a key"
    if key in IMPORTING and any(imports(key, one.strip(" '\"")) for one in text.partition("=")[2].split(",")):
        return "which names a module to be imported"
    return None


def refuse_links(directory: Path) -> None:
    """Raise an error if a directory holds links to outside, through which other files would be overwritten.

    Raises:
        UserError: there is such a link; the sentence names it.
    """
    inside = directory.resolve()
    for path in [
        *directory.glob("*"),
        *directory.glob(".hydra/*"),
        *directory.glob("checkpoints/*"),
        directory / ".hydra",
    ]:
        if path.is_symlink() and not path.resolve().is_relative_to(inside):
            raise UserError(
                f"{printable(str(path))} is a link to a place outside of {directory}, where a resumed run would write; "
                "replace it by a file, or say trust=true if you know who made it."
            )


def refuse_distrusted(
    directory: Path, overrides: Iterable[str], taken: Sequence[str], needed: Sequence[str], given: bool
) -> None:
    """Raise an error if the content of a directory could run code.

    Args:
        directory: directory of a run or a sweep.
        overrides: overrides with which the run or sweep would go on.
        taken: keys of the overrides that the user has given again, and that are not taken from the directory.
        needed: configuration directories that the run or sweep was started with.
        given: whether the user has named a configuration directory.

    Raises:
        UserError: the first thing that is not trusted.
    """
    refuse_links(directory)
    for text in overrides:
        if text.partition("=")[0].lstrip("+~") not in taken and (why := distrusted(text)):
            raise UserError(
                f"{directory} says {printable(text)}, {why}, and the content of a directory is not trusted "
                "(SECURITY.md); say trust=true if you know who wrote it."
            )
    if needed and not given:
        raise UserError(
            f"{directory} says that its configuration comes from {printable(needed[0])}, and the content of a "
            "directory is not trusted (SECURITY.md); name it again with --config-dir, or say trust=true."
        )
