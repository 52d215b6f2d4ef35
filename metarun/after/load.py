"""A run's learner, made again from its checkpoint without the data that it was trained on.

``best.pt`` holds the selected parameters, the configuration, the names of the chosen algorithm, task and model, and
the plain form of the family's spec and converter (`metarun.data.portable`). The configuration is composed from the
installed files by these names, and the checkpoint only supplies values for keys: no code comes from it (SECURITY.md).
"""

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from metarun.assemble import build_family, build_model, choose_device, hash_of_constants
from metarun.command.composing import CHOICES, composed
from metarun.command.trust import MEMBER, imports
from metarun.config import build, check_ranges
from metarun.contracts import Algorithm, Converter, Family, Numbers, Spec, Split, Task, TaskConverter, Tree
from metarun.data.converters import Arrays
from metarun.data.portable import rebuilt
from metarun.engine.replicas import replica_configs
from metarun.errors import UserError, first_line
from metarun.results import checkpoint
from metarun.system.terminal import printable
from metarun.tree import leaves


class Remembered:
    """A family as a checkpoint describes it: everything but its data."""

    def __init__(self, spec: Spec, dataset: str, converter: Converter | TaskConverter | None) -> None:
        self.spec, self.dataset, self.converter = spec, dataset, converter

    def sample(self, split: Split, count: int, generator: torch.Generator) -> Task:
        """Refuse.

        Raises:
            UserError: always, since the data are not there.
        """
        raise UserError(f"The data of {self.dataset} are not here; give the learner examples of your own.")


@dataclass(frozen=True)
class Learned:
    """The parts of a learner."""

    model: nn.Module
    algorithm: Algorithm
    theta: Tree
    """The parameters that validation selected."""
    family: Family
    """The family that the learner was trained on, without its data, or with its simulator."""
    converter: Converter | TaskConverter | None
    """What makes inputs of what users have; None where the family has no such thing."""
    config: DictConfig
    """The configuration of the run, or of the replica."""
    names: dict[str, str]
    """The names of the members chosen for ``algo``, ``task`` and ``model``."""
    dataset: str
    """Where the training examples came from."""
    step: int
    """The meta-step that validation selected."""
    val_score: float
    replica: int
    device: str

    @property
    def spec(self) -> Spec:
        """The spec that model and algorithm were built with."""
        return self.family.spec


def why_distrusted(key: str, value: Any, installed: Any) -> str | None:
    """Return why a value of a recorded key is refused; None if it is a plain value, or the installed one."""
    if value == installed:
        return None
    name = key.rpartition(".")[2]
    if name.startswith("_"):
        return "which names code to be run"
    if not name.isidentifier():
        return "which is no key"
    if imports(key, value):
        return "which names a module to be imported"
    nested = list(value.items()) if isinstance(value, dict) else []
    nested += [(name, one) for one in value] if isinstance(value, list) else []
    for inner, one in nested:
        # Names of a nested mapping may be anything except Hydra's.
        if str(inner).startswith("_") or (isinstance(one, dict | list) and why_distrusted(key, one, None)):
            return "which names code to be run"
        if isinstance(one, str) and "${" in one:
            return "which asks for a resolver"
    return "which asks for a resolver" if isinstance(value, str) and "${" in value else None


def with_recorded(
    config: DictConfig, recorded: Mapping[str, Any], given: Collection[str], trust: bool, path: Path
) -> None:
    """Give a composed configuration the values of the recorded one, in place.

    Args:
        config: composed by the names of the recorded one.
        recorded: the configuration in the checkpoint.
        given: keys and groups that the user has set, which stay.
        trust: whether the checkpoint may name code.
        path: the checkpoint.

    Raises:
        UserError: the checkpoint names code that the installation does not, or is damaged.
    """

    def is_given(key: str) -> bool:
        return any(one == key or one.startswith(f"{key}.") for one in given) or key.partition(".")[0] in given

    try:
        with open_dict(config):
            for group in CHOICES:
                if not isinstance(recorded[group], dict):
                    raise KeyError(group)
                if trust and recorded[group].get("_target_") != config[group].get("_target_"):
                    # What the installed files set is for another target.
                    config[group] = {name: one for name, one in config[group].items() if is_given(f"{group}.{name}")}
                for name, value in recorded[group].items():
                    key = f"{group}.{name}"
                    if is_given(key):
                        continue
                    installed: Any = OmegaConf.to_container(config[group], resolve=True)
                    why = None if trust else why_distrusted(key, value, installed.get(name))
                    if why:
                        raise UserError(
                            f"{path} says {printable(key)}={printable(str(value))}, {why}, and a checkpoint is not "
                            "trusted (SECURITY.md); say trust=true if you know who wrote it."
                        )
                    config[group][name] = value
            for group in ("train", "eval", "replicas"):
                kept = {name: one for name, one in recorded[group].items() if not is_given(f"{group}.{name}")}
                config[group] = OmegaConf.merge(config[group], kept)
            config.seed = recorded["seed"]
    except (KeyError, AttributeError, OmegaConfBaseException) as error:
        raise UserError(f"The configuration in {path} is damaged ({first_line(error)}); train again.") from error


def best_file(path: Path) -> Path:
    """Return the checkpoint of the selected parameters of a run, given its directory or the file itself."""
    return path if path.is_file() else path / "checkpoints" / "best.pt"


def read_best(path: Path, device: str) -> dict[str, Any]:
    """Read the checkpoint of a run's selected parameters, as ``metarun.state.save_best`` wrote it.

    Raises:
        UserError: it is missing, damaged, or of an earlier version.
    """
    content = checkpoint.load(best_file(path), device)
    if not {"names", "family", "config", "constants"} <= content.keys():
        raise UserError(
            f"{best_file(path)} was written by an earlier version, which did not describe its inputs; train again."
        )
    return content


def recomposed(
    content: Mapping[str, Any],
    path: Path,
    overrides: Sequence[str] = (),
    config_dir: str | Path | None = None,
    trust: bool = False,
) -> tuple[DictConfig, dict[str, str]]:
    """Compose the configuration of a checkpoint, changed by ``overrides``, and return the names of its members.

    Raises:
        UserError: the checkpoint names what is not installed, or code.
    """
    names, recorded = content["names"], None
    with suppress(yaml.YAMLError, TypeError):
        recorded = yaml.safe_load(content["config"])
    members = isinstance(names, dict) and all(MEMBER.fullmatch(str(names.get(group))) for group in CHOICES)
    if not members or not isinstance(recorded, dict):
        raise UserError(f"The configuration in {path} is damaged; train again.")
    given = {one.partition("=")[0].lstrip("+~").replace("/", ".") for one in overrides}
    chosen = [f"{group}={names[group]}" for group in CHOICES if group not in given]
    try:
        config, names = composed([*chosen, *overrides], config_dir)
    except UserError as error:
        if config_dir is None and str(error).startswith("There is no "):
            raise UserError(f"{error} (If it is your own, name your configuration with config_dir.)") from error
        raise
    with_recorded(config, recorded, given, trust, path)
    return config, names


def learned(
    path: Path,
    device: str = "auto",
    trust: bool = False,
    config_dir: str | Path | None = None,
    replica: int = 0,
) -> Learned:
    """Return the learner of a run.

    Args:
        path: the directory of a run, or a copy of its ``best.pt``.
        device: auto, cpu, cuda or cuda:N.
        trust: whether the checkpoint may name code outside the installed configuration.
        config_dir: the directory of your own configuration, if the run was started with one.
        replica: which of the runs that were trained together.

    Raises:
        UserError: the checkpoint is missing or damaged, does not fit what is installed, or is not trusted.
    """
    device = choose_device(device)
    content = read_best(path, device)
    place, count = best_file(path), len(best_of(content))
    if not 0 <= replica < count:
        raise UserError(f"{place} holds {count} replicas; give a number from 0 to {count - 1}, not {replica}.")
    config, names = recomposed(content, place, config_dir=config_dir, trust=trust)
    return learned_in(content, place, config, names, device, replica)


def best_of(content: Mapping[str, Any]) -> list[Any]:
    """Return what validation selected of each replica: ``theta``, ``step`` and ``val_score``, or None."""
    found: list[Any] = content.get("best", [content])
    return [None if one is None or "theta" not in one else one for one in found]


def learned_in(
    content: Mapping[str, Any], place: Path, config: DictConfig, names: dict[str, str], device: str, replica: int
) -> Learned:
    """Return a learner of the checkpoint ``content``, which was read from ``place``; ``config`` is its own.

    Raises:
        UserError: the checkpoint does not fit what is installed, or validation selected nothing.
    """
    chosen = best_of(content)[replica]
    if chosen is None:
        raise UserError(f"Replica {replica} in {place} has no parameters that validation selected; choose another.")
    require_dtype(chosen["theta"])
    check_ranges(config)
    own, _ = replica_configs(config)[replica]
    family = family_of(content, own, device)
    model = build_model(own, family).to(device)
    if hash_of_constants(model) != content["constants"]:
        raise UserError(
            f"{place} was trained with other frozen parameters or buffers than those that the model has now; restore "
            "the file that they were read from, or train again."
        )
    algorithm = cast(Algorithm, build(own, "algo", model=model, spec=family.spec))
    if shapes_of(chosen["theta"]) != shapes_of(algorithm.init(torch.Generator())):
        raise UserError(f"The parameters in {place} do not fit the model that is built now; train again.")
    converter = getattr(family, "converter", None)
    if converter is None and isinstance(family.spec.inputs, Numbers):
        converter = Arrays(family.spec.inputs.shape, family.spec.target.outputs)
    return Learned(
        *(model, algorithm, chosen["theta"], family, converter, own, names, content["dataset"]),
        *(chosen["step"], chosen["val_score"], replica, device),
    )


def require_dtype(theta: Tree) -> None:
    """Raise an error if torch makes tensors of another type than that of the parameters.

    Raises:
        UserError: the two types, and what to do.
    """
    now = torch.get_default_dtype()
    trained = next((leaf.dtype for leaf in leaves(theta) if leaf.is_floating_point()), now)
    if trained != now:
        raise UserError(
            f"The learner was trained in {trained}, and torch's default is {now}; call "
            f"torch.set_default_dtype({trained}) before it is loaded and used."
        )


def shapes_of(tree: Any) -> Any:
    """Return a tree with the shape of each leaf in its place."""
    if isinstance(tree, dict):
        return {name: shapes_of(branch) for name, branch in tree.items()}
    return tuple(tree.shape) if isinstance(tree, torch.Tensor) else None


def family_of(content: Mapping[str, Any], config: DictConfig, device: str) -> Family:
    """Return the family that a checkpoint describes; one that has its own loss is built, with all that it needs.

    Raises:
        UserError: the family's code is missing, or its data are not those of the run.
    """
    described = content["family"]
    if described["own_loss"]:
        family = build_family(config, device)
        if family.dataset != content["dataset"]:
            raise UserError(
                f"The learner needs the data that it was trained on, {content['dataset']}, and those found now are "
                f"{family.dataset}; set METARUN_DATA_DIR, or data_dir for a test, to where they are."
            )
        return family
    try:
        # Imported for the classes that it marks as portable.
        get_method(config.task._target_)
    except (ImportError, ValueError) as error:
        raise UserError(f"task: {config.task._target_} cannot be imported ({error.__cause__ or error}).") from error
    converter = rebuilt(described["converter"])
    # What the converter would import has to be what the configuration says, which has been checked.
    if getattr(converter, "embed", None) != config.task.get("embed"):
        raise UserError("The checkpoint's converter embeds by another model than its configuration says; train again.")
    return Remembered(rebuilt(described["spec"]), content["dataset"], converter)
