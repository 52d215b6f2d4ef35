"""Replicas, trained together in one process: the configurations of the separate runs that they equal."""

from copy import deepcopy
from itertools import product
from math import isfinite, prod
from typing import Any

from omegaconf import DictConfig, OmegaConf

from metarun.errors import UserError

OF_THE_OUTER_STEP = ("train.lr", "train.weight_decay", "train.clip", "train.final")

MOST = 10_000
"""Largest number of replicas in one process; each has a configuration and a model, and a typing error could make a
billion of them."""


def varied_keys(config: DictConfig) -> dict[str, list[float]]:
    """Return the keys of ``replicas.over`` with their values, after checking them.

    Raises:
        UserError: a key cannot differ within one process, or values are not numbers.
    """
    over: Any = config.replicas.over
    if over is None:
        return {}
    if not isinstance(over, DictConfig):
        raise UserError("replicas.over maps keys to lists of numbers, such as '{algo.inner_lr: [0.1, 0.03]}'.")
    over = OmegaConf.to_container(over, resolve=True)
    for key, values in over.items():
        group, _, name = str(key).partition(".")
        if key not in OF_THE_OUTER_STEP and (group != "algo" or not name.isidentifier()):
            raise UserError(
                f"replicas.over can vary {', '.join(OF_THE_OUTER_STEP)} and numbers of algo, not {key}; sweep it with "
                f"metarun -m {key}=..."
            )
        now = OmegaConf.select(config, str(key))
        numbers = isinstance(values, list) and values and all(type(v) in (int, float) and isfinite(v) for v in values)
        if not numbers or len(set(values)) != len(values):
            raise UserError(f"replicas.over: {key} needs a list of different numbers, such as [0.1, 0.03].")
        if type(now) is not float and not (key == "train.clip" and now is None):
            raise UserError(
                f"replicas.over: {key} must be a number with a point in this run, and it is {now}; what changes the "
                f"work itself is swept with metarun -m {key}=..."
            )
    return {str(key): [float(value) for value in values] for key, values in over.items()}


def replica_configs(config: DictConfig) -> list[tuple[DictConfig, dict[str, float]]]:
    """Return each replica's configuration as a separate run, and the keys in which it differs: grid times seeds."""
    over, count = varied_keys(config), config.replicas.count
    if (replicas := prod(map(len, over.values())) * count) > MOST:
        raise UserError(f"replicas.count and replicas.over make {replicas} runs; {MOST} are the most in one process.")
    found = []
    for values in product(*over.values()):
        for offset in range(count):
            own, differs = deepcopy(config), dict(zip(over, values, strict=True))
            for key, value in differs.items():
                OmegaConf.update(own, key, value)
            if count > 1:
                own.seed = differs["seed"] = config.seed + offset
            own.replicas.count, own.replicas.over = 1, None
            found.append((own, differs))
    return found


def label(differs: dict[str, float]) -> str:
    """Return the keys and values of a replica, written like overrides on the command line."""
    return " ".join(f"{key}={value!r}" for key, value in differs.items())
