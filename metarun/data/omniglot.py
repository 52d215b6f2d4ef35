"""The Omniglot data set, as published.

``data_dir/omniglot`` holds ``images_background.zip`` and ``images_evaluation.zip`` of
https://github.com/brendenlake/omniglot (folder ``python``), or the folders unpacked from them, with entries
``images_background/<alphabet>/<characterNN>/<drawing>.png``: 1,623 characters with 20 drawings each, of 105×105
1-bit pixels. If they exist, ``splits_vinyals/{train,val,test}.txt`` assign characters to the splits of Vinyals et al.
2016 (https://arxiv.org/abs/1606.04080), in lines ``<alphabet>/<characterNN>/rotNNN``.
"""

import hashlib
import http.client
import io
import logging
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from metarun.data.cache import cached
from metarun.data.files import Files
from metarun.errors import UserError
from metarun.system.files import atomic_write

log = logging.getLogger(__name__)

UPSTREAM = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python/"
MD5 = {
    "images_background": "68d2efa1b9178cc56df9314c21c6e718",
    "images_evaluation": "6b91aef0f799c5bb55b94e3f2daec811",
}
CHARACTERS, DRAWINGS = 1623, 20
RANDOM_SPLIT = {"train": 1100, "val": 100, "test": 423}
RANDOM_SPLIT_SEED = 1623
HOW_TO_GET_IT = (
    "set task.download=true, put images_background.zip and images_evaluation.zip from "
    "https://github.com/brendenlake/omniglot there, or choose task.dataset=procedural"
)


def _sources(folder: Path) -> list[Path]:
    """For each half of the data set, its unpacked folder or else its zip, if either exists."""
    places = [(folder / half, folder / f"{half}.zip") for half in MD5]
    return [path for pair in places if (path := next((p for p in pair if p.exists()), None))]


def is_there(data_dir: str) -> bool:
    """Whether both halves of the data set are in ``data_dir/omniglot``."""
    return len(_sources(Path(data_dir) / "omniglot")) == len(MD5)


def download(data_dir: str, upstream: str = UPSTREAM) -> None:
    """Fetch the halves that are missing, check their md5 sums, and put them in place.

    Raises:
        UserError: the download failed or its checksum is wrong; no partial file remains.
    """
    folder = Path(data_dir) / "omniglot"
    for half, md5 in MD5.items():
        if (folder / half).exists() or (folder / f"{half}.zip").exists():
            continue
        url = f"{upstream}{half}.zip"
        log.info("Fetching %s", url)
        try:
            with urllib.request.urlopen(url, timeout=60) as response:
                content = response.read()
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            raise UserError(
                f"{url} could not be fetched ({error}); check the network, or put the file into {folder} yourself."
            ) from error
        if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
            raise UserError(f"{url} arrived with a wrong md5 sum and was deleted; try again later.")
        with atomic_write(folder / f"{half}.zip") as file:
            file.write(content)


def _entries(source: Path) -> Iterator[tuple[str, bytes]]:
    """The path and the content of every PNG in an unpacked folder or a zip."""
    with Files(source, f"delete it, then {HOW_TO_GET_IT}") as files:
        for name in files.names():
            if name.endswith(".png"):
                yield name, files.read(name)


def _read(folder: Path, size: int) -> dict[str, Tensor]:
    """Character ``alphabet/characterNN`` → uint8 ``[drawings, size, size]``, ink 255 on 0."""
    drawings: dict[str, list[Tensor]] = defaultdict(list)
    for source in _sources(folder):
        for name, content in _entries(source):
            try:
                # 1-bit images must become 8-bit before resizing, or PIL resizes by nearest neighbour.
                image = Image.open(io.BytesIO(content)).convert("L")
            except (UnidentifiedImageError, OSError, SyntaxError) as error:
                raise UserError(f"{source}: {name} is not a readable image; {HOW_TO_GET_IT}.") from error
            if image.size != (size, size):
                image = image.resize((size, size), Image.Resampling.LANCZOS)
            character = "/".join(PurePosixPath(name).parts[-3:-1])
            drawings[character].append(torch.from_numpy(255 - np.asarray(image)))
    wrong = [name for name, images in drawings.items() if len(images) != DRAWINGS]
    if wrong or not drawings:
        found = f"{wrong[0]} has {len(drawings[wrong[0]])} drawings" if wrong else "there is no image"
        raise UserError(
            f"{folder} is not the whole data set: {found}, where every character has {DRAWINGS}; {HOW_TO_GET_IT}."
        )
    return {name: torch.stack(images) for name, images in sorted(drawings.items())}


def _fingerprint(folder: Path) -> str:
    """A cache key that changes when a zip changes; unpacked folders are not cached."""
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in _sources(folder)]
    return f"{folder.resolve()} {stats}"


def _vinyals_split(folder: Path, names: list[str]) -> dict[str, list[str]]:
    position = set(names)
    split = {}
    for part in ("train", "val", "test"):
        path = folder / f"{part}.txt"
        try:
            lines = path.read_text().split()
        except OSError as error:
            raise UserError(
                f"task.split=vinyals needs {path} ({error.strerror}); put the split files there, or choose "
                "task.split=random."
            ) from error
        split[part] = sorted({line.rsplit("/rot", 1)[0] for line in lines})
        unknown = [name for name in split[part] if name not in position]
        if unknown:
            raise UserError(f"{path} names {unknown[0]}, which is not in the data set; put the published file there.")
    return split


def characters(data_dir: str, size: int, split: Literal["auto", "vinyals", "random"]) -> tuple[dict[str, Tensor], str]:
    """Images of each split as uint8 ``[characters, drawings, size, size]``, and the name of the split.

    Raises:
        UserError: the data are missing, damaged or incomplete.
    """
    folder = Path(data_dir) / "omniglot"
    missing = len(MD5) - len(_sources(folder))
    if missing:
        raise UserError(f"Omniglot is not in {folder} ({missing} of 2 parts missing): {HOW_TO_GET_IT}.")
    if any(path.is_dir() for path in _sources(folder)):
        images = _read(folder, size)
    else:
        images = cached("omniglot", f"{_fingerprint(folder)} {size}", lambda: _read(folder, size))
    names = sorted(images)
    if len(names) != CHARACTERS:
        raise UserError(f"{folder} holds {len(names)} characters where the data set has {CHARACTERS}; {HOW_TO_GET_IT}.")
    if split == "auto":
        split = "vinyals" if (folder / "splits_vinyals").is_dir() else "random"
        if split == "random":
            log.info("No %s, so characters are split at random (1100/100/423).", folder / "splits_vinyals")
    if split == "vinyals":
        parts = _vinyals_split(folder / "splits_vinyals", names)
    else:
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(RANDOM_SPLIT_SEED)).tolist()
        shuffled = iter(names[i] for i in order)
        parts = {part: [name for _, name in zip(range(n), shuffled)] for part, n in RANDOM_SPLIT.items()}  # noqa: B905
    return {part: torch.stack([images[name] for name in chosen]) for part, chosen in parts.items()}, split
