"""Everything that changes during meta-training, and how it is saved and restored."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from metarun.assemble import Experiment
from metarun.contracts import Family, Tree
from metarun.data.portable import plain
from metarun.engine.meta_step import MetaStep
from metarun.errors import UserError
from metarun.results import checkpoint
from metarun.tree import leaves


@dataclass
class Best:
    """What validation has selected so far."""

    step: int
    val_score: float
    theta: Tree


@dataclass
class Training:
    """Everything that changes during meta-training; lists have one item per replica."""

    train_state: Tree
    """Leaves ``[replicas, ...]``; see `metarun.engine.meta_step`."""
    best: list[Best | None]
    rows: list[list[dict[str, float | int]]]
    """Rows of ``metrics.csv``."""
    step: int = 0
    window: list[Tensor] = field(default_factory=list)
    """(loss, score) ``[replicas, 2]`` of each step since the last row of ``metrics.csv``."""
    seconds: float = 0.0
    compile_seconds: float = 0.0
    """Seconds of these spent on recording, compiling and choosing."""
    step_seconds: float = 0.0
    """Seconds of these spent in meta-steps alone."""
    engine: str = "eager"
    task_map: str = "vmap"
    """The engine and the map over tasks of the last steps; a resumed run goes on with both."""
    device: str = "cpu"
    """The kind of device that the last steps ran on."""
    threads: int = 1
    """Number of torch's threads."""
    layout: list[str] = field(default_factory=list)
    """What the vector of learned numbers consists of: a name and a shape for each part."""


def start(meta_step: MetaStep) -> Training:
    """Return the state before the first step."""
    count = meta_step.count
    state, rows = meta_step.initial_train_state(), [list[dict[str, float | int]]() for _ in range(count)]
    return Training(state, [None] * count, rows, layout=meta_step.layout.described())


SAVED_AS_IT_IS = (
    *("step", "train_state", "rows", "window", "seconds", "compile_seconds", "step_seconds"),
    *("engine", "task_map", "device", "threads"),
)


def save(experiment: Experiment, training: Training, directory: Path) -> None:
    """Write ``last.pt``, all that a resumed run needs; the previous checkpoint is kept."""
    content: dict[str, Any] = {name: getattr(training, name) for name in SAVED_AS_IT_IS}
    content["layout"] = training.layout
    content["best"] = [vars(best) if best else None for best in training.best]
    checkpoint.save_last(directory, experiment.identity | content)


def save_best(experiment: Experiment, training: Training, directory: Path) -> None:
    """Write ``best.pt``: the parameters that validation selected, one set per replica where there are several."""
    best = [vars(best) if best else None for best in training.best]
    content: dict[str, Any] = {"best": best} if len(best) > 1 else (best[0] or {})
    learner = {"names": experiment.names, "family": described(experiment.family)}
    checkpoint.save(directory / "checkpoints" / "best.pt", experiment.identity | content | learner)


def described(family: Family) -> dict[str, Any]:
    """Return what a learner needs to know of a family without its data, in plain form."""
    return {
        "spec": plain(family.spec),
        "converter": plain(getattr(family, "converter", None)),
        "own_loss": hasattr(family, "loss"),
    }


def restore(experiment: Experiment, meta_step: MetaStep, directory: Path) -> Training:
    """Return the state in ``last.pt``, or in ``previous.pt`` if ``last.pt`` is damaged.

    Raises:
        UserError: the checkpoint is missing or broken, or belongs to another configuration or to other data.
    """
    path = directory / "checkpoints" / "last.pt"
    content = checkpoint.load_last(directory, experiment.device, experiment.identity["config_hash"])
    if content["replicas"] != experiment.identity["replicas"]:
        raise UserError(
            f"The checkpoint {path} belongs to other replicas; resume with no other keys, or start a new run."
        )
    if content["dataset"] != experiment.family.dataset:
        raise UserError(
            f"The checkpoint {path} was trained on {content['dataset']}, and the data found now are "
            f"{experiment.family.dataset}; set data_dir to where the data of the checkpoint are."
        )
    if content["constants"] != experiment.identity["constants"]:
        raise UserError(
            f"The checkpoint {path} was trained with other frozen parameters or buffers than those that the model has "
            "now; restore the file that they were read from, or start a new run."
        )
    training = start(meta_step)
    shapes = [leaf.shape for leaf in leaves(training.train_state)]
    # Parameters lie in one vector, whose length says little; checkpoints of earlier versions have nothing else.
    same_parts = content.get("layout", training.layout) == training.layout
    if not same_parts or shapes != [leaf.shape for leaf in leaves(content["train_state"])]:
        raise UserError(f"The checkpoint {path} does not fit the model that is built now; start a new run.")
    for name in SAVED_AS_IT_IS:
        setattr(training, name, content[name])
    training.best = [Best(**best) if best else None for best in content["best"]]
    return training
