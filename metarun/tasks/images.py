"""Few-shot classification of pictures that the user has: a folder per class, an index, or an archive of these."""

import hashlib
import logging
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from metarun.contracts import Facts, Numbers, Pooled, Predict, Sizes, Spec, Split, Task
from metarun.data import splits
from metarun.data.augment import AUGMENTATIONS, augmented
from metarun.data.embedding import VIEWS, Embedded, cached_features, fitted
from metarun.data.files import Files, found
from metarun.data.pictures import Pictures, decoded, found_in
from metarun.data.portable import portable
from metarun.data.sources import check_source
from metarun.data.spelling import plain
from metarun.data.store import Store, stored
from metarun.errors import require
from metarun.nn.ops import unit_rows
from metarun.targets import verification
from metarun.targets.classes import ACCURACY, Classes
from metarun.tasks.few_shot import Asked, Cells, Shots, Ways, draw_tasks, ordered, range_of, sizes_for, units_of

log = logging.getLogger(__name__)

LARGEST_SIZE = 512
MEASURED = 5000
"""Number of training pictures, evenly spaced, that mean and standard deviation are computed of."""
BINS = 8
"""Bins per channel of the colour histograms that ``centroid`` compares."""


class Pool(NamedTuple):
    """The pictures of one split."""

    rows: Tensor
    """Pixels ``[pictures of the data set, channels, size, size]``, uint8; or features ``[pictures, d]``."""
    order: Tensor
    """The rows of the split, sorted by class."""
    cells: Cells
    """Where each class is in ``order``."""
    content: str
    """A hash of all pictures of the data set."""


def measured(pool: Pool) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel, with white as 1, rounded to four digits."""
    some = pool.order[:: len(pool.order) // MEASURED + 1]
    sums = torch.zeros(2, pool.rows.shape[1], dtype=torch.float64)
    for first in range(0, len(some), 256):
        x = pool.rows[some[first : first + 256]].double() / 255
        sums += torch.stack([x.mean((2, 3)).sum(0), x.square().mean((2, 3)).sum(0)])
    mean, square = sums / len(some)
    std = (square - mean.square()).clamp(min=0).sqrt().clamp(min=1 / 255)
    return tuple(round(v, 4) for v in mean.tolist()), tuple(round(v, 4) for v in std.tolist())


def colours(x: Tensor) -> Tensor:
    """Return the square roots of joint histograms of colour: pixels ``[n, 3, h, w]`` of 0 to 1 → ``[n, BINS³]``."""
    # Whole numbers would need eight bytes for each pixel and channel.
    bins = (x * BINS).floor().clamp(0, BINS - 1)
    joint = ((bins[:, 0] * BINS + bins[:, 1]) * BINS + bins[:, 2]).flatten(1).long()
    counts = x.new_zeros(len(x), BINS**3).scatter_add(1, joint, torch.ones_like(joint, dtype=x.dtype))
    return unit_rows(counts.sqrt())


@portable
@dataclass(frozen=True)
class Colours:
    """Normalised pictures as histograms of their colours."""

    pictures: Pictures

    def __call__(self, x: Tensor) -> Tensor:
        """``[pictures, 3, size, size]`` → ``[pictures, bins]``."""
        return colours(self.pictures.shares(x))


class Wanted(NamedTuple):
    """How a data set is split."""

    split: str
    """``auto``, ``given`` or ``random``, where there are no lists."""
    seed: int
    lists: Path | None
    """A folder of lists of classes."""
    ways: int
    """The number of classes that a split should have at least."""
    smallest: int
    """Number of pictures of the smallest class that is of use."""


class Images:
    """Tasks of ``ways`` classes; ``x [pictures, channels, size, size]`` normalised, ``y [pictures, ways]`` one-hot.

    Pictures are decoded and resized once, one by one, into a file of the cache, and stay there as bytes on the CPU. A
    picture that occurs several times is used once, so none is in two splits. Test classes are new.

    Args:
        path: a folder or a zip with a folder per class at any depth, with ``train``, ``val`` and ``test`` folders of
            such, with an ``index.csv``, or with ``train.csv``, ``val.csv`` and ``test.csv`` next to a folder
            ``images``; or an index: a CSV with the columns ``path``, ``class`` and perhaps ``split``.
        ways: number of classes of a task, at least 2, or a range from which each task draws it.
        shots: number of support pictures per class, at least 1; or a range from which each task draws this number.
        queries: number of query pictures per class of a validation or test task, at least 1.
        train_ways: number of classes of a training task, for learners that allow it; null: ``ways``.
        train_shots: number of support pictures per class in training, or a range; null: ``shots``.
        train_queries: number of query pictures per class in training; null: ``queries``.
        uneven: whether each class draws its own number of support pictures from a range, instead of each task drawing
            one number for all its classes.
        split: ``given`` (by the data), ``random`` (by class and ``split_seed``), ``auto`` (given if the data name
            splits, else random), or a folder with lists of classes ``train.txt``, ``val.txt`` and ``test.txt``.
        split_seed: seed of a random split.
        test_path: other data whose classes are all test classes; null: test classes are of ``path``.
        class_of: a regular expression, searched in each picture's path, whose group is the class; null: the folder.
        image_size: edge in pixels to which pictures are resized, 16 to 512.
        channels: 3 for RGB, 1 for grey.
        crop: the part of each picture that is kept: left, top, right and bottom as shares of width and height.
        augment: what changes training pictures at random: some of ``flip``, ``crop`` and ``colour``.
        embed: a frozen pretrained model (see `metarun.data.sources`) whose features replace pictures, which are
            embedded once and without ``augment``; null: pictures stay pixels.
        embed_size: edge in pixels of the pictures that this model sees, in place of ``image_size``, 16 to 512.
        embed_views: number of views of each picture whose features are averaged: 1 (as it is), 2 (mirrored as well) or
            8 (turned by quarters too, for pictures that have no upper side).
        verify: whether tests also say how well claims of a class are verified (see `metarun.targets.verification`).
        device: where the pictures live.
        data_dir: where paths are looked up that do not exist here.
        typed: the keys that the user set; other sizes give way to what the data can serve. None: all.
        converter: what a run has measured of its pictures, for a later test of it; None: measured on training pictures.

    Raises:
        UserError: data are missing or broken, or a class is in two splits.
    """

    def __init__(
        self,
        path: str,
        ways: Ways = 5,
        shots: Shots = 1,
        queries: int = 15,
        train_ways: Ways | None = None,
        train_shots: Shots | None = None,
        train_queries: int | None = None,
        uneven: bool = False,
        split: str = "auto",
        split_seed: int = 0,
        test_path: str | None = None,
        class_of: str | None = None,
        image_size: int = 84,
        channels: int = 3,
        crop: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0),
        augment: Sequence[str] = (),
        embed: str | None = None,
        embed_size: int = 224,
        embed_views: int = 1,
        verify: bool = False,
        device: str = "cpu",
        data_dir: str = "data",
        typed: Collection[str] | None = None,
        converter: Pictures | Embedded | None = None,
    ) -> None:
        asked = Asked(ways, shots, queries, train_ways, train_shots, train_queries, uneven)
        asked.sizes()
        for key, size in {"image_size": image_size, "embed_size": embed_size}.items():
            require(16 <= size <= LARGEST_SIZE, f"{key} must be 16 to {LARGEST_SIZE}, not {size}")
        require(embed_views in VIEWS, f"embed_views must be one of {', '.join(map(str, VIEWS))}, not {embed_views}")
        require(embed_views == 1 or embed is not None, "embed_views averages features; set embed too")
        require(channels in (1, 3), f"channels must be 3 (RGB) or 1 (grey), not {channels}")
        left, top, right, bottom = crop
        require(
            0 <= left < right <= 1 and 0 <= top < bottom <= 1,
            f"crop must be left, top, right and bottom from 0 to 1, not {list(crop)}",
        )
        unknown = sorted(set(augment) - set(AUGMENTATIONS))
        require(not unknown, f"augment must hold some of {', '.join(AUGMENTATIONS)}, not {', '.join(unknown)}")
        require("colour" not in augment or channels == 3, "augment=[colour] is for channels=3, and these are grey")
        require(_has_one_group(class_of), f"class_of must be a regular expression with one group, not {class_of!r}")
        if embed is not None:
            check_source(embed, "pictures")
            require(channels == 3, "embed is for pictures in colour; set channels=3")
            require(
                not augment or (typed is not None and "augment" not in typed),
                "embed computes the features of each picture once, so that augment has no effect; set augment=[]",
            )
            image_size, augment = embed_size, ()
        form = Pictures(image_size, channels, (left, top, right, bottom))
        self.augment, self.device = tuple(name for name in AUGMENTATIONS if name in augment), device

        lists = None if split in ("auto", "given", "random") else found(split, data_dir, "task.split")
        wanted = Wanted(split, split_seed, lists, range_of("ways", ways).least, range_of("shots", shots).most + 1)
        source = found(path, data_dir)
        elsewhere = None if test_path is None else found(test_path, data_dir, "task.test_path")
        name, self.pools, self.classes, digests = pools_of(source, elsewhere, class_of, form, wanted)
        places = {part: source if part != "test" or elsewhere is None else elsewhere for part in self.classes}
        self.units = {part: units_of(places[part].resolve(), own) for part, own in self.classes.items()}
        name += [f"{image_size}px" + ("" if channels == 3 else ":grey"), digests]
        name += [] if embed is None else [embed]
        name += [] if embed_views == 1 else [f"{embed_views} views"]
        counts = {part: pool.cells.size for part, pool in self.pools.items()}
        self.sizes = sizes_for(asked, counts, ":".join(name), "pictures", typed, self.classes)
        others = self.sizes[False]
        self.dataset = ":".join([*name, *others.text()])
        self.converter: Pictures | Embedded
        if embed is None:
            known = converter if isinstance(converter, Pictures) else None
            mean, std = (known.mean, known.std) if known else measured(self.pools["train"])
            self.converter = Pictures(image_size, channels, form.crop, mean, std)
            inputs: tuple[int, ...] = (channels, image_size, image_size)
            facts = Facts(features=Colours(self.converter)) if channels == 3 else Facts()
        else:
            self.converter = self._embed(form, embed, embed_views, device, converter)
            inputs, facts = (len(self.converter.mean),), Facts()
        self.class_names = tuple(self.classes["test"])
        if verify:
            self.pooled = Pooled(verification.METRICS, _claims, verification.scores)
        if device != "cpu":
            held = {id(pool.rows): pool.rows.to(device) for pool in self.pools.values()}
            self.pools = {part: pool._replace(rows=held[id(pool.rows)]) for part, pool in self.pools.items()}
        self.spec = Spec(
            Numbers(inputs),
            Classes(others.ways),
            Sizes(others.shots.most, others.queries, others.ways, self.sizes[True].ways, len(self.classes["train"])),
            metrics=(ACCURACY,),
            facts=facts,
        )

    def _embed(
        self, form: Pictures, embed: str, views: int, device: str, known: Pictures | Embedded | None
    ) -> Embedded:
        """Replace the pixels of all pools by standardised features, and return the converter of what users have.

        It is the one that is ``known``, or fitted to training pictures.
        """
        stores = {id(pool.rows): pool for pool in self.pools.values()}
        found = {
            key: cached_features(embed, "pictures", pool.rows, f"{form} {pool.content}", device, views)
            for key, pool in stores.items()
        }
        train = self.pools["train"]
        own = known if isinstance(known, Embedded) else None
        converter = own or fitted(form, embed, found[id(train.rows)][train.order], views)
        ready = {key: converter.standardised(z) for key, z in found.items()}
        self.pools = {part: pool._replace(rows=ready[id(pool.rows)]) for part, pool in self.pools.items()}
        return converter

    def sample(self, split: Split, count: int, generator: torch.Generator) -> Task:
        """Draw ``count`` tasks; leaves ``[count, pictures, ...]``, and ``class`` as well for training tasks."""
        pool = self.pools[split]

        def inputs(examples: Tensor) -> Tensor:
            pixels = pool.rows[pool.order[examples].to(self.device)]
            if isinstance(self.converter, Embedded):
                return pixels
            if split == "train" and self.augment:
                pixels = augmented(pixels.flatten(0, 1), self.augment, generator).reshape(pixels.shape)
            return self.converter.normalised(pixels)

        return draw_tasks(pool.cells, self.sizes[split == "train"], count, generator, inputs, split == "train")


def _claims(predict: Predict, task: Task) -> Tensor:
    return verification.claims(predict(task.query["x"]), task.query)


def _has_one_group(pattern: str | None) -> bool:
    """Whether there is no pattern, or one with a group."""
    try:
        return pattern is None or re.compile(pattern).groups == 1
    except re.error:
        return False


def pools_of(
    source: Path, elsewhere: Path | None, class_of: str | None, form: Pictures, wanted: Wanted
) -> tuple[list[str], dict[str, Pool], dict[str, list[str]], str]:
    """Return the name of the data, the pictures and the classes of each split, and a hash of the split's content.

    Args:
        source: the data set.
        elsewhere: a data set whose classes are all test classes; None: those of ``source`` are split.
        class_of: see `Images`.
        form: how pictures are decoded.
        wanted: how the data are split.
    """
    own, store = _read(source, class_of, form)
    other, other_store = (None, None) if elsewhere is None else _read(elsewhere, class_of, form)
    copied = frozenset(other_store.digests) if other_store else frozenset()
    rows, split_name = splits.by_class(
        own,
        own.rows_of(wanted.smallest, copied),
        *(wanted.split, wanted.seed, wanted.ways, wanted.lists),
        testing=other is None,
    )
    stores, name = dict.fromkeys(rows, store), [own.name, split_name]
    if other is not None and other_store is not None:
        rows["test"], stores["test"] = other.rows_of(wanted.smallest), other_store
        known = {plain(label) for part in ("train", "val") for label in rows[part]}
        if alike := [label for label in rows["test"] if plain(label) in known]:
            log.warning(
                "%s: test classes have names of training classes of %s: %s. If they are the same, they are no new "
                "classes.",
                *(other.name, own.name, splits.listed(alike)),
            )
        name.append(f"test={other.name}")
    content, pools, classes = hashlib.sha256(), {}, {}
    for part, by_label in rows.items():
        order, cells, classes[part] = ordered(by_label)
        whole = hashlib.sha256(b"".join(stores[part].digests)).hexdigest()
        pools[part] = Pool(stores[part].rows, order, cells, whole)
        content.update(f"{part} {cells.size[0].tolist()}".encode())
        content.update(b"".join(stores[part].digests[row] for row in order.tolist()))
    return name, pools, classes, content.hexdigest()[:6]


def _read(source: Path, class_of: str | None, form: Pictures) -> tuple[splits.Examples, Store]:
    """Return the pictures of a data set with their labels, decoded."""
    is_index = source.suffix.lower() in (".csv", ".tsv")
    with Files(source.parent if is_index else source) as files:
        pictures = found_in(files, source if is_index else None, class_of)
        names = [picture.name for picture in pictures]
        shape = (form.channels, form.size, form.size)
        store = stored(
            "images",
            f"{files.stamp(names)} {form.key}",
            len(names),
            shape,
            lambda: decoded(files, pictures, form),
            f"Reading {len(names)} pictures of {source}, once.",
        )
    labels, parts = [picture.label for picture in pictures], [picture.split for picture in pictures]
    return splits.Examples(source.stem if is_index else source.name, "pictures", labels, parts, store.digests), store
