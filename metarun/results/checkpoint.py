"""Checkpoints: written atomically, verified when they are read, and read without running code from them.

``last.pt`` is kept together with the one before it, ``previous.pt``, which is used where the last one is damaged.
"""

import logging
import os
from pathlib import Path
from typing import Any, cast

from metarun.errors import UserError
from metarun.system import sealed
from metarun.system.files import LAST, PREVIOUS

log = logging.getLogger(__name__)

FORMAT = 5


def save(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` (tensors, numbers, texts in dicts and lists) atomically."""
    sealed.save(path, {"format": FORMAT, **content})


def second_name(path: Path, other: Path) -> None:
    """Give the file ``path`` the second name ``other``, replacing any such file; without links, only rename it."""
    aside = other.with_name(f".{other.name}.{os.getpid()}.part")
    aside.unlink(missing_ok=True)
    try:
        os.link(path, aside)
        aside.replace(other)
        # Renaming one name of a file to another name of the same file does nothing at all.
        aside.unlink(missing_ok=True)
    except OSError:
        path.replace(other)


def save_last(directory: Path, content: dict[str, Any]) -> None:
    """Write ``last.pt``, and keep the previous one as ``previous.pt``."""
    path = directory / "checkpoints" / LAST
    if path.is_file():
        second_name(path, path.with_name(PREVIOUS))
    save(path, content)


def load(path: Path, device: str, config_hash: str | None = None) -> dict[str, Any]:
    """Read a checkpoint of the configuration with ``config_hash``; None: of any.

    Raises:
        UserError: missing, broken, from another version or of another configuration.
    """
    try:
        content = sealed.load(path, device)
    except FileNotFoundError as error:
        raise UserError(f"There is no checkpoint {path}; name the directory of a run that wrote one.") from error
    except sealed.Damaged as error:
        raise UserError(f"The checkpoint {path} is broken ({error}); start that run again.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this version of metarun; start that run again.")
    if config_hash is not None and content["config_hash"] != config_hash:
        raise UserError(
            f"The checkpoint {path} belongs to another configuration; resume with no other keys than "
            "resume, device and data_dir, or start a new run."
        )
    return cast(dict[str, Any], content)


def load_last(directory: Path, device: str, config_hash: str) -> dict[str, Any]:
    """Read ``last.pt``; if it is damaged, warn, read ``previous.pt`` and put that in the place of ``last.pt``.

    Raises:
        UserError: both are missing or broken, or they are of another version or configuration.
    """
    path = directory / "checkpoints" / LAST
    previous = path.with_name(PREVIOUS)
    try:
        sealed.verify(path)
    except (OSError, sealed.Damaged) as error:
        why = "is missing" if isinstance(error, FileNotFoundError) else f"is broken ({error})"
        try:
            content = load(previous, device, config_hash)
        except UserError:
            raise UserError(
                f"The checkpoint {path} {why}, and there is no complete one before it; start that run again."
            ) from error
        words = "The checkpoint %s %s; the run continues from the one before it, of step %s."
        log.warning(words, path, why, content["step"])
        second_name(previous, path)
        return content
    return load(path, device, config_hash)
