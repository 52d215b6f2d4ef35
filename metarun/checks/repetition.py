"""A check that a task gets the same answers when it is asked again.

A module that keeps something from one call to the next, such as a hidden state or a counter in an attribute, shares it
between support and query examples and between tasks, so that scores depend on the order of tasks. PyTorch allows that,
and where shapes happen to fit, nothing fails. Therefore one task is scored twice before a run begins.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from metarun.assemble import Experiment
from metarun.checks.gradient import rounding
from metarun.contracts import Task, Tree
from metarun.engine.batch import adapt_and_score
from metarun.errors import UserError
from metarun.nn.transforms import plainly


@contextmanager
def same_global_numbers() -> Iterator[None]:
    """Inside, Python's, NumPy's and torch's global generators may be used, and afterwards they are as they were."""
    python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(of_numpy)  # noqa: NPY002


def attributes_of(model: nn.Module) -> dict[str, object]:
    """Map the dotted name of each plain attribute of a model and its modules to its value."""
    return {
        f"{name}.{key}" if name else key: value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if not key.startswith("_")
    }


def check_repetition(experiment: Experiment, theta: Tree, task: Task) -> None:
    """Score a task (leaves ``[1, ...]``) twice as it is before adaptation, with equal parameters and random numbers.

    Policies are left out: they act in environments that may change by themselves.

    Raises:
        UserError: the query losses differ by more than rounding; the sentence names attributes that have changed.
    """
    if not experiment.family.spec.offers("examples"):
        return
    first = experiment.replicas[0]

    def score() -> Tensor:
        # Plain calls, since a tensor that is kept inside a transform cannot be used outside.
        with plainly(), same_global_numbers():
            return adapt_and_score(first.algorithm, theta, task, experiment.loss, 0)[0]

    before = attributes_of(first.model)
    try:
        once, again = score(), score()
    except Exception:
        # What cannot be scored is reported by the check of predictions.
        return
    if not bool(((once - again).abs() > rounding(once) * once.abs()).any()):
        return
    changed = [name for name, value in attributes_of(first.model).items() if before.get(name) is not value]
    if changed:
        who = f"model: the forward pass of {type(first.model).__name__} changes {', '.join(changed[:3])}"
    else:
        who = "The model, the loss or the algorithm keeps something"
    raise UserError(
        f"{who} from one call to the next, and its answers depend on that: the same task has a query loss of "
        f"{float(once.mean()):.6g} and, asked again, of {float(again.mean()):.6g}. Tasks would share what is kept; let "
        "a forward pass depend on its input and its parameters alone."
    )
