"""Molecules as packed fingerprints, with the outcome of each assay.

A ``.npz`` file holds ``fp_packed [molecules, bytes]``, the bits of a fingerprint as ``numpy.packbits`` packs them;
``labels [molecules, assays]``: 1 active, 0 inactive, −1 not measured; and ``tasks [assays]``, the names of the assays.
"""

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from metarun.data.arrays import plain_array
from metarun.data.files import DAMAGED
from metarun.data.tables import first_where
from metarun.errors import UserError

ARRAYS = ("fp_packed", "labels", "tasks")


class Molecules(NamedTuple):
    """The content of a file."""

    packed: Any
    labels: Any
    tasks: list[str]


def read_molecules(path: Path) -> Molecules:
    """Return the molecules in a file.

    Raises:
        UserError: the file is not one of molecules; the sentence names the file, and what is wrong with which array.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            if not hasattr(file, "files"):
                raise UserError(f"{path} holds a single array; save {', '.join(ARRAYS)} with numpy.savez.")
            if lacking := [name for name in ARRAYS if name not in file.files]:
                raise UserError(f"{path} lacks the array {lacking[0]!r}; it must hold {', '.join(ARRAYS)}.")
            packed, labels, tasks = (plain_array(file[name]) for name in ARRAYS)
    except DAMAGED as error:
        raise UserError(f"{path} is not an .npz file of arrays ({error}); save {', '.join(ARRAYS)} in one.") from error
    if packed.dtype != np.uint8 or packed.ndim != 2:
        raise UserError(
            f"{path}: fp_packed must be [molecules, bytes] of uint8, not {list(packed.shape)} of {packed.dtype}; pack "
            "bits with numpy.packbits(bits, axis=1)."
        )
    if labels.shape != (len(packed), len(tasks)):
        raise UserError(
            f"{path}: labels must be [molecules, assays], {[len(packed), len(tasks)]} by fp_packed and tasks, not "
            f"{list(labels.shape)}."
        )
    names = [str(task) for task in tasks]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"{path}: tasks has two assays {twice[0]}; rename one of them, or leave it out.")
    wrong = ~np.isin(labels, (-1, 0, 1))
    if (place := first_where(wrong)) is not None:
        row, column = divmod(place, labels.shape[1])
        raise UserError(
            f"{path}: labels must be 1 (active), 0 (inactive) or −1 (not measured), and molecule {row} of the assay "
            f"{tasks[column]!s} has {labels[row, column]}."
        )
    return Molecules(packed, labels.astype(np.int8), names)


def unpacked(packed: Tensor) -> Tensor:
    """Return the bits ``[..., 8 bytes]`` of ``packed [..., bytes]``, in the default dtype."""
    shifts = torch.arange(7, -1, -1, device=packed.device, dtype=torch.uint8)
    bits = (packed[..., None] >> shifts) & 1
    return bits.flatten(-2).to(torch.get_default_dtype())
