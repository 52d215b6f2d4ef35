"""Procedurally generated characters, so that few-shot classification needs no download.

A character is one to three strokes, each a smooth curve through a few random points (Catmull-Rom splines).
Each drawing moves every point a little, rotates, scales, shears and shifts the whole character, and has its own pen
thickness. Everything is a function of fixed seeds, so the characters are the same on every machine.
"""

import math

import torch
from torch import Tensor

from metarun.data.cache import cached

CHARACTERS = {"train": 600, "val": 100, "test": 200}
DRAWINGS = 20
STROKES, POINTS, SAMPLES = 3, 4, 24
VERSION = 1
"""Part of the cache key; increase it when the drawing code changes."""

JITTER = 0.09
"""Standard deviation of the displacement of a point, for characters of width 2."""


def _catmull_rom(points: Tensor) -> Tensor:
    """A smooth curve through ``points [..., POINTS, 2]``: ``[..., (POINTS − 1) * SAMPLES, 2]``."""
    first = 2 * points[..., :1, :] - points[..., 1:2, :]
    last = 2 * points[..., -1:, :] - points[..., -2:-1, :]
    p = torch.cat([first, points, last], -2)
    p0, p1, p2, p3 = (p[..., i : i + POINTS - 1, None, :] for i in range(4))
    t = torch.linspace(0, 1, SAMPLES)[:, None]
    curve = p1 + 0.5 * t * (p2 - p0 + t * (2 * p0 - 5 * p1 + 4 * p2 - p3 + t * (3 * (p1 - p2) + p3 - p0)))
    return curve.flatten(-3, -2)


def _affine(drawings: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random linear maps ``[drawings, 2, 2]`` and shifts ``[drawings, 1, 2]``."""

    def normal(std: float) -> Tensor:
        return std * torch.randn(drawings, generator=generator)

    angle, shear = normal(math.pi / 16), normal(0.15)
    width, height = normal(0.12).exp(), normal(0.12).exp()
    cos, sin = angle.cos(), angle.sin()
    rows = [torch.stack([width * cos, height * (shear * cos - sin)], -1)]
    rows += [torch.stack([width * sin, height * (shear * sin + cos)], -1)]
    shift = 0.1 * torch.randn(drawings, 1, 2, generator=generator)
    return torch.stack(rows, -2), shift


def _draw(size: int, characters: int, generator: torch.Generator) -> Tensor:
    """Drawings of random characters: uint8 ``[characters, DRAWINGS, size, size]``."""
    points = 1.6 * torch.rand(characters, STROKES, POINTS, 2, generator=generator) - 0.8
    strokes = torch.randint(1, STROKES + 1, (characters, 1, 1, 1), generator=generator)
    used = torch.arange(STROKES)[None, :, None, None] < strokes
    axis = torch.linspace(-1.15, 1.15, size)
    pixels = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).view(-1, 2)
    images = torch.empty(characters, DRAWINGS, size * size, dtype=torch.uint8)
    for i in range(characters):
        moved = points[i] + JITTER * torch.randn(DRAWINGS, STROKES, POINTS, 2, generator=generator)
        linear, shift = _affine(DRAWINGS, generator)
        curve = _catmull_rom(moved)
        # Strokes that this character lacks are moved far outside the image.
        curve = torch.where(used[i], curve, torch.full_like(curve, 99.0)).flatten(1, 2)
        curve = curve @ linear.transpose(1, 2) + shift
        distance = torch.cdist(pixels.expand(DRAWINGS, -1, -1), curve).amin(-1)
        thickness = 0.05 + 0.05 * torch.rand(DRAWINGS, 1, generator=generator)
        edge = 1.5 / size
        ink = ((thickness - distance) / edge + 0.5).clamp(0, 1)
        images[i] = (255 * ink).round().to(torch.uint8)
    return images.view(characters, DRAWINGS, size, size)


def procedural_characters(size: int) -> dict[str, Tensor]:
    """Images of each split as uint8 ``[characters, drawings, size, size]``, ink 255 on 0; cached."""

    def make() -> dict[str, Tensor]:
        return {
            split: _draw(size, count, torch.Generator().manual_seed(seed))
            for seed, (split, count) in enumerate(CHARACTERS.items())
        }

    return cached("procedural", f"version {VERSION}, {size} pixels", make)
