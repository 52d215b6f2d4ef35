"""Random changes of training pictures, drawn from a generator."""

from collections.abc import Sequence

import torch
from torch import Tensor

AUGMENTATIONS = ("flip", "crop", "colour")
"""``flip`` mirrors every second picture from left to right; ``crop`` shifts pictures by up to a tenth of their edge and
mirrors their borders; ``colour`` multiplies brightness, contrast and saturation by 0.6 to 1.4, as Chen et al. 2019 do
(https://arxiv.org/abs/1904.04232)."""
SHIFT = 10
"""A shift is at most the edge divided by this."""
JITTER = 0.4
LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in a colour's brightness (ITU-R BT.601)."""


def shifted(pixels: Tensor, down: Tensor, right: Tensor, most: int) -> Tensor:
    """Return pictures ``[n, channels, h, w]`` shifted by whole pixels ``[n]`` of at most ``most`` in size."""
    height, width = pixels.shape[2:]

    def mirrored(size: int) -> Tensor:
        """Positions from ``-most`` to ``size + most``, reflected at the borders."""
        at = torch.arange(-most, size + most, device=pixels.device).abs()
        return torch.where(at >= size, 2 * size - 2 - at, at)

    padded = pixels.index_select(2, mirrored(height)).index_select(3, mirrored(width))
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(len(pixels), device=pixels.device), :, most - down, most - right]


def recoloured(pixels: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor) -> Tensor:
    """Return pictures ``[n, 3, h, w]`` of 0 to 255 whose three properties are multiplied by factors ``[n]``, in order.

    Contrast is the distance to the picture's mean grey value, and saturation that to each pixel's, so that all three
    together are one linear map of each pixel.
    """
    x = pixels.flatten(2).float()
    luma = torch.tensor(LUMA, device=x.device)
    mixed = saturation[:, None, None] * torch.eye(3, device=x.device) + (1 - saturation)[:, None, None] * luma
    offset = (1 - contrast) * brightness * (x.mean(2) @ luma)
    x = torch.baddbmm(offset[:, None, None], (brightness * contrast)[:, None, None] * mixed, x)
    return x.round_().clamp_(0, 255).to(torch.uint8).view_as(pixels)


def augmented(pixels: Tensor, names: Sequence[str], generator: torch.Generator) -> Tensor:
    """Return pictures ``[n, channels, h, w]`` (uint8) changed at random by some of ``AUGMENTATIONS``."""
    count, most = len(pixels), min(pixels.shape[2:]) // SHIFT
    random = torch.rand(6, count, generator=generator).to(pixels.device)
    if "flip" in names:
        pixels = torch.where((random[0] < 0.5)[:, None, None, None], pixels.flip(3), pixels)
    if "crop" in names:
        down, right = (random[1:3] * (2 * most + 1)).long().clamp(max=2 * most) - most
        pixels = shifted(pixels, down, right, most)
    if "colour" in names:
        pixels = recoloured(pixels, *(1 - JITTER + 2 * JITTER * random[3:]))
    return pixels
