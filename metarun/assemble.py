"""Building a family, a model and an algorithm that fit each other from a configuration."""

import hashlib
from collections.abc import Collection
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from typing import Any, cast

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from metarun.config import build, check_ranges, config_hash, construct
from metarun.contracts import Algorithm, Family, Loss, Need, Reader, Split, Task, Tree
from metarun.engine.replicas import replica_configs
from metarun.errors import UserError
from metarun.nn.functional import seeded
from metarun.nn.transforms import stacked
from metarun.random import stream
from metarun.system.torchrun import count, local_rank
from metarun.targets.scoring import loss_of
from metarun.tree import tree_map


def sample_tasks(experiment: "Experiment", split: Split, count: int, generator: torch.Generator) -> Task:
    """Draw tasks of the family, each with a seed; seeds are drawn after the tasks, so they do not change the tasks."""
    tasks = experiment.family.sample(split, count, generator)
    if tasks.seed is not None:
        return tasks
    return tasks._replace(seed=torch.randint(2**62, (count,), generator=generator).to(experiment.device))


@dataclass(frozen=True)
class Replica:
    """One of the runs that are trained together; usually there is just one."""

    config: DictConfig
    """Configuration of the separate run that the replica equals."""
    differs: dict[str, float]
    """The keys in which it differs from the others."""
    model: nn.Module
    algorithm: Algorithm
    number: int = 0
    """Its number among the runs that were trained together, by which tables call it."""


@dataclass(frozen=True)
class Experiment:
    """The parts of a run."""

    config: DictConfig
    names: dict[str, str]
    """The names of the members chosen for ``algo``, ``task`` and ``model``."""
    family: Family
    replicas: list[Replica]
    algorithm: Algorithm
    """The algorithm that all replicas train with, closed over ``placeholders``."""
    placeholders: dict[str, Tensor]
    """A tensor for each hyperparameter in which replicas differ, to be exchanged for the replica's own value."""
    device: str

    @property
    def loss(self) -> Loss:
        """The function that scores the tasks of the family."""
        return loss_of(self.family)

    @property
    def model(self) -> nn.Module:
        """The model of the first replica."""
        return self.replicas[0].model

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What every checkpoint says about the run that wrote it: none of it changes during the run."""
        return {
            "config": OmegaConf.to_yaml(self.config, resolve=True),
            "config_hash": config_hash(self.config),
            "replicas": [config_hash(replica.config) for replica in self.replicas],
            "dataset": self.family.dataset,
            "constants": hash_of_constants(self.model),
        }

    def initial_thetas(self) -> list[Tree]:
        """Return what each replica meta-learns, before meta-training."""
        return [r.algorithm.init(stream(r.config.seed, "algorithm")) for r in self.replicas]


def choose_device(device: str, number: int | None = None) -> str:
    """Resolve ``auto`` and the GPU of a process of ``torchrun``; raise an error if the device does not exist.

    With ``auto``, the jobs of a sweep, which have a ``number``, take turns on the GPUs that the process sees.
    """
    gpus = torch.cuda.device_count()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and number is not None and gpus > 1:
            return f"cuda:{number % gpus}"
    if device == "cuda" and count() > 1:
        device = f"cuda:{local_rank()}"
    kind, _, index = device.partition(":")
    if device != "cpu" and (kind != "cuda" or (index and not index.isdecimal())):
        raise UserError(f"device must be auto, cpu, cuda or cuda:N, not {device!r}.")
    if kind == "cuda" and int(index or 0) >= gpus:
        raise UserError(f"device={device} does not exist: torch sees {gpus} CUDA devices; choose device=cpu.")
    return device


def build_family(
    config: DictConfig, device: str, typed: Collection[str] | None = None, converter: Reader | None = None
) -> Family:
    """Build the task family.

    ``typed`` are the keys that the user set (see `assemble`); ``converter`` is one that another run has fitted, for a
    family that takes it.
    """
    further: dict[str, Any] = {} if converter is None else {"converter": converter}
    if typed is not None:
        further["typed"] = {key.removeprefix("task.") for key in typed if key.startswith("task.")}
    return cast(Family, build(config, "task", device=device, data_dir=config.data_dir, **further))


def build_model(config: DictConfig, family: Family) -> nn.Module:
    """Build the model, initialised from ``seed`` alone; torch's global generator is left as it was."""
    with seeded(stream(config.seed, "weights")):
        model = build(config, "model", spec=family.spec)
    if not isinstance(model, nn.Module):
        raise UserError(f"model: {config.model._target_} must build a torch.nn.Module.")
    return model


def constants(model: nn.Module) -> list[Tensor]:
    """Return what a model holds but does not learn: buffers and frozen parameters."""
    return [*model.buffers(), *(p for p in model.parameters() if not p.requires_grad)]


def hash_of_constants(model: nn.Module) -> str:
    """Return a hash of the buffers and frozen parameters of ``model``, which no checkpoint holds."""
    found = hashlib.sha256()
    for tensor in constants(model):
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:12]


@cache
def _read_member(group: str, name: str) -> Any:
    """The content of a file of metarun's own configuration as it is written, which must not be changed."""
    text = (files("metarun.conf") / group / f"{name}.yaml").read_text(encoding="utf-8")
    return OmegaConf.to_container(OmegaConf.create(text))


def _member(group: str, name: str) -> Any:
    """The content of a file of metarun's own configuration as it is written, in plain values."""
    return deepcopy(_read_member(group, name))


def algorithm_names() -> list[str]:
    """Return the members of the group ``algo``, without aliases."""
    paths = (files("metarun.conf") / "algo").iterdir()
    members = {path.name.removesuffix(".yaml") for path in paths if path.name.endswith(".yaml")}
    return sorted(members - set(aliases()))


@cache
def aliases() -> dict[str, str]:
    """Map each alias to the algorithm whose configuration it takes; an alias itself has no ``_target_``."""
    found = {}
    for path in (files("metarun.conf") / "algo").iterdir():
        if path.name.endswith(".yaml") and "_target_:" not in (text := path.read_text(encoding="utf-8")):
            found[path.name.removesuffix(".yaml")] = str(cast(DictConfig, OmegaConf.create(text)).defaults[0])
    return found


def default_algorithm(name: str, family: Family, model: nn.Module) -> tuple[Algorithm, nn.Module] | None:
    """Build a member of the group ``algo`` with its default keys, and its model: ``model``, or the one it names.

    Return None if the algorithm does not fit the family or the model.
    """
    keys = _member("algo", name)
    try:
        for default in keys.pop("defaults", []):
            if isinstance(default, dict):
                model = construct("model", _member("model", next(iter(default.values()))), spec=family.spec)
        algorithm: Algorithm = construct("algo", keys, model=model, spec=family.spec)
    except UserError:
        return None
    return (algorithm, model) if family.spec.offers(algorithm.needs) else None


NEEDS: dict[Need, str] = {
    "slope": "a gradient to follow",
    "loss": "a differentiable loss",
    "examples": "a loss over examples that stay the same",
    "rows": "examples with known targets",
    "numbers": "targets that are numbers",
    "classes": "examples of classes",
    "targets": "examples that have a single target each",
    "labels": "examples that have a single class each",
    "policy": "an environment to act in",
}


def check_fit(config: DictConfig, names: dict[str, str], family: Family, model: nn.Module, algo: Algorithm) -> None:
    """Raise an error if the algorithm does not fit the task; the error names algorithms that do."""
    spec = family.spec
    if not spec.offers(algo.needs):
        fitting = ", ".join(name for name in algorithm_names() if default_algorithm(name, family, model))
        raise UserError(
            f"algo={names['algo']} needs {NEEDS[algo.needs]}, and task={names['task']} has none; algorithms that fit "
            f"it: {fitting}."
        )
    if not algo.any_ways and spec.sizes.train_ways not in (None, spec.sizes.ways):
        raise UserError(
            f"algo={names['algo']} needs as many ways in training as in test: set task.train_ways={spec.sizes.ways}."
        )
    frozen = not any(parameter.requires_grad for parameter in model.parameters())
    if frozen and algo.approach == "agnostic":
        raise UserError(
            f"algo={names['algo']} adapts the parameters of the model, and all those of model={names['model']} are "
            "frozen: leave some of them with requires_grad=True, or choose an algorithm that needs none, such as "
            "protonet."
        )
    if algo.max_steps is not None and config.eval.adapt_steps > algo.max_steps:
        raise UserError(
            f"algo={names['algo']} has learned {algo.max_steps} steps of adaptation and cannot take "
            f"eval.adapt_steps={config.eval.adapt_steps}: set eval.adapt_steps={algo.max_steps}, or train more steps "
            "with algo.inner_steps."
        )


def assemble(
    config: DictConfig, names: dict[str, str], typed: Collection[str] | None = None, number: int | None = None
) -> Experiment:
    """Build everything that ``config`` names.

    Args:
        config: the whole configuration.
        names: the members chosen for ``algo``, ``task`` and ``model``.
        typed: the keys that the user set, such as ``task.train_ways``; a task family may lower others to what its data
            can serve. None: all keys.
        number: that of a job of a sweep, which decides its GPU where there are several.

    Raises:
        UserError: a value is out of range, data are missing, or the parts do not fit each other.
    """
    device = choose_device(config.device, number)
    configs = replica_configs(config)
    for own, _ in configs:
        check_ranges(own)
    family = build_family(config, device, typed)
    replicas = []
    for place, (own, differs) in enumerate(configs):
        model = build_model(own, family).to(device)
        algorithm = cast(Algorithm, build(own, "algo", model=model, spec=family.spec))
        replicas.append(Replica(own, differs, model, algorithm, place))
    first = replicas[0]
    check_fit(config, names, family, first.model, first.algorithm)
    for other in replicas[1:]:
        if any(not torch.equal(a, b) for a, b in zip(constants(first.model), constants(other.model), strict=True)):
            raise UserError(
                f"model: {config.model._target_} draws buffers or frozen parameters by the seed, so replicas cannot "
                "share it; sweep the seeds with metarun -m seed=0,1,2."
            )
    placeholders = {
        key: torch.tensor(value, device=device) for key, value in first.differs.items() if key.startswith("algo.")
    }
    algorithm = first.algorithm
    if placeholders:
        keys = {key.removeprefix("algo."): value for key, value in placeholders.items()}
        algorithm = cast(Algorithm, build(first.config, "algo", exchanged=keys, model=first.model, spec=family.spec))
    return Experiment(config, names, family, replicas, algorithm, placeholders, device)


def training_tasks(experiment: Experiment, seeds: list[int], count: int, step: int) -> Task:
    """``count`` training tasks for each of ``seeds``, with leaves ``[replicas, tasks, ...]``."""

    def drawn(seed: int) -> Task:
        return sample_tasks(experiment, "train", count, stream(seed, "train", step))

    if len(set(seeds)) == 1:
        return tree_map(lambda leaf: leaf.expand(len(seeds), *leaf.shape), drawn(seeds[0]))
    batches = {seed: drawn(seed) for seed in sorted(set(seeds))}
    together: Task = stacked([batches[seed] for seed in seeds])
    return together
