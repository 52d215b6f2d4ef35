"""Pictures as the tensors that a model takes, and where a folder, an archive or an index has them."""

import io
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from metarun.contracts import Examples
from metarun.data.files import PARTS, Files, read_file, split_in, table, visible
from metarun.data.portable import portable
from metarun.errors import UserError, require

log = logging.getLogger(__name__)

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
DECODER = 2
"""Changes whenever the same file gives other pixels, so that none are read from the cache that were decoded before."""
MOST_PIXELS = 2**26
"""Pixels of the largest picture that is decoded; its header is read first."""
COLUMNS = {
    "path": ("path", "filename", "file", "image"),
    "class": ("class", "label"),
    "split": ("split",),
}
"""The columns of an index, and other names that they may have."""


def opened(content: bytes) -> Image.Image:
    """Return a picture whose header alone is decoded.

    Raises:
        ValueError: it is not a picture, or an absurdly large one.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ValueError(f"it has more than {MOST_PIXELS} pixels") from error
    except Exception as error:  # a broken picture raises what its format's reader happens to meet
        raise ValueError("it is not a picture, or its header is broken") from error
    if image.width * image.height > MOST_PIXELS:
        raise ValueError(f"it has {image.width} × {image.height} pixels, and at most {MOST_PIXELS} are decoded")
    return image


def upright(image: Image.Image, channels: int) -> Image.Image:
    """Return a picture in grey (1 channel) or in RGB (3 channels) of 8 bits, turned as its camera noted.

    What is transparent becomes white.

    Raises:
        ValueError: its pixels are numbers of which nothing says which one is white.
    """
    mode = "L" if channels == 1 else "RGB"
    # Pillow would cut these off at 255. It scales PGM (and, in older versions, reads PNG) of 16 bits to numbers of 32.
    of_16_bits = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PPM", "PNG"))
    require(
        of_16_bits or image.mode not in ("I", "F"),
        f"its pixels are numbers of 32 bits (mode {image.mode}); scale them to 8 or 16 bits",
    )
    image = ImageOps.exif_transpose(image)
    if of_16_bits:
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert(mode)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


@portable
@dataclass(frozen=True)
class Pictures:
    """Turns pictures into the tensors that a model takes (`metarun.contracts.Converter`)."""

    size: int
    """Edge in pixels to which pictures are resized, whatever their shape."""
    channels: int
    """1 for grey, 3 for red, green and blue."""
    crop: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    """The part that is kept: left, top, right and bottom as shares of width and height."""
    mean: tuple[float, ...] = ()
    """Mean of each channel of the training pictures, with white as 1; empty: 0."""
    std: tuple[float, ...] = ()
    """Standard deviation of each channel; empty: 1."""

    @property
    def key(self) -> str:
        """All that determines the pixels of a given file, for a cache."""
        return f"{self} {DECODER}"

    def pixels(self, picture: bytes | Image.Image) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return a picture, or the content of its file, resized: ``[channels, size, size]`` of 0 to 255.

        Raises:
            ValueError: it cannot be decoded; the message says why.
        """
        image = opened(picture) if isinstance(picture, bytes) else picture
        left, top, right, bottom = self.crop
        try:
            if image is not picture:
                # A JPEG is decoded at a fraction of its size where that still leaves four times the pixels; a user's
                # own image would stay small.
                image.draft(None, (round(2 * self.size / (right - left)), round(2 * self.size / (bottom - top))))
            image = upright(image, self.channels)
        except Exception as error:
            raise ValueError(f"it cannot be decoded ({error})") from error
        box = (left * image.width, top * image.height, right * image.width, bottom * image.height)
        if image.size != (self.size, self.size) or self.crop != (0.0, 0.0, 1.0, 1.0):
            image = image.resize((self.size, self.size), Image.Resampling.LANCZOS, box)
        return np.asarray(image).reshape(self.size, self.size, self.channels).transpose(2, 0, 1)

    def normalised(self, pixels: Tensor) -> Tensor:
        """Return pixels of 0 to 255 ``[..., channels, size, size]`` in the default dtype, normalised per channel."""
        mean, scale = (
            torch.tensor(values, device=pixels.device)[:, None, None]
            for values in (
                [255 * value for value in self.mean or [0.0] * self.channels],
                [1 / (255 * value) for value in self.std or [1.0] * self.channels],
            )
        )
        # Subtracting turns bytes into numbers. A GPU multiplies with a tensor as a CPU does, unlike dividing.
        return pixels.sub(mean).mul_(scale)

    def shares(self, x: Tensor) -> Tensor:
        """Return the pixels of normalised pictures, with white as 1."""
        mean, std = (x.new_tensor(values)[:, None, None] for values in (self.mean or [0.0], self.std or [1.0]))
        return x * std + mean

    def read(self, path: Path) -> Examples:
        """Read a picture, a folder of pictures, or a folder with one folder of pictures per class.

        Raises:
            ValueError: there is no picture.
        """
        return read_pictures(path)

    def inputs(self, x: Any) -> Tensor:
        """Return pictures, or the files that hold them, as ``[pictures, channels, size, size]``.

        Args:
            x: paths, the contents of files, images of Pillow, or arrays of bytes, ``[height, width]`` or
                ``[height, width, 3]``; or a single one of these.

        Raises:
            UserError: a picture cannot be read; the message says which and why.
        """
        rows = []
        for number, picture in enumerate(listed(x), 1):
            name = str(picture) if isinstance(picture, str | Path) else f"Picture {number}"
            try:
                content = Path(picture).read_bytes() if isinstance(picture, str | Path) else picture
                rows.append(torch.from_numpy(self.pixels(content).copy()))
            except OSError as error:
                raise UserError(f"{name} cannot be read ({error.strerror}); choose another file.") from error
            except ValueError as error:
                raise UserError(f"{name} cannot be used: {error}; choose another picture.") from error
        if not rows:
            raise UserError("There is no picture; give at least one.")
        return self.normalised(torch.stack(rows))


class Found(NamedTuple):
    """A picture among `Files`."""

    name: str
    label: str
    split: str | None
    line: str = ""
    """The line of an index that names it, for messages."""


def image_of(array: np.ndarray[Any, Any], number: int) -> Image.Image:
    """Return an array of bytes as a picture.

    Raises:
        UserError: it has another shape or type.
    """
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
        raise UserError(
            f"Picture {number} must be an array [height, width] or [height, width, 3] of bytes (numpy.uint8), not "
            f"{list(array.shape)} of {array.dtype}."
        )
    return Image.fromarray(array)


def listed(x: Any) -> list[Any]:
    """Return a user's pictures as a list, arrays among them as pictures; ``x`` may be a single one."""
    single = isinstance(x, str | Path | bytes | Image.Image)
    if isinstance(x, np.ndarray | Tensor):
        # Its rows must not pass for pictures.
        single = x.ndim == 2 or (x.ndim == 3 and x.shape[2] == 3)
    return [
        image_of(np.asarray(one), number) if isinstance(one, np.ndarray | Tensor) else one
        for number, one in enumerate([x] if single else x, 1)
    ]


def is_picture(name: str) -> bool:
    """Whether the name of a file ends like that of a picture."""
    return name.lower().endswith(ENDINGS)


def pictures_in(folder: Path) -> list[Path]:
    """Return the pictures directly in a folder, in the order of their names."""
    return [path for path in visible(folder) if is_picture(path.name)]


def read_pictures(path: Path) -> Examples:
    """Read a picture, a folder of pictures, or a folder with one folder of pictures per class, as paths.

    Raises:
        ValueError: there is no picture.
    """
    if path.is_file():
        return Examples([path], None, [path.name])
    require(path.is_dir(), f"there is no {path}; name a picture or a folder of pictures")
    loose = pictures_in(path)
    if loose:
        return Examples(loose, None, [found.name for found in loose])
    of_class = [(found, folder.name) for folder in visible(path) if folder.is_dir() for found in pictures_in(folder)]
    require(
        len(of_class) > 0,
        f"{path} has neither pictures ({', '.join(ENDINGS)}) nor folders with pictures, one per class",
    )
    found, labels = [one for one, _ in of_class], [label for _, label in of_class]
    return Examples(found, labels, [str(one.relative_to(path)) for one in found])


def common_folder(names: Sequence[str]) -> str:
    """Return the folder below which all files lie and in which at least one of several folders or files lies."""
    parts = [PurePosixPath(name).parts[:-1] for name in names]
    shared = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return "".join(f"{part}/" for part in shared)


def in_folders(names: Sequence[str], source: str, class_of: str | None) -> list[Found]:
    """Return pictures whose class is the folder that holds them, below folders named after splits if there are some.

    Args:
        names: paths of pictures.
        source: the data set, for messages.
        class_of: a pattern, searched in the path, whose group is the class instead.

    Raises:
        UserError: a picture has no class.
    """
    base = common_folder(names)
    if base and all("/" not in name.removeprefix(base) for name in names):
        # A single class.
        base = common_folder([base.rstrip("/")])
    below = {name: name.removeprefix(base) for name in names}
    tops = {path.partition("/")[0].lower() for path in below.values() if "/" in path}
    are_splits = len(tops) > 1 and tops <= PARTS.keys() and all("/" in path for path in below.values())
    # Otherwise train/cat and test/cat would be two classes.
    splits = sorted(
        {top for top, *rest in (path.split("/") for path in below.values()) if len(rest) > 1 and top.lower() in PARTS}
    )
    others = [path.partition("/")[0] for path in below.values() if path.partition("/")[0].lower() not in PARTS]
    if class_of is None and len(splits) > 1 and others:
        raise UserError(
            f"{source}: the folders {' and '.join(splits)} are splits, and {base}{others[0]} next to them is not; take "
            "it out of the data, or say in task.class_of which part of a path is the class."
        )
    found = []
    for name, path in below.items():
        top, _, rest = path.partition("/")
        split, own = (PARTS[top.lower()], rest) if are_splits else (None, path)
        label = own.rpartition("/")[0]
        if class_of is not None:
            match = re.search(class_of, own)
            label = match[1] if match else ""
        if not label:
            why = "lies in no folder of a class" if class_of is None else f"does not match task.class_of={class_of}"
            raise UserError(f"{source}: {name} {why}; put each picture into the folder of its class, or name an index.")
        found.append(Found(name, label, split))
    return found


def of_index(content: bytes, place: str, folder: str, split: str | None = None) -> list[Found]:
    """Return the pictures that a table with the columns ``path`` and ``class``, and perhaps ``split``, names.

    Args:
        content: the table.
        place: its file, for messages.
        folder: the folder below which the paths lie, with a slash at its end.
        split: the split of all rows where the table belongs to one.
    """
    rows = table(content, place, COLUMNS, optional=("split",))
    return [
        Found(
            folder + row.values["path"],
            row.values["class"],
            split or split_in(row, place),
            f" ({place}, line {row.line})",
        )
        for row in rows
    ]


def found_in(files: Files, index: Path | None, class_of: str | None) -> list[Found]:
    """Return all pictures of a data set with their classes, sorted by name.

    Args:
        files: the folder or archive.
        index: a table in the folder that names the pictures, where the user chose one.
        class_of: see `in_folders`.

    Raises:
        UserError: there is no picture, or the layout is not known.
    """
    if index is not None:
        return sorted(of_index(read_file(index), str(index), ""))
    names = files.names()
    pictures = [name for name in names if is_picture(name)]
    if not pictures:
        raise UserError(f"{files.source} holds no picture ({', '.join(ENDINGS)}); set task.path to where they are.")
    base = common_folder(pictures)
    folders = {
        f"{parent}/" if str(parent) != "." else "" for parent in (PurePosixPath(base), *PurePosixPath(base).parents)
    }
    known = set(names)
    for folder in sorted(folders, key=len, reverse=True):
        if (own := f"{folder}index.csv") in known:
            return sorted(of_index(files.read(own), str(files.source / own), folder))
        tables = {part: f"{folder}{part}.csv" for part in ("train", "val", "test") if f"{folder}{part}.csv" in known}
        if {"train", "test"} <= tables.keys():
            rows = [
                row
                for part, own in tables.items()
                for row in of_index(files.read(own), str(files.source / own), folder, part)
            ]
            # Published splits lie next to a folder with all pictures.
            inside = f"{folder}images/"
            moved = [row._replace(name=inside + row.name.removeprefix(folder)) for row in rows]
            return sorted(new if new.name in known else row for row, new in zip(rows, moved, strict=True))
    return in_folders(pictures, str(files.source), class_of)


def decoded(files: Files, pictures: Sequence[Found], form: Pictures) -> Iterator[np.ndarray[Any, np.dtype[np.uint8]]]:
    """Yield the pixels of pictures one by one.

    Raises:
        UserError: a picture is missing or broken.
    """
    for picture in pictures:
        try:
            content = files.read(picture.name)
        except UserError as error:
            raise UserError(f"{str(error).removesuffix('.')}{picture.line}.") from error
        try:
            yield form.pixels(content)
        except ValueError as error:
            place = f"{files.source / picture.name}{picture.line}"
            raise UserError(f"{place} cannot be used: {error}; replace it or leave it out.") from error
