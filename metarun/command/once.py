"""Composing the configuration of a command once.

Hydra's entry point composes the whole configuration to read ``hydra.mode`` from it, and then again with the mode that
it has chosen as a further override. The two differ in that key alone. The jobs of a sweep are composed to see whether
they can be, for the names of their folders, and for the launcher.

A sweep's own configuration is composed with the first of several choices, where Hydra takes the default, which may lack
keys that all of the choices have: ``-m task=grocery,cells task.image_size=32``.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy

from hydra._internal import hydra as entry
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf


def with_first_choices(overrides: Sequence[Override]) -> list[str]:
    """Return the lines of overrides; keys without a dot, such as groups of a configuration, have their first choice."""
    found = []
    for override in overrides:
        key = override.get_key_element()
        several = isinstance(override.value(), ChoiceSweep) and "." not in key and not override.is_hydra_override()
        first = next(iter(override.sweep_string_iterator())) if several else ""
        found.append(f"{key}={first}" if several else str(override.input_line))
    return found


MOST_JOBS = 500
"""Jobs whose configurations are kept, at some 100 kilobytes each."""


class LoadsOnce(ConfigLoaderImpl):
    """Keeps the configuration in which Hydra looks for the mode, for the run or the sweep that follows."""

    expected = RunMode.RUN
    """The mode that the command has asked for; a configuration may name another."""

    def __init__(self, config_search_path: ConfigSearchPath) -> None:
        super().__init__(config_search_path)
        self.kept: tuple[str | None, list[str], DictConfig] | None = None
        self.of_jobs: dict[tuple[str, ...], DictConfig] = {}

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """Compose the configuration of a job, or return a copy of what has been composed for the same job."""
        job = (*master_config.hydra.overrides.hydra, *sweep_overrides)
        kept = self.of_jobs.get(job)
        if kept is None:
            kept = super().load_sweep_config(master_config, sweep_overrides)
            if len(self.of_jobs) < MOST_JOBS:
                self.of_jobs[job] = kept
        # Who asks numbers it, and sets it read-only.
        config = deepcopy(kept)
        OmegaConf.copy_cache(from_config=master_config, to_config=config)
        return config

    def load_configuration(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        """Compose a configuration, or return the kept one if it is of these overrides and this mode."""
        if not validate_sweep_overrides:
            try:
                config = self.composed(config_name, overrides, self.expected, from_shell, False)
            except Exception:
                # Only a sweep may leave a choice open, and the configuration may ask for one.
                return self.composed(config_name, overrides, run_mode, from_shell, False)
            self.kept = config_name, list(overrides), config
            return config
        kept, self.kept = self.kept, None
        chosen = f"hydra.mode={run_mode.name}"
        if (
            kept is None
            or run_mode != self.expected
            or (config_name, overrides)
            not in (
                kept[:2],
                (kept[0], [*kept[1], chosen]),
            )
        ):
            return self.composed(config_name, overrides, run_mode, from_shell, True)
        parsed = OverridesParser.create().parse_overrides(overrides)
        self.validate_sweep_overrides_legal(parsed, run_mode, from_shell)
        config = kept[2]
        if overrides != kept[1]:
            config.hydra.mode = run_mode
            config.hydra.overrides.hydra.append(chosen)
        return config

    def composed(
        self, config_name: str | None, overrides: list[str], run_mode: RunMode, from_shell: bool, validate: bool
    ) -> DictConfig:
        """Compose a configuration; that of a sweep with the first of several choices."""
        if run_mode != RunMode.MULTIRUN:
            return super().load_configuration(config_name, overrides, run_mode, from_shell, validate)
        parsed = OverridesParser.create().parse_overrides(overrides)
        if validate:
            self.validate_sweep_overrides_legal(parsed, run_mode, from_shell)
        config = super().load_configuration(config_name, with_first_choices(parsed), run_mode, from_shell, False)
        # What the sweeper goes through.
        config.hydra.overrides.task = [one.input_line for one in parsed if not one.is_hydra_override()]
        return config


@contextmanager
def composing_once(multirun: bool) -> Iterator[None]:
    """Inside, Hydra's entry point composes once, for a single run or for a sweep."""
    LoadsOnce.expected = RunMode.MULTIRUN if multirun else RunMode.RUN
    entry.ConfigLoaderImpl = LoadsOnce  # type: ignore[attr-defined]
    try:
        yield
    finally:
        entry.ConfigLoaderImpl = ConfigLoaderImpl  # type: ignore[attr-defined]
