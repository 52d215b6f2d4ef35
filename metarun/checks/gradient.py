"""A check of a run's first meta-gradient against plain autograd, without any transform of ``torch.func``.

A model or a family may call a function whose derivative is wrong under ``torch.func``, and only a comparison would
reveal it. The meta-gradient of one task is therefore computed twice: once as in the run, and once by plain autograd
with torch's own layers as they are (`metarun.nn.transforms.plainly`).

The comparison is made in the run's precision. Where it finds a difference that rounding does not explain, it is made
again in float64 before the run is stopped: a gradient with jumps, such as that of a support vector machine whose active
set changes with the last digit of its inputs, differs in float32 alone; a wrong derivative differs in both.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from metarun.assemble import Replica, build_model
from metarun.config import build
from metarun.contracts import Algorithm, Tree
from metarun.engine.batch import meta_gradient
from metarun.engine.meta_step import MetaStep, parts_of, replica
from metarun.errors import UserError, first_line
from metarun.nn.transforms import plainly
from metarun.tree import tree_map

log = logging.getLogger(__name__)

ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-9}
"""Relative difference that needs no explanation: wrong derivatives of normalisations are off by 7e-4 and more."""
AMPLIFIED = 100
"""How much more the rounding within a step may move the gradient than a change of the parameters' last digit does."""
CANCELLED = 10
"""How much more rounding shows in gradients of policies, since advantages have mean zero and cancel in sums."""
SMALL = 1e-3
"""Parameters whose share of the whole gradient is smaller are measured against this share."""


def rounding(values: Tensor) -> float:
    """Return the relative difference of tensors like ``values`` that needs no explanation."""
    return ROUNDING.get(values.dtype, ROUNDING[torch.float32])


def plain_gradient(meta_step: MetaStep, given: Tree, jitter: float = 0.0) -> Tensor:
    """Return the first replica's meta-gradient ``[numbers]`` by plain autograd, at parameters changed by a share."""
    own = replica(given, 0)
    weights = own["train_state"]["weights"]
    signs = torch.ones_like(weights)
    signs[::2] = -1
    theta = meta_step.layout.theta({**own["train_state"], "weights": weights * (1 + jitter * signs)})
    experiment = meta_step.experiment
    with plainly(), torch.backends.cudnn.flags(enabled=False):
        algorithm = experiment.replicas[0].algorithm
        found = meta_gradient(algorithm, theta, own["tasks"], experiment.loss)
    return meta_step.layout.vector(tree_map(torch.detach, found.grads))


@contextmanager
def default_float64() -> Iterator[None]:
    """Inside, new tensors are float64 unless stated otherwise."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def in_float64(meta_step: MetaStep, given: Tree) -> tuple[MetaStep, Tree]:
    """Return the first replica's meta-step and its input in float64."""

    def wide(leaf: Tensor) -> Tensor:
        return leaf[:1].double() if leaf.is_floating_point() else leaf[:1]

    experiment = meta_step.experiment
    config, family = experiment.replicas[0].config, experiment.family
    model = build_model(config, family).to(experiment.device).double()
    algorithm = cast(Algorithm, build(config, "algo", model=model, spec=family.spec))
    only = Replica(config, {}, model, algorithm)
    return MetaStep(replace(experiment, replicas=[only], algorithm=algorithm, placeholders={})), tree_map(wide, given)


def check_gradient(meta_step: MetaStep, given: Tree) -> None:
    """Compare the meta-gradient of the first task of ``given`` with plain autograd's.

    Raises:
        UserError: they differ by more than rounding, in float64 too; the sentence names the parameter that differs
            most.
    """
    try:
        compare_gradients(meta_step, given)
    except UserError as refusal:
        try:
            with default_float64():
                compare_gradients(*in_float64(meta_step, given))
        except (UserError, RuntimeError):
            raise refusal from None
        log.info("The meta-gradient is right in float64. In float32 it depends on the last digits of the parameters.")


def compare_gradients(meta_step: MetaStep, given: Tree) -> None:
    """Compare as `check_gradient`, in the precision of ``given``."""
    if not meta_step.layout.size:
        return
    one = parts_of(given, 1)[0]
    found = meta_step.gradient(one, narrow=False)["gradient"][0]
    try:
        expected = plain_gradient(meta_step, one)
    except RuntimeError as error:
        log.info("The meta-gradient cannot be compared with plain autograd's: %s", first_line(error))
        return
    allowed = rounding(expected)
    if meta_step.experiment.family.spec.offers("policy"):
        allowed *= CANCELLED
    difference = relative(meta_step, found, expected)
    if bool((difference <= allowed).all()):
        return
    # Far more than rounding: unless this very gradient magnifies rounding, something is wrong.
    moved = plain_gradient(meta_step, one, jitter=torch.finfo(expected.dtype).eps)
    excess = difference - (allowed + AMPLIFIED * relative(meta_step, moved, expected))
    if bool((excess <= 0).all()):
        return
    # Where both results are NaN, the loss itself is to blame, which is reported elsewhere.
    if not bool(expected.isfinite().all()):
        return
    worst = int(excess.nan_to_num(torch.inf).argmax())
    name = meta_step.layout.names[worst]
    raise UserError(
        f"The meta-gradient of {name} differs from that of plain autograd by {100 * float(difference[worst]):.2g} %: "
        "the model, the loss or the algorithm calls a function whose derivative is wrong under torch.func; write that "
        "function out in plain arithmetic, or take a layer of torch.nn."
    )


def relative(meta_step: MetaStep, found: Tensor, expected: Tensor) -> Tensor:
    """Return how far ``found`` is from ``expected`` for each parameter, relative to its size ``[parameters]``."""
    sizes = meta_step.layout.sizes
    apart = torch.stack([part.norm() for part in torch.split(found - expected, sizes)])
    size = torch.stack([part.norm() for part in torch.split(expected, sizes)])
    return apart / size.clamp(min=SMALL * float(expected.norm()) + torch.finfo(expected.dtype).tiny)
