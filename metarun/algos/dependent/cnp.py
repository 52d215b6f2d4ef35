"""Conditional neural processes, with or without attention.

- ``attention=false``, CNP: Garnelo et al. 2018, "Conditional Neural Processes", https://arxiv.org/abs/1807.01613 (§2):

      r_i = h(x_i, y_i),   r = mean of r_i,   μ, σ = g(x, r)

- ``attention=true``, the deterministic path of ANP: Kim et al. 2019, "Attentive Neural Processes",
  https://arxiv.org/abs/1901.05761 (§3): every query weighs the r_i by its own attention (scaled dot products of
  embedded inputs, several heads) in place of the mean.

The meta-loss is the negative log-likelihood of support and query targets under the normal distribution (μ, σ), with
σ = 0.1 + 0.9 softplus(·) as in the authors' code (https://github.com/google-deepmind/neural-processes); predictions
are μ. Networks are the method's own: the model of the configuration is not used.
"""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from metarun.errors import require
from metarun.functional import keep_support, multi_head, own_network
from metarun.types import Algorithm, Loss, Spec, Task, Tree

LEAST_STD = 0.1


def layers(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    modules: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        modules += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*modules[:-1])


class Process(nn.Module):
    """Encoder, aggregation and decoder."""

    def __init__(self, inputs: int, outputs: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.encoder = layers(inputs + outputs, width, width, width, width)
        self.decoder = layers(inputs + width, width, width, 2 * outputs)
        if heads:
            self.embed = layers(inputs, width, width)
            self.mix = nn.Linear(width, width)

    def attend(self, x: Tensor, query: Tensor, r: Tensor) -> Tensor:
        """``r [support, width]`` weighed for every query ``[queries, width]``."""
        mixed: Tensor = self.mix(multi_head(self.embed(query), self.embed(x), r, self.heads))
        return mixed

    def forward(self, given: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Support inputs, support targets and query inputs ``[points, numbers]`` → μ and σ ``[queries, outputs]``."""
        x, y, query = given
        r = self.encoder(torch.cat([x, y], -1))
        r = self.attend(x, query, r) if self.heads else r.mean(0).expand(len(query), -1)
        mean, spread = self.decoder(torch.cat([query, r], -1)).chunk(2, -1)
        return mean, LEAST_STD + (1 - LEAST_STD) * softplus(spread)


def cnp(model: nn.Module, spec: Spec, attention: bool = False, width: int = 128, heads: int = 8) -> Algorithm:
    """Conditional neural process.

    Args:
        model: not used.
        spec: of a regression task.
        attention: whether queries attend to the support points.
        width: of every layer, at least 1; with attention a multiple of ``heads``.
        heads: of attention, at least 1.
    """
    require(width >= 1, f"width must be at least 1, not {width}")
    require(heads >= 1, f"heads must be at least 1, not {heads}")
    require(not attention or width % heads == 0, f"width must be a multiple of heads={heads}, not {width}")
    inputs = math.prod(spec.input_shape)

    def build() -> Process:
        return Process(inputs, spec.outputs, width, heads if attention else 0)

    forward, drawn = own_network(build)

    def init(model: nn.Module, generator: torch.Generator) -> Tree:
        return {"weights": drawn(model, generator)}

    def distribution(theta: Tree, state: Tree, x: Tensor) -> tuple[Tensor, Tensor]:
        mean_and_std: tuple[Tensor, Tensor] = forward(
            theta["weights"], (state["x"].flatten(1), state["y"], x.flatten(1))
        )
        return mean_and_std

    def predict(theta: Tree, state: Tree, x: Any) -> Tensor:
        return distribution(theta, state, x)[0]

    def meta_loss(theta: Tree, task: Task, loss: Loss) -> tuple[Tensor, Tensor]:
        x, y = (torch.cat([task.support[name], task.query[name]]) for name in ("x", "y"))
        mean, std = distribution(theta, task.support, x)
        nats = 0.5 * ((y - mean) / std).square() + std.log() + 0.5 * math.log(2 * math.pi)
        _, score = loss(lambda query: mean[len(task.support["x"]) :], task.query)
        return nats.sum(-1).mean(), score

    return Algorithm(
        init,
        keep_support,
        predict,
        family="dependent",
        kinds=("regression",),
        paper="https://arxiv.org/abs/1901.05761" if attention else "https://arxiv.org/abs/1807.01613",
        meta_loss=meta_loss,
        adapted_parameters=lambda theta: width,
    )
