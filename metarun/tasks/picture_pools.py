"""Pools of pictures by class, with new classes for testing: Omniglot, emoji, metarun's characters, or your own."""

import hashlib
import logging
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from metarun.data import omniglot, splits
from metarun.data.emoji import Emoji, emoji
from metarun.data.files import found
from metarun.data.pictures import Pictures
from metarun.data.procedural import procedural_characters
from metarun.errors import require
from metarun.tasks.few_shot import cells_of, digest_of, units_of
from metarun.tasks.images import Pool, Wanted, pools_of

log = logging.getLogger(__name__)

Dataset = Literal["auto", "omniglot", "procedural", "emoji"]
SMALLEST, LARGEST = 8, 128


class Asked(NamedTuple):
    """Which pictures a family wants; see `metarun.tasks.completion.Completion` for the keys."""

    dataset: Dataset
    path: str | None
    split: str
    split_seed: int
    class_of: str | None
    train_design: str | None
    image_size: int
    channels: int | None
    smallest: int
    """Number of pictures of the smallest class that is of use."""
    data_dir: str


class Pools(NamedTuple):
    """The pictures of every split."""

    name: str
    """Where they come from, and how they are split."""
    of_split: dict[str, Pool]
    """``train``, ``val`` and ``test``; the groups of their cells are designs."""
    channels: int
    units: Mapping[str, frozenset[str]]
    """The names of the classes of every split, with their source."""


def picture_pools(asked: Asked) -> Pools:
    """Return the pictures that were asked for.

    Raises:
        UserError: data are missing or broken, or a split has no class.
        ValueError: a key has a value that these data do not allow.
    """
    require(
        SMALLEST <= asked.image_size <= LARGEST,
        f"image_size must be {SMALLEST} to {LARGEST}, not {asked.image_size}",
    )
    require(asked.channels in (None, 1, 3), f"channels must be 1 (grey) or 3 (RGB), not {asked.channels}")
    dataset: str = asked.dataset
    if asked.path is None and dataset == "auto":
        dataset = "omniglot" if omniglot.is_there(asked.data_dir) else "procedural"
        if dataset == "procedural":
            log.info("No Omniglot in %s/omniglot, so the pictures are procedural characters.", asked.data_dir)
    is_emoji = asked.path is None and dataset == "emoji"
    require(
        is_emoji or asked.train_design is None,
        "train_design is for dataset=emoji, which has several designs; leave it out",
    )
    if asked.path is not None:
        return _of_path(asked, asked.path)
    if is_emoji:
        return _of_emoji(asked)
    require(asked.channels in (None, 1), f"the characters of {dataset} are grey; set channels=1 or leave it out")
    if dataset == "omniglot":
        require(
            asked.split in ("auto", "vinyals", "random"),
            f"split must be auto, vinyals or random for omniglot, not {asked.split}",
        )
        characters, name = omniglot.characters(asked.data_dir, asked.image_size, asked.split)  # type: ignore[arg-type]
    else:
        characters, name = procedural_characters(asked.image_size), "fixed"
    pools = {split: _of_characters(drawings) for split, drawings in characters.items()}
    units = {split: units_of(dataset, map(digest_of, drawings)) for split, drawings in characters.items()}
    return Pools(f"{dataset}:{name}:{asked.image_size}px", pools, 1, units)


def _of_characters(drawings: Tensor) -> Pool:
    """Return a pool of ``drawings [classes, drawings, size, size]``."""
    classes, count = drawings.shape[:2]
    rows = drawings.flatten(0, 1)[:, None]
    return Pool(rows, torch.arange(len(rows)), cells_of(torch.full((1, classes), count)), "")


def _of_path(asked: Asked, path: str) -> Pools:
    """Return the user's own pictures, which are read as those of ``task=images``."""
    channels = asked.channels or 3
    lists = None if asked.split in ("auto", "given", "random") else found(asked.split, asked.data_dir, "task.split")
    wanted = Wanted(asked.split, asked.split_seed, lists, 1, asked.smallest)
    form = Pictures(asked.image_size, channels)
    place = found(path, asked.data_dir)
    name, pools, classes, digests = pools_of(place, None, asked.class_of, form, wanted)
    units = {split: units_of(place.resolve(), own) for split, own in classes.items()}
    return Pools(":".join([*name, f"{asked.image_size}px", *_grey(channels), digests]), pools, channels, units)


def _grey(channels: int) -> list[str]:
    """Return what the number of channels adds to the name of a data set in colour."""
    return ["grey"] if channels == 1 else []


def _of_emoji(asked: Asked) -> Pools:
    """Return emoji by subcategory, and designs as groups."""
    channels = asked.channels or 3
    place = found("emoji", asked.data_dir, "data_dir")
    every = emoji(place, Pictures(asked.image_size, channels))
    designs = sorted(set(every.designs))
    design = asked.train_design
    require(
        design is None or (design in designs and len(designs) > 1),
        f"train_design must be one of the designs {', '.join(designs)} and leave another for testing, not {design}",
    )
    examples = splits.Examples("emoji", "pictures", every.labels, [None] * len(every.labels), every.store.digests)
    rows = examples.rows_of(asked.smallest)
    if asked.split in ("auto", "random"):
        rows_by_split, name = splits.by_class(examples, rows, "random", asked.split_seed, 1)
    else:
        lists = found(asked.split, asked.data_dir, "task.split")
        rows_by_split, name = splits.by_class(examples, rows, "auto", asked.split_seed, 1, lists)
    others = [other for other in designs if other != design]
    pools, content = {}, hashlib.sha256()
    for split, by_label in rows_by_split.items():
        own = designs if design is None else [design] if split == "train" else others
        pools[split] = _by_design(every, by_label, own)
        content.update(f"{split} {pools[split].cells.size.tolist()}".encode())
        content.update(b"".join(every.store.digests[row] for row in pools[split].order.tolist()))
    held_out = [] if design is None else [f"train_design={design}"]
    parts = ["emoji", name, *held_out, f"{asked.image_size}px", *_grey(channels), content.hexdigest()[:6]]
    units = {split: units_of(place.resolve(), own) for split, own in rows_by_split.items()}
    return Pools(":".join(parts), pools, channels, units)


def _by_design(every: Emoji, by_label: dict[str, list[int]], designs: list[str]) -> Pool:
    """Return the pictures of some classes in some designs, each design a group."""
    cells = [
        [[row for row in rows if every.designs[row] == design] for rows in by_label.values()] for design in designs
    ]
    order = torch.tensor([row for group in cells for rows in group for row in rows], dtype=torch.long)
    sizes = torch.tensor([[len(rows) for rows in group] for group in cells])
    return Pool(every.store.rows, order, cells_of(sizes), "")


def pixels_of(pool: Pool, examples: Tensor, device: str) -> Tensor:
    """Return pictures ``[..., channels, size, size]`` with white as 1, given their places in the pool ``[...]``."""
    white = torch.full((), 255, dtype=torch.get_default_dtype(), device=device)
    return pool.rows[pool.order[examples]].to(device, torch.get_default_dtype()) / white
