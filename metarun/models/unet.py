"""A small U-Net on pictures, for velocities of pictures mixed with noise.

Ronneberger et al. 2015, https://arxiv.org/abs/1505.04597, with residual blocks as in Ho et al. 2020,
https://arxiv.org/abs/2006.11239, one halving instead of four, and no attention. It is made cheap by working on blocks
of 2 × 2 pixels as channels (Shi et al. 2016, https://arxiv.org/abs/1609.05158).
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle, silu

from metarun.contracts import Numbers, Spec
from metarun.errors import require
from metarun.targets.flow import Flow, noisy_of

BLOCK = 2
WAVES = 4
GROUP = 8


class Stem(nn.Module):
    """Noisy pictures and their times → blocks of pixels, with sine and cosine of the time as further channels."""

    def forward(self, given: Any) -> Tensor:
        """``[rows, channels, height, width]`` → ``[rows, 4 channels + 2 waves, height / 2, width / 2]``."""
        noisy = noisy_of(given)
        x = pixel_unshuffle(noisy.x, BLOCK)
        frequency = torch.arange(1, WAVES + 1, device=x.device).to(x) * (math.pi / 2)
        angle = noisy.t[:, None] * frequency
        waves = torch.cat([angle.sin(), angle.cos()], 1)[:, :, None, None]
        return torch.cat([x, waves.expand(-1, -1, *x.shape[2:])], 1)


class Place(nn.Module):
    """x plus a learned map, so that a task can be told where something is.

    The map is the root of its area times its parameters: a step of gradient descent then changes it as much as it
    changes a bias that all places share.
    """

    def __init__(self, width: int, height: int, across: int) -> None:
        super().__init__()
        self.map = nn.Parameter(torch.zeros(width, height, across))
        self.scale = math.sqrt(height * across)

    def forward(self, x: Tensor) -> Tensor:
        """``[rows, width, height, across]`` in the same shape."""
        return x + self.scale * self.map


class Residual(nn.Module):
    """x plus two convolutions of x, each after a normalisation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(width // GROUP, width) for _ in range(2))
        self.convolutions = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """``[rows, width, height, width]`` in the same shape."""
        h = x
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            h = convolution(silu(norm(h)))
        return x + h


class HalfSize(nn.Module):
    """x plus what residual blocks make of x at half its size."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(width, 2 * width, 3, 2, padding=1)
        self.blocks = nn.Sequential(*(Residual(2 * width) for _ in range(blocks)))
        self.up = nn.Conv2d(2 * width, BLOCK**2 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``[rows, width, height, width]`` in the same shape."""
        return x + pixel_shuffle(self.up(self.blocks(self.down(x))), BLOCK)


class UNetSmall(nn.Module):
    """Blocks of pixels → features at full and at half size → velocities.

    The ``trunk`` is a sequence with three convolutions at its top level, so that methods which modulate a trunk of
    convolutions modulate these.

    Args:
        spec: that of a family with a `metarun.targets.flow.Flow` as target, of pictures whose edge is a multiple of 4.
        width: number of channels at full size, a multiple of 8; twice as many at half size.
        blocks: number of residual blocks at half size, at least 1.
    """

    def __init__(self, spec: Spec, width: int = 16, blocks: int = 1) -> None:
        super().__init__()
        shape = spec.inputs.shape
        require(
            isinstance(spec.target, Flow) and isinstance(spec.inputs, Numbers) and len(shape) == 3,
            "unet_small makes velocities of pictures, as task=generate wants; choose another model",
        )
        require(
            shape[1] % 4 == 0 and shape[2] % 4 == 0,
            f"unet_small needs pictures whose edge is a multiple of 4, not {shape[1]}; change task.image_size",
        )
        require(width >= GROUP and width % GROUP == 0, f"width must be a multiple of {GROUP}, not {width}")
        require(blocks >= 1, f"blocks must be at least 1, not {blocks}")
        own = shape[0] * BLOCK**2
        self.trunk = nn.Sequential(
            Stem(),
            nn.Conv2d(own + 2 * WAVES, width, 3, padding=1),
            Place(width, shape[1] // BLOCK, shape[2] // BLOCK),
            Residual(width),
            nn.Conv2d(width, width, 1),
            HalfSize(width, blocks),
            nn.Conv2d(width, width, 3, padding=1),
            Residual(width),
            nn.GroupNorm(width // GROUP, width),
            nn.SiLU(),
        )
        self.head = nn.Conv2d(width, own, 3, padding=1)

    def forward(self, given: Any) -> Tensor:
        """Return the velocity of noisy pictures (`metarun.targets.flow.Noisy`): ``[rows, channels, height, width]``."""
        return pixel_shuffle(self.head(self.trunk(given)), BLOCK)
