"""The four-block convolutional network of the few-shot literature."""

from math import gcd
from typing import Literal

import torch
from torch import Tensor, nn

from metarun.errors import require
from metarun.norm import BatchStatistics
from metarun.types import Spec


def _norm(kind: str, channels: int) -> nn.Module:
    if kind == "batch":
        return BatchStatistics(channels)
    if kind == "group":
        # Eight groups at most, of two channels at least: a group of one value would normalise to zero.
        return nn.GroupNorm(gcd(8, channels // 2) if channels % 2 == 0 else 1, channels)
    return nn.Identity()


class Conv4(nn.Module):
    """Four blocks of 3×3 convolution, normalisation and ReLU, then a linear head.

    With ``downsample="stride"`` each convolution has stride 2, as in MAML and Reptile on Omniglot
    (https://arxiv.org/abs/1703.03400, §5.2); with ``"max_pool"``, four times the work, each block ends in 2×2
    max-pooling, as in Matching and Prototypical Networks. The features are the spatial mean of the last block,
    as in MAML's code, or all of its values.

    Args:
        spec: input ``(channels, height, width)`` of any size from 16×16, and the number of outputs.
        filters: channels of each block, at least 1.
        downsample: how each block halves the image.
        readout: ``mean`` or ``flatten``.
        norm: ``batch`` (statistics of the current batch, hence transductive), ``group`` or ``none``.
    """

    def __init__(
        self,
        spec: Spec,
        filters: int = 64,
        downsample: Literal["stride", "max_pool"] = "stride",
        readout: Literal["mean", "flatten"] = "mean",
        norm: Literal["batch", "group", "none"] = "batch",
    ) -> None:
        super().__init__()
        require(filters >= 1, f"filters must be at least 1, not {filters}")
        require(
            len(spec.input_shape) == 3 and min(spec.input_shape[1:]) >= 16,
            f"conv4 needs images of at least 16×16, and this task's input has shape {spec.input_shape}; "
            f"choose {'another model' if spec.tokens or spec.control else 'model=mlp'}",
        )
        layers: list[nn.Module] = []
        channels = spec.input_shape[0]
        for _ in range(4):
            stride = 2 if downsample == "stride" else 1
            # A bias before a normalisation is cancelled by it.
            layers.append(nn.Conv2d(channels, filters, 3, stride, padding=1, bias=norm == "none"))
            layers += [_norm(norm, filters), nn.ReLU()]
            if downsample == "max_pool":
                layers.append(nn.MaxPool2d(2))
            channels = filters
        if readout == "mean":
            layers.append(nn.AdaptiveAvgPool2d(1))
        self.trunk = nn.Sequential(*layers, nn.Flatten())
        with torch.no_grad():
            features = self.trunk(torch.zeros(1, *spec.input_shape)).shape[1]
        self.head = nn.Linear(features, spec.outputs)

    def forward(self, x: Tensor) -> Tensor:
        """``[examples, channels, height, width]`` → ``[examples, outputs]``."""
        out: Tensor = self.head(self.trunk(x))
        return out
