"""Features of pictures without any learning: where edges run in which direction, and colours at a coarse scale.

Histograms of oriented gradients as in Dalal and Triggs 2005 (https://doi.org/10.1109/CVPR.2005.177), without their
normalisation of blocks, in plain arithmetic that works under ``torch.func.vmap``.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from metarun.nn.ops import unit_rows

DIRECTIONS, CELLS, COARSE = 6, 4, 5


def described(x: Tensor) -> Tensor:
    """Return features ``[n, d]`` of pictures ``x [n, channels, size, size]`` with values from 0 to 1.

    Both parts, the histograms and the coarse picture, have length one.
    """
    grey = x.mean(1)
    across = (grey[:, 1:-1, 2:] - grey[:, 1:-1, :-2]) / 2
    down = (grey[:, 2:, 1:-1] - grey[:, :-2, 1:-1]) / 2
    strength = (across.square() + down.square() + 1e-8).sqrt()
    directions = torch.arange(DIRECTIONS, device=x.device) * (math.pi / DIRECTIONS)
    # cos² of the angle between an edge and a direction, to the fourth power: about one neighbour on each side counts.
    along = (across[:, None] * directions.cos()[:, None, None] + down[:, None] * directions.sin()[:, None, None]) / (
        strength[:, None]
    )
    histograms = adaptive_avg_pool2d(strength[:, None] * along.square().square().square(), CELLS).flatten(1)
    coarse = adaptive_avg_pool2d(x, COARSE).flatten(1)
    return torch.cat([unit_rows(histograms), unit_rows(coarse)], 1)


def kernel_distance(a: Tensor, b: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the squared kernel distance of samples ``a [n, d]`` and ``b [m, d]``; without bias, so it can be negative.

    The squared maximum mean discrepancy with the kernel (x·y / d + 1)³ of Bińkowski et al. 2018
    (https://arxiv.org/abs/1801.01401, §4), here of our features instead of a network's. Of samples of equal size, those
    of ``weight [n]`` 0 can be left out. Samples of a single row have no distance from each other.
    """
    of_a, of_b = (x.new_ones(len(x)) if weight is None else weight for x in (a, b))

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: Tensor, w: Tensor) -> Tensor:
        k = kernel(x, x)
        return (w @ k @ w - w @ k.diagonal()) / (w.sum() * (w.sum() - 1)).clamp(min=1)

    across = of_a @ kernel(a, b) @ of_b / (of_a.sum() * of_b.sum())
    return within(a, of_a) + within(b, of_b) - 2 * across
