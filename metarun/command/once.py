"""Composing the configuration of a command once.

Hydra's entry point composes the whole configuration to read ``hydra.mode`` from it, and then again with the mode that
it has chosen as a further override. The two differ in that key alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from hydra._internal import hydra as entry
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig


class LoadsOnce(ConfigLoaderImpl):
    """Keeps the configuration in which Hydra looks for the mode, for the run or the sweep that follows."""

    expected = RunMode.RUN
    """The mode that the command has asked for; a configuration may name another."""

    def __init__(self, config_search_path: ConfigSearchPath) -> None:
        super().__init__(config_search_path)
        self.kept: tuple[str | None, list[str], DictConfig] | None = None

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
                config = super().load_configuration(config_name, overrides, self.expected, from_shell, False)
            except Exception:
                # Only a sweep may leave a choice open, and the configuration may ask for one.
                return super().load_configuration(config_name, overrides, run_mode, from_shell, False)
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
            return super().load_configuration(config_name, overrides, run_mode, from_shell)
        parsed = OverridesParser.create().parse_overrides(overrides)
        self.validate_sweep_overrides_legal(parsed, run_mode, from_shell)
        config = kept[2]
        if overrides != kept[1]:
            config.hydra.mode = run_mode
            config.hydra.overrides.hydra.append(chosen)
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
