"""The four-block convolutional network of the few-shot literature."""

from math import gcd
from typing import Literal

import torch
from torch import Tensor, nn

from metarun.contracts import Numbers, Spec
from metarun.errors import require


def norm_of(kind: str, channels: int) -> nn.Module:
    """Return a normalisation of maps of so many channels."""
    if kind == "batch":
        # No running averages: MAML normalises by the batch in test too, so the queries of a task see each other.
        return nn.BatchNorm2d(channels, track_running_stats=False)
    if kind == "group":
        # Eight groups at most, of two channels at least: a group of one value would normalise to zero.
        return nn.GroupNorm(gcd(8, channels // 2) if channels % 2 == 0 else 1, channels)
    return nn.Identity()


def head_of(features: int, outputs: int, zero: bool) -> nn.Linear:
    """Return a linear head, with zeros as weights if ``zero``."""
    head = nn.Linear(features, outputs)
    if zero:
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    return head


class Conv4(nn.Module):
    """Four blocks of 3×3 convolution, normalisation and ReLU, then a linear head.

    With ``downsample="stride"`` each convolution has stride 2, as in MAML and Reptile on Omniglot
    (https://arxiv.org/abs/1703.03400, §5.2). With ``"max_pool"``, at four times the cost, each block ends in 2×2
    max-pooling, as in Matching and Prototypical Networks. With fewer ``halvings`` only the first blocks halve the
    image, and the last maps stay large, as in Relation Networks. The features are the spatial mean of the last block,
    as in MAML's code, or all of its values.

    Attributes:
        maps: shape ``(filters, height, width)`` of the features with ``readout="flatten"``, None otherwise.

    Args:
        spec: input ``(channels, height, width)`` of any size from 16×16, and the number of outputs.
        filters: number of channels of each block, at least 1.
        downsample: how a block halves the image.
        halvings: number of blocks that halve the image, from the first on, 0 to 4.
        readout: how features are read from the last block, ``mean`` or ``flatten``.
        norm: ``batch`` (statistics of the current batch, hence transductive), ``group`` or ``none``.
        zero_head: whether the head starts meta-training from zeros. If so, all classes are equal before adaptation, and
            the first step sets the head to a sum of support features (Kao, Chiu, Chen 2022,
            https://arxiv.org/abs/2106.15367, who also reset the head to zero in each meta-step).
    """

    def __init__(
        self,
        spec: Spec,
        filters: int = 64,
        downsample: Literal["stride", "max_pool"] = "stride",
        halvings: int = 4,
        readout: Literal["mean", "flatten"] = "mean",
        norm: Literal["batch", "group", "none"] = "batch",
        zero_head: bool = False,
    ) -> None:
        super().__init__()
        require(filters >= 1, f"filters must be at least 1, not {filters}")
        require(0 <= halvings <= 4, f"halvings must be 0 to 4, not {halvings}")
        require(
            len(spec.inputs.shape) == 3 and min(spec.inputs.shape[1:]) >= 16,
            f"conv4 needs images of at least 16×16, and this task's input has shape {spec.inputs.shape}; "
            f"choose {'model=mlp' if isinstance(spec.inputs, Numbers) else 'another model'}",
        )
        layers: list[nn.Module] = []
        channels = spec.inputs.shape[0]
        for block in range(4):
            stride = 2 if downsample == "stride" and block < halvings else 1
            # A bias before a normalisation is cancelled by it.
            layers.append(nn.Conv2d(channels, filters, 3, stride, padding=1, bias=norm == "none"))
            layers += [norm_of(norm, filters), nn.ReLU()]
            if downsample == "max_pool" and block < halvings:
                layers.append(nn.MaxPool2d(2))
            channels = filters
        with torch.no_grad():
            last = nn.Sequential(*layers)(torch.zeros(2, *spec.inputs.shape))[0]
        self.maps = tuple(last.shape) if readout == "flatten" else None
        if readout == "mean":
            layers.append(nn.AdaptiveAvgPool2d(1))
        self.trunk = nn.Sequential(*layers, nn.Flatten())
        features = filters if readout == "mean" else last.numel()
        self.head = head_of(features, spec.target.outputs, zero_head)

    def forward(self, x: Tensor) -> Tensor:
        """``[examples, channels, height, width]`` → ``[examples, outputs]``."""
        out: Tensor = self.head(self.trunk(x))
        return out
