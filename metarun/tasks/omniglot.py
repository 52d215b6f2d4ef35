"""Few-shot classification of handwritten characters: N ways, K shots.

The images are those of the real data set (Lake, Salakhutdinov, Tenenbaum 2015,
https://github.com/brendenlake/omniglot), or characters that metarun draws itself (`metarun.data.procedural`), which
need no download.
"""

import logging
from collections.abc import Collection
from typing import Literal

import torch
from torch import Tensor

from metarun.contracts import Numbers, Sizes, Spec, Split, Task, Tree
from metarun.data import omniglot as real
from metarun.data.converters import Drawings
from metarun.data.procedural import procedural_characters
from metarun.errors import require
from metarun.targets.classes import ACCURACY, Classes
from metarun.tasks.few_shot import Asked, Dealt, Shots, Ways, deal, digest_of, draw, part_of, sizes_for, units_of

log = logging.getLogger(__name__)


class Omniglot:
    """Tasks of ``ways`` classes; ``x [images, 1, size, size]`` with ink 1 on 0, ``y [images, ways]`` one-hot.

    The order of classes and of images is random, so neither labels nor positions carry information.

    Args:
        ways: number of classes of a task, at least 2, or a range from which each task draws it.
        shots: number of support images per class, at least 1; or a range from which each task draws this number.
        queries: number of query images per class of a validation or test task, at least 1.
        train_ways: number of classes of a training task, for learners that allow it; null: ``ways``.
        train_shots: number of support images per class in training, or a range; null: ``shots``.
        train_queries: number of query images per class in training; null: ``queries``.
        uneven: whether each class draws its own number of support images from a range, instead of each task drawing
            one number for all its classes.
        dataset: ``omniglot``, ``procedural``, or ``auto``: real if it is there, else procedural.
        split: ``vinyals`` (by the files of ``splits_vinyals``), ``random`` (1100/100/423 characters by a
            fixed seed), or ``auto``: vinyals if its files are there. Procedural characters have their own split.
        rotations: ``classes`` (each character turned by a multiple of 90° is a separate class), ``task`` (one turn
            drawn for each class and task) or ``none``.
        image_size: edge in pixels, 16 to 105.
        download: whether to fetch the real data set if it is missing.
        device: where the images live.
        data_dir: holds the folder ``omniglot``.
        typed: the keys that the user set; other sizes give way to what the data can serve. None: all.
    """

    def __init__(
        self,
        ways: Ways = 5,
        shots: Shots = 1,
        queries: int = 15,
        train_ways: Ways | None = None,
        train_shots: Shots | None = None,
        train_queries: int | None = None,
        uneven: bool = False,
        dataset: Literal["auto", "omniglot", "procedural"] = "auto",
        split: Literal["auto", "vinyals", "random"] = "auto",
        rotations: Literal["classes", "task", "none"] = "classes",
        image_size: int = 28,
        download: bool = False,
        device: str = "cpu",
        data_dir: str = "data",
        typed: Collection[str] | None = None,
    ) -> None:
        asked = Asked(ways, shots, queries, train_ways, train_shots, train_queries, uneven)
        asked.sizes()
        require(16 <= image_size <= 105, f"image_size must be from 16 to 105, not {image_size}")

        if dataset == "auto":
            dataset = "omniglot" if download or real.is_there(data_dir) else "procedural"
            if dataset == "procedural":
                log.info(
                    "No Omniglot in %s/omniglot, so the characters are procedural "
                    "(task.download=true fetches the real ones).",
                    data_dir,
                )
        if dataset == "omniglot":
            if download:
                real.download(data_dir)
            characters, split_name = real.characters(data_dir, image_size, split)
        else:
            characters, split_name = procedural_characters(image_size), "fixed"
        self.units = {part: units_of(dataset, map(digest_of, drawings)) for part, drawings in characters.items()}
        name = ":".join([dataset, split_name, f"rotations={rotations}", f"{image_size}px"])
        self.rotations = rotations
        self.device = device
        self.converter = Drawings(image_size)
        turns = 1 if rotations == "none" else 4
        # [characters * turns, drawings, size, size], with the turns of a character next to each other.
        self.images = {
            name: torch.stack([images.rot90(k, (2, 3)) for k in range(turns)], 1).flatten(0, 1).to(device)
            for name, images in characters.items()
        }
        pools = {name: torch.full((1, self._classes(part)), part.shape[1]) for name, part in self.images.items()}
        self.sizes = sizes_for(asked, pools, name, "drawings", typed)
        others = self.sizes[False]
        self.dataset = ":".join([name, *others.text()])
        self.spec = Spec(
            Numbers((1, image_size, image_size)),
            Classes(others.ways),
            Sizes(
                others.shots.most,
                others.queries,
                others.ways,
                self.sizes[True].ways,
                training_classes=len(self.images["train"]),
            ),
            metrics=(ACCURACY,),
        )

    def _classes(self, images: Tensor) -> int:
        return len(images) // 4 if self.rotations == "task" else len(images)

    def sample(self, split: Split, count: int, generator: torch.Generator) -> Task:
        """Draw ``count`` tasks; leaves ``[count, images, ...]``, and ``class`` as well for training tasks."""
        images = self.images[split]
        sizes = self.sizes[split == "train"]
        ways = sizes.ways

        pool = torch.ones(count, self._classes(images), dtype=torch.bool)
        classes = draw(pool, ways, generator)
        if self.rotations == "task":
            classes = classes * 4 + torch.randint(4, classes.shape, generator=generator)
        # A GPU divides by a Python number by multiplying with its rounded inverse, so episodes would differ in their
        # last bit.
        white = torch.full((), 255, dtype=torch.get_default_dtype(), device=self.device)
        drawings = draw(torch.ones(count, ways, images.shape[1], dtype=torch.bool), sizes.examples, generator)

        def part(dealt: Dealt) -> Tree:
            x = images[dealt.identity.to(self.device), dealt.example.to(self.device)][:, :, None]
            return part_of(dealt, x.to(torch.get_default_dtype()) / white, ways, split == "train")

        support, query = deal(classes, drawings, sizes, generator)
        return Task(part(support), part(query))
