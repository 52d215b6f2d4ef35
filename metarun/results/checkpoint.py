"""Checkpoints: whole or not there, and read without running code from them."""

import pickle
import zipfile
from pathlib import Path
from typing import Any, cast

import torch

from metarun.errors import UserError
from metarun.results.files import atomic_write

FORMAT = 2


def save(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` (tensors, numbers, texts in dicts and lists) atomically."""
    with atomic_write(path) as file:
        torch.save({"format": FORMAT, **content}, file)


def load(path: Path, device: str, config_hash: str) -> dict[str, Any]:
    """Read a checkpoint of the configuration with ``config_hash``.

    Raises:
        UserError: missing, broken, from another version or of another configuration.
    """
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"There is no checkpoint {path}; name the directory of a run that wrote one.") from error
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise UserError(f"The checkpoint {path} is broken; start that run again.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this version of metarun; start that run again.")
    if content["config_hash"] != config_hash:
        raise UserError(
            f"The checkpoint {path} belongs to another configuration; resume with no other keys than "
            "resume, device and data_dir, or start a new run."
        )
    return cast(dict[str, Any], content)
