"""Completion of pictures: regression from the place of a pixel to its value.

A task is one picture. The support set is some of its pixels, drawn at random, and the queries are others, as in
Garnelo et al. 2018 (https://arxiv.org/abs/1807.01613, §4.2) and Zintgraf et al. 2019
(https://arxiv.org/abs/1810.03642, §4.1). The pictures of test tasks are of new classes.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from metarun.contracts import Facts, Numbers, Predict, Samples, Sizes, Spec, Split, Task, Tree
from metarun.data.portable import portable
from metarun.errors import require
from metarun.nn.padding import weighing
from metarun.results.pictures import grid_of_pictures
from metarun.targets.real import MSE, Real
from metarun.tasks.few_shot import Shots, draw, shot_ranges, with_padding
from metarun.tasks.images import Pool
from metarun.tasks.picture_pools import Asked, Dataset, picture_pools, pixels_of

log = logging.getLogger(__name__)

MEASURED = 5000
"""Number of training pictures, evenly spaced, of which the mean is computed."""


def places(size: int) -> Tensor:
    """Return the centres of the pixels of a picture, row by row, as x and y from −1 to 1: ``[size², 2]``."""
    axis = (torch.arange(size) + 0.5) * 2 / size - 1
    return torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).flatten(0, 1).to(torch.get_default_dtype())


def index_of(x: Tensor, size: int) -> Tensor:
    """Return the number of the pixel at each place ``[..., 2]``, counted row by row."""
    column, row = ((x + 1) * size / 2).floor().clamp(0, size - 1).long().unbind(-1)
    return row * size + column


@portable
@dataclass(frozen=True)
class MeanPicture:
    """The mean of the training pictures as an answer."""

    pixels: Tensor
    """``[size², channels]``."""

    def __call__(self, support: Tree, x: Tensor) -> Tensor:
        """Return the mean value at each place ``x [pixels, 2]``, whatever the support set is."""
        return self.pixels.to(x)[index_of(x, round(len(self.pixels) ** 0.5))]


def mean_picture(pool: Pool) -> MeanPicture:
    """Return the mean of the pictures of a pool."""
    some = torch.arange(len(pool.order))[:: len(pool.order) // MEASURED + 1]
    total = torch.zeros(pool.rows.shape[1:], dtype=torch.float64)
    for first in range(0, len(some), 256):
        total += pixels_of(pool, some[first : first + 256], "cpu").sum(0)
    return MeanPicture((total / len(some)).to(torch.get_default_dtype()).flatten(1).T.contiguous())


class Completion:
    """Tasks of one picture each; ``x [pixels, 2]`` from −1 to 1, ``y [pixels, channels]`` with white (or ink) as 1.

    Args:
        dataset: ``omniglot``, ``procedural`` (characters that metarun draws), ``emoji`` (the folder ``emoji`` in
            ``data_dir``, by subcategory), or ``auto``: omniglot if it is there, else procedural.
        path: your own pictures in place of ``dataset``, laid out as for ``task=images``; null: ``dataset``.
        shots: number of support pixels, at least 1; or a range from which each task draws this number.
        queries: number of query pixels of a validation or test task; null: all that are not in the support set.
        train_shots: number of support pixels in training, or a range; null: ``shots``.
        train_queries: number of query pixels in training; null: ``queries``.
        split: for your own pictures as for ``task=images``; for omniglot ``vinyals``, ``random`` or ``auto``; for emoji
            ``random``, or a folder with lists of subcategories.
        split_seed: seed of a random split.
        class_of: for your own pictures as for ``task=images``.
        train_design: the design of the emoji of training, validation and test having the others; null: all designs.
        image_size: edge in pixels to which pictures are resized, 8 to 128.
        channels: 1 for grey, 3 for RGB; null: 1 for characters, otherwise 3.
        device: where the tasks are put.
        data_dir: holds the data sets.

    Raises:
        UserError: data are missing or broken.
    """

    def __init__(
        self,
        dataset: Dataset = "auto",
        path: str | None = None,
        shots: Shots = 50,
        queries: int | None = None,
        train_shots: Shots | None = None,
        train_queries: int | None = None,
        split: str = "auto",
        split_seed: int = 0,
        class_of: str | None = None,
        train_design: str | None = None,
        image_size: int = 28,
        channels: int | None = None,
        device: str = "cpu",
        data_dir: str = "data",
    ) -> None:
        self.shots, self.train_shots = shot_ranges(shots, train_shots)
        asked = Asked(*(dataset, path, split, split_seed, class_of, train_design, image_size, channels, 1, data_dir))
        pixels = image_size**2
        for name, most in {"shots": self.shots.most, "train_shots": self.train_shots.most}.items():
            require(most < pixels, f"{name} must be below {pixels}, the number of pixels, not {most}")
        self.queries = pixels - self.shots.most if queries is None else queries
        own = queries if train_queries is None else train_queries
        self.train_queries = pixels - self.train_shots.most if own is None else own
        for name, count, known in (
            ("queries", self.queries, self.shots),
            ("train_queries", self.train_queries, self.train_shots),
        ):
            require(
                1 <= count <= pixels - known.most,
                f"{name} must be 1 to {pixels - known.most}, the pixels that are not in the support set, not {count}",
            )
        name, self.pools, self.channels, self.units = picture_pools(asked)
        self.size, self.device = image_size, device
        self.places = places(image_size).to(device)
        self.dataset = ":".join(["completion", name, *self.shots.text("shots")])
        self.ink = path is None and name.startswith(("omniglot", "procedural"))
        self.spec = Spec(
            Numbers((2,)),
            Real(self.channels),
            Sizes(self.shots.most, self.queries),
            metrics=(MSE,),
            facts=Facts(references={"mean_picture": mean_picture(self.pools["train"])}),
        )
        self.samples = Samples(self._make, self._show)

    def sample(self, split: Split, count: int, generator: torch.Generator) -> Task:
        """Draw ``count`` pictures; leaves ``[count, pixels, ...]``, and ``weight [count, pixels]`` if shots vary."""
        train, pool = split == "train", self.pools[split]
        shots, queries = (self.train_shots, self.train_queries) if train else (self.shots, self.queries)
        chosen = torch.randint(len(pool.order), (count,), generator=generator)
        every = torch.ones(count, self.size**2, dtype=torch.bool)
        at = draw(every, shots.most + queries, generator).to(self.device)
        x = self.places[at]
        values = pixels_of(pool, chosen, self.device).flatten(2).transpose(1, 2)
        y = values.gather(1, at[..., None].expand(-1, -1, self.channels))

        def part(columns: slice, real: Tensor | None) -> dict[str, Tensor]:
            return with_padding(x[:, columns], y[:, columns], real)

        of_support, of_query = slice(shots.most), slice(shots.most, None)
        if shots.fixed:
            return Task(part(of_support, None), part(of_query, None))
        # Drawn last, so that tasks with fewer pixels are those with the most, less the last pixels.
        real = torch.arange(shots.most) < shots.draw((count, 1), generator)
        return Task(part(of_support, real), part(of_query, torch.ones(count, queries, dtype=torch.bool)))

    def _make(self, predict: Predict, task: Task) -> Tree:
        """Return the completed picture ``[size², channels]``."""
        with weighing(None):
            return {"completed": predict(self.places)}

    def _show(self, found: Mapping[str, Tree], tasks: Task) -> Figure:
        """Draw known pixels, completed pictures and true pictures, a row per task."""
        rows: dict[str, list[Any]] = {"support": [], **{f"{when} adaptation": [] for when in found}, "true": []}
        for i in range(len(tasks.support["x"])):
            known = self._painted(tasks.support, i)
            rows["support"].append(known)
            for when, leaf in found.items():
                rows[f"{when} adaptation"].append(leaf["completed"][i].view(self.size, self.size, -1))
            other = self._painted(tasks.query, i)
            rows["true"].append(torch.where(other.isnan(), known, other))
        return grid_of_pictures(rows, ink=self.ink)

    def _painted(self, data: Tree, task: int) -> Tensor:
        """Return the pixels of one part of a task as a picture ``[size, size, channels]``, NaN where it has none."""
        real = data["weight"][task] > 0 if "weight" in data else torch.ones(len(data["x"][task]), dtype=torch.bool)
        picture = torch.full((self.size**2, self.channels), torch.nan)
        picture[index_of(data["x"][task][real], self.size)] = data["y"][task][real].float()
        return picture.view(self.size, self.size, self.channels)
