"""Template matching: finding objects by their likeness to those of the support set, without any learning.

Each true box of the support set is a template, cut out as a square and resized to ``EDGE`` pixels. It is compared with
the windows of several sizes around every location of a picture by their normalised correlation, without the mean of
each channel (Lewis 1995, "Fast Normalized Cross-Correlation"). The score of a class at a location is the highest
correlation of one of its templates, and the box is that template's, as much larger or smaller as the window is.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import relu

from metarun.contracts import Tree
from metarun.data.portable import portable
from metarun.targets.boxes import Boxes

EDGE = 12
"""Edge of templates in pixels."""
SCALES = (0.6, 0.77, 1.0, 1.3, 1.67)
"""Edges of windows, in edges of the median template."""
STEEP, MIDDLE = 12.0, 0.6
"""Logit of a correlation r: STEEP (r − MIDDLE). Average precision depends on the order alone."""


def sampling(middle: Tensor, extent: Tensor, size: int) -> Tensor:
    """Return weights ``[..., EDGE, size]`` by which a line of ``size`` pixels is resampled in windows.

    A new pixel is a mean of old ones with triangular weights, wide enough to cover all of them; beyond the line there
    is nothing.

    Args:
        middle: middle of each window in pixels ``[...]``.
        extent: its length in pixels ``[...]``.
        size: length of the line.
    """
    steps = (torch.arange(EDGE, device=middle.device) + 0.5) / EDGE - 0.5
    at = middle[..., None] + steps.to(middle.dtype) * extent[..., None]
    old = torch.arange(size, device=middle.device) + 0.5
    width = (extent / EDGE).clamp(min=1.0)[..., None, None]
    return relu(1 - (old - at[..., None]).abs() / width) / width


def unit(z: Tensor) -> Tensor:
    """Return windows ``[..., channels, EDGE, EDGE]`` as vectors of length 1, without the mean of each channel."""
    z = (z - z.mean((-1, -2), keepdim=True)).flatten(-3)
    return z / (z.square().sum(-1, keepdim=True) + 1e-6).sqrt()


@portable
@dataclass(frozen=True)
class TemplateMatching:
    """Outputs of template matching (`metarun.contracts.Facts.references`)."""

    target: Boxes

    def __call__(self, support: Tree, x: Tensor) -> Tensor:
        """(support set, pictures ``[pictures, channels, size, size]``) → ``[pictures, locations, outputs]``."""
        target, size = self.target, self.target.size
        boxes, label = support["boxes"].flatten(0, 1), support["label"].flatten(0, 1)
        real = label.sum(-1) > 0
        if "weight" in support:
            real = real & (support["weight"] > 0).repeat_interleave(support["boxes"].shape[1])
        middle, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
        edge = torch.where(real, sides.amax(-1), 1.0).clamp(min=1.0)
        pictures = support["x"].repeat_interleave(support["boxes"].shape[1], 0)
        down, right = sampling(middle[:, 1], edge, size), sampling(middle[:, 0], edge, size)
        templates = unit(down[:, None] @ pictures @ right[:, None].mT)
        usual = torch.where(real, edge, torch.nan).nanmedian()
        places = (torch.arange(target.edge, device=x.device, dtype=x.dtype) + 0.5) * target.stride
        # [pictures, locations, scales, templates]
        alike = torch.stack([self._windows(x, places, usual * scale) @ templates.T for scale in SCALES], 2).masked_fill(
            ~real, -1.0
        )
        of_class = torch.where(label.T > 0, alike.amax(2)[..., None, :], -1.0).amax(-1)
        logit = STEEP * (of_class - MIDDLE)
        best = alike.flatten(2).argmax(-1)
        window, which = usual * torch.tensor(SCALES, device=x.device, dtype=x.dtype), best % len(boxes)
        logs = (sides / edge[:, None]).clamp(min=1e-3)[which] * window[best // len(boxes)][..., None] / target.unit
        nothing = torch.zeros_like(logs)
        return torch.cat([logit, nothing[..., :1], logs.log(), nothing], -1)

    def _windows(self, x: Tensor, places: Tensor, edge: Tensor) -> Tensor:
        """Return a window of this edge around every location as a unit vector ``[pictures, locations, d]``."""
        weights = sampling(places, edge.expand(len(places)), x.shape[-1])
        rows = torch.einsum("gts,ncsw->ngctw", weights, x)
        both = torch.einsum("hus,ngcts->nghctu", weights, rows)
        return unit(both).flatten(1, 2)
