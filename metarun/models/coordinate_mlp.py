"""A multi-layer perceptron on waves of its inputs, for functions of a place such as pictures."""

import math
from collections.abc import Sequence
from itertools import product
from typing import Literal

import torch
from torch import Tensor, nn

from metarun.contracts import Moments, Spec, Tokens
from metarun.errors import require
from metarun.models.mlp import fully_connected

MOST_WAVES = 4096


class Waves(nn.Module):
    """Inputs, and the sine and cosine of π/2 k·x for every vector k of whole numbers up to ``highest``, but one of ±k.

    Fourier features (Tancik et al. 2020, https://arxiv.org/abs/2006.10739) with the frequencies of a grid instead of
    random ones, so that nothing depends on a seed.
    """

    frequencies: Tensor

    def __init__(self, inputs: int, highest: int) -> None:
        super().__init__()
        zero = (0,) * inputs
        every = product(range(-highest, highest + 1), repeat=inputs)
        found = torch.tensor([k for k in every if k > zero], dtype=torch.get_default_dtype()).view(-1, inputs)
        self.register_buffer("frequencies", found * (math.pi / 2))
        self.width = inputs + 2 * len(found)

    def forward(self, x: Tensor) -> Tensor:
        """``[examples, inputs]`` → ``[examples, width]``."""
        angle = x @ self.frequencies.T.to(x)
        return torch.cat([x, angle.sin(), angle.cos()], -1)


class CoordinateMLP(nn.Module):
    """Waves of the inputs, fully connected layers, then a linear head.

    Args:
        spec: sizes of input and output.
        widths: width of each hidden layer.
        highest: number of half periods of the fastest wave across inputs from −1 to 1, 0 for none.
        activation: nonlinearity after each hidden layer.
    """

    def __init__(
        self,
        spec: Spec,
        widths: Sequence[int] = (64, 64, 64),
        highest: int = 6,
        activation: Literal["relu", "tanh", "gelu", "silu"] = "relu",
    ) -> None:
        super().__init__()
        require(
            not isinstance(spec.inputs, Tokens | Moments) and len(spec.inputs.shape) == 1,
            "coordinate_mlp needs inputs that are a few numbers, such as the place of a pixel; choose another model",
        )
        inputs = spec.inputs.shape[0]
        require(
            highest >= 0 and (2 * highest + 1) ** inputs <= MOST_WAVES,
            f"highest must not be negative and give at most {MOST_WAVES} waves of {inputs} inputs, not {highest}",
        )
        waves = Waves(inputs, highest)
        self.trunk = nn.Sequential(waves, *fully_connected(waves.width, widths, activation))
        self.head = nn.Linear(widths[-1], spec.target.outputs)

    def forward(self, x: Tensor) -> Tensor:
        """``[examples, inputs]`` → ``[examples, outputs]``."""
        out: Tensor = self.head(self.trunk(x))
        return out
