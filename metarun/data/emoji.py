"""Emoji in several designs, as published in the npm packages ``emoji-datasource-*``.

A folder holds ``emoji.json``, a list of emoji with ``image`` (the name of a file) and ``subcategory``, and
``img/<design>/<pixels>/<image>`` for every design.
"""

import json
from pathlib import Path
from typing import NamedTuple

from metarun.data.files import Files
from metarun.data.pictures import Found, Pictures, decoded
from metarun.data.store import Store, stored
from metarun.errors import UserError

HOW_TO_GET_IT = "put emoji.json and img/ of the npm packages emoji-datasource-twitter and emoji-datasource-google there"


class Emoji(NamedTuple):
    """All emoji of a folder, each in every design."""

    labels: list[str]
    """The subcategory of each picture."""
    designs: list[str]
    """The design of each picture."""
    store: Store


def _listed(path: Path) -> dict[str, str]:
    """Return the subcategory of each file name in ``emoji.json``.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        found = {str(entry["image"]): str(entry["subcategory"]) for entry in entries}
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {HOW_TO_GET_IT}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a list of emoji with the fields image and subcategory ({type(error).__name__}: {error}); "
            f"{HOW_TO_GET_IT}."
        ) from error
    if not found:
        raise UserError(f"{path} lists no emoji; {HOW_TO_GET_IT}.")
    return found


def emoji(folder: Path, form: Pictures) -> Emoji:
    """Read all emoji that are listed, in every design that has pictures.

    Raises:
        UserError: the folder lacks a file, or a picture is broken.
    """
    label = _listed(folder / "emoji.json")
    with Files(folder) as files:
        pictures, designs = list[Found](), list[str]()
        for name in files.names():
            parts = name.split("/")
            if len(parts) >= 3 and parts[-4:-3] == ["img"] and parts[-1] in label:
                pictures.append(Found(name, label[parts[-1]], None))
                designs.append(parts[-3])
        if not pictures:
            raise UserError(f"{folder} holds no picture that emoji.json lists; {HOW_TO_GET_IT}.")
        names = [picture.name for picture in pictures]
        store = stored(
            "emoji",
            f"{files.stamp(names)} {form.key}",
            len(names),
            (form.channels, form.size, form.size),
            lambda: decoded(files, pictures, form),
            f"Reading {len(names)} pictures of {folder}, once.",
        )
    return Emoji([picture.label for picture in pictures], designs, store)
