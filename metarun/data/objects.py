"""Pictures with objects in boxes as their owner has them."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metarun.contracts import Examples, Predict, Request, Tree
from metarun.data.boxes import SLACK, annotated
from metarun.data.files import Files
from metarun.data.pictures import Pictures, listed, opened, read_pictures
from metarun.data.portable import portable
from metarun.errors import require
from metarun.targets.boxes import GEOMETRY, NEVER, Boxes
from metarun.targets.detections import hits, mean_over_classes, overlap, precision_and_recall

LEAST_SCORE = 0.05
"""Boxes with a smaller chance are no answers."""
ROTATED = (5, 6, 7, 8)
"""Orientations in a file for which width and height change places (EXIF 2.3, tag 0x0112)."""


class Detected(NamedTuple):
    """An object that was found, in pixels of the user's picture."""

    label: Hashable
    left: float
    top: float
    right: float
    bottom: float
    score: float
    """Chance from 0 to 1."""


def shape_of(picture: Any) -> tuple[int, int]:
    """Return width and height of a picture, upright.

    Raises:
        ValueError: it cannot be read.
    """
    if isinstance(picture, str | Path):
        picture = Path(picture).read_bytes()
    if isinstance(picture, bytes):
        picture = opened(picture)
    width, height = picture.size
    return (height, width) if picture.getexif().get(0x0112) in ROTATED else (width, height)


def boxes_of(given: Any, shape: tuple[int, int], number: int) -> list[tuple[Hashable, tuple[float, ...]]]:
    """Return the label and the corners of each box of a picture.

    Raises:
        ValueError: there is something else, a box without an area, or one that leaves the picture.
    """
    found, (width, height) = list[tuple[Hashable, tuple[float, ...]]](), shape
    require(not isinstance(given, str | Mapping), f"y must hold a list of boxes for picture {number}, perhaps empty")
    for one in given:
        if isinstance(one, Mapping):
            one = (one.get("label"), *one.get("box", ()))
        whole = isinstance(one, Sequence) and len(one) >= 5 and all(isinstance(v, Real) for v in one[1:5])
        require(
            whole and not isinstance(one, str) and isinstance(one[0], Hashable) and one[0] is not None,
            f"y must hold boxes as (label, left, top, right, bottom), and picture {number} has {one!r}",
        )
        label, (left, top, right, bottom) = one[0], one[1:5]
        inside = min(left, top) >= -SLACK and right <= width + SLACK and bottom <= height + SLACK
        require(
            left < right and top < bottom and inside,
            f"the box {one!r} of picture {number} has no area, or leaves its {width} × {height} pixels; correct it",
        )
        found.append((label, (max(left, 0), max(top, 0), min(right, width), min(bottom, height))))
    return found


def boxes_found(target: Boxes, predict: Predict, data: Tree) -> Tensor:
    """Return corners, class and score of the boxes found ``[pictures, found, 6]``, without classes the task lacks."""
    own = data["own"] > 0
    known = torch.cat([own, own.new_ones(len(own), 1 + GEOMETRY)], -1)
    found = target.found(predict(data["x"]).masked_fill(~known[:, None], NEVER))
    return torch.cat([found.boxes, found.label[..., None].to(found.boxes), found.score[..., None]], -1)


class InPictures:
    """Objects in pictures of one task, and those in further pictures (`metarun.contracts.UserTask`)."""

    def __init__(self, form: "Objects", x: Any, y: Any) -> None:
        self.form, pictures = form, listed_pictures(x)
        require(y is not None, "y must hold a list of boxes for each picture, and is None")
        given = list(y)
        require(
            len(pictures) == len(given),
            f"x has {len(pictures)} pictures and y has {len(given)} lists of boxes; give one for each",
        )
        self.x = form.pictures.inputs(pictures)
        self.shapes = [shape_of(one) for one in pictures]
        self.boxes = [boxes_of(*pair, i) for i, pair in enumerate(zip(given, self.shapes, strict=True), 1)]
        self.labels = sorted({label for own in self.boxes for label, _ in own}, key=str)
        ways = form.target.ways
        require(
            1 <= len(self.labels) <= ways,
            f"y must hold boxes of 1 to {ways} classes, the number that the learner was trained with, not "
            f"{len(self.labels)}; train with another task.ways",
        )

    @cached_property
    def support(self) -> Tree:
        """The support set ``x`` and ``y`` (`metarun.targets.boxes.Boxes`)."""
        target = self.form.target
        most = max(map(len, self.boxes))
        boxes, label = torch.zeros(len(self.x), most, 4), torch.zeros(len(self.x), most, target.ways)
        for row, (own, (width, height)) in enumerate(zip(self.boxes, self.shapes, strict=True)):
            scale = torch.tensor([target.size / width, target.size / height] * 2)
            for place, (name, corners) in enumerate(own):
                boxes[row, place] = torch.tensor(corners) * scale
                label[row, place, self.labels.index(name)] = 1
        dtype = torch.get_default_dtype()
        return {"x": self.x, "y": target.drawn(boxes.to(dtype), label.to(dtype))}

    def ask(self, x: Any) -> Request:
        """Return the request for the objects in pictures, as a list of `Detected` by falling score for each."""
        pictures, target = listed_pictures(x), self.form.target
        shapes = [shape_of(one) for one in pictures]
        own = (torch.arange(target.ways) < len(self.labels)).to(self.x).expand(len(pictures), -1)

        def answers(made: Tensor) -> list[list[Detected]]:
            found = []
            for rows, (width, height) in zip(made.tolist(), shapes, strict=True):
                across, down = width / target.size, height / target.size
                found.append(
                    [
                        Detected(
                            self.labels[int(kind)], left * across, top * down, right * across, bottom * down, score
                        )
                        for left, top, right, bottom, kind, score in rows
                        if score >= LEAST_SCORE
                    ]
                )
            return found

        return Request({"x": self.form.pictures.inputs(pictures), "own": own}, partial(boxes_found, target), answers)

    def rows(self, answer: Sequence[Detected], truth: Any) -> list[dict[str, Any]]:
        """Return a row of a table for each object."""
        return [one._asdict() for one in answer]

    def compared(self, answers: Sequence[Sequence[Detected]], y: Sequence[Any]) -> str:
        """Return the average precision at an overlap of half, as COCO computes it, over the classes of the truth."""
        true = [[(one[0], [float(v) for v in one[1:5]]) for one in own] for own in y]
        labels = sorted({label for own in true for label, _ in own}, key=str)
        most, most_found = (max((len(own) for own in rows), default=0) or 1 for rows in (true, answers))
        boxes, found = torch.zeros(len(true), most, 4), torch.zeros(len(true), most_found, 4)
        kind, kind_found = torch.full((len(true), most), -1), torch.full((len(true), most_found), -2)
        score = torch.full((len(true), most_found), -1.0)
        for row, (own, said) in enumerate(zip(true, answers, strict=True)):
            for place, (label, corners) in enumerate(own):
                boxes[row, place], kind[row, place] = torch.tensor(corners), labels.index(label)
            for place, one in enumerate(said):
                found[row, place], score[row, place] = torch.tensor(one[1:5]), one.score
                kind_found[row, place] = labels.index(one.label) if one.label in labels else -2
        same = kind_found[:, :, None] == kind[:, None]
        hit = hits(torch.where(same, overlap(found, boxes), -1.0), (0.5,))
        classes = torch.arange(len(labels))
        counted = kind_found.flatten() == classes[:, None]
        positives = (kind.flatten() == classes[:, None]).sum(1)
        precision, _ = precision_and_recall(score.flatten(), hit.flatten(1), counted, positives)
        return f"AP50 {100 * float(mean_over_classes(precision, positives)):.2f} % with their own boxes"


def listed_pictures(x: Any) -> list[Any]:
    """Return pictures as a list.

    Raises:
        ValueError: there is none.
    """
    found = listed(x)
    require(len(found) > 0, "x must hold at least one picture")
    return found


@portable
@dataclass(frozen=True)
class Objects:
    """Pictures with objects in boxes as their owner has them (`metarun.contracts.TaskConverter`)."""

    pictures: Pictures
    target: Boxes
    without_area: str = "error"
    """Whether boxes without an area in files are an ``error``, or are left out (``drop``)."""

    def task(self, x: Any, y: Any) -> InPictures:
        """Return a user's task.

        Args:
            x: pictures, as for `metarun.data.pictures.Pictures.inputs`.
            y: for each picture a list of boxes: (label, left, top, right, bottom) in pixels of that picture, or a
                dictionary with ``label`` and ``box``.

        Raises:
            ValueError: they are something else.
            UserError: a picture cannot be read.
        """
        return InPictures(self, x, y)

    def read(self, path: Path) -> Examples:
        """Read pictures annotated in Pascal VOC or COCO, or a folder of pictures without boxes.

        Raises:
            ValueError: there is no picture.
            UserError: an annotation is broken; the sentence names the file.
        """
        if path.is_dir() and not any(name.lower().endswith((".xml", ".json")) for name in Files(path).names()):
            found = read_pictures(path)
            return Examples(found.x, None, found.names)
        if path.is_file() and path.suffix.lower() not in (".json", ".zip"):
            return read_pictures(path)
        pictures, files = annotated(path, self.without_area)
        with files:
            x = [files.read(one.name) for one in pictures]
        return Examples(x, [one.boxes for one in pictures], [one.name for one in pictures])
