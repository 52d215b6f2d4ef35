"""Annotated pictures: boxes in the XML files of Pascal VOC or in a JSON file of COCO."""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from xml.etree import ElementTree

from metarun.data.files import PARTS, Files, read_file
from metarun.data.pictures import is_picture
from metarun.errors import UserError

LARGEST_XML = 2**22
"""Bytes of the largest annotation of one picture."""
SLACK = 1.0
"""Pixels by which a box may leave its picture, since VOC counts pixels from 1."""


class Box(NamedTuple):
    """Where an object of a class is, in pixels of the picture's file."""

    label: str
    left: float
    top: float
    right: float
    bottom: float


class Annotated(NamedTuple):
    """A picture with its boxes."""

    name: str
    """Its path below the source."""
    boxes: tuple[Box, ...]
    place: str
    """The file that annotates it, for messages."""
    split: str | None
    """The split that the data name for it."""
    size: tuple[float, float] | None
    """Width and height that the annotation states."""


def number(value: Any, what: str, place: str) -> float:
    """Return a coordinate.

    Raises:
        UserError: it is no finite number.
    """
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise UserError(f"{place} has {what} {value!r}; write a number of pixels.")
    return found


def checked(box: Box, place: str) -> Box:
    """Return a box that has an area.

    Raises:
        UserError: it has none, or its class has no name.
    """
    if not box.label.strip():
        raise UserError(f"{place} has no class; name it, or delete the box.")
    if not (box.right > box.left and box.bottom > box.top):
        corners = ", ".join(f"{value:g}" for value in box[1:])
        raise UserError(
            f"{place} ({box.label}: {corners}) has no area; correct or delete it, or leave such boxes out with "
            "task.without_area=drop."
        )
    return box


def within(box: Box, size: tuple[float, float], place: str) -> Box:
    """Return a box cut to its picture of width and height ``size``.

    Raises:
        UserError: it leaves the picture by more than a pixel.
    """
    width, height = size
    if min(box.left, box.top) < -SLACK or box.right > width + SLACK or box.bottom > height + SLACK:
        corners = ", ".join(f"{value:g}" for value in box[1:])
        raise UserError(
            f"{place} ({box.label}: {corners}) leaves its picture of {width:g} × {height:g} pixels; correct or delete "
            "it."
        )
    return box._replace(
        left=max(box.left, 0.0), top=max(box.top, 0.0), right=min(box.right, width), bottom=min(box.bottom, height)
    )


def _text(node: ElementTree.Element, path: str, place: str) -> str:
    found = node.findtext(path)
    if found is None or not found.strip():
        raise UserError(f"{place} has no {path}; add it, or delete what lacks it.")
    return found.strip()


def _voc_picture(root: ElementTree.Element, name: str, files: Mapping[str, str], place: str) -> str:
    """Return the path of an annotation's picture, which lies in its folder or in a folder JPEGImages next to that."""
    own = PurePosixPath(name)
    wanted = (root.findtext("filename") or "").strip()
    stems = [PurePosixPath(wanted).stem] if wanted else []
    for folder in (own.parent, own.parent.parent / "JPEGImages", own.parent.parent / "images", own.parent.parent):
        for stem in (*stems, own.stem):
            if (found := files.get(f"{folder / stem}".removeprefix("./"))) is not None:
                return found
    raise UserError(
        f"{place} is of the picture {wanted or own.stem}, which is not there; add it next to the annotation or in a "
        "folder JPEGImages, or delete the annotation."
    )


def voc_annotation(
    content: bytes, name: str, pictures: Mapping[str, str], source: Path, without_area: str, split: str | None
) -> Annotated:
    """Return what an XML file of Pascal VOC says.

    Args:
        content: the file.
        name: its path below ``source``.
        pictures: paths of pictures by their path without ending.
        source: the data set.
        without_area: whether boxes without an area are an ``error``, or ``drop``ped.
        split: the split of the picture.

    Raises:
        UserError: it is damaged, or a box is.
    """
    place = str(source / name)
    if len(content) > LARGEST_XML:
        raise UserError(f"{place} has {len(content)} bytes, and at most {LARGEST_XML} are read; make it smaller.")
    if re.search(rb"<!(DOCTYPE|ENTITY)", content):
        raise UserError(f"{place} declares entities, which annotations need not; delete the declarations.")
    try:
        root = ElementTree.fromstring(content)
    except ElementTree.ParseError as error:
        raise UserError(f"{place} is not whole XML ({error}); get the file again, or delete it.") from error
    if root.tag != "annotation":
        raise UserError(f"{place} has {root.tag} where an annotation of Pascal VOC begins; move the file elsewhere.")
    size = None
    if root.find("size") is not None:
        width, height = (number(_text(root, f"size/{side}", place), side, place) for side in ("width", "height"))
        size = (width, height) if width > 0 and height > 0 else None
    boxes = []
    for index, node in enumerate(root.iter("object"), 1):
        here = f"{place}, object {index}"
        corners = [number(_text(node, f"bndbox/{key}", here), key, here) for key in ("xmin", "ymin", "xmax", "ymax")]
        box = Box((node.findtext("name") or "").strip(), *corners)
        if without_area == "drop" and not (box.right > box.left and box.bottom > box.top):
            continue
        boxes.append(checked(box, here))
    return Annotated(_voc_picture(root, name, pictures, place), tuple(boxes), place, split, size)


def _listed_splits(files: Files, names: Iterable[str]) -> dict[str, str]:
    """Return the split of each picture without its ending, by ``ImageSets/Main/train.txt`` and its kin."""
    found: dict[str, str] = {}
    for name in names:
        path = PurePosixPath(name)
        if path.parts[-3:-1] == ("ImageSets", "Main") and path.suffix == ".txt" and path.stem in PARTS:
            for line in files.read(name).decode("utf-8-sig", "replace").split("\n"):
                if line.split():
                    found[line.split()[0]] = PARTS[path.stem]
    return found


def voc(files: Files, without_area: str) -> list[Annotated]:
    """Return all pictures that XML files below a folder annotate.

    Raises:
        UserError: a file or a box is broken, or two files annotate one picture.
    """
    names = files.names()
    pictures = {name.rpartition(".")[0]: name for name in names if is_picture(name)}
    split = _listed_splits(files, names)
    found, of_picture = [], dict[str, str]()
    for name in names:
        if name.lower().endswith(".xml"):
            own = split.get(PurePosixPath(name).stem)
            one = voc_annotation(files.read(name), name, pictures, files.source, without_area, own)
            if one.name in of_picture:
                raise UserError(
                    f"{one.place} and {of_picture[one.name]} annotate the same picture; delete one of them."
                )
            of_picture[one.name] = one.place
            found.append(one)
    return found


def _entries(held: Mapping[str, Any], key: str, fields: tuple[str, ...], place: str) -> list[dict[str, Any]]:
    """Return a list of a COCO file, whose entries have all ``fields``."""
    entries = held.get(key)
    if not isinstance(entries, list):
        raise UserError(f"{place} has no list {key}, so it is no annotation file of COCO; choose another.")
    for index, entry in enumerate(entries):
        missing = [field for field in fields if not isinstance(entry, dict) or field not in entry]
        if missing:
            what = f"{key}[{index}]" + (f" (id {entry['id']})" if isinstance(entry, dict) and "id" in entry else "")
            raise UserError(f"{place}, {what}, has no {missing[0]}; add it, or delete the entry.")
    return entries


def coco(content: bytes, place: str, folder: str, names: Iterable[str], without_area: str) -> list[Annotated]:
    """Return all pictures of a JSON file of COCO. Regions of crowds, which are no boxes of objects, are left out.

    Args:
        content: the file.
        place: where it lies, for messages.
        folder: the folder below which its pictures are looked for first, with a slash at its end.
        names: the paths of all pictures.
        without_area: whether boxes without an area are an ``error``, or ``drop``ped.

    Raises:
        UserError: it is damaged, or a picture or a box is.
    """
    try:
        held = json.loads(content)
    except ValueError as error:
        raise UserError(f"{place} is not whole JSON ({error}); get the file again, or choose another.") from error
    if not isinstance(held, dict):
        raise UserError(f"{place} has no list images, so it is no annotation file of COCO; choose another.")
    images = _entries(held, "images", ("id", "file_name"), place)
    categories = {entry["id"]: str(entry["name"]) for entry in _entries(held, "categories", ("id", "name"), place)}
    by_id: dict[Any, dict[str, Any]] = {}
    for entry in images:
        if entry["id"] in by_id:
            raise UserError(
                f"{place} gives the image id {entry['id']} to {by_id[entry['id']]['file_name']} and to "
                f"{entry['file_name']}; give each picture an id that no other has."
            )
        by_id[entry["id"]] = entry
    boxes: dict[Any, list[Box]] = {key: [] for key in by_id}
    for index, entry in enumerate(_entries(held, "annotations", ("image_id", "category_id", "bbox"), place)):
        here = f"{place}, annotations[{index}]" + (f" (id {entry['id']})" if "id" in entry else "")
        if entry["image_id"] not in by_id:
            raise UserError(
                f"{here}, has the image id {entry['image_id']}, which no picture has; correct or delete it."
            )
        if entry["category_id"] not in categories:
            raise UserError(
                f"{here}, has the category id {entry['category_id']}, which is unknown; name it in categories."
            )
        if entry.get("iscrowd"):
            continue
        corners = entry["bbox"]
        if not isinstance(corners, list) or len(corners) != 4:
            raise UserError(f"{here}, has the bbox {corners!r}; write left, top, width and height.")
        left, top, width, height = (number(value, "the coordinate", here) for value in corners)
        box = Box(categories[entry["category_id"]], left, top, left + width, top + height)
        if without_area == "drop" and not (width > 0 and height > 0):
            continue
        boxes[entry["image_id"]].append(checked(box, here))
    known, by_name = set(names), dict[str, str]()
    for name in sorted(known):
        by_name.setdefault(PurePosixPath(name).name, name)
    found = []
    for key, entry in by_id.items():
        wanted = str(entry["file_name"])
        picture = next((path for path in (folder + wanted, wanted) if path in known), None)
        picture = picture or by_name.get(PurePosixPath(wanted).name)
        if picture is None:
            raise UserError(f"{place} names the picture {wanted}, which is not there; add it, or delete its entry.")
        sides = [float(entry[side]) for side in ("width", "height") if isinstance(entry.get(side), int | float)]
        size = (sides[0], sides[1]) if len(sides) == 2 else None
        found.append(Annotated(picture, tuple(boxes[key]), place, None, size))
    return found


def _all_coco(files: Files, names: list[str], tables: list[str], without_area: str) -> Iterator[Annotated]:
    pictures = [name for name in names if is_picture(name)]
    for name in tables:
        stem = PurePosixPath(name).stem.lower()
        # As in instances_train2017.json, or in train/_annotations.coco.json.
        words = [*re.split(r"[^a-z]+", stem), PurePosixPath(name).parent.name.lower()]
        split = next((PARTS[word] for word in words if word in PARTS), None) if len(tables) > 1 else None
        folder = f"{PurePosixPath(name).parent}/".removeprefix("./")
        for one in coco(files.read(name), str(files.source / name), folder, pictures, without_area):
            yield one._replace(split=split)


def annotated(source: Path, without_area: str = "error") -> tuple[list[Annotated], Files]:
    """Return the pictures of a data set with their boxes, sorted by name, and the files that hold them.

    Args:
        source: a folder or a zip with XML files of Pascal VOC or JSON files of COCO, or one such JSON file.
        without_area: whether boxes without an area are an ``error``, or ``drop``ped.

    Raises:
        UserError: there is no annotation, or one is broken; the sentence names the file and the box.
    """
    if source.suffix.lower() == ".json":
        files = Files(source.parent)
        names = [name for name in files.names() if is_picture(name)]
        return sorted(coco(read_file(source), str(source), "", names, without_area)), files
    files = Files(source)
    names = files.names()
    tables = [name for name in names if name.lower().endswith(".json")]
    if any(name.lower().endswith(".xml") for name in names):
        found = voc(files, without_area)
    elif tables:
        found = list(_all_coco(files, names, tables, without_area))
    else:
        raise UserError(
            f"{source} holds no annotations, which are XML files of Pascal VOC or JSON files of COCO; set task.path to "
            "where they are."
        )
    return sorted(found), files
