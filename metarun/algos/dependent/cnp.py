"""Conditional neural processes.

Garnelo et al. 2018, "Conditional Neural Processes", https://arxiv.org/abs/1807.01613 (§2):

    r_i = h(x_i, y_i)              for every context point
    r = mean of r_i
    μ, σ = g(x, r)                 for every target x

The meta-loss is the mean negative log-likelihood of all targets under the normal distribution (μ, σ), with
σ = 0.1 + 0.9 softplus(·) as in the authors' code (https://github.com/google-deepmind/neural-processes). The targets are
all support and query points. In training only some support points are the context: their number is drawn uniformly and
the points are chosen at random, for every task from its own seed. The authors draw one number per batch, since their
tensors have no weights, and leave the largest out. Validation and test use the whole support set.

With ``waves`` inputs are places, such as those of pixels, and both networks see them as waves (`metarun.nn.waves`),
since layers on two numbers alone learn only what changes slowly. All layers then begin as in the authors' code, with
biases of zero and weights by the rule of Glorot and Bengio 2010 (https://proceedings.mlr.press/v9/glorot10a.html,
equation 16), which are larger than torch's own, and y of a context point weighs as much as all of its waves together.
Otherwise the mean of the r_i hardly depends on any y, and for thousands of steps nothing but the mean of all tasks is
learned.

Predictions are μ, and the second metric is the log-likelihood. The method brings its own networks; the configured
model is not used.
"""

import math
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from metarun.contracts import Algorithm, Loss, MetaLoss, Scores, Spec, Task, Tree, flat
from metarun.errors import require
from metarun.inner import both, keep_support
from metarun.nn.functional import own_network
from metarun.nn.ops import mean_row
from metarun.nn.waves import Waves
from metarun.random import fresh_seed, uniform
from metarun.targets.metric import Metric
from metarun.targets.weights import count_of, mean_over, weight_of

LEAST_STD = 0.1
LOG_LIKELIHOOD = Metric("log-likelihood", higher_is_better=True)
"""Mean log-likelihood in nats per target."""


class Points(NamedTuple):
    """Examples whose targets are known, as rows of numbers."""

    x: Tensor
    """``[points, inputs]``."""
    y: Tensor
    """``[points, outputs]``."""

    def pairs(self) -> Tensor:
        """Inputs concatenated with outputs ``[points, inputs + outputs]``."""
        return torch.cat([self.x, self.y], -1)


def points(data: Tree) -> Points:
    """Return examples as points."""
    return Points(flat(data["x"]), data["y"])


def layers(*widths: int) -> nn.Sequential:
    """Return linear layers with ReLU between them."""
    modules: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        modules += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def placed(inputs: int, waves: int) -> tuple[nn.Module, int]:
    """Return what turns inputs into what networks see of them, and the width of that."""
    if not waves:
        return nn.Identity(), inputs
    module = Waves(inputs, waves)
    return module, module.width


def begin(network: nn.Module, places: int, encoders: list[nn.Sequential]) -> None:
    """Draw weights by Glorot's rule; in encoders, y weighs as much as the ``places`` inputs before it."""
    for module in network.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    with torch.no_grad():
        for encoder in encoders:
            next(encoder.parameters())[:, places:] *= math.sqrt(places)


def drawn_context(support: Tree, least: int | None) -> Tensor:
    """Draw weights ``[support]``: 1 for a random context of at least ``least`` points, else 0; None: all points.

    The size of the context is uniform on ``least``, …, all. A smaller support set is used as a whole. Padding is never
    part of the context.

    Raises:
        UserError: the task has no seed to draw from.
    """
    whole, n = weight_of(support), count_of(support)
    if least is None or least >= len(whole):
        return whole
    numbers = uniform(fresh_seed(), (len(whole) + 1,))
    order = numbers[1:]
    if "weight" in support:
        # Padding is ranked last, so the points get the random numbers that they would get without it.
        order = torch.where(whole > 0, order[(whole.cumsum(0) - 1).clamp(min=0).long()], 2.0)
    size = least + (numbers[0] * (n - least + 1)).floor()
    rank = (order[None] < order[:, None]).sum(1)
    chosen = (rank < size).to(whole.dtype)
    return chosen * whole if "weight" in support else chosen


def as_normal(output: Tensor) -> tuple[Tensor, Tensor]:
    """Return a decoder's output ``[..., 2 outputs]`` as mean and standard deviation ``[..., outputs]``."""
    mean, spread = output.chunk(2, -1)
    return mean, LEAST_STD + (1 - LEAST_STD) * softplus(spread)


def log_likelihood(y: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return the log density ``[points]`` of every target ``y [points, outputs]`` in nats."""
    return (-0.5 * ((y - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)).sum(-1)


class Process(nn.Module):
    """Encoder, mean and decoder."""

    def __init__(self, inputs: int, outputs: int, width: int, waves: int = 0) -> None:
        super().__init__()
        self.place, places = placed(inputs, waves)
        self.encoder = layers(places + outputs, width, width, width, width)
        self.decoder = layers(places + width, width, width, 2 * outputs)
        if waves:
            begin(self, places, [self.encoder])

    def forward(self, given: tuple[Points, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Support points, their weights and targets ``x [targets, inputs]`` → μ and σ ``[targets, outputs]``."""
        support, weight, x = given
        r = mean_row(self.encoder(Points(self.place(support.x), support.y).pairs()), weight)
        return as_normal(self.decoder(torch.cat([self.place(x), r.expand(len(x), -1)], -1)))


def cnp(model: nn.Module, spec: Spec, width: int = 128, least_context: int | None = 3, waves: int = 0) -> Algorithm:
    """Conditional neural process.

    Args:
        model: only its dtype and device are used.
        spec: that of a regression task.
        width: width of every layer, at least 1.
        least_context: smallest number of context points in training, at least 1; None: all support points always.
        waves: number of half periods of the fastest wave of the inputs; 0: the networks see the inputs alone.
    """
    require(width >= 1, f"width must be at least 1, not {width}")
    require(least_context is None or least_context >= 1, f"least_context must be at least 1, not {least_context}")
    inputs = math.prod(spec.inputs.shape)
    forward, drawn = own_network(lambda: Process(inputs, spec.target.outputs, width, waves), model)

    def init(generator: torch.Generator) -> Tree:
        return {"weights": drawn(generator)}

    def distribution(theta: Tree, support: Tree, weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        mean_and_std: tuple[Tensor, Tensor] = forward(theta["weights"], (points(support), weight, x))
        return mean_and_std

    def predict(theta: Tree, state: Tree, x: Any) -> Tensor:
        return distribution(theta, state, weight_of(state), flat(x))[0]

    def likelihood(theta: Tree, state: Tree, data: Tree) -> Scores:
        found = log_likelihood(data["y"], *distribution(theta, state, weight_of(state), flat(data["x"])))
        return {LOG_LIKELIHOOD.name: mean_over(found, data)}

    def meta_loss(theta: Tree, task: Task, loss: Loss) -> MetaLoss:
        targets, weight = both(task), drawn_context(task.support, least_context)
        mean, std = distribution(theta, task.support, weight, flat(targets["x"]))
        _, scores = loss(lambda query: mean[len(task.support["y"]) :], task.query)
        return MetaLoss(-mean_over(log_likelihood(targets["y"], mean, std), targets), scores)

    return Algorithm(
        init,
        keep_support,
        predict,
        approach="dependent",
        needs="numbers",
        paper="https://arxiv.org/abs/1807.01613",
        meta_loss=meta_loss,
        metrics=(LOG_LIKELIHOOD,),
        scores=likelihood,
        adapted_parameters=lambda theta: width,
    )
