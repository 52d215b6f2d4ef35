"""Transfer: train on all training tasks jointly, then fine-tune on the support set.

The "pretrained" baseline of MAML (https://arxiv.org/abs/1703.03400, §5.1) and the "Baseline" of Chen et al.
2019, "A Closer Look at Few-shot Classification" (https://arxiv.org/abs/1904.04232, §3.1).

Where tasks share classes, the trunk learns to tell all training classes apart with one wide linear head; a
new task gets a new head that starts at zero. Elsewhere the whole model learns the average task.
Fine-tuning is gradient descent on all weights; its step size is chosen from ``step_sizes`` on validation tasks.
Where we deviate: Chen et al. freeze the trunk.

Expected: MSE 1.6 ± 0.2 after 10 steps, from 2.97 (``metarun algo=transfer task=sinusoid``).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from metarun.algos.baselines.scratch import STEP_SIZES, scratch
from metarun.contracts import Algorithm, Loss, MetaLoss, Spec, Task, Tree
from metarun.inner import both
from metarun.nn.functional import forward_of, number_like, require_own_head, trunk_and_head
from metarun.nn.padding import weighing
from metarun.targets.weights import mean_over
from metarun.tree import size


def over_training_classes(logits: Tensor, data: Tree, score: str) -> MetaLoss:
    """Return the mean cross-entropy of ``logits [examples, training classes]``, and the accuracy as ``score``."""
    correct = logits.argmax(-1) == data["class"]
    if "weight" in data:
        loss = mean_over(cross_entropy(logits, data["class"], reduction="none"), data)
    else:
        loss = cross_entropy(logits, data["class"])
    return MetaLoss(loss, {score: mean_over(correct.to(logits.dtype), data)})


def transfer(model: nn.Module, spec: Spec, step_sizes: Sequence[float] = STEP_SIZES) -> Algorithm:
    """Joint training, then fine-tuning.

    Args:
        model: any differentiable module; with ``trunk`` and ``head`` where tasks share classes.
        spec: the task family's; ``training_classes`` says whether tasks share classes.
        step_sizes: candidate step sizes for fine-tuning, each above 0.
    """
    fine_tuning = scratch(model, step_sizes)._replace(
        needs="examples" if spec.offers("examples") or spec.offers("policy") else "slope",
        paper="https://arxiv.org/abs/1904.04232",
        meta_learns=True,
    )
    forward, classes = forward_of(model), spec.sizes.training_classes

    def joint_task(theta: Tree, task: Task, loss: Loss) -> MetaLoss:
        return MetaLoss(*loss(lambda x: forward(theta["weights"], x), both(task)))

    if classes is None:
        return fine_tuning._replace(meta_loss=joint_task)
    trunk, head = trunk_and_head(model, "transfer")
    require_own_head(model, "transfer")
    embed = forward_of(trunk)

    def init(generator: torch.Generator) -> Tree:
        theta = fine_tuning.init(generator)
        weights = theta["weights"]
        for name in weights.keys() & {"head.weight", "head.bias"}:
            weights[name] = torch.zeros_like(weights[name])
        joint = torch.randn(classes, head.in_features, generator=generator) / head.in_features**0.5
        bias = number_like(model, 0.0).new_zeros(classes)
        return {**theta, "joint_head": {"weight": joint.to(bias), "bias": bias}}

    def joint_classification(theta: Tree, task: Task, loss: Loss) -> MetaLoss:
        data, joint = both(task), theta["joint_head"]
        features = {n.removeprefix("trunk."): w for n, w in theta["weights"].items() if n.startswith("trunk.")}
        with weighing(data.get("weight")):
            logits = embed(features, data["x"]) @ joint["weight"].T + joint["bias"]
        return over_training_classes(logits, data, spec.metrics[0].name)

    return fine_tuning._replace(
        init=init,
        meta_loss=joint_classification,
        any_ways=True,
        adapted_parameters=lambda theta: size(theta["weights"]),
    )
