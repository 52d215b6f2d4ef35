"""Adaptive modulation: shared parameters, modulated by a few parameters per task.

- ``modulation=context``, CAVIA: Zintgraf, Shiarlis, Kurin, Hofmann, Whiteson 2019, "Fast Context Adaptation via
  Meta-Learning", https://arxiv.org/abs/1810.03642. In a trunk of linear layers a vector φ is concatenated with the
  input of the first layer, which adds U φ to its output (§3.3). In a trunk of convolutions a linear layer computes a
  scale γ and a shift β for every channel from φ, (γ, β) = V φ + b, and the maps h of the third convolution become
  γ h + β (as in the official code, https://github.com/lmzintgraf/cavia, ``classification/models.py``, whose φ has 100
  numbers).
- ``modulation=film``: a scale 1 + γ and a shift β for every channel of every layer (Perez et al. 2018,
  https://arxiv.org/abs/1709.07871), with γ and β adapted to the task.

    inner step   φ ← φ − α ∇ L_support with respect to φ alone, from φ = 0            (equations 3 and 4)
    meta-loss    as in MAML, over the shared parameters alone                          (equation 5)

A layer followed by a normalisation is modulated after that normalisation, which would otherwise undo the modulation.
"""

import math
from collections.abc import Iterator
from copy import deepcopy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metarun.contracts import Algorithm, Loss, Tree, Weights
from metarun.errors import require
from metarun.inner import part_descent
from metarun.nn.functional import forward_of, parameters_of, seeded
from metarun.tree import size

CONTEXT_CONVOLUTION = 3
"""Number of the convolution whose maps the context modulates; the last one where there are fewer."""


def along_channels(vector: Tensor, out: Tensor) -> Tensor:
    """Reshape ``vector [channels]`` to fit ``out [..., channels]``, or ``[examples, channels, height, width]``."""
    return vector[:, None, None] if out.ndim == 4 else vector


class Contextual(nn.Module):
    """A layer to whose output U φ is added."""

    def __init__(self, layer: nn.Module, inputs: int, channels: int, context: int) -> None:
        super().__init__()
        self.layer = layer
        self.context = nn.Parameter(torch.zeros(context))
        # Initialised like a linear layer over input and context together.
        bound = 1 / math.sqrt(inputs + context)
        self.mix = nn.Parameter(torch.empty(channels, context).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, shifted."""
        out: Tensor = self.layer(x)
        return out + self.mix @ self.context


class GeneratedFiLM(nn.Module):
    """A layer whose output maps are scaled and shifted by the outputs of a linear layer on φ."""

    def __init__(self, layer: nn.Module, channels: int, context: int) -> None:
        super().__init__()
        self.layer = layer
        self.context = nn.Parameter(torch.zeros(context))
        self.generate = nn.Linear(context, 2 * channels)
        # The official code's default.
        nn.init.kaiming_uniform_(self.generate.weight, nonlinearity="linear")

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, modulated."""
        out: Tensor = self.layer(x)
        scale, shift = self.generate(self.context).chunk(2)
        return along_channels(scale, out) * out + along_channels(shift, out)


class FiLM(nn.Module):
    """A layer whose output is scaled and shifted channel by channel."""

    def __init__(self, layer: nn.Module, channels: int) -> None:
        super().__init__()
        self.layer = layer
        self.scale, self.shift = nn.Parameter(torch.zeros(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, modulated."""
        out: Tensor = self.layer(x)
        return out * (1 + along_channels(self.scale, out)) + along_channels(self.shift, out)


TASK_OWN: dict[type[nn.Module], tuple[str, ...]] = {
    Contextual: ("context",),
    GeneratedFiLM: ("context",),
    FiLM: ("scale", "shift"),
}
"""The parameters of each modulated layer that are adapted to the task."""


def names_of_own(model: nn.Module) -> set[str]:
    """Return the names of the parameters of a modulated model that are adapted to the task."""
    return {f"{place}.{name}" for place, layer in model.named_modules() for name in TASK_OWN.get(type(layer), ())}


def modulated(model: nn.Module, modulation: str, context: int) -> nn.Module:
    """Return a copy of ``model`` whose trunk is modulated."""
    model = deepcopy(model)
    trunk = getattr(model, "trunk", None)
    layers = dict(enumerate(trunk)) if isinstance(trunk, nn.Sequential) else {}
    weighted = {i: layer for i, layer in layers.items() if isinstance(layer, nn.Linear | nn.Conv2d)}
    require(
        len(weighted) > 0,
        f"adaptive needs a model with a trunk of linear or convolutional layers, and {type(model).__name__} has none; "
        "choose another model",
    )
    assert isinstance(trunk, nn.Sequential)
    convolutions = [i for i, layer in weighted.items() if isinstance(layer, nn.Conv2d)]
    chosen = list(weighted)
    if modulation == "context":
        chosen = convolutions[:CONTEXT_CONVOLUTION][-1:] or chosen[:1]
    for i in chosen:
        layer = weighted[i]
        channels, inputs = len(layer.weight), layer.weight[0].numel()
        following = layers.get(i + 1)
        normed = following is not None and i + 1 not in weighted and any(True for _ in following.parameters())
        place = i + 1 if normed else i
        if modulation == "film":
            change: nn.Module = FiLM(layers[place], channels)
        elif convolutions:
            change = GeneratedFiLM(layers[place], channels, context)
        else:
            change = Contextual(layers[place], inputs, channels, context)
        trunk[place] = change.to(layer.weight)
    return model


def adaptive(
    model: nn.Module,
    modulation: Literal["context", "film"] = "context",
    context: int = 5,
    inner_lr: float = 1.0,
    inner_steps: int = 1,
    first_order: bool = False,
) -> Algorithm:
    """Shared parameters, with a context vector or scales and shifts adapted to each task.

    Args:
        model: a module whose ``trunk`` is a sequence of layers.
        modulation: what is adapted to each task: ``context`` (CAVIA) or ``film``.
        context: length of φ, at least 1.
        inner_lr: α, above 0, for mean losses.
        inner_steps: number of inner steps in meta-training, at least 1.
        first_order: whether the inner gradient is treated as a constant.
    """
    require(context >= 1, f"context must be at least 1, not {context}")
    require(inner_lr > 0, f"inner_lr must be above 0, not {inner_lr}")
    require(inner_steps >= 1, f"inner_steps must be at least 1, not {inner_steps}")
    with torch.random.fork_rng(devices=[]):
        whole = modulated(model, modulation, context)
    forward = forward_of(whole)
    own = names_of_own(whole)
    start = {name: p.detach() for name, p in whole.named_parameters() if name in own}

    def init(generator: torch.Generator) -> Tree:
        with seeded(generator):
            weights = parameters_of(modulated(model, modulation, context))
        return {"weights": {name: w for name, w in weights.items() if name not in start}}

    def adapt(theta: Tree, support: Tree, loss: Loss) -> Iterator[Weights]:
        return part_descent(forward, theta["weights"], start, support, loss, inner_lr, first_order)

    def predict(theta: Tree, state: Weights, x: Any) -> Tensor:
        return forward({**theta["weights"], **state}, x)

    return Algorithm(
        init,
        adapt,
        predict,
        approach="dependent",
        needs="loss",
        paper="https://arxiv.org/abs/1810.03642",
        train_steps=inner_steps,
        adapted_parameters=lambda theta: size(start),
    )
