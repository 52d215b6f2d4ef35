"""MetaNAS: the architecture is adapted to each task together with the weights.

Elsken, Staffler, Metzen, Hutter 2020, "Meta-Learning of Neural Architectures for Few-Shot Learning",
https://arxiv.org/abs/1911.11090. The model's layers mix operations by softmax(a / T).

    inner step    w ← w − α_w ∇_w L_support,   a ← a − α_a ∇_a L_support                 (algorithm 2, task learner)
    temperature   from 1 before the first step down to ``final_temperature``, by a constant factor per step (§4.2)
    meta-loss     L_query after the last step, over initial w and (with ``learned_start``) initial a

Mixtures harden as T falls. After the last step a test task keeps only the operation of largest weight in each layer
(``discrete``), as in the paper's soft pruning. For the first ``warm_up`` meta-steps, all operations have equal weight
and only the weights are trained. Gradients are those of second-order MAML; the paper's meta-learner is Reptile.
`architectures.csv` and `architectures.png` show the architecture weights that test tasks arrive at.

Some texts call this family of methods MANN, "model-agnostic neural architecture search"; `mann` here is the
memory-augmented neural network.
"""

from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from metarun.contracts import Algorithm, Loss, MetaLoss, Report, Spec, Task, Tree, Weights
from metarun.errors import require
from metarun.inner import descent, inner_loop, support_gradient
from metarun.nn.functional import forward_of, parameters_of
from metarun.nn.ops import one_hot
from metarun.targets.metric import Metric
from metarun.tree import size


class State(NamedTuple):
    """The weights and architecture weights of one task after ``step`` steps."""

    weights: Weights
    architecture: Weights
    step: int


def metanas(
    model: nn.Module,
    spec: Spec,
    inner_lr: float = 0.01,
    architecture_lr: float = 1.0,
    inner_steps: int = 5,
    final_temperature: float = 0.05,
    harden_steps: int | None = None,
    discrete: bool = True,
    learned_start: bool = True,
    warm_up: int = 0,
    first_order: bool = False,
) -> Algorithm:
    """MAML over weights and architecture.

    Args:
        model: a module with layers that each mix ``operations`` by a parameter ``architecture``.
        spec: the task family's; any will do.
        inner_lr: step size of weights, above 0, for mean losses.
        architecture_lr: step size of architecture weights, at least 0; 0 leaves them to meta-learning.
        inner_steps: number of inner steps in meta-training, at least 1.
        final_temperature: temperature after the last hardening step, above 0, at most 1.
        harden_steps: number of steps over which the temperature falls, from 1 to ``inner_steps``; null: all of them.
        discrete: whether test tasks choose one operation per layer after the last hardening step.
        learned_start: whether initial architecture weights are meta-learned. If not, operations have equal weight
            before the first step, so that none can win over all tasks before the others have learned anything.
        warm_up: number of meta-steps during which operations have equal weight, at least 0.
        first_order: whether the inner gradient is treated as a constant.
    """
    require(inner_lr > 0, f"inner_lr must be above 0, not {inner_lr}")
    require(architecture_lr >= 0, f"architecture_lr must be at least 0, not {architecture_lr}")
    require(inner_steps >= 1, f"inner_steps must be at least 1, not {inner_steps}")
    require(0 < final_temperature <= 1, f"final_temperature must be above 0 and at most 1, not {final_temperature}")
    hardening = inner_steps if harden_steps is None else harden_steps
    require(1 <= hardening <= inner_steps, f"harden_steps must be from 1 to {inner_steps}, not {harden_steps}")
    require(warm_up >= 0, f"warm_up must be at least 0, not {warm_up}")
    require(
        learned_start or architecture_lr > 0,
        "architecture_lr must be above 0 with learned_start=false: nothing would choose an operation",
    )
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "architecture")}
    require(
        len(layers) > 0,
        f"metanas needs a model with layers that mix operations, and {type(model).__name__} has none; choose "
        "model=supernet_mlp or model=supernet_conv",
    )
    operations = [cast(tuple[str, ...], module.operations) for module in layers.values()]
    require(len(set(operations)) == 1, "metanas needs a model with the same operations in all layers; choose another")
    names = [f"{layer}.architecture" for layer in layers]
    forward = forward_of(model)

    def init(generator: torch.Generator) -> Tree:
        parameters = parameters_of(model)
        theta: Tree = {
            "weights": {name: w for name, w in parameters.items() if name not in names},
            "carried": {"meta_step": parameters[names[0]].new_zeros(())},
        }
        return {**theta, "architecture": {name: parameters[name] for name in names}} if learned_start else theta

    def even(theta: Tree) -> Weights:
        """Return architecture weights that give all operations equal weight."""
        like = theta["carried"]["meta_step"]
        return {name: like.new_zeros(len(operations[0])) for name in names}

    def begun(theta: Tree) -> Tensor:
        """Whether the warm-up is over."""
        return cast(Tensor, theta["carried"]["meta_step"] >= warm_up)

    def tempered(theta: Tree, architecture: Weights, step: int) -> Weights:
        """Return the logits of the operations' weights after ``step`` steps, all equal during the warm-up."""
        temperature = final_temperature ** (min(step, hardening) / hardening)
        return {name: torch.where(begun(theta), a / temperature, 0.0) for name, a in architecture.items()}

    def adapt(theta: Tree, support: Tree, loss: Loss) -> Iterator[State]:
        weights, architecture = theta["weights"], theta.get("architecture") or even(theta)

        def slope(state: State, step: int) -> Weights:
            def tempered_forward(variables: Weights, x: Any) -> Tensor:
                hot = tempered(theta, {name: variables[name] for name in names}, step)
                return forward({**variables, **hot}, x)

            here = {**state.weights, **state.architecture}
            start = {name: v.detach() for name, v in here.items()} if first_order else here
            return support_gradient(tempered_forward, start, support, loss)

        def update(state: State, found: Weights, step: int) -> State:
            weights = descent(inner_lr)(state.weights, found, step)
            return State(weights, descent(architecture_lr)(state.architecture, found, step), step + 1)

        return inner_loop(State(weights, architecture, 0), slope, update)

    def chosen(theta: Tree, state: State) -> Weights:
        """Return logits that leave one operation per layer, or the mixture as it is while it is still hardening."""
        hot = tempered(theta, state.architecture, state.step)
        if not discrete or state.step < inner_steps:
            return hot
        return {n: torch.where(begun(theta), one_hot(a.argmax(-1), len(a), a).log(), a) for n, a in hot.items()}

    def predict(theta: Tree, state: State, x: Any) -> Tensor:
        return forward({**state.weights, **chosen(theta, state)}, x)

    def meta_loss(theta: Tree, task: Task, loss: Loss) -> MetaLoss:
        state = next(islice(adapt(theta, task.support, loss), inner_steps, None))
        weights = {**state.weights, **tempered(theta, state.architecture, inner_steps)}
        value, scores = loss(partial(forward, weights), task.query)
        return MetaLoss(value, scores, {"meta_step": theta["carried"]["meta_step"] + 1})

    def architectures(theta: Tree, task: Task, loss: Loss, steps: int) -> Tensor:
        """Return the weights of the operations ``[layers, operations]``, before one is chosen."""
        state = next(islice(adapt(theta, task.support, loss), steps, None))
        hot = tempered(theta, state.architecture, steps)
        return torch.stack([hot[name].softmax(-1) for name in names])

    axes = {"layer": tuple(layers), "operation": operations[0]}
    return Algorithm(
        init,
        adapt,
        predict,
        approach="agnostic",
        needs="loss",
        paper="https://arxiv.org/abs/1911.11090",
        train_steps=inner_steps,
        meta_loss=meta_loss,
        report=Report("architectures", axes, Metric("weight", higher_is_better=True), architectures),
        adapted_parameters=lambda theta: size(theta["weights"]) + size(even(theta)),
    )
