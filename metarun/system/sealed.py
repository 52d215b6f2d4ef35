"""Files of tensors whose damage is detected: torch's own format with a checksum.

``torch.save`` writes a zip archive, and a zip archive may end with a comment. The comment holds the SHA-256 of all
bytes before it, so that every bit of the file is checked and ``torch.load`` can still read the file.
"""

import hashlib
import io
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch

from metarun.system.files import atomic_write

LABEL = b"metarun sha256 "
LENGTH = len(LABEL) + 64
"""Length of the comment."""
BLOCK = 1 << 20


class Damaged(Exception):
    """A file is not what was written; the text says in what way."""


def save(path: Path, content: Any) -> None:
    """Write ``content`` (tensors, numbers, texts in dicts and lists) atomically.

    Raises:
        OSError: the file cannot be written; a previous file of the same name is unchanged.
    """
    archive = io.BytesIO()
    torch.save(content, archive)
    # The last two bytes of an archive without a comment say that the comment has no bytes.
    archive.seek(-2, io.SEEK_END)
    archive.write(struct.pack("<H", LENGTH))
    with archive.getbuffer() as data, atomic_write(path) as file:
        file.write(data)
        file.write(LABEL + hashlib.sha256(data).hexdigest().encode())


def verify(path: Path) -> None:
    """Compare a file with its checksum.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: the file cannot be read.
        Damaged: the checksum differs or is missing.
    """
    found, left = hashlib.sha256(), path.stat().st_size - LENGTH
    with path.open("rb") as file:
        while left > 0 and (block := file.read(min(BLOCK, left))):
            found.update(block)
            left -= len(block)
        comment = file.read()
    if left < 0 or not comment.startswith(LABEL):
        raise Damaged("it has no checksum")
    if comment != LABEL + found.hexdigest().encode():
        raise Damaged("its checksum does not fit its content")


def load(path: Path, device: str = "cpu") -> Any:
    """Read what ``save`` wrote and verify it; no code from the file is run.

    Raises:
        FileNotFoundError: there is no such file.
        Damaged: the file cannot be read, or is not what was written.
    """
    try:
        verify(path)
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise Damaged(str(error).partition("\n")[0]) from error
