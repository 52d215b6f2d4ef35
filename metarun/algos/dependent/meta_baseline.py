"""Meta-Baseline: pre-training as a classifier of all training classes, then nearest class mean by cosine in episodes.

Chen, Liu, Xu, Darrell, Wang 2021, "Meta-Baseline: Exploring Simple Meta-Learning for Few-Shot Learning",
https://arxiv.org/abs/2003.04390 (§3).

    pre-training   cross-entropy of a linear classifier W f(x) + b over all training classes
    episodes       cross-entropy of the queries by  logit_k(x) = τ cos(f(x), c_k)
    prototype      c_k = mean of the embeddings of class k's support examples

The classifier is dropped after pre-training; the trunk f and the scale τ are trained in episodes. Without episodes this
is the paper's Classifier-Baseline, without pre-training it is `protonet` with ``distance=cosine``.

Where we deviate: both stages are one run with one optimizer and schedule, pre-training classifies the examples of
tasks, and what validation tasks select may be from either stage. Support and query examples are embedded in one batch.
"""

from typing import Any

import torch
from torch import Tensor, nn

from metarun.algos.baselines.transfer import over_training_classes
from metarun.contracts import Algorithm, Loss, MetaLoss, Spec, Task, Tree
from metarun.errors import require
from metarun.inner import both, by_row, keep_support, rows_together
from metarun.nn.functional import forward_of, number_like, parameters_of, trunk_and_head
from metarun.nn.ops import class_means, unit_rows
from metarun.nn.padding import weighing


def meta_baseline(model: nn.Module, spec: Spec, pretrain_steps: int = 500, scale: float = 10.0) -> Algorithm:
    """Classifier pre-training, then episodes with a cosine nearest mean.

    Args:
        model: a module with ``trunk`` and ``head``; of the head only its width is used.
        spec: that of a family whose tasks share classes.
        pretrain_steps: number of meta-steps of pre-training, at least 0.
        scale: initial τ, above 0 (10 in the paper).
    """
    require(pretrain_steps >= 0, f"pretrain_steps must be at least 0, not {pretrain_steps}")
    require(scale > 0, f"scale must be above 0, not {scale}")
    trunk, head = trunk_and_head(model, "meta_baseline")
    embed, classes = forward_of(trunk), spec.sizes.training_classes
    if spec.offers("labels"):
        require(classes is not None, "meta_baseline needs tasks that share classes; choose another, such as protonet")

    def init(generator: torch.Generator) -> Tree:
        weights = parameters_of(trunk)
        first = number_like(model, 0.0)
        joint = torch.randn(classes or 0, head.in_features, generator=generator) / head.in_features**0.5
        return {
            "weights": weights,
            "scale": first.new_tensor(scale),
            "joint_head": {"weight": joint.to(first), "bias": first.new_zeros(classes or 0)},
            "carried": {"meta_step": first.new_zeros(())},
        }

    def nearest(theta: Tree, z: Tensor, y: Tensor, weight: Tensor | None, queries: Tensor) -> Tensor:
        centres = class_means(z, y, weight)
        answer: Tensor = theta["scale"] * unit_rows(queries) @ unit_rows(centres).T
        return answer

    def predict(theta: Tree, state: Tree, x: Any) -> Tensor:
        rows, queries = rows_together(spec, embed, theta["weights"], state, x)
        return by_row(lambda asked: nearest(theta, rows.z, rows.y, rows.weight, asked), queries)

    def meta_loss(theta: Tree, task: Task, loss: Loss) -> MetaLoss:
        data, size, step = both(task), len(task.support["x"]), theta["carried"]["meta_step"]
        with weighing(data.get("weight")):
            z = embed(theta["weights"], data["x"])
        logits = z @ theta["joint_head"]["weight"].T + theta["joint_head"]["bias"]
        classifying = over_training_classes(logits, data, spec.metrics[0].name).loss
        answers = nearest(theta, z[:size], task.support["y"], task.support.get("weight"), z[size:])
        episodic, scores = loss(lambda x: answers, task.query)
        # Which stage it is changes no operation, so that a recorded or compiled step serves both.
        chosen = torch.where(step < pretrain_steps, classifying, episodic)
        return MetaLoss(chosen, scores, {"meta_step": step + 1})

    return Algorithm(
        init,
        keep_support,
        predict,
        approach="dependent",
        needs="labels",
        paper="https://arxiv.org/abs/2003.04390",
        meta_loss=meta_loss,
        any_ways=True,
        open_ways=True,
        embed=lambda theta, x: embed(theta["weights"], x),
        adapted_parameters=lambda theta: 0,
    )
