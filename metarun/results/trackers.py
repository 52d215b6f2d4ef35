"""``tracker=[tensorboard,wandb,mlflow]``: a run's scores in an experiment tracker, while the run goes on.

The trackers are those of Hugging Face's accelerate, which gives all of them one interface; Lightning's loggers would
bring a whole training framework. A tracker is a further view of ``metrics.csv``: what goes wrong in it is said once,
and the run goes on.
"""

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from metarun.errors import UserError, first_line
from metarun.results.tables import Row
from metarun.system.files import write_text

log = logging.getLogger(__name__)

PROJECT = "metarun"
IDENTITIES = "trackers.json"
"""The file in a run's directory with the numbers under which trackers know the run, for one that is resumed."""
NAMES = ("tensorboard", "wandb", "mlflow")
OF_TRAINING = ("train_loss", "train_score", "val_loss", "val_score", "seconds")
OF_TEST = ("score", "ci95", "score_before", "val_score", "selected_step")


def chosen(config: DictConfig) -> list[str]:
    """Return the names of the trackers of a run.

    Raises:
        UserError: a name is unknown, or its package is not installed.
    """
    given: Any = OmegaConf.to_container(OmegaConf.create({"tracker": config.tracker}), resolve=True)
    names = given["tracker"]
    names = [] if names is None else names if isinstance(names, list) else [names]
    for name in names:
        if name not in NAMES:
            raise UserError(f"tracker must be null or some of {', '.join(NAMES)}, as in tracker=[wandb], not {name!r}.")
        for package in ("accelerate", name):
            if find_spec(package) is None:
                raise UserError(
                    f"tracker={name} needs the package {package}, which is missing: pip install 'metarun[{name}]'."
                )
    return list(dict.fromkeys(names))


def known_as(directory: Path) -> dict[str, str]:
    """Return the numbers under which trackers know the run in a directory."""
    try:
        found = json.loads((directory / IDENTITIES).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return {k: v for k, v in found.items() if isinstance(v, str) and v.isalnum()} if isinstance(found, dict) else {}


def begun(name: str, directory: Path, identity: str | None) -> tuple[Any, str | None]:
    """Begin or continue a run in a tracker; return the tracker of accelerate's, and the run's number there."""
    from accelerate import PartialState, tracking

    # Its trackers refuse to work without; the run itself does not use it.
    PartialState(cpu=True)
    if name == "tensorboard":
        tracker: Any = tracking.TensorBoardTracker(run_name=name, logging_dir=directory)
    elif name == "wandb":
        identity = identity or os.urandom(6).hex()
        tracker = tracking.WandBTracker(
            run_name=PROJECT, name=directory.name, dir=str(directory), id=identity, resume="allow"
        )
    else:
        tracker = tracking.MLflowTracker(experiment_name=PROJECT, run_name=directory.name, run_id=identity)
    tracker.start()
    return tracker, tracker.tracker.info.run_id if name == "mlflow" else identity


def settings(config: DictConfig) -> dict[str, str | int | float | bool]:
    """Return a configuration as one flat mapping from dotted keys."""
    flat: dict[str, str | int | float | bool] = {}

    def add(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, one in value.items():
                add(f"{prefix}.{key}" if prefix else str(key), one)
        else:
            flat[prefix] = value if isinstance(value, bool | int | float | str) else str(value)

    add("", OmegaConf.to_container(config, resolve=True, enum_to_str=True))
    return flat


class Trackers:
    """The trackers of one run, to be used in a ``with`` block; each is left out once it has failed."""

    def __init__(self, config: DictConfig, directory: Path) -> None:
        """Begin in each tracker.

        Raises:
            UserError: a name is unknown, or its package is not installed.
        """
        self.running: dict[str, Any] = {}
        identities = known_as(directory)
        for name in chosen(config):
            with self.without_harm(name):
                new = name not in identities
                self.running[name], identity = begun(name, directory.absolute(), identities.get(name))
                identities[name] = identity or "new"
                if new:
                    self.running[name].store_init_configuration(settings(config))
        if self.running:
            with suppress(OSError):
                write_text(directory / IDENTITIES, json.dumps(identities))

    @contextmanager
    def without_harm(self, name: str) -> Iterator[None]:
        """Inside, an error is the end of one tracker alone."""
        try:
            yield
        except Exception as error:
            self.running.pop(name, None)
            log.warning("tracker=%s failed, and the run goes on without it (%s).", name, first_line(error))

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, *error: object) -> None:
        for name in list(self.running):
            with self.without_harm(name):
                self.running[name].finish()

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Send those values that are finite numbers."""
        finite = {k: v for k, v in values.items() if isinstance(v, int | float) and math.isfinite(v)}
        for name in list(self.running):
            with self.without_harm(name):
                self.running[name].log(finite, step=step)

    def __call__(self, rows: Sequence[Row]) -> None:
        """Send the newest row of ``metrics.csv`` of each replica."""
        values = {f"{place(i, rows)}{k}": row.get(k) for i, row in enumerate(rows) for k in OF_TRAINING}
        self.log(values, int(rows[0]["step"]))

    def tested(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Send the scores in the rows of ``result.csv``."""
        self.log({f"{place(i, rows)}test/{k}": row.get(k) for i, row in enumerate(rows) for k in OF_TEST}, step)


def place(index: int, rows: Sequence[Any]) -> str:
    """Return what a replica's values are called by, where there are several."""
    return f"replica_{index}/" if len(rows) > 1 else ""
