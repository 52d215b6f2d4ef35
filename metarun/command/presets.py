"""Presets for Hydra: each section of a file ``preset/TASK.yaml`` is the member ``preset/TASK/SECTION`` of its groups.

A section is named after an algorithm, or ``ALGO/MODEL`` if it applies only to one model. A file with the key
``presets_of`` has the sections of another task, each changed by the rest of the file. The user's files take precedence
over those of metarun, and a file ``preset/TASK/SECTION.yaml``, which Hydra finds by itself, over a section.
"""

from collections.abc import Iterable
from functools import cache
from importlib.resources.abc import Traversable
from typing import Any, ClassVar

import yaml
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf

from metarun.errors import UserError


@cache
def parsed(text: str) -> DictConfig:
    """Parse a YAML text whose values are mappings, except that of ``presets_of``.

    Raises:
        ValueError: the text is not of this form; the message says why.
    """
    try:
        table = OmegaConf.create(text)
    except yaml.YAMLError as error:
        raise ValueError(f"is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(table, DictConfig):
        raise ValueError("must hold a section for each algorithm")
    for name, section in table.items():
        if name != "presets_of" and not isinstance(section, DictConfig):
            raise ValueError(f"must hold sections with keys such as algo and train, and {name!s} is {section!r}")
    return table


def table_of(task: str, roots: tuple[Traversable, ...]) -> dict[str, Any]:
    """Return the content of every ``preset/TASK.yaml`` in the folders ``roots``; later folders take precedence.

    Raises:
        UserError: a file is not a table of presets.
    """
    table: dict[str, Any] = {}
    for root in roots:
        path = root / "preset" / f"{task}.yaml"
        if path.is_file():
            try:
                table |= parsed(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise UserError(f"{path} {error}.") from error
    return table


def sections(task: str, roots: tuple[Traversable, ...]) -> dict[str, DictConfig]:
    """Return the presets for a task, as a mapping from section to what it sets."""
    table = table_of(task, roots)
    base = table.pop("presets_of", None)
    if base is None:
        return table
    borrowed = table_of(base, roots)
    if not borrowed or "presets_of" in borrowed:
        raise UserError(f"preset/{task}.yaml: presets_of must name a task with sections, and {base} has none.")
    return {section: OmegaConf.merge(preset, table) for section, preset in borrowed.items()}  # type: ignore[misc]


def typed_keys(overrides: Iterable[str], experiment: str | None) -> set[str]:
    """Return the keys of groups that the user set, on the command line or in an experiment: ``{"task.ways"}``.

    All other keys have defaults, or come from a preset.
    """
    keys = {override.partition("=")[0].lstrip("+~") for override in overrides}
    for root in PresetSource.roots if experiment else ():
        path = root / "experiment" / f"{experiment}.yaml"
        if path.is_file():
            groups: Any = OmegaConf.to_container(OmegaConf.create(path.read_text(encoding="utf-8")))
            keys |= {f"{name}.{key}" for name, group in groups.items() if isinstance(group, dict) for key in group}
    return keys


class PresetSource(ConfigSource):
    """A source of sections for Hydra, which are read on demand."""

    roots: ClassVar[tuple[Traversable, ...]] = ()

    def preset(self, config_path: str) -> DictConfig | None:
        """Return what ``preset/TASK/SECTION`` sets; None for other paths."""
        group, _, rest = config_path.partition("/")
        task, _, section = rest.partition("/")
        if group != "preset" or not section:
            return None
        # The user's folders come after this source in Hydra's search.
        if any((root / "preset" / task / f"{section}.yaml").is_file() for root in self.roots):
            return None
        return sections(task, self.roots).get(section)

    @staticmethod
    def scheme() -> str:
        """The scheme of the paths that this source understands."""
        return "presets"

    def load_config(self, config_path: str) -> ConfigResult:
        """A section."""
        preset = self.preset(config_path)
        return ConfigResult(self.provider, self.full_path(), OmegaConf.create(preset), {"package": "_global_"})

    def is_config(self, config_path: str) -> bool:
        """Whether there is such a section."""
        return self.preset(config_path) is not None

    def is_group(self, config_path: str) -> bool:
        """Return False: no section is a group, and the folder with the files belongs to another source."""
        return False

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """Return an empty list, as there are no groups."""
        return []

    def available(self) -> bool:
        """Always."""
        return True


class PresetPath(SearchPathPlugin):
    """Adds sections to the end of Hydra's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append ``PresetSource``."""
        search_path.append("metarun", "presets://")


def register_presets(*roots: Traversable) -> None:
    """Let Hydra find the presets in the folders ``roots``; later folders take precedence."""
    PresetSource.roots = roots
    Plugins.instance().register(PresetSource)
    Plugins.instance().register(PresetPath)
