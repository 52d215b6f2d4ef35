"""Detecting objects of new classes in pictures that metarun makes: sprites on photographs or on noise."""

import hashlib
import logging
import math
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from metarun.contracts import Sizes, Split, Task
from metarun.data.files import found
from metarun.data.pictures import Pictures
from metarun.data.splits import SHARES, dealt
from metarun.data.sprites import Photos, Placed, Sprites, apart, emoji, noise, pasted, photos, shapes
from metarun.errors import require
from metarun.targets.boxes import Boxes
from metarun.tasks.box_family import BoxFamily, leaves
from metarun.tasks.few_shot import draw, units_of

log = logging.getLogger(__name__)

AT_ONCE = 256
"""Number of pictures that are pasted at a time."""
ROOM = 1.25
"""Edge of a stored photo, of which a part is a background, in edges of a picture."""
MEAN, STD = 0.45, 0.25
"""By which all channels are normalised, with white as 1."""


class Pool(NamedTuple):
    """What pictures of a split are made of."""

    classes: Tensor
    """Classes of sprites ``[classes]``."""
    design: int
    photos: Tensor
    """Photos for backgrounds ``[photos]``."""


class SpriteDetection(BoxFamily):
    """Tasks of finding sprites of ``ways`` classes.

    A support picture has one object of a class of the task, a query picture one to ``objects`` of them. Both may have
    distractors: sprites of other classes of the same split, which have no box. Objects are scaled, turned and partly
    hidden, by each other and by pieces of the background. Their boxes are those of the whole sprite within the picture.
    Test tasks have classes of groups, backgrounds, and with ``designs=apart`` a design, of which nothing else has any.

    Args:
        ways: number of classes of a task, at least 1.
        shots: number of support pictures per class, at least 1.
        queries: number of query pictures per class of a validation or test task, at least 1.
        train_queries: number of query pictures per class in training; null: ``queries``.
        sprites: ``emoji`` (``data_dir/emoji``), ``shapes`` (drawn by metarun), or ``auto``: emoji if they are there.
        backgrounds: a folder of photos here or in ``data_dir``, whose split is by folder; ``noise``; or ``auto``: the
            photos of ``data_dir/grocery_store_84`` if they are there, else noise.
        designs: ``apart`` (the sprites of test tasks have another design) or ``same``.
        image_size: edge of a picture in pixels, a multiple of 16 from 32 to 256.
        sprite_size: least and largest edge of a sprite, as shares of the picture's edge.
        turn: largest angle by which sprites are turned, in degrees from 0 to 180.
        hidden: largest share of an object that a piece of the background hides, 0 to 0.5.
        objects: largest number of objects in a query picture, at least 1.
        distractors: largest number of distractors in a picture, at least 0.
        most_found: number of boxes that are kept of a picture, those with the highest scores.
        split_seed: seed of the split of groups and of photos.
        device: where tasks live.
        data_dir: holds the folders of emoji and photos.

    Raises:
        UserError: data are missing or broken.
    """

    def __init__(
        self,
        ways: int = 5,
        shots: int = 5,
        queries: int = 3,
        train_queries: int | None = None,
        sprites: Literal["auto", "emoji", "shapes"] = "auto",
        backgrounds: str = "auto",
        designs: Literal["apart", "same"] = "apart",
        image_size: int = 64,
        sprite_size: tuple[float, float] = (0.25, 0.45),
        turn: float = 30.0,
        hidden: float = 0.3,
        objects: int = 3,
        distractors: int = 1,
        most_found: int = 20,
        split_seed: int = 0,
        device: str = "cpu",
        data_dir: str = "data",
    ) -> None:
        counted = {"ways": ways, "shots": shots, "queries": queries, "objects": objects}
        for name, value in {**counted, "train_queries": train_queries, "most_found": most_found}.items():
            require(value is None or value >= 1, f"{name} must be at least 1, not {value}")
        require(distractors >= 0, f"distractors must be at least 0, not {distractors}")
        fits = image_size % 16 == 0 and 32 <= image_size <= 256
        require(fits, f"image_size must be a multiple of 16 from 32 to 256, not {image_size}")
        least, most = sprite_size
        require(0.1 <= least <= most <= 0.8, f"sprite_size must rise from 0.1 to 0.8 at most, not {list(sprite_size)}")
        require(0 <= turn <= 180, f"turn must be 0 to 180 degrees, not {turn}")
        require(0 <= hidden <= 0.5, f"hidden must be 0 to 0.5, not {hidden}")
        self.ways, self.shots, self.queries, self.device = ways, shots, {False: queries}, device
        self.queries[True] = train_queries or queries
        self.size, self.range, self.turn, self.hidden = image_size, (least, most), turn, hidden
        self.objects, self.distractors = objects, distractors
        self.sprites, name = _sprites(sprites, data_dir)
        self.photos, place = _backgrounds(backgrounds, data_dir, round(ROOM * image_size))
        self.pools, self.units = self._split(split_seed, designs, name, place)
        keys = [
            name,
            place,
            f"split{split_seed}",
            f"designs={designs}",
            f"{image_size}px",
            f"sprites={least:g}-{most:g}",
        ]
        keys += [f"turn={turn:g}", f"hidden={hidden:g}", f"objects={objects}", f"distractors={distractors}"]
        self.dataset = ":".join(keys)
        target = Boxes(ways, image_size, most=objects, most_found=most_found)
        form = Pictures(image_size, 3, mean=(MEAN,) * 3, std=(STD,) * 3)
        super().__init__(target, Sizes(shots, queries, ways), form)

    def _split(
        self, seed: int, designs: str, name: str, place: str
    ) -> tuple[dict[str, Pool], dict[str, frozenset[str]]]:
        """Deal groups of classes, and folders of photos, to training, validation and test; return their names, too."""
        groups = dealt(set(self.sprites.groups), seed, SHARES)
        places = dealt(set(self.photos.classes), seed, SHARES, 1)
        pools = {}
        for split in SHARES:
            classes = torch.tensor([i for i, group in enumerate(self.sprites.groups) if group in groups[split]])
            enough = len(classes) - (self.distractors > 0)
            require(
                self.ways <= enough, f"ways must be at most {enough}, by the {split} classes of {name}, not {self.ways}"
            )
            rows = torch.tensor([i for i, own in enumerate(self.photos.classes) if own in places[split]])
            require(len(rows) > 0, "backgrounds must be photos in at least three folders; add some, or choose noise")
            pools[split] = Pool(classes, int(split == "test" and designs == "apart"), rows)
        units = {
            split: units_of(name, groups[split]) | units_of(place, (f"background {one}" for one in places[split]))
            for split in SHARES
        }
        return pools, units

    def sample(self, split: Split, count: int, generator: torch.Generator) -> Task:
        """Draw ``count`` tasks; leaves ``[count, pictures, ...]``."""
        pool = self.pools[split]
        own = draw(torch.ones(count, len(pool.classes), dtype=torch.bool), self.ways, generator)
        support = self._part(own, self.shots, 1, pool, generator)
        query = self._part(own, self.queries[split == "train"], self.objects, pool, generator)
        return Task(support, query)

    def _part(self, own: Tensor, each: int, objects: int, pool: Pool, generator: torch.Generator) -> dict[str, Tensor]:
        """Make ``each`` pictures per class of tasks whose classes are ``own [tasks, ways]``, in random order."""
        tasks, ways = len(own), self.ways
        pictures, slots = ways * each, objects + self.distractors
        first = torch.arange(ways).repeat_interleave(each).expand(tasks, -1)
        first = first.gather(1, torch.rand(tasks, pictures, generator=generator).argsort(1))
        label = torch.randint(ways, (tasks, pictures, slots), generator=generator)
        label[..., 0] = first
        number = torch.randint(1, objects + 1, (tasks, pictures, 1), generator=generator)
        others = torch.randint(self.distractors + 1, (tasks, pictures, 1), generator=generator)
        slot = torch.arange(slots)
        is_object = slot < objects
        real = torch.where(is_object, slot < number, slot - objects < others)
        sprite = own.gather(1, label.flatten(1)).view_as(label)
        if self.distractors:
            sprite = torch.where(is_object, sprite, self._others(own, label.shape, len(pool.classes), generator))
        x, boxes = self._pictures(pool.classes[sprite].flatten(0, 1), real.flatten(0, 1), pool, objects, generator)
        x, boxes = x.view(tasks, pictures, *x.shape[1:]), boxes.view(tasks, pictures, slots, 4)
        most = self.objects
        label, there = label[..., :objects], (real & (boxes[..., 2] > boxes[..., 0]))[..., :objects]
        marks = one_hot(label, ways) * there[..., None]
        full = torch.zeros(tasks, pictures, most, 4)
        full[:, :, :objects] = boxes[:, :, :objects] * there[..., None]
        kinds = torch.zeros(tasks, pictures, most, ways)
        kinds[:, :, :objects] = marks.to(kinds.dtype)
        return leaves(self.target, self.pictures.normalised(255 * x), full, kinds, self.device)

    def _others(self, own: Tensor, shape: torch.Size, classes: int, generator: torch.Generator) -> Tensor:
        """Draw positions of classes ``shape [tasks, ...]`` that are not among the ways of each task."""
        free = torch.ones(len(own), classes, dtype=torch.bool).scatter(1, own, False)
        drawn = torch.multinomial(free.double(), math.prod(shape[1:]), replacement=True, generator=generator)
        return drawn.view(shape)

    def _pictures(
        self, classes: Tensor, real: Tensor, pool: Pool, objects: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Make pictures with sprites of ``classes [pictures, slots]``: pixels from 0 to 1, and boxes."""
        count, slots = classes.shape
        low, high = (math.log(share * self.size) for share in self.range)
        edge = (low + (high - low) * torch.rand(count, slots, generator=generator)).exp()
        angle = math.radians(self.turn) * (2 * torch.rand(count, slots, generator=generator) - 1)
        placed = Placed(apart(edge, self.size, real, generator), edge, angle)
        xs, boxes = [], []
        for at in range(0, count, AT_ONCE):
            part = slice(at, at + AT_ONCE)
            behind = self._background(pool, len(classes[part]), generator)
            sprites = self.sprites.pixels[classes[part], pool.design].to(torch.get_default_dtype()) / 255
            x, box = pasted(behind, sprites, real[part], Placed(*(value[part] for value in placed)))
            hole = self._holes(box[:, :objects], generator)
            xs.append(torch.where(hole[:, None], behind, x))
            boxes.append(box)
        return torch.cat(xs), torch.cat(boxes)

    def _background(self, pool: Pool, count: int, generator: torch.Generator) -> Tensor:
        """Return backgrounds ``[count, 3, size, size]`` from 0 to 1: parts of photos, every second one mirrored."""
        row = pool.photos[torch.randint(len(pool.photos), (count,), generator=generator)]
        pixels = self.photos.pixels[row]
        spare = pixels.shape[-1] - self.size
        down, right = torch.randint(spare + 1, (2, count), generator=generator)
        windows = pixels.unfold(2, self.size, 1).unfold(3, self.size, 1)
        pixels = windows[torch.arange(count), :, down, right]
        mirrored = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
        return torch.where(mirrored, pixels.flip(-1), pixels).to(torch.get_default_dtype()) / 255

    def _holes(self, boxes: Tensor, generator: torch.Generator) -> Tensor:
        """Return where the background hides objects ``[pictures, size, size]``: a strip along one side of each box."""
        count, objects = boxes.shape[:2]
        share = self.hidden * torch.rand(count, objects, 1, generator=generator)
        side = torch.randint(4, (count, objects, 1), generator=generator)
        left, top, right, bottom = boxes.unbind(-1)
        width, height = right - left, bottom - top
        cut = torch.stack([right - share[..., 0] * width, bottom - share[..., 0] * height], -1)
        other = torch.stack([left + share[..., 0] * width, top + share[..., 0] * height], -1)
        which = torch.arange(4) == side
        # Sides are left, top, right and bottom.
        x0 = torch.where(which[..., 2], cut[..., 0], left)
        y0 = torch.where(which[..., 3], cut[..., 1], top)
        x1 = torch.where(which[..., 0], other[..., 0], right)
        y1 = torch.where(which[..., 1], other[..., 1], bottom)
        along = torch.arange(self.size) + 0.5
        in_x = (along > x0[..., None]) & (along < x1[..., None])
        in_y = (along > y0[..., None]) & (along < y1[..., None])
        return (in_y[..., :, None] & in_x[..., None, :]).any(1)


def _sprites(sprites: str, data_dir: str) -> tuple[Sprites, str]:
    """Return the sprites that are asked for, and their name."""
    folder = Path(data_dir) / "emoji"
    if sprites == "auto":
        sprites = "emoji" if (folder / "emoji.json").is_file() else "shapes"
        if sprites == "shapes":
            log.info("No emoji.json in %s, so the sprites are shapes.", folder)
    if sprites == "shapes":
        return shapes(), "shapes"
    held = emoji(folder)
    return held, f"emoji{_digest(held.pixels)}"


def _backgrounds(backgrounds: str, data_dir: str, size: int) -> tuple[Photos, str]:
    """Return the photos that are asked for, or noise, and their name."""
    if backgrounds == "auto":
        known = Path(data_dir) / "grocery_store_84"
        backgrounds = str(known) if known.is_dir() else "noise"
    if backgrounds == "noise":
        return noise(size), "noise"
    folder = found(backgrounds, data_dir, "task.backgrounds")
    held = photos(folder, size)
    return held, f"{folder.name}{_digest(held.pixels)}"


def _digest(pixels: Tensor) -> str:
    """Return a hash of some of the pixels."""
    some = pixels.reshape(len(pixels), -1)[:: len(pixels) // 64 + 1]
    return hashlib.sha256(some.contiguous().numpy().tobytes()).hexdigest()[:6]
