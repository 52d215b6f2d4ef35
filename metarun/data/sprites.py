"""Sprites and backgrounds, and pictures in which sprites are pasted on backgrounds, with their boxes."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate

from metarun.data.files import Files
from metarun.data.pictures import Pictures, is_picture, opened
from metarun.data.store import Bytes, different, stored
from metarun.errors import UserError

EDGE = 32
"""Edge of a sprite in pixels."""
SMALLEST_GROUP = 10
"""Emoji of a subcategory that is used."""
DESIGNS = ("twitter", "google")


class Sprites(NamedTuple):
    """Pictures with transparency, several designs of each class."""

    pixels: Tensor
    """uint8 ``[classes, designs, 4, EDGE, EDGE]``: red, green, blue and opacity."""
    groups: list[str]
    """The group of each class; classes of a group resemble each other."""


def opaque(content: bytes, place: Path) -> Bytes:
    """Return a picture with its opacity ``[4, EDGE, EDGE]``, cut to what is not transparent and then to a square.

    Raises:
        UserError: it cannot be decoded, or is all transparent.
    """
    try:
        image = opened(content).convert("RGBA")
    except Exception as error:
        raise UserError(f"{place} cannot be used: it is not a picture; replace it or leave it out.") from error
    box = image.getchannel("A").point(lambda a: 255 if a > 127 else 0).getbbox()
    if box is None:
        raise UserError(f"{place} cannot be used: all of it is transparent; replace it or leave it out.")
    image = image.crop(box)
    square = Image.new("RGBA", (max(image.size),) * 2)
    square.paste(image, ((square.width - image.width) // 2, (square.height - image.height) // 2))
    return np.asarray(square.resize((EDGE, EDGE), Image.Resampling.LANCZOS)).transpose(2, 0, 1)


def emoji(folder: Path) -> Sprites:
    """Return a class per emoji, and a group per subcategory, of a folder with ``emoji.json`` and ``img/DESIGN/64/``.

    The npm packages emoji-datasource have them (https://github.com/iamcal/emoji-data). Subcategories of fewer than ten
    emoji are left out, and so are emoji that look like an earlier one in one of the designs, as many families do.

    Raises:
        UserError: a file is missing or broken.
    """
    with Files(folder) as files:
        try:
            known = json.loads(files.read("emoji.json"))
            every = [(one["subcategory"], one["short_name"], one["image"]) for one in known]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{folder / 'emoji.json'} is not a list of emoji with subcategory, short_name and image ({error}); get "
                "the file again."
            ) from error
        size = Counter(group for group, _, _ in every)
        used = sorted(one for one in every if size[one[0]] >= SMALLEST_GROUP)
        names = [f"img/{design}/64/{image}" for _, _, image in used for design in DESIGNS]

        def made() -> Iterator[Bytes]:
            return (opaque(files.read(name), folder / name) for name in names)

        store = stored(
            "sprites",
            f"{files.stamp(names)} {EDGE} 1",
            *(len(names), (4, EDGE, EDGE)),
            made,
            f"Reading {len(names)} emoji of {folder}, once.",
        )
    of_design = [different(store.digests[first :: len(DESIGNS)]) for first in range(len(DESIGNS))]
    kept = sorted(set.intersection(*map(set, of_design)))
    pixels = store.rows.view(len(used), len(DESIGNS), 4, EDGE, EDGE)[kept]
    return Sprites(pixels, [used[i][0] for i in kept])


GROUPS, MEMBERS = 60, 8
"""Number of groups of shapes, and of shapes in a group."""


def shapes() -> Sprites:
    """Return shapes in two colours that metarun draws: an outline with a smaller one of other corners inside it.

    All shapes of a group have the same numbers of corners. The first design is filled; in the second one the outer
    shape is a thick line, and both colours change places. They are the same on every machine.
    """
    generator = torch.Generator().manual_seed(7)
    count = GROUPS * MEMBERS
    axis = (torch.arange(EDGE) + 0.5) / EDGE * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    radius, angle = (x.square() + y.square()).sqrt(), torch.atan2(y, x)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    corners = torch.randint(2, 8, (2, GROUPS), generator=generator).repeat_interleave(MEMBERS, 1)
    depth, turn = uniform(0.15, 0.45, 2, count), uniform(0, 2 * math.pi, 2, count)
    sharp = uniform(-0.15, 0.15, 2, count)

    def inside(part: int, scale: float) -> Tensor:
        """How far inside of an outline each pixel is ``[count, EDGE, EDGE]``, 0 to 1 with a soft edge."""
        n, d, t, s = (value[part][:, None, None] for value in (corners, depth, turn, sharp))
        wave = 1 - d / 2 + d / 2 * (n * angle + t).cos() + s * (2 * n * angle + 2 * t).cos()
        return ((scale * wave - radius) * EDGE / 3 + 0.5).clamp(0, 1)

    colours = uniform(0, 1, 2, count, 3, 1, 1)
    # Distinct from each other: the second colour is at least half as far as it can be from the first.
    colours[1] = torch.where((colours[1] - colours[0]).abs() < 0.35, (colours[0] + 0.5) % 1, colours[1])
    outer, inner, hole = inside(0, 0.95), inside(1, 0.5), inside(0, 0.6)
    line = outer * (1 - hole)

    def design(body: Tensor, spot: Tensor, first: Tensor, second: Tensor) -> Tensor:
        rgb = first * (1 - spot[:, None]) + second * spot[:, None]
        return torch.cat([rgb, torch.maximum(body, spot)[:, None]], 1)

    both = torch.stack([design(outer, inner, colours[0], colours[1]), design(line, inner, colours[1], colours[0])], 1)
    groups = [f"group{i // MEMBERS}" for i in range(count)]
    return Sprites((255 * both).round().to(torch.uint8), groups)


class Photos(NamedTuple):
    """Backgrounds, of which those of a class resemble each other."""

    pixels: Tensor
    """uint8 ``[photos, 3, size, size]``."""
    classes: list[str]
    """The folder of each photo."""


def photos(folder: Path, size: int) -> Photos:
    """Return all different pictures below a folder, resized to squares.

    Raises:
        UserError: there is none, or one is broken.
    """
    form = Pictures(size, 3)
    with Files(folder) as files:
        names = [name for name in files.names() if is_picture(name)]
        if not names:
            raise UserError(f"{folder} holds no pictures; set task.backgrounds to a folder of photos, or to noise.")

        def made() -> Iterator[Bytes]:
            for name in names:
                try:
                    yield form.pixels(files.read(name))
                except ValueError as error:
                    raise UserError(f"{folder / name} cannot be used: {error}; replace it or leave it out.") from error

        store = stored(
            "backgrounds",
            f"{files.stamp(names)} {form.key}",
            *(len(names), (3, size, size)),
            made,
            f"Reading {len(names)} photos of {folder}, once.",
        )
    kept = different(store.digests)
    # Rows that are left as they are stay on the disk until they are used.
    rows = store.rows if len(kept) == len(names) else store.rows[kept]
    return Photos(rows, [Path(names[i]).parent.name for i in kept])


NOISES = 300
"""Number of backgrounds of noise, of which parts are shown."""


def noise(size: int) -> Photos:
    """Return backgrounds of coloured noise, smooth and fine, each a class by itself."""
    generator = torch.Generator().manual_seed(11)
    smooth = torch.rand(NOISES, 3, 5, 5, generator=generator, dtype=torch.float32)
    fine = torch.randn(NOISES, 3, size // 4, size // 4, generator=generator, dtype=torch.float32)
    both = [interpolate(part, (size, size), mode="bilinear") for part in (smooth, fine)]
    pixels = (255 * (both[0] + 0.08 * both[1])).clamp(0, 255).round().to(torch.uint8)
    return Photos(pixels, [str(i) for i in range(NOISES)])


class Placed(NamedTuple):
    """Where sprites are to be pasted; all ``[pictures, sprites]`` but for the centre, ``[pictures, sprites, 2]``."""

    centre: Tensor
    """x and y in pixels."""
    edge: Tensor
    """Edge of the sprite in pixels, before it is turned."""
    angle: Tensor
    """In radians."""


def apart(edge: Tensor, size: int, real: Tensor, generator: torch.Generator, tries: int = 10) -> Tensor:
    """Draw centres of sprites ``[pictures, sprites, 2]``, each the best of some tries at keeping clear of earlier ones.

    Args:
        edge: of each sprite ``[pictures, sprites]``.
        size: edge of the picture.
        real: whether each sprite is there; those that are not need no room ``[pictures, sprites]``.
        generator: source of the centres.
        tries: number of centres to choose from.
    """
    pictures, sprites = edge.shape
    drawn = torch.rand(pictures, sprites, tries, 2, generator=generator)
    # At most a sixth of a sprite leaves the picture in each direction.
    margin = edge[..., None, None] / 3
    drawn = margin + drawn * (size - 2 * margin)
    chosen = drawn[:, :, 0].clone()
    for i in range(1, sprites):
        gap = (drawn[:, i, :, None] - chosen[:, None, :i]).norm(dim=-1) / ((edge[:, i, None] + edge[:, :i]) / 2)[
            :, None
        ]
        gap = gap.masked_fill(~real[:, None, :i], 1.0).amin(-1).clamp(max=1.0)
        best = gap.argmax(-1)
        chosen[:, i] = drawn[torch.arange(pictures), i, best]
    return chosen


def pasted(backgrounds: Tensor, sprites: Tensor, real: Tensor, placed: Placed) -> tuple[Tensor, Tensor]:
    """Return pictures with sprites pasted one over the other, and the boxes of the whole sprites.

    Args:
        backgrounds: ``[pictures, 3, size, size]`` from 0 to 1.
        sprites: red, green, blue and opacity from 0 to 1 ``[pictures, sprites, 4, EDGE, EDGE]``.
        real: whether each sprite is pasted ``[pictures, sprites]``.
        placed: where.

    Returns:
        pictures ``[pictures, 3, size, size]``, and boxes ``[pictures, sprites, 4]``: left, top, right and bottom of the
        part of the sprite that is in the picture, hidden or not; zeros where a sprite is not pasted.
    """
    size, x = backgrounds.shape[-1], backgrounds.clone()
    # From the picture's coordinates, −1 to 1, to the sprite's.
    scale = size / placed.edge
    cos, sin = placed.angle.cos() * scale, placed.angle.sin() * scale
    at = 2 * placed.centre / size - 1
    rows = torch.stack([torch.stack([cos, sin], -1), torch.stack([-sin, cos], -1)], -2)
    maps = torch.cat([rows, -(rows @ at[..., None])], -1)
    boxes, axis = torch.zeros(*real.shape, 4), (torch.arange(size) + 0.5) / size * 2 - 1
    for i in range(real.shape[1]):
        row = real[:, i].nonzero()[:, 0]
        across, down, shift = (column[..., None, None, :] for column in maps[row, i].unbind(-1))
        grid = across * axis[:, None] + (down * axis[:, None, None] + shift)
        # Colours are weighed by their opacity, so that what is transparent has none.
        own = sprites[row, i]
        own = torch.cat([own[:, :3] * own[:, 3:], own[:, 3:]], 1)
        warped = grid_sample(own, grid, align_corners=False)
        x[row] = warped[:, :3] + x[row] * (1 - warped[:, 3:])
        for side, (low, high) in ((1, (0, 2)), (2, (1, 3))):
            along = warped[:, 3].amax(side) > 0.5
            boxes[row, i, low] = along.byte().argmax(1).to(boxes.dtype)
            boxes[row, i, high] = (size - along.flip(1).byte().argmax(1)).to(boxes.dtype) * along.any(1)
    return x, boxes
