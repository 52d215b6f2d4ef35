"""Everything that changes during meta-training, and its way to disk and back."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, StepLR

from metarun import checkpoint
from metarun.assemble import Experiment
from metarun.config import config_hash
from metarun.errors import UserError
from metarun.tree import learned, leaves, tree_map
from metarun.types import Tree


@dataclass
class Best:
    """What validation has selected so far."""

    step: int
    val_score: float
    theta: Tree


@dataclass
class Training:
    """Everything that changes during meta-training."""

    theta: Tree
    optimizer: Optimizer | None
    """None where there is nothing to learn."""
    schedule: LRScheduler | None
    step: int = 0
    best: Best | None = None
    rows: list[dict[str, float | int]] = field(default_factory=list)
    """Of ``metrics.csv``."""
    window: list[Tensor] = field(default_factory=list)
    """(loss, score) of each step since the last row."""
    seconds: float = 0.0
    step_seconds: float = 0.0
    """Of which outside of validation."""


def outer_optimizer(config: DictConfig, theta: Tree) -> tuple[Optimizer | None, LRScheduler | None]:
    """The optimizer over the learned leaves of ``theta``, if there are any, and its schedule over ``train.steps``."""
    train, variables = config.train, list(leaves(learned(theta)))
    if not variables:
        return None, None
    optimizer: Optimizer
    match train.optimizer.name:
        case "adam":
            optimizer = Adam(variables, train.lr, weight_decay=train.weight_decay, fused=True)
        case "adamw":
            optimizer = AdamW(variables, train.lr, weight_decay=train.weight_decay, fused=True)
        case _:
            optimizer = SGD(variables, train.lr, weight_decay=train.weight_decay, fused=True)
    steps = max(train.steps, 1)
    match train.schedule.name:
        case "linear":
            return optimizer, LinearLR(optimizer, 1.0, train.final, total_iters=steps)
        case "cosine":
            return optimizer, CosineAnnealingLR(optimizer, steps, eta_min=train.lr * train.final)
        case "step":
            return optimizer, StepLR(optimizer, train.decay_every, train.decay)
        case _:
            return optimizer, None


def start(experiment: Experiment) -> Training:
    """The state before the first step."""
    # Parameters of their own memory, whatever init returned, for the optimizer to write into.
    theta = tree_map(lambda leaf: leaf.detach().clone(), experiment.initial_theta())
    return Training(theta, *outer_optimizer(experiment.config, theta))


def _identity(experiment: Experiment) -> dict[str, Any]:
    """What both checkpoints say of the run that wrote them."""
    return {
        "config": OmegaConf.to_yaml(experiment.config, resolve=True),
        "config_hash": config_hash(experiment.config),
        "dataset": experiment.family.dataset,
    }


def save(experiment: Experiment, training: Training, directory: Path) -> None:
    """Write ``last.pt``, all that a resumed run needs."""
    content = {
        "step": training.step,
        "theta": training.theta,
        "optimizer": training.optimizer.state_dict() if training.optimizer else None,
        "schedule": training.schedule.state_dict() if training.schedule else None,
        "best": vars(training.best) if training.best else None,
        "rows": training.rows,
        "window": training.window,
        "seconds": training.seconds,
        "step_seconds": training.step_seconds,
    }
    checkpoint.save(directory / "checkpoints" / "last.pt", _identity(experiment) | content)


def save_best(experiment: Experiment, best: Best, directory: Path) -> None:
    """Write ``best.pt``: the parameters that validation selected."""
    checkpoint.save(directory / "checkpoints" / "best.pt", _identity(experiment) | vars(best))


def restore(experiment: Experiment, directory: Path) -> Training:
    """The state that ``last.pt`` holds.

    Raises:
        UserError: the checkpoint is missing, broken, of another configuration or of other data.
    """
    path = directory / "checkpoints" / "last.pt"
    content = checkpoint.load(path, experiment.device, config_hash(experiment.config))
    if content["dataset"] != experiment.family.dataset:
        raise UserError(
            f"The checkpoint {path} was trained on {content['dataset']}, and the data found now are "
            f"{experiment.family.dataset}; set data_dir to where the former lie."
        )
    training = start(experiment)
    for old, new in zip(leaves(training.theta), leaves(content["theta"]), strict=True):
        old.copy_(new)
    if training.optimizer is not None:
        training.optimizer.load_state_dict(content["optimizer"])
    if training.schedule is not None:
        training.schedule.load_state_dict(content["schedule"])
    training.best = Best(**content["best"]) if content["best"] else None
    for name in ("step", "rows", "window", "seconds", "step_seconds"):
        setattr(training, name, content[name])
    return training
