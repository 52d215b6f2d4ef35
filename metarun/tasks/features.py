"""Few-shot classification of vectors that the user has computed: N ways, K shots."""

import hashlib
import logging
import zipfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from metarun.contracts import Examples, Numbers, Sizes, Spec, Split, Task
from metarun.data import splits
from metarun.data.arrays import plain_array
from metarun.data.converters import Arrays, moments, row_names
from metarun.data.files import DAMAGED, PARTS, found
from metarun.data.portable import portable
from metarun.errors import UserError
from metarun.targets.classes import ACCURACY, Classes
from metarun.tasks.few_shot import Asked, Shots, Ways, draw_tasks, ordered, range_of, sizes_for, units_of

log = logging.getLogger(__name__)

LARGEST_ARRAY = 2**36
"""Bytes of the largest array that is read."""


@portable
@dataclass(frozen=True)
class Vectors:
    """Vectors as the tensor that a model takes (`metarun.contracts.Converter`)."""

    mean: tuple[float, ...]
    """Mean of each number over the training vectors; 0 without standardisation."""
    std: tuple[float, ...]
    """Standard deviation of each number, 1 where it never changes; 1 without standardisation."""

    def inputs(self, x: Any) -> Tensor:
        """Return vectors ``[n, numbers]`` standardised, in the default dtype.

        Raises:
            ValueError: they have another width, or are not finite numbers.
        """
        # In the default dtype, numbers far from 0 would lose what tells them apart before their mean is subtracted.
        found = Arrays((len(self.mean),)).inputs(x, torch.float64)
        return ((found - found.new_tensor(self.mean)) / found.new_tensor(self.std)).to(torch.get_default_dtype())

    def read(self, path: Path) -> Examples:
        """Read the arrays ``x`` and, if there, ``y`` of an ``.npz``, or a table with one column per number.

        Raises:
            ValueError: the file cannot be read, or has another number of columns.
            UserError: an array is missing or damaged.
        """
        if path.suffix.lower() != ".npz":
            return Arrays((len(self.mean),)).read(path)
        held = arrays(path)
        return Examples(held["x"], held["y"].tolist(), row_names(len(held["x"])))


def _declared(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return the shape and type that the header of an array declares, without reading the array."""
    with archive.open(info) as file:
        try:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, kind = read(file)
        except Exception as error:  # a broken header raises what numpy's parser happens to meet
            raise ValueError(f"{info.filename} has a broken header") from error
        size = int(np.prod(shape, dtype=object)) * kind.itemsize
        if kind.hasobject:
            raise ValueError(f"{info.filename} holds Python objects; save numbers or texts")
        if size > min(info.file_size, LARGEST_ARRAY):
            raise ValueError(f"{info.filename} declares {size} bytes and has {info.file_size}")
    return shape, kind


def arrays(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Return the arrays ``x``, ``y`` and, if there, ``split`` of a file; headers are checked before memory is spent.

    Raises:
        UserError: the file is missing, damaged or lacks an array, or shapes do not agree.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            declared = {
                info.filename.removesuffix(".npy"): _declared(archive, info)
                for info in archive.infolist()
                if info.filename in ("x.npy", "y.npy", "split.npy")
            }
        for name in ("x", "y"):
            if name not in declared:
                raise UserError(f"{path} holds no array {name}; save it with numpy.savez(path, x=vectors, y=labels).")
        shape = declared["x"][0]
        if len(shape) != 2 or not all(shape) or declared["x"][1].kind not in "fiub":
            raise UserError(f"{path}: x must be numbers of shape [examples, numbers], not {list(shape)}.")
        for name, (own, _) in declared.items():
            if name != "x" and own != shape[:1]:
                raise UserError(f"{path}: {name} must have shape {list(shape[:1])}, as x has rows, not {list(own)}.")
        with np.load(path, allow_pickle=False) as loaded:
            return {name: plain_array(loaded[name]) for name in declared}
    except DAMAGED as error:
        raise UserError(f"{path} is not a file of numpy.savez, or is damaged ({error}); save it again.") from error


def _part(path: Path, row: int, value: str) -> str:
    """Return the split that a row names."""
    if value.lower() not in PARTS:
        raise UserError(f"{path}: row {row} (from 0) has the split {value!r}; write train, val or test.")
    return PARTS[value.lower()]


class Features:
    """Tasks of ``ways`` classes; ``x [examples, numbers]``, ``y [examples, ways]`` one-hot. Test classes are new.

    Args:
        path: a file of ``numpy.savez`` with ``x [examples, numbers]``, ``y [examples]`` (numbers or texts, equal within
            a class), and perhaps ``split [examples]`` (``train``, ``val`` or ``test``).
        ways: number of classes of a task, at least 2, or a range from which each task draws it.
        shots: number of support examples per class, at least 1; or a range from which each task draws this number.
        queries: number of query examples per class of a validation or test task, at least 1.
        train_ways: number of classes of a training task, for learners that allow it; null: ``ways``.
        train_shots: number of support examples per class in training, or a range; null: ``shots``.
        train_queries: number of query examples per class in training; null: ``queries``.
        uneven: whether each class draws its own number of support examples from a range, instead of each task drawing
            one number for all its classes.
        split: ``given`` (by the array ``split``), ``random`` (by class and ``split_seed``), or ``auto``: given if there
            is such an array.
        split_seed: seed of a random split.
        standardise: whether each number is scaled to mean 0 and standard deviation 1 of the training examples.
        device: where the vectors live.
        data_dir: where the path is looked up if it does not exist here.
        typed: the keys that the user set; other sizes give way to what the data can serve. None: all.
        converter: what a run has measured of its vectors, for a later test of it; None: measured here.

    Raises:
        UserError: the file is missing or broken, or a class is in two splits.
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
        split: Literal["auto", "given", "random"] = "auto",
        split_seed: int = 0,
        standardise: bool = True,
        device: str = "cpu",
        data_dir: str = "data",
        typed: Collection[str] | None = None,
        converter: Vectors | None = None,
    ) -> None:
        asked = Asked(ways, shots, queries, train_ways, train_shots, train_queries, uneven)
        asked.sizes()
        place = found(path, data_dir)
        held = arrays(place)
        # Numbers that float32 cannot hold stay as they are until they are standardised.
        x = torch.from_numpy(held["x"].astype(np.result_type(held["x"].dtype, np.float32)))
        if not bool((finite := x.isfinite().all(1)).all()):
            row = int((~finite).nonzero()[0])
            raise UserError(f"{place}: row {row} (from 0) of x holds a number that is not finite; mend or remove it.")
        if held["y"].dtype.kind == "f" and (empty := np.isnan(held["y"])).any():
            raise UserError(f"{place}: row {int(empty.argmax())} (from 0) of y is not a number; label or remove it.")
        named = held.get("split", [None] * len(x))
        given = [None if value is None else _part(place, row, str(value)) for row, value in enumerate(named)]
        if copies := len(x) - len({hash(row.tobytes()) for row in x.numpy()}):
            log.warning(
                "%s: %d vectors are copies of others, which a task may both show and ask for; leave copies of the same "
                "example out.",
                *(place, copies),
            )
        examples = splits.Examples(place.stem, "examples", [str(label) for label in held["y"].tolist()], given)
        fewest, several = range_of("shots", shots).most + 1, range_of("ways", ways).least
        positions, split_name = splits.by_class(examples, examples.rows_of(fewest), split, split_seed, several)
        parts = {part: ordered(by_label) for part, by_label in positions.items()}
        self.cells = {part: own.cells for part, own in parts.items()}
        self.classes = {part: own.classes for part, own in parts.items()}
        self.class_names = tuple(self.classes["test"])
        self.units = {part: units_of(place.resolve(), own) for part, own in self.classes.items()}
        unit = ((0.0,) * x.shape[1], (1.0,) * x.shape[1])
        self.converter = converter or Vectors(*(moments(x[parts["train"].order]) if standardise else unit))
        self.rows = {part: self.converter.inputs(x[own.order]).to(device) for part, own in parts.items()}
        self.device = device
        counts = {part: cells.size for part, cells in self.cells.items()}
        content = hashlib.sha256(str({part: size.tolist() for part, size in counts.items()}).encode())
        for rows in self.rows.values():
            content.update(rows.cpu().numpy().tobytes())
        name = ":".join([place.stem, split_name, content.hexdigest()[:6]])
        self.sizes = sizes_for(asked, counts, name, "examples", typed, self.classes)
        others = self.sizes[False]
        self.dataset = ":".join([name, *others.text()])
        self.spec = Spec(
            Numbers((x.shape[1],)),
            Classes(others.ways),
            Sizes(others.shots.most, others.queries, others.ways, self.sizes[True].ways, len(positions["train"])),
            metrics=(ACCURACY,),
        )

    def sample(self, split: Split, count: int, generator: torch.Generator) -> Task:
        """Draw ``count`` tasks; leaves ``[count, examples, ...]``, and ``class`` as well for training tasks."""

        def inputs(examples: Tensor) -> Tensor:
            return self.rows[split][examples.to(self.device)]

        return draw_tasks(self.cells[split], self.sizes[split == "train"], count, generator, inputs, split == "train")
