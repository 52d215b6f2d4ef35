"""Learners without a training: what a run leaves, for tests of what comes after it."""

from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from scenarios import generator

from metarun.assemble import Experiment, Replica, build_model
from metarun.config import build
from metarun.contracts import Tree
from metarun.state import Best, Training, save_best
from metarun.tree import tree_map


@cache
def keys_of(group: str, name: str) -> dict[str, Any]:
    """A file of the configuration, without what it includes, in plain values that are not to be changed."""
    found = OmegaConf.to_container(OmegaConf.create((files("metarun.conf") / group / f"{name}.yaml").read_text()))
    return {key: value for key, value in found.items() if key != "defaults"}


def member(group: str, name: str) -> DictConfig:
    """A file of the configuration, without what it includes."""
    return OmegaConf.create(keys_of(group, name))


def with_algorithm(experiment: Experiment, algo: str, model: str | None = None) -> Experiment:
    """The experiment with another algorithm, and perhaps another model."""
    config, family = experiment.config.copy(), experiment.family
    module, names = experiment.model, experiment.names | {"algo": algo}
    with open_dict(config):
        config.algo = member("algo", algo)
        if model is not None:
            names["model"], config.model = model, member("model", model)
            module = build_model(config, family)
    algorithm = build(config, "algo", model=module, spec=family.spec)
    replicas = [Replica(config, {}, module, algorithm)]
    return replace(experiment, config=config, names=names, replicas=replicas, algorithm=algorithm)


def leave_a_checkpoint(experiment: Experiment, directory: Path) -> Tree:
    """Leave ``best.pt`` with other parameters than those with which the learner begins anyway; return them."""
    noise, theta = generator(3), experiment.initial_thetas()[0]
    theta = tree_map(lambda w: w + 0.02 * torch.randn(w.shape, generator=noise) if w.is_floating_point() else w, theta)
    save_best(experiment, Training({}, [Best(1, 0.5, theta)], [[]]), directory)
    return theta
