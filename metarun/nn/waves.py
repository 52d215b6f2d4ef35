"""Waves of inputs, for networks on places: functions of a few numbers that change fast."""

import math
from itertools import product

import torch
from torch import Tensor, nn

from metarun.errors import require

MOST_WAVES = 4096


class Waves(nn.Module):
    """Inputs, and the sine and cosine of π/2 k·x for every vector k of whole numbers up to ``highest``, but one of ±k.

    Fourier features (Tancik et al. 2020, https://arxiv.org/abs/2006.10739) with the frequencies of a grid instead of
    random ones, so that nothing depends on a seed.

    Args:
        inputs: number of inputs.
        highest: number of half periods of the fastest wave across inputs from −1 to 1; 0: the inputs alone.

    Raises:
        ValueError: there would be too many waves.
    """

    frequencies: Tensor

    def __init__(self, inputs: int, highest: int) -> None:
        super().__init__()
        require(
            highest >= 0 and (highest == 0 or (2 * highest + 1) ** inputs <= MOST_WAVES),
            f"the highest wave must not be negative and give at most {MOST_WAVES} waves of {inputs} inputs, and it is "
            f"{highest}",
        )
        zero = (0,) * inputs
        every = product(range(-highest, highest + 1), repeat=inputs)
        found = torch.tensor([k for k in every if k > zero], dtype=torch.get_default_dtype()).view(-1, inputs)
        self.register_buffer("frequencies", found * (math.pi / 2))
        self.width = inputs + 2 * len(found)

    def forward(self, x: Tensor) -> Tensor:
        """``[examples, inputs]`` → ``[examples, width]``."""
        angle = x @ self.frequencies.T.to(x)
        return torch.cat([x, angle.sin(), angle.cos()], -1)
