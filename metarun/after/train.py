"""Training from Python, with the files that the command writes."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from metarun import cli
from metarun.after.learner import Learner, load
from metarun.command.composing import hydra_of
from metarun.command.resume import arguments_of_resumed, config_dirs, options_first
from metarun.errors import UserError
from metarun.system.terminal import PrintableRecord

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Run:
    """A finished run."""

    directory: Path
    """Where its files are (docs/usage.md says which)."""
    config_dir: str | Path | None = None
    """The directory of the user's own configuration."""

    @property
    def results(self) -> "pd.DataFrame":
        """The rows of ``result.csv``: one for each of the runs that were trained together, usually a single one."""
        import pandas as pd

        return pd.read_csv(self.directory / "result.csv")

    @cached_property
    def learner(self) -> Learner:
        """The learner with the parameters that validation selected, of the first replica; see ``metarun.load``."""
        return load(self.directory, config_dir=self.config_dir)


@contextmanager
def own_logging() -> Iterator[None]:
    """Inside, Hydra may set up logging; afterwards it is as it was."""
    root, factory = logging.getLogger(), logging.getLogRecordFactory()
    handlers, level = root.handlers[:], root.level
    logging.setLogRecordFactory(PrintableRecord)
    try:
        yield
    finally:
        for handler in set(root.handlers) - set(handlers):
            handler.close()
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.setLogRecordFactory(factory)


def train(*overrides: str, directory: str | Path | None = None, config_dir: str | Path | None = None) -> Run:
    """Do what ``metarun OVERRIDES...`` does: meta-train, select, test, and write the files of the run.

    Args:
        overrides: as on the command line, such as ``"algo=maml"``, ``"task=sinusoid"``, ``"train.steps=1000"``.
        directory: where to write; None: a new directory under ``outputs``.
        config_dir: the directory of your own configuration, as with ``--config-dir``.

    Raises:
        UserError: the run cannot be done, or has failed; the sentence says what to do.
        KeyboardInterrupt: the run was stopped; ``train("resume=DIR")`` continues it.
    """
    given = list(overrides)
    if options_first(given)[0]:
        raise UserError(
            f"{options_first(given)[0][0]} is an option of the command; metarun.train takes KEY=VALUE alone."
        )
    if directory is not None:
        given.append("hydra.run.dir='" + str(directory).replace("\\", "\\\\").replace("'", "\\'") + "'")
    own = [] if config_dir is None else ["--config-dir", str(config_dir)]
    options, given = options_first(arguments_of_resumed([*own, *given]))
    config_dir = next(iter(config_dirs(options)), None)
    before, done = len(cli.failures), dict[str, Path]()

    def job(config: DictConfig) -> float:
        done["directory"] = Path(HydraConfig.get().runtime.output_dir)
        return cli.job(config)

    with own_logging(), hydra_of(config_dir) as hydra:
        try:
            hydra.run("config", job, given)
        except SystemExit as end:
            # The owner of the directory refuses in this way.
            raise UserError(str(end.code).removeprefix("metarun: ")) from end
    if failed := cli.failures[before:]:
        del cli.failures[before:]
        raise UserError(failed[-1])
    return Run(done["directory"], config_dir)
