"""A small residual network with a feature pyramid, for what is to be told of each location of a picture."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from metarun.contracts import Spec
from metarun.errors import require
from metarun.models.conv4 import norm_of
from metarun.targets.boxes import GEOMETRY, Boxes

RARE = 2.0
"""Initial logit of background, so that most locations are background before anything is learned."""


class Residual(nn.Module):
    """Two 3×3 convolutions, of which the first halves the maps, and a shortcut (He et al. 2016, figure 2)."""

    def __init__(self, inputs: int, outputs: int, norm: str) -> None:
        super().__init__()
        bias = norm == "none"
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, 2, padding=1, bias=bias),
            *(norm_of(norm, outputs), nn.ReLU()),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=bias),
            norm_of(norm, outputs),
        )
        self.shortcut = nn.Conv2d(inputs, outputs, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """``[pictures, inputs, height, width]`` → ``[pictures, outputs, height / 2, width / 2]``."""
        out: Tensor = self.layers(x) + self.shortcut(x)
        return out.relu()


class Pyramid(nn.Module):
    """Features of every location, and the geometry of an object there: ``[pictures, locations, features + 4]``."""

    def __init__(self, channels: int, widths: Sequence[int], features: int, norm: str) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, widths[0], 3, 2, padding=1, bias=norm == "none"), norm_of(norm, widths[0]), nn.ReLU()
        )
        inner = (widths[0], *widths)
        self.stages = nn.ModuleList(Residual(a, b, norm) for a, b in zip(inner, widths, strict=False))
        self.lateral = nn.ModuleList(nn.Conv2d(width, features, 1) for width in widths)
        self.smooth = nn.Sequential(
            nn.Conv2d(features, features, 3, padding=1, bias=norm == "none"), norm_of(norm, features), nn.ReLU()
        )
        self.geometry = nn.Sequential(
            nn.Conv2d(features, features, 3, padding=1, bias=norm == "none"), norm_of(norm, features), nn.ReLU()
        )
        self.box = nn.Conv2d(features, GEOMETRY, 1)
        for parameter in self.box.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Pictures ``[pictures, channels, size, size]`` → features and geometry, location by location in rows."""
        x, maps = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        z = self.lateral[-1](maps[-1])
        for lateral, own in zip(reversed(self.lateral[:-1]), reversed(maps[:-1]), strict=True):
            z = lateral(own) + interpolate(z, scale_factor=2.0, mode="nearest")
        box = self.box(self.geometry(z))
        return torch.cat([self.smooth(z), box], 1).flatten(2).movedim(1, 2)


class ResNetFPN(nn.Module):
    """Residual stages, their maps joined from coarse to fine, and a linear head at each location of the finest.

    Feature pyramid: Lin et al. 2017, https://arxiv.org/abs/1612.03144, §3; only the finest level, of stride 4, is read,
    as in Zhou et al. 2019, https://arxiv.org/abs/1904.07850. The head tells classes. The trunk tells geometry, which
    means the same for all classes.

    Args:
        spec: input ``(channels, size, size)``, and a target `metarun.targets.boxes.Boxes` of stride 4.
        widths: channels of each residual stage, at least 1; each stage halves the maps, the first to a quarter.
        features: channels of the pyramid, at least 1.
        norm: ``group``, ``batch`` (statistics of the current batch, hence transductive) or ``none``.
        zero_head: whether the head starts from zeros.
    """

    def __init__(
        self,
        spec: Spec,
        widths: Sequence[int] = (16, 24, 32),
        features: int = 32,
        norm: Literal["group", "batch", "none"] = "group",
        zero_head: bool = True,
    ) -> None:
        super().__init__()
        target = spec.target
        require(
            isinstance(target, Boxes) and target.stride == 4,
            "resnet_fpn_small tells where objects are, and this task asks for something else; choose model=conv4",
        )
        assert isinstance(target, Boxes)
        require(len(widths) >= 1 and min(widths) >= 1, f"widths must be positive, not {list(widths)}")
        require(features >= 1, f"features must be at least 1, not {features}")
        coarsest = 2 ** (len(widths) + 1)
        require(
            target.size % coarsest == 0,
            f"image_size must be a multiple of {coarsest} for {len(widths)} widths, not {target.size}",
        )
        self.features = features
        self.trunk = Pyramid(spec.inputs.shape[0], widths, features, norm)
        self.head = nn.Linear(features, target.ways + 1)
        with torch.no_grad():
            if zero_head:
                self.head.weight.zero_()
            self.head.bias.zero_()
            self.head.bias[-1] = RARE

    def forward(self, x: Tensor) -> Tensor:
        """``[pictures, channels, size, size]`` → ``[pictures, locations, outputs]``."""
        z = self.trunk(x)
        return torch.cat([self.head(z[..., : self.features]), z[..., self.features :]], -1)
