"""Baseline++: joint training with a cosine classifier, then a new classifier fitted to each task on frozen features.

Chen, Liu, Kira, Wang, Huang 2019, "A Closer Look at Few-shot Classification", https://arxiv.org/abs/1904.04232 (§3.2).

    logit of class c     τ g_c cos(f(x), w_c)
    training             cross-entropy over all training classes, over f and the w and g of each
    a new task           w and g of its classes by gradient descent on the support set, f as it is

As in the authors' code (https://github.com/wyharveychen/CloserLookFewShot, ``distLinear`` in ``backbone.py``) τ is 2
for up to 200 classes and 10 for more, and the length g_c of each class is learned. Every classifier starts from the
random weights of a linear layer, with g_c their length; before the first step it therefore answers at chance level.

Where we deviate: the authors fit w and g with 100 passes over random mini-batches of 4, by SGD with a step size of
0.01, dampened momentum and weight decay. Here steps are plain gradient descent on the whole support set, their size is
chosen on validation tasks, and all tasks start from the same random weights. Support and query examples are embedded
in one batch.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metarun.algos.baselines.scratch import check_step_sizes, with_step_size
from metarun.algos.baselines.transfer import over_training_classes
from metarun.contracts import Algorithm, Loss, MetaLoss, Spec, Task, Tree, Weights
from metarun.errors import require
from metarun.inner import Fit, answer, both, fit_head, fits
from metarun.nn.functional import forward_of, number_like, parameters_of, trunk_and_head
from metarun.nn.ops import unit_rows
from metarun.nn.padding import weighing

STEP_SIZES = (0.01, 0.1, 1.0, 10.0)


def official_scale(classes: int) -> float:
    """Return τ for a number of classes, as in the authors' code."""
    return 2.0 if classes <= 200 else 10.0


def random_classifier(classes: int, features: int, generator: torch.Generator, like: Tensor) -> Weights:
    """Draw ``weight [classes, features]`` uniformly within ±1/√features, and return it with ``length [classes]``."""
    weight = (2 * torch.rand(classes, features, generator=generator) - 1) / features**0.5
    return {"weight": weight.to(like), "length": weight.norm(dim=1).to(like)}


def weighted_cosines(classifier: Weights, z: Tensor) -> Tensor:
    """Return g_c cos(z, w_c): ``z [examples, features]`` → ``[examples, classes]``."""
    return unit_rows(z) @ unit_rows(classifier["weight"]).T * classifier["length"]


def baselinepp(
    model: nn.Module,
    spec: Spec,
    scale: float | None = None,
    task_scale: float | None = None,
    step_sizes: Sequence[float] = STEP_SIZES,
) -> Algorithm:
    """Cosine classifiers on a jointly trained trunk.

    Args:
        model: a module with ``trunk`` and ``head``; of the head only its width is used.
        spec: that of a family whose tasks share classes.
        scale: τ of joint training, above 0; null: 2 for up to 200 training classes, 10 for more.
        task_scale: τ of a task's own classifier, above 0; null: by the same rule.
        step_sizes: candidate step sizes for fitting a task's classifier, each above 0.
    """
    require(scale is None or scale > 0, f"scale must be above 0, not {scale}")
    require(task_scale is None or task_scale > 0, f"task_scale must be above 0, not {task_scale}")
    check_step_sizes(step_sizes)
    trunk, head = trunk_and_head(model, "baselinepp")
    embed, classes = forward_of(trunk), spec.sizes.training_classes
    if spec.offers("labels"):
        require(classes is not None, "baselinepp needs tasks that share classes; choose another, such as multitask")
    classes, ways = classes or 0, spec.sizes.ways or 0
    joint_scale = official_scale(classes) if scale is None else scale
    own_scale = official_scale(ways) if task_scale is None else task_scale

    def init(generator: torch.Generator) -> Tree:
        weights = parameters_of(trunk)
        first = number_like(model, 0.0)
        return {
            "weights": weights,
            "joint_head": random_classifier(classes, head.in_features, generator, first),
            "carried": {
                "step_size": first.new_tensor(step_sizes[0]),
                "start": random_classifier(ways, head.in_features, generator, first),
            },
        }

    def logits(classifier: Weights, z: Tensor) -> Tensor:
        return own_scale * weighted_cosines(classifier, z)

    def predict(theta: Tree, state: Fit, x: Any) -> Tensor:
        def heads(z: Tensor) -> Iterator[Weights]:
            return fit_head(state, logits, theta["carried"]["start"], z, theta["carried"]["step_size"])

        return answer(state, embed, theta["weights"], x, heads, logits)

    def meta_loss(theta: Tree, task: Task, loss: Loss) -> MetaLoss:
        data = both(task)
        with weighing(data.get("weight")):
            of_all = joint_scale * weighted_cosines(theta["joint_head"], embed(theta["weights"], data["x"]))
        return over_training_classes(of_all, data, spec.metrics[0].name)

    return Algorithm(
        init,
        fits,
        predict,
        approach="baseline",
        needs="labels",
        paper="https://arxiv.org/abs/1904.04232",
        meta_loss=meta_loss,
        candidates=lambda theta: [with_step_size(theta, size) for size in step_sizes],
        any_ways=True,
        embed=lambda theta, x: embed(theta["weights"], x),
        adapted_parameters=lambda theta: ways * (head.in_features + 1),
    )
