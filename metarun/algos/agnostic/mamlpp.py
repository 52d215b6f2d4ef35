"""MAML++.

Antoniou, Edwards, Storkey 2019, "How to train your MAML", https://arxiv.org/abs/1810.09502. MAML with (§4):

    learned steps      w_{k+1} = w_k − α_{l,k} ∇ L_support(w_k) for each tensor l of weights, step k     (LSLR)
    multi-step loss    meta-loss = Σ_k v_k L_query(w_k), k = 1 … S; the weights v_k move to the last step        (MSL)
    derivative order   first order for the first epochs, second order afterwards                                 (DA)
    per-step norm      scale and shift of batch normalisation for each step, outside of the inner loop      (BNWB)
                       and running statistics for each step                                                 (BNRS)

The cosine schedule of the outer learning rate (CA) is ``train.schedule=cosine``. v starts at 1/S; in each epoch every v
but the last falls by 1/(S·E), not below 0.03/S, and the last takes what they lose; after E epochs it is 1 and the
others are 0, as in the authors' code (https://github.com/AntreasAntoniou/HowToTrainYourMAMLPytorch). With all
switches off this is MAML.

``batch_norm`` is one of:
- ``shared``: the model's own scale and shift, adapted like all weights, with the statistics of the batch (the authors'
  code does so with ``enable_inner_loop_optimizable_bn_params``, which is off by default);
- ``per_step``: a separate scale and shift for each step, with the statistics of the batch, so queries see each other;
- ``per_step_running``: training normalises by the batch and averages its statistics for each step. Test uses these
  averages, so queries do not see each other. The authors' code keeps such averages and never uses them.

With the last two the inner loop does not adapt the parameters of any normalisation, as in the authors' code. Layers
that normalise by other statistics than those of the batch (layer, group, instance, root mean square) have one scale
and shift for all steps.

Where we deviate: the weights after k steps use normalisation number k for support and query alike, S + 1 in all; the
authors' code has S. The weights of MSL and the order of derivatives change without changing the computation, so a
step costs the same in all epochs.
"""

from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from itertools import islice
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from metarun.contracts import Algorithm, Loss, MetaLoss, Task, Tree, Weights
from metarun.errors import require
from metarun.inner import at_step, descent, inner_loop
from metarun.nn.functional import Forward, forward_of, parameters_of
from metarun.nn.normalisation import along_channels, batch_statistics, with_variance
from metarun.nn.transforms import gradient
from metarun.tree import size, tree_map

MOMENTUM = 0.1
"""Momentum of running statistics, as in torch."""

BatchNorm = nn.modules.batchnorm._BatchNorm

NORMALISATIONS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
"""Layers whose parameters the inner loop does not adapt."""


class GivenStatistics(nn.Module):
    """Batch normalisation with given statistics."""

    def __init__(self, norm: BatchNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.epsilon = norm.weight, norm.bias, norm.eps
        self.register_buffer("mean", torch.zeros_like(norm.weight))
        self.register_buffer("variance", torch.ones_like(norm.weight))

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, channels, ...]`` → the same shape."""
        mean, variance = cast(Tensor, self.mean), cast(Tensor, self.variance)
        return with_variance(x - along_channels(mean, x), variance, self.weight, self.bias, self.epsilon)


class KeptStatistics(nn.Module):
    """Batch normalisation by the batch, which keeps the statistics of its last pass to be read."""

    def __init__(self, norm: BatchNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.epsilon = norm.weight, norm.bias, norm.eps
        self.seen: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, channels, ...]`` → the same shape."""
        mean, variance = batch_statistics(x)
        self.seen = {"mean": mean, "variance": variance}
        return with_variance(x - along_channels(mean, x), variance, self.weight, self.bias, self.epsilon)


def learns_scale(module: nn.Module) -> bool:
    """Whether ``module`` normalises by the batch and learns a scale and a shift for its output."""
    by_batch = isinstance(module, BatchNorm) and module.training and module.affine
    return by_batch and bool(module.weight.requires_grad and module.bias.requires_grad)


def with_norms(model: nn.Module, kind: type[GivenStatistics] | type[KeptStatistics]) -> nn.Module:
    """Return a copy of ``model`` whose batch normalisations are replaced by layers of type ``kind``."""
    model = deepcopy(model)
    for name, module in list(model.named_modules()):
        if learns_scale(module):
            place, _, last = name.rpartition(".")
            setattr(model.get_submodule(place), last, kind(cast(BatchNorm, module)))
    return model


def normalising_parameters(model: nn.Module) -> set[str]:
    """Return the names of the parameters of all normalisations in ``model``."""
    norms = ((name, module) for name, module in model.named_modules() if isinstance(module, NORMALISATIONS))
    return {parameter for name, module in norms for parameter, _ in module.named_parameters(name, recurse=False)}


class State(NamedTuple):
    """The weights of one task after ``step`` steps."""

    weights: Weights
    step: int


def step_weights(epoch: Tensor, steps: int, epochs: int) -> Tensor:
    """Return the weights v of the query losses after 1, …, ``steps`` steps, in ``epoch``, annealed over ``epochs``."""
    early = (1 / steps - epoch / (steps * epochs)).clamp(min=0.03 / steps)
    early = torch.where(epoch < epochs, early, 0.0)
    return torch.stack([*[early] * (steps - 1), 1 - (steps - 1) * early])


def mamlpp(
    model: nn.Module,
    inner_lr: float = 0.1,
    inner_steps: int = 5,
    learned_rates: bool = True,
    multi_step_epochs: int = 10,
    first_order_epochs: int | None = 0,
    batch_norm: Literal["shared", "per_step", "per_step_running"] = "per_step",
    epoch: int = 500,
) -> Algorithm:
    """MAML++, with a separate switch for each of its parts.

    Args:
        model: any differentiable module.
        inner_lr: initial α, above 0, for mean losses.
        inner_steps: S, at least 1.
        learned_rates: whether α is learned for each tensor of weights and each step.
        multi_step_epochs: E, number of epochs over which the multi-step loss is annealed, at least 0; 0: only the last
            step's loss is used.
        first_order_epochs: number of epochs without second derivatives, at least 0; null: all.
        batch_norm: how batch normalisation is done, where the model has any, and whether normalisations of any kind are
            adapted (``shared``) or not.
        epoch: number of meta-steps in an epoch, at least 1.
    """
    require(inner_lr > 0, f"inner_lr must be above 0, not {inner_lr}")
    require(inner_steps >= 1, f"inner_steps must be at least 1, not {inner_steps}")
    require(multi_step_epochs >= 0, f"multi_step_epochs must be at least 0, not {multi_step_epochs}")
    require(
        first_order_epochs is None or first_order_epochs >= 0,
        f"first_order_epochs must be at least 0, not {first_order_epochs}",
    )
    require(epoch >= 1, f"epoch must be at least 1, not {epoch}")
    norms = [name for name, module in model.named_modules() if learns_scale(module)]
    if batch_norm == "shared":
        norms = []
    of_norms = {f"{norm}.{part}" for norm in norms for part in ("weight", "bias")}
    of_others = set[str]() if batch_norm == "shared" else normalising_parameters(model) - of_norms
    running = batch_norm == "per_step_running" and bool(norms)
    keeping = with_norms(model, KeptStatistics) if running else model
    in_training = forward_of(keeping)
    in_test = forward_of(with_norms(model, GivenStatistics)) if running else in_training
    by_step = learned_rates or bool(norms)

    def init(generator: torch.Generator) -> Tree:
        parameters = parameters_of(model)
        weights = {name: w for name, w in parameters.items() if name not in of_norms | of_others}
        first = next(iter(weights.values()))
        theta: dict[str, Any] = {"weights": weights, "carried": {"meta_step": first.new_zeros(())}}
        if learned_rates:
            theta["rates"] = {name: first.new_full((inner_steps,), inner_lr) for name in weights}
        if norms:
            theta["norms"] = {n: parameters[n].expand(inner_steps + 1, -1).clone() for n in sorted(of_norms)}
        if of_others:
            theta["other_norms"] = {name: parameters[name] for name in sorted(of_others)}
        if running:
            shapes = {norm: (inner_steps + 1, len(parameters[f"{norm}.weight"])) for norm in norms}
            theta["carried"]["mean"] = {norm: first.new_zeros(shape) for norm, shape in shapes.items()}
            theta["carried"]["variance"] = {norm: first.new_ones(shape) for norm, shape in shapes.items()}
        return theta

    def norms_at(theta: Tree, step: int, forward: Forward) -> Forward:
        """Return the forward pass with the normalisation of ``step`` in place."""
        own = {name: values[step] for name, values in theta.get("norms", {}).items()} | theta.get("other_norms", {})
        if running and forward is in_test:
            for part in ("mean", "variance"):
                own |= {f"{norm}.{part}": values[step] for norm, values in theta["carried"][part].items()}
        return lambda weights, x: forward({**weights, **own}, x)

    def kept() -> Tree:
        modules = {norm: keeping.get_submodule(norm) for norm in norms} if running else {}
        return {p: {norm: cast(KeptStatistics, m).seen[p] for norm, m in modules.items()} for p in ("mean", "variance")}

    def descend(
        theta: Tree, support: Tree, loss: Loss, forward: Forward, second_order: Tensor | bool
    ) -> Iterator[tuple[State, Tree]]:
        """Yield states, each with the statistics of the support set that led to it (none for the first)."""

        def slope(state: tuple[State, Tree], step: int) -> tuple[Weights, Tree]:
            here, now = norms_at(theta, step, forward), at_step(support, step)

            def support_loss(weights: Weights) -> tuple[Tensor, Tree]:
                value, _ = loss(partial(here, weights), now)
                return value, (kept() if forward is in_training else {})

            weights = state[0].weights
            start = {n: w.detach() for n, w in weights.items()} if second_order is False else weights
            found, seen = gradient(support_loss, start, has_aux=True)
            if second_order is False:
                found = {n: g.detach() for n, g in found.items()}
            if isinstance(second_order, Tensor):
                found = {n: g.detach() + second_order * (g - g.detach()) for n, g in found.items()}
            return found, seen

        def update(state: tuple[State, Tree], found: tuple[Weights, Tree], step: int) -> tuple[State, Tree]:
            gradients, seen = found
            rates = {n: r[step] for n, r in theta["rates"].items()} if learned_rates else inner_lr
            return State(descent(rates)(state[0].weights, gradients, step), step + 1), seen

        # Where each step has separate learned parameters, there are no further steps to take.
        states = inner_loop((State(theta["weights"], 0), {}), slope, update)
        return islice(states, inner_steps + 1) if by_step else states

    def adapt(theta: Tree, support: Tree, loss: Loss) -> Iterator[State]:
        return (state for state, _ in descend(theta, support, loss, in_test, False))

    def predict(theta: Tree, state: State, x: Any) -> Tensor:
        return norms_at(theta, state.step, in_test)(state.weights, x)

    def meta_loss(theta: Tree, task: Task, loss: Loss) -> MetaLoss:
        carried = theta["carried"]
        now = torch.floor(carried["meta_step"] / epoch)
        second_order: Tensor | bool = first_order_epochs == 0
        if first_order_epochs:
            second_order = (now >= first_order_epochs).to(now.dtype)
        losses, statistics = [], []
        for state, seen in descend(theta, task.support, loss, in_training, second_order):
            statistics.append(seen)
            last = state.step == inner_steps
            if last or (multi_step_epochs and state.step):
                value, scores = loss(partial(norms_at(theta, state.step, in_training), state.weights), task.query)
                losses.append(value)
            if last:
                break
        renewed: dict[str, Any] = {"meta_step": carried["meta_step"] + 1}
        if running:
            by_steps = [*statistics[1:], kept()]
            for part in ("mean", "variance"):
                new = {norm: torch.stack([seen[part][norm].detach() for seen in by_steps]) for norm in norms}
                renewed[part] = tree_map(lambda old, n: old + MOMENTUM * (n - old), carried[part], new)
        if not multi_step_epochs:
            return MetaLoss(losses[-1], scores, renewed)
        annealed = (step_weights(now, inner_steps, multi_step_epochs) * torch.stack(losses)).sum()
        return MetaLoss(annealed, scores, renewed)

    return Algorithm(
        init,
        adapt,
        predict,
        approach="agnostic",
        needs="loss",
        paper="https://arxiv.org/abs/1810.09502",
        train_steps=inner_steps,
        meta_loss=meta_loss,
        max_steps=inner_steps if by_step else None,
        adapted_parameters=lambda theta: size(theta["weights"]),
    )
