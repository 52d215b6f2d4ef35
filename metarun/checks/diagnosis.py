"""Why a loss stopped being finite: the data, the model and the loss, or the size of the steps."""

import torch
from omegaconf import OmegaConf

from metarun.assemble import Experiment, sample_tasks
from metarun.checks.family import largest, not_finite
from metarun.engine.batch import evaluate
from metarun.random import stream
from metarun.state import Training


def suspect_step(training: Training) -> int:
    """Return the first step since the last row in which no replica has a finite loss, else the last; from 0."""
    first = training.step - len(training.window)
    finite = [bool(row[..., 0].isfinite().any()) for row in training.window]
    return first + finite.index(False) if False in finite else max(training.step - 1, 0)


def step_size_remedy(experiment: Experiment, testing: bool = False) -> str:
    """Return what to lower, according to the keys of this run; with ``testing``, for a score instead of a loss."""
    train, algo = experiment.config.train, experiment.config.algo
    within_trust_region = train.optimizer.name == "trpo"
    keys = [f"algo.{key}" for key in ("inner_lr", "step_sizes") if OmegaConf.select(algo, key) is not None]
    keys += ["eval.adapt_steps"] * testing
    if not experiment.algorithm.meta_learns:
        return f"lower {' or '.join(keys or ['eval.adapt_steps'])}"
    outer = "train.trust_region.kl" if within_trust_region else "train.lr"
    large = train.clip is None or train.clip > 1
    clip = "" if within_trust_region else f", or {'set train.clip=1' if large else 'lower train.clip'}"
    return f"lower {' or '.join([outer, *keys])}{clip}"


def blame(experiment: Experiment, training: Training) -> str:
    """Return what is to blame for a training loss that is not finite, and the remedy.

    The batch of the step in question is drawn again and inspected. Then the loss of the initial parameters on this
    batch is computed, before any adaptation step.
    """
    step = suspect_step(training)
    thetas = experiment.initial_thetas()
    batches = {}
    for seed in sorted({replica.config.seed for replica in experiment.replicas}):
        batches[seed] = sample_tasks(
            experiment, "train", experiment.config.train.meta_batch, stream(seed, "train", step)
        )
        if wrong := not_finite(batches[seed]):
            return f"the data of training step {step + 1} hold {wrong}; fix the data, or what sample does with them"
    for replica, theta in zip(experiment.replicas, thetas, strict=True):
        tasks = batches[replica.config.seed]
        losses = evaluate(replica.algorithm, theta, tasks, experiment.loss, 0).losses
        if not bool(torch.isfinite(losses).all()):
            return (
                f"the data of training step {step + 1} are finite, but on them the loss is not even with the initial "
                f"parameters and before any adaptation, so no step size is to blame; check the model, the loss, and "
                f"the scale of the data, whose largest number is {largest(tasks):.3g}"
            )
    return (
        "the data are finite and so is their loss with the initial parameters, so the step size is to blame; "
        f"{step_size_remedy(experiment)}"
    )
