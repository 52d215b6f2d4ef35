"""A small vision transformer."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from metarun.contracts import Numbers, Spec
from metarun.errors import require
from metarun.models.conv4 import head_of


class Patches(nn.Module):
    """A picture as a sequence of linear maps of its patches, with a learned vector for each position."""

    def __init__(self, shape: tuple[int, ...], patch: int, width: int) -> None:
        super().__init__()
        channels, *edges = shape
        rows, columns = (math.ceil(edge / patch) for edge in edges)
        self.missing = (0, columns * patch - edges[1], 0, rows * patch - edges[0])
        self.map = nn.Conv2d(channels, width, patch, stride=patch)
        self.positions = nn.Parameter(0.02 * torch.randn(rows * columns, width))

    def forward(self, x: Tensor) -> Tensor:
        """``[pictures, channels, height, width]`` → ``[pictures, patches, width]``."""
        patches: Tensor = self.map(pad(x, self.missing))
        return patches.flatten(2).transpose(1, 2) + self.positions


class MeanOfRows(nn.Module):
    """Normalised vectors of a sequence, averaged."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """``[pictures, patches, width]`` → ``[pictures, width]``."""
        out: Tensor = self.norm(x).mean(1)
        return out


class ViTSmall(nn.Module):
    """Patches, pre-norm transformer layers, the mean over patches, and a linear head.

    Dosovitskiy et al. 2021 (https://arxiv.org/abs/2010.11929), with the mean in place of a class token (their
    appendix D.3 finds both equal) and without dropout.

    Args:
        spec: input ``(channels, height, width)``, and the number of outputs.
        patch: edge of a patch in pixels, at least 1 and at most the picture's; what the last patches lack is zero.
        width: width of the vectors, at least 1.
        layers: number of transformer layers, at least 1.
        heads: number of attention heads, a divisor of ``width``.
        zero_head: whether the head starts meta-training from zeros, as in ``conv4``.
    """

    def __init__(
        self,
        spec: Spec,
        patch: int = 7,
        width: int = 128,
        layers: int = 4,
        heads: int = 4,
        zero_head: bool = False,
    ) -> None:
        super().__init__()
        require(width >= 1, f"width must be at least 1, not {width}")
        require(layers >= 1, f"layers must be at least 1, not {layers}")
        require(heads >= 1 and width % heads == 0, f"heads must divide the width {width}, and {heads} does not")
        shape = spec.inputs.shape
        require(
            isinstance(spec.inputs, Numbers) and len(shape) == 3,
            f"vit_small needs images, and this task's input has shape {shape}; choose another model",
        )
        require(
            1 <= patch <= min(shape[1:]), f"patch must be 1 to {min(shape[1:])}, the edge of the images, not {patch}"
        )
        body = [
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        ]
        self.trunk = nn.Sequential(Patches(shape, patch, width), *body, MeanOfRows(width))
        self.head = head_of(width, spec.target.outputs, zero_head)

    def forward(self, x: Tensor) -> Tensor:
        """``[examples, channels, height, width]`` → ``[examples, outputs]``."""
        out: Tensor = self.head(self.trunk(x))
        return out
