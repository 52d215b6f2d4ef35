"""Molecules: a task is an assay, which says of some molecules whether they are active."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from metarun.data.files import found
from metarun.data.fingerprints import read_molecules, unpacked
from metarun.data.tables import Source
from metarun.errors import require
from metarun.targets.labels import Labels
from metarun.tasks.cells import Cells, Draws
from metarun.tasks.few_shot import Shots, shot_ranges, units_of
from metarun.tasks.table import TableTasks, content_of, require_sizes, say, usable
from metarun.tasks.table_splits import SHARES, dealt_among, named_splits, split_file_of

log = logging.getLogger(__name__)

CLASSES = ("inactive", "active")


def first_copies(packed: Any) -> Any:
    """Return the number of the first molecule with each one's fingerprint ``[molecules]``."""
    first = dict[bytes, int]()
    return np.array([first.setdefault(row.tobytes(), i) for i, row in enumerate(packed)])


def molecules(
    path: str,
    shots: Shots = 16,
    queries: int | None = 64,
    train_shots: Shots | None = None,
    train_queries: int | None = 16,
    smallest: int | None = 25,
    shares: tuple[float, float, float] = SHARES,
    new_molecules: float = 0.0,
    split_seed: int = 0,
    split_file: str | None = None,
    drop: Sequence[str] = (),
    name: str | None = None,
    device: str = "cpu",
    data_dir: str = "data",
) -> TableTasks:
    """Tasks from a file of packed fingerprints and labels (`metarun.data.fingerprints`); ``x`` are bits.

    Args:
        path: an ``.npz`` file, here or in ``data_dir``.
        shots: number of support molecules of each class, at least 1, or a range from which each task draws it.
        queries: largest number of query molecules of each class in a validation or test task; null: all the rest.
        train_shots: the same as ``shots`` in training; null: ``shots``.
        train_queries: the same as ``queries`` in training.
        smallest: assays with fewer molecules in a class are left out, at least 2; null: one more than ``shots``.
        shares: of training, validation and test assays in a random split, above 0.
        new_molecules: share of the molecules, drawn at random, that validation and test tasks consist of and that no
            training task contains, from 0 to below 1; 0: all tasks are about the same molecules. Those with the
            fingerprint of a molecule that was not drawn are not new.
        split_seed: seed of the random splits.
        split_file: a CSV file with a line per assay: its name and train, val or test.
        drop: assays that are not used.
        name: of the data set in results; null: that of the file.
        device: where the molecules live.
        data_dir: where else the file is looked for.

    Raises:
        UserError: the file is missing or broken, or has too few assays.
    """
    require(0 <= new_molecules < 1, f"new_molecules must be from 0 to below 1, not {new_molecules}")
    require_sizes(queries, train_queries, smallest, shares)
    of_shots, of_training = shot_ranges(shots, train_shots)
    place = found(path, data_dir)
    data = read_molecules(place)
    unknown = [assay for assay in drop if assay not in data.tasks]
    require(not unknown, f"drop names {unknown[:1]}, and {place} has no such assay")
    assay, molecule = np.nonzero(data.labels.T >= 0)
    kept = ~np.isin(assay, [data.tasks.index(one) for one in drop])
    assay, molecule = assay[kept], molecule[kept]
    label = data.labels[molecule, assay].astype(np.int64)
    least = max(smallest or 0, of_shots.most + 1)
    first = first_copies(data.packed)
    if copies := int((first < np.arange(len(first))).sum()):
        log.warning(
            "%s: %d molecules have the fingerprints of others; a task may both show and ask for them.", place, copies
        )
    new = np.random.default_rng(split_seed).random(len(data.packed)) < new_molecules
    # To a learner, molecules of one fingerprint are the same.
    new &= ~np.isin(first, first[~new])

    def of(chosen: Any, least: int) -> Cells:
        shape = (len(data.tasks), len(CLASSES))
        return Cells(molecule[chosen], assay[chosen], label[chosen], shape).without_small(least)

    def cells_with(least: int) -> tuple[Cells, Cells]:
        """Return the cells of validation and test tasks, and those of training tasks."""
        chosen = [new[molecule], ~new[molecule]] if new_molecules > 0 else [np.ones(len(molecule), dtype=bool)]
        cells, old = of(chosen[0], least), of(chosen[-1], least)
        # A task must be large enough whichever split it falls into.
        cells.size = cells.size.masked_fill((old.size == 0).any(1, keepdim=True), 0)
        return cells, old

    cells, old = cells_with(least)
    tasks = usable(cells, data.tasks, len(CLASSES), least, Source([place], [len(data.packed)], header=False))
    if split_file is None:
        every = np.flatnonzero((cells_with(smallest or 1)[0].size > 0).all(1).numpy())
        parts = dealt_among(every, tasks, shares, split_seed, str(place))
    else:
        index = named_splits([data.tasks[i] for i in tasks], split_file_of(split_file, data_dir), split_file)
        parts = {part: tasks[own] for part, own in index.items()}
    say(parts, cells, CLASSES)
    packed = torch.from_numpy(data.packed)
    facts = [
        name or place.stem,
        *(["new molecules"] if new_molecules > 0 else []),
        *of_shots.text("shots"),
        content_of(packed, torch.from_numpy(label), cells, parts),
    ]
    sizes = [(of_training, train_queries), (of_shots, queries), (of_shots, queries)]
    draws = {
        part: Draws(old if part == "train" else cells, torch.from_numpy(own), *size)
        for (part, own), size in zip(parts.items(), sizes, strict=True)
    }
    packed = packed.to(device)
    return TableTasks(
        *(":".join(facts), 8 * packed.shape[1], lambda row: unpacked(packed[row]), None, Labels.of(CLASSES)),
        *(draws, device),
        units={part: units_of(place.resolve(), (data.tasks[i] for i in own)) for part, own in parts.items()},
    )
