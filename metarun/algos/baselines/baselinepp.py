"""Baseline++: joint training under a cosine classifier, then a new one fitted to each task on frozen features.

Chen, Liu, Kira, Wang, Huang 2019, "A Closer Look at Few-shot Classification", https://arxiv.org/abs/1904.04232 (§3.2).

    logit of class c     τ cos(f(x), w_c)
    training             cross-entropy over all training classes, over f and the w of each
    a new task           w of its classes by gradient descent on the support set, f as it is

As in the authors' code (https://github.com/wyharveychen/CloserLookFewShot) τ is larger for many classes than for a
task's few, and constant. They fit w with 100 steps on random mini-batches of 4 from random w; here steps are on the
whole support set, and from the direction of the class means, which a few steps suffice for; validation tasks choose
their size. Support and query examples are embedded in one batch.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from metarun.algos.baselines.scratch import check_step_sizes, with_step_size
from metarun.algos.baselines.transfer import both
from metarun.errors import require
from metarun.functional import Fit, answer, fit_head, fits, forward_of, parameters_of, trunk_and_head, unit_rows
from metarun.types import Algorithm, Loss, Spec, Task, Tree, Weights

STEP_SIZES = (0.01, 0.1, 1.0, 10.0)


def baselinepp(
    model: nn.Module,
    spec: Spec,
    scale: float = 30.0,
    task_scale: float = 10.0,
    step_sizes: Sequence[float] = STEP_SIZES,
) -> Algorithm:
    """Cosine classifiers on a jointly trained trunk.

    Args:
        model: a module with ``trunk`` and ``head``; of the head only its width is used.
        spec: of a family whose tasks share classes.
        scale: τ of joint training, above 0.
        task_scale: τ of a task's own classifier, above 0.
        step_sizes: candidates for fitting it, each above 0.
    """
    require(scale > 0, f"scale must be above 0, not {scale}")
    require(task_scale > 0, f"task_scale must be above 0, not {task_scale}")
    check_step_sizes(step_sizes)
    trunk, head = trunk_and_head(model, spec, "baselinepp")
    embed, classes = forward_of(trunk), spec.training_classes
    if spec.kind == "classification":
        require(classes is not None, "baselinepp needs tasks that share classes; choose another, such as multitask")

    def init(model: nn.Module, generator: torch.Generator) -> Tree:
        weights = parameters_of(trunk_and_head(model, spec, "baselinepp")[0])
        first = next(iter(weights.values()))
        joint = torch.randn(classes or 0, head.in_features, generator=generator) / head.in_features**0.5
        return {
            "weights": weights,
            "joint_head": {"weight": joint.to(first)},
            "carried": {"step_size": first.new_tensor(step_sizes[0])},
        }

    def cosines(weights: Weights, z: Tensor) -> Tensor:
        return task_scale * unit_rows(z) @ unit_rows(weights["weight"]).T

    def predict(theta: Tree, state: Fit, x: Any) -> Tensor:
        def heads(z: Tensor) -> Iterator[Weights]:
            start = {"weight": unit_rows(state.support["y"].T @ unit_rows(z))}
            return fit_head(state, cosines, start, z, theta["carried"]["step_size"])

        return answer(state, embed, theta["weights"], x, heads, cosines)

    def meta_loss(theta: Tree, task: Task, loss: Loss) -> tuple[Tensor, Tensor]:
        data = both(task)
        logits = scale * unit_rows(embed(theta["weights"], data["x"])) @ unit_rows(theta["joint_head"]["weight"]).T
        correct = logits.argmax(-1) == data["class"]
        return cross_entropy(logits, data["class"]), correct.to(logits.dtype).mean()

    return Algorithm(
        init,
        fits,
        predict,
        family="baseline",
        kinds=("classification",),
        paper="https://arxiv.org/abs/1904.04232",
        meta_loss=meta_loss,
        candidates=lambda theta: [with_step_size(theta, size) for size in step_sizes],
        any_ways=True,
        adapted_parameters=lambda theta: (spec.ways or 0) * head.in_features,
    )
