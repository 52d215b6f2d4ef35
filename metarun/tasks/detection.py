"""Detecting objects of new classes in pictures that the user has annotated: Pascal VOC or COCO."""

import hashlib
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from metarun.contracts import Sizes, Split, Task
from metarun.data.boxes import Annotated, annotated, within
from metarun.data.files import Files, found
from metarun.data.objects import Objects, shape_of
from metarun.data.pictures import Pictures
from metarun.data.splits import SHARES, dealt, listed, warn_of_like
from metarun.data.store import Bytes, different, stored
from metarun.errors import UserError, require
from metarun.targets.boxes import Boxes
from metarun.tasks.box_family import BoxFamily, leaves
from metarun.tasks.few_shot import units_of

log = logging.getLogger(__name__)

LARGEST_SIZE = 512
MEASURED = 1000
"""Number of training pictures, evenly spaced, that mean and standard deviation are computed of."""
SIZES = (0.05, 0.5)
"""Smallest and largest median object that ``augment`` shows in training tasks, in edges of a picture."""
WINDOWS = (0.4, 4.0)
"""Edges of the smallest and the largest window in which it shows them, in edges of a picture."""
NUMBERS = 16
"""Bytes after the pixels of a stored picture that hold its width and height."""


class Pool(NamedTuple):
    """What tasks of a split are drawn from."""

    classes: list[int]
    """Classes with enough pictures."""
    holding: dict[int, Tensor]
    """The pictures of the split that hold an object of each of these classes."""


class Detection(BoxFamily):
    """Tasks of finding the objects of ``ways`` classes in pictures.

    For each class of a task, ``shots`` support pictures and ``queries`` query pictures are drawn that hold an object of
    it. All objects of the task's classes have boxes; those of other classes are background. Pictures are resized to
    squares. No class and no picture of a test task is in any other task. Validation tasks have classes that training
    lacks only if there are enough; otherwise they have training classes, in other pictures.

    Args:
        path: a folder or a zip with XML files of Pascal VOC next to the pictures (or in the usual folders Annotations
            and JPEGImages) or with JSON files of COCO; or one such JSON file.
        ways: number of classes of a task, at least 1.
        shots: number of support pictures per class, at least 1.
        queries: number of query pictures per class of a validation or test task, at least 1.
        train_queries: number of query pictures per class in training; null: ``queries``.
        test_classes: the classes of test tasks; null: drawn by ``split_seed``.
        split: ``given`` (pictures belong to the split that the data name), ``random`` (by ``split_seed``), or ``auto``:
            given if the data name splits.
        split_seed: seed of random splits.
        image_size: edge in pixels to which pictures are resized, a multiple of 16 from 32 to 512.
        most_found: number of boxes that are kept of a picture, those with the highest scores.
        augment: whether training pictures are mirrored at random, and replaced by smaller or larger windows, so that
            the median object of a task has a size that is drawn for it; in every second task colours are changed.
        without_area: whether a box without an area is an ``error``, or is left out (``drop``).
        device: where tasks live.
        data_dir: where paths are looked up that do not exist here.
        converter: what a run has learned of pictures, for a later test of it; None: measured on training pictures.

    Raises:
        UserError: data are missing or broken, or a class has too few pictures.
    """

    def __init__(
        self,
        path: str,
        ways: int = 3,
        shots: int = 5,
        queries: int = 5,
        train_queries: int | None = None,
        test_classes: Sequence[str] | None = None,
        split: Literal["auto", "given", "random"] = "auto",
        split_seed: int = 0,
        image_size: int = 96,
        most_found: int = 50,
        augment: bool = True,
        without_area: Literal["error", "drop"] = "error",
        device: str = "cpu",
        data_dir: str = "data",
        converter: Objects | None = None,
    ) -> None:
        counted = {"ways": ways, "shots": shots, "queries": queries, "train_queries": train_queries}
        for name, value in {**counted, "most_found": most_found}.items():
            require(value is None or value >= 1, f"{name} must be at least 1, not {value}")
        fits = image_size % 16 == 0 and 32 <= image_size <= LARGEST_SIZE
        require(fits, f"image_size must be a multiple of 16 from 32 to {LARGEST_SIZE}, not {image_size}")
        self.ways, self.shots, self.device, self.augment = ways, shots, device, augment
        self.queries = {False: queries, True: train_queries or queries}

        source = found(path, data_dir)
        pictures, files = annotated(source, without_area)
        with files:
            pictures, self.pixels, shapes = _decoded(files, pictures, image_size, source)
        boxes = [_on_square(one, shape, image_size) for one, shape in zip(pictures, shapes, strict=True)]
        self.classes = sorted({box.label for one in pictures for box in one.boxes})
        if not self.classes:
            raise UserError(f"{source} has pictures without a single box; set task.path to annotated ones.")
        warn_of_like(self.classes, str(source), "classes")
        most = max(map(len, boxes))
        number = {name: index for index, name in enumerate(self.classes)}
        self.boxes, self.label = torch.zeros(len(pictures), most, 4), torch.full((len(pictures), most), -1)
        for row, (one, own) in enumerate(zip(pictures, boxes, strict=True)):
            if one.boxes:
                self.boxes[row, : len(own)] = own
                self.label[row, : len(own)] = torch.tensor([number[box.label] for box in one.boxes])

        part, part_name = _split_of_pictures(pictures, split, split_seed, source)
        of_split, class_name = self._split_of_classes(test_classes, split_seed, source)
        self.pools = {name: self._pool(name, of_split[name], part == name, source) for name in SHARES}
        self.units = {name: units_of(source.resolve(), own) for name, own in of_split.items()}
        self.dataset = ":".join([source.stem, part_name, class_name, f"{image_size}px", self._digest(part)])
        known = None if converter is None else converter.pictures
        mean, std = (known.mean, known.std) if known else _measured(self.pixels[part == "train"])
        target = Boxes(ways, image_size, most=most, most_found=most_found)
        super().__init__(target, Sizes(shots, queries, ways), Pictures(image_size, 3, mean=mean, std=std))
        self.converter = replace(self.converter, without_area=without_area)

    def _split_of_classes(
        self, test_classes: Sequence[str] | None, seed: int, source: Path
    ) -> tuple[dict[str, list[str]], str]:
        """Return the classes of each split, and the name of that choice."""
        known = self.classes
        if test_classes is None:
            drawn = dealt(known, seed, SHARES, self.ways)
            test, name = sorted(drawn["test"]), f"classes=random{seed}"
        else:
            unknown = sorted(set(test_classes) - set(known))
            require(not unknown, f"test_classes must be among {listed(known)}, not {', '.join(unknown)}")
            test, name = sorted(set(test_classes)), "test=" + "+".join(sorted(set(test_classes)))
        rest = [one for one in known if one not in test]
        for split, own in (("test", test), ("training", rest)):
            if len(own) < self.ways:
                raise UserError(
                    f"{source} has {len(own)} classes for {split} tasks of {self.ways}: {listed(own)}; lower "
                    "task.ways, or name others in task.test_classes."
                )
        drawn = dealt(rest, seed, {"train": 0.8, "val": 0.2}, self.ways)
        if len(rest) >= 3 * self.ways:
            return {"train": sorted(drawn["train"]), "val": sorted(drawn["val"]), "test": test}, name
        log.info("%s: validation tasks have the training classes, in other pictures.", source)
        return {"train": rest, "val": rest, "test": test}, name

    def _pool(
        self, split: str, classes: list[str], own: "np.ndarray[tuple[int], np.dtype[np.bool_]]", source: Path
    ) -> Pool:
        """Return what tasks of a split are drawn from.

        Raises:
            UserError: too few classes have enough pictures.
        """
        rows, wanted = torch.from_numpy(own), self.shots + self.queries[split == "train"]
        holding = {
            self.classes.index(name): ((self.label == self.classes.index(name)).any(1) & rows).nonzero()[:, 0]
            for name in classes
        }
        few = [f"{self.classes[index]} ({len(held)})" for index, held in holding.items() if len(held) < wanted]
        enough = {index: held for index, held in holding.items() if len(held) >= wanted}
        if len(enough) < self.ways:
            raise UserError(
                f"{source} has too few {split} pictures of {listed(few)}: a task needs {self.shots} shots and "
                f"{wanted - self.shots} queries of each of {self.ways} classes; lower task.shots or task.queries, or "
                "add pictures."
            )
        if few:
            log.info(
                "%s: %s classes with fewer than %d pictures are left out: %s.", *(source, split, wanted, listed(few))
            )
        return Pool(list(enough), enough)

    def sample(self, split: Split, count: int, generator: torch.Generator) -> Task:
        """Draw ``count`` tasks; leaves ``[count, pictures, ...]``."""
        pool, training = self.pools[split], split == "train"
        classes, support, query = zip(*(self._draw(pool, training, generator) for _ in range(count)), strict=True)
        rows, own, change = (torch.tensor(support), torch.tensor(query)), torch.tensor(classes), None
        if training and self.augment:
            both = torch.cat(rows, 1)
            edges = (self.boxes[both][..., 2:] - self.boxes[both][..., :2]).mean(-1) / self.target.size
            theirs = (self.label[both][..., None] == own[:, None, None]).any(-1)
            zoom = windows(edges.masked_fill(~theirs, math.nan).flatten(1).nanmedian(1).values, generator)[:, None]
            change = zoom, turned_colours(count, generator)
        shown, asked = (self._part(part, own, change, generator) for part in rows)
        return Task(shown, asked)

    def _draw(self, pool: Pool, training: bool, generator: torch.Generator) -> tuple[list[int], list[int], list[int]]:
        """Draw classes and pictures of one task, none of which is drawn twice."""
        order = torch.randperm(len(pool.classes), generator=generator)[: self.ways]
        classes = [pool.classes[i] for i in order.tolist()]
        wanted, taken = self.shots + self.queries[training], set[int]()
        support, query = list[int](), list[int]()
        # Rare classes choose first, so that common ones do not take their pictures.
        for index in sorted(classes, key=lambda one: len(pool.holding[one])):
            held = pool.holding[index]
            shuffled = held[torch.randperm(len(held), generator=generator)].tolist()
            drawn = [row for row in shuffled if row not in taken][:wanted]
            if len(drawn) < wanted:
                names = ", ".join(self.classes[one] for one in classes)
                raise UserError(
                    f"The classes {names} share so many pictures that a task cannot have {wanted} others of each; "
                    "lower task.shots or task.queries."
                )
            taken |= set(drawn)
            support += drawn[: self.shots]
            query += drawn[self.shots :]

        def mixed(rows: list[int]) -> list[int]:
            return [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]

        return classes, mixed(support), mixed(query)

    def _part(
        self, rows: Tensor, classes: Tensor, change: tuple[Tensor, Tensor] | None, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Return the leaves of the pictures ``rows [tasks, pictures]`` of tasks with ``classes [tasks, ways]``.

        Training tasks have a ``change``: windows of the edge ``[tasks, 1]`` and ``turned_colours``.
        """
        x, boxes = self.pictures.normalised(self.pixels[rows]), self.boxes[rows]
        label = (self.label[rows][..., None] == classes[:, None, None]).to(torch.get_default_dtype())
        if change is not None:
            x, boxes, label = augmented(x, boxes, label, *change, generator)
        boxes = boxes * (label.sum(-1, keepdim=True) > 0)
        return leaves(self.target, x, boxes, label, self.device)

    def _digest(self, part: Any) -> str:
        """Return a hash of pictures, boxes and their split."""
        content = hashlib.sha256(self.boxes.numpy().tobytes() + self.label.numpy().tobytes())
        content.update(" ".join(part.tolist()).encode())
        content.update(self.pixels[:: len(self.pixels) // 64 + 1].contiguous().numpy().tobytes())
        return content.hexdigest()[:6]


def windows(edge: Tensor, generator: torch.Generator) -> Tensor:
    """Return the edge of the windows of each task, in edges of a picture ``[tasks]``.

    The classes of a test task may be much larger or smaller than those of training. What a task shows therefore has a
    size that says nothing of its class, with the same chance of each order of magnitude.

    Args:
        edge: mean of width and height of each task's median object, in edges of a picture ``[tasks]``.
        generator: source of the sizes.
    """
    low, high = map(math.log, SIZES)
    drawn = (low + (high - low) * torch.rand(edge.shape, generator=generator)).exp()
    return (edge / drawn).clamp(*WINDOWS)


def turned_colours(count: int, generator: torch.Generator) -> Tensor:
    """Return rotations and reflections of normalised colours ``[count, 3, 3]``, of which every second is the identity.

    They are the same in all pictures of a task, so that the colour of a class is to be learned from the support set
    (as in Ni et al. 2021, "Data Augmentation for Meta-Learning", https://arxiv.org/abs/2010.07092, task augmentation).
    """
    turned = torch.linalg.qr(torch.randn(count, 3, 3, generator=generator)).Q
    kept = torch.rand(count, 1, 1, generator=generator) < 0.5
    return torch.where(kept, torch.eye(3), turned)


def augmented(
    x: Tensor, boxes: Tensor, label: Tensor, zoom: Tensor, colours: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Return windows of pictures, each around an object of the task, every second one mirrored, with their boxes.

    Args:
        x: pictures ``[tasks, pictures, channels, size, size]``.
        boxes: left, top, right, bottom in pixels ``[tasks, pictures, most, 4]``.
        label: one-hot class of each box, zeros for others and for padding ``[tasks, pictures, most, ways]``. It becomes
            zero for boxes of which less than half is in the window.
        zoom: edge of the windows of each task, in edges of a picture ``[tasks, 1]``; around a picture there are zeros.
        colours: by which the colours of each task are multiplied ``[tasks, channels, channels]``.
        generator: source of the windows.
    """
    size, pictures = x.shape[-1], boxes.shape[:2]
    real = label.sum(-1) > 0
    chosen = torch.rand(real.shape, generator=generator).masked_fill(~real, -1.0).argmax(-1)
    around = boxes.gather(2, chosen[..., None, None].expand(-1, -1, 1, 4))[:, :, 0]
    middle = (around[..., :2] + around[..., 2:]) / 2 / size
    edge = zoom[..., None].expand(*pictures, 1)
    shift = (torch.rand(*pictures, 2, generator=generator) - 0.5) * edge / 2
    # A large window holds the whole picture, a small one lies within it.
    corner = (middle + shift - edge / 2).clamp((1 - edge).clamp(max=0.0), (1 - edge).clamp(min=0.0))
    mirrored = torch.rand(*pictures, 1, generator=generator) < 0.5
    along = (torch.arange(size, device=x.device) + 0.5) / size
    places = corner[..., None] + edge[..., None] * along
    across = torch.where(mirrored, places[..., 0, :].flip(-1), places[..., 0, :])
    both = across[..., None, :].expand(*pictures, size, size), places[..., 1, :, None].expand(*pictures, size, size)
    grid = torch.stack(both, -1).to(x.dtype)
    x = grid_sample(x.flatten(0, 1), 2 * grid.flatten(0, 1) - 1, align_corners=False).view_as(x)
    x = (colours[:, None] @ x.flatten(3)).view_as(x)
    moved = (boxes - size * corner.repeat(1, 1, 2)[:, :, None]) / edge[..., None]
    inside = moved.clamp(0, size)
    share = (inside[..., 2:] - inside[..., :2]).prod(-1) / (moved[..., 2:] - moved[..., :2]).prod(-1).clamp(min=1e-6)
    left, top, right, bottom = inside.unbind(-1)
    other = torch.stack([size - right, top, size - left, bottom], -1)
    inside = torch.where(mirrored[..., None], other, inside)
    return x, inside.to(boxes.dtype), label * (share >= 0.5)[..., None]


def _split_of_pictures(pictures: Sequence[Annotated], option: str, seed: int, source: Path) -> tuple[Any, str]:
    """Return the split of each picture, and the name of that choice.

    Raises:
        UserError: the data name no split, or not one for every picture.
    """
    named = [one.split for one in pictures]
    given = any(named)
    if option == "given" and not given:
        raise UserError(f"{source} names no splits of its pictures; choose task.split=random.")
    if option == "random" or not given:
        drawn = dealt([one.name for one in pictures], seed, SHARES)
        return np.array([next(part for part in SHARES if one.name in drawn[part]) for one in pictures]), f"random{seed}"
    if None in named:
        left = [one.name for one, split in zip(pictures, named, strict=True) if split is None]
        raise UserError(
            f"{source} names a split for some of its pictures and none for {listed(left)}; name one for all, or choose "
            "task.split=random."
        )
    return np.array(named), "given"


def _decoded(
    files: Files, pictures: Sequence[Annotated], size: int, source: Path
) -> tuple[list[Annotated], Tensor, list[tuple[float, float]]]:
    """Return the pictures without copies, pixels ``[pictures, 3, size, size]``, and upright width and height of each.

    Raises:
        UserError: a picture is missing or broken, or its size is not the one that its annotation states.
    """
    form = Pictures(size, 3)

    def made() -> Iterator[Bytes]:
        for one in pictures:
            content = files.read(one.name)
            try:
                pixels = form.pixels(content)
                width, height = shape_of(content)
            except ValueError as error:
                raise UserError(
                    f"{source / one.name}, which {one.place} annotates, cannot be used: {error}; replace it or delete "
                    "its annotation."
                ) from error
            shape = np.array([width, height], np.int64).view(np.uint8)
            yield np.concatenate([pixels.reshape(-1), shape])

    names = [one.name for one in pictures]
    row = 3 * size * size
    store = stored(
        "boxes",
        f"{files.stamp(names)} {form.key}",
        *(len(pictures), (row + NUMBERS,)),
        made,
        f"Reading {len(pictures)} pictures of {source}, once.",
    )
    kept = different(store.digests)
    if copies := sorted(set(range(len(pictures))) - set(kept)):
        log.info(
            "%s: %d pictures are copies of others and are left out with their boxes: %s.",
            *(source, len(copies), listed([names[i] for i in copies])),
        )
    rows = store.rows[kept] if copies else store.rows
    shapes = rows[:, row:].contiguous().numpy().view(np.int64)
    pixels = rows[:, :row].reshape(-1, 3, size, size)
    return [pictures[i] for i in kept], pixels, [(float(w), float(h)) for w, h in shapes]


def _on_square(one: Annotated, shape: tuple[float, float], size: int) -> Tensor:
    """Return a picture's boxes in pixels of the square to which it is resized ``[boxes, 4]``.

    Raises:
        UserError: a box leaves the picture, or the annotation is of a picture of another size.
    """
    if one.size is not None and one.size != shape:
        stated, real = (" × ".join(f"{side:g}" for side in sides) for sides in (one.size, shape))
        upright = " when it is turned as its camera noted" if one.size == shape[::-1] else ""
        raise UserError(
            f"{one.place} is of a picture of {stated} pixels, and {one.name} has {real}{upright}; correct the size, or "
            "replace the picture."
        )
    width, height = shape
    scale = torch.tensor([size / width, size / height, size / width, size / height])
    cut = [within(box, shape, f"{one.place}, box {index} of {one.name}") for index, box in enumerate(one.boxes, 1)]
    return torch.tensor([box[1:] for box in cut]).reshape(-1, 4) * scale


def _measured(pixels: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel, with white as 1, rounded to four digits."""
    some = pixels[:: len(pixels) // MEASURED + 1].double() / 255
    mean, std = some.mean((0, 2, 3)), some.std((0, 2, 3)).clamp(min=1 / 255)
    return tuple(round(v, 4) for v in mean.tolist()), tuple(round(v, 4) for v in std.tolist())
