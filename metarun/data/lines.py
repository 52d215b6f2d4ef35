"""Lines of text by author: Shakespeare's speakers, presidents, and folders of the user.

An author's *work* is what is held out as a whole: a play with all of its speakers, or everything that a president or an
author of the user's has written. Training, validation and test share no work.
"""

import logging
import re
import textwrap
import unicodedata
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from metarun.data.files import PARTS, Files, found
from metarun.data.splits import SHARES, dealt, listed
from metarun.errors import UserError

log = logging.getLogger(__name__)

FOLDER = "public_domain_authors"
CORPORA = "packages/corpora"
SOURCE = "https://github.com/nltk/nltk_data, packages/corpora: shakespeare.zip, state_union.zip and inaugural.zip"
ARCHIVES = {"shakespeare": ("shakespeare",), "presidents": ("inaugural", "state_union")}
"""The archives of each corpus."""
SPLIT_SEED = 11

SAME_SURNAME = {
    **{"1825-Adams": "JQAdams", "1889-Harrison": "BHarrison", "1905-Roosevelt": "TRoosevelt"},
    **{"2001-Bush": "GWBush", "2005-Bush": "GWBush", "1865-Johnson": "AJohnson"},
}
"""Addresses of presidents who share a surname with another one."""


class Author(NamedTuple):
    """The lines of one author."""

    name: str
    work: str
    """What is held out as a whole."""
    lines: list[str]
    """Different lines, in their order."""


def text_of(content: bytes, place: str) -> str:
    """Return a file's content as text.

    Raises:
        UserError: it is not in UTF-8; the sentence names the line.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{place}, line {line}, is not text in UTF-8; save the file in this encoding.") from error


def lines_of(texts: Iterable[str], longest: int) -> list[str]:
    """Return the different lines of texts, without blank ones; longer ones are broken between words.

    A letter and its accent are one character however they were written.
    """
    found = dict[str, None]()
    for text in texts:
        for line in unicodedata.normalize("NFC", text).splitlines():
            # Runs of spaces and tabs show how a text was set, and not how it was written.
            found |= dict.fromkeys(textwrap.wrap(re.sub(r"\s+", " ", line).strip(), longest))
    return list(found)


def is_there(data_dir: str, name: str) -> bool:
    """Whether the archives of a corpus are in ``data_dir``."""
    return all((Path(data_dir) / FOLDER / CORPORA / f"{archive}.zip").is_file() for archive in ARCHIVES[name])


def _archive(data_dir: str, name: str) -> Files:
    place = Path(data_dir) / FOLDER / CORPORA / f"{name}.zip"
    if not place.is_file():
        raise UserError(f"There is no {place}; fetch it from {SOURCE}, or choose task.dataset=toy.")
    return Files(place, f"fetch it again from {SOURCE}")


def shakespeare(data_dir: str, longest: int) -> list[Author]:
    """Return the speakers of eight plays; a play is a work.

    Raises:
        UserError: the archive is missing or damaged.
    """
    authors = []
    with _archive(data_dir, "shakespeare") as files:
        for name in (name for name in files.names() if name.endswith(".xml")):
            try:
                play = ElementTree.fromstring(files.read(name))
            except ElementTree.ParseError as error:
                raise UserError(f"{files.source} is damaged at {name} ({error}); {files.remedy}.") from error
            speeches = dict[str, list[str]]()
            for speech in play.iter("SPEECH"):
                speaker = speech.findtext("SPEAKER") or "nobody"
                speeches.setdefault(speaker, []).extend("".join(line.itertext()) for line in speech.findall("LINE"))
            work = PurePosixPath(name).stem
            authors += [Author(f"{who} ({work})", work, lines_of(said, longest)) for who, said in speeches.items()]
    return authors


def presidents(data_dir: str, longest: int) -> list[Author]:
    """Return the presidents of the USA with their inaugural addresses and those on the state of the union.

    Raises:
        UserError: an archive is missing or damaged.
    """
    texts = dict[str, list[str]]()
    for corpus in ARCHIVES["presidents"]:
        with _archive(data_dir, corpus) as files:
            for name in (name for name in files.names() if name.endswith(".txt")):
                address = PurePosixPath(name).stem
                year, president = address.split("-")[:2]
                who = SAME_SURNAME.get(f"{year}-{president}", president)
                # Quotation marks of another time are in another encoding, and no reason to lose an address.
                texts.setdefault(who, []).append(files.read(name).decode("utf-8", "replace"))
    return [Author(who, who, lines_of(own, longest)) for who, own in texts.items()]


def own_texts(path: str, data_dir: str, longest: int) -> tuple[list[Author], dict[str, str] | None, str]:
    """Return the authors of a folder: a folder of text files or a text file per author.

    If all that it holds are folders named train, val and test (or their synonyms), the authors are inside them.

    Returns:
        The authors, the split of each by name if the folders say it, and the name of the data.

    Raises:
        UserError: the folder is missing or has no text, a file is not in UTF-8, or an author has no line.
    """
    place = found(path, data_dir)
    if not place.is_dir():
        raise UserError(f"{place} is a file; set task.path to a folder with a folder or a text file per author.")
    with Files(place) as files:
        names = [name for name in files.names() if name.lower().endswith(".txt")]
        if not names:
            raise UserError(
                f"{place} has no file that ends in .txt; put a folder of such files or one per author there."
            )
        given = all(name.partition("/")[0].lower() in PARTS and "/" in name for name in names)
        texts, split = dict[str, list[str]](), dict[str, str]()
        for name in names:
            part, _, rest = name.partition("/") if given else ("", "", name)
            author = PurePosixPath(rest).parts[0]
            author = author[: -len(".txt")] if author.lower().endswith(".txt") else author
            if given and split.setdefault(author, PARTS[part.lower()]) != PARTS[part.lower()]:
                raise UserError(
                    f"{place}: author {author} is in {split[author]} and {PARTS[part.lower()]}, but test authors must "
                    "be new; keep each author in one of them."
                )
            texts.setdefault(author, []).append(text_of(files.read(name), str(place / name)))
    authors = [Author(author, author, lines_of(own, longest)) for author, own in texts.items()]
    if empty := [author.name for author in authors if not author.lines]:
        raise UserError(f"{place}: author {empty[0]} has no line of text; add some, or delete what is there.")
    return authors, split if given else None, place.name


def of_size(authors: Iterable[Author], smallest: int, dataset: str, training: bool) -> list[Author]:
    """Return the authors that have enough lines; a line of the log names those that are left out.

    In training, the small authors of a work together are one author if they have enough lines.

    Raises:
        UserError: none is left.
    """
    authors = list(authors)
    large = [author for author in authors if len(author.lines) >= smallest]
    small = [author for author in authors if len(author.lines) < smallest]
    if training:
        together = dict[str, list[Author]]()
        for author in small:
            together.setdefault(author.work, []).append(author)
        small = []
        for work, own in together.items():
            lines = list(dict.fromkeys(line for author in own for line in author.lines))
            if len(lines) >= smallest:
                large.append(Author(f"small parts ({work})", work, lines))
            else:
                small += own
    if not large:
        most = max((len(author.lines) for author in authors), default=0)
        raise UserError(
            f"No author of {dataset} has {smallest} different lines for shots + queries (at most {most}); lower "
            "task.shots and task.queries, or add text."
        )
    if small:
        names = listed([f"{author.name} ({len(author.lines)})" for author in small])
        log.info("%s: authors with fewer than %d lines are left out: %s.", dataset, smallest, names)
    return large


def by_work(authors: Iterable[Author], split: Mapping[str, str] | None, dataset: str) -> dict[str, list[Author]]:
    """Return the authors of each split; splits share no work.

    Args:
        authors: all of them.
        split: that of each work; None: drawn by a fixed seed.
        dataset: name of the data, for messages.

    Raises:
        UserError: a split has no author.
    """
    authors = list(authors)
    if split is None:
        drawn = dealt({author.work for author in authors}, SPLIT_SEED, SHARES, 1)
        split = {work: part for part, works in drawn.items() for work in works}
    parts: dict[str, list[Author]] = {part: [] for part in SHARES}
    for author in authors:
        parts[split[author.work]].append(author)
    if missing := [part for part, own in parts.items() if not own]:
        raise UserError(f"{dataset} leaves no author for {missing[0]}; at least three are needed, so add some.")
    return parts


CORPUS: dict[str, Callable[[str, int], list[Author]]] = {"shakespeare": shakespeare, "presidents": presidents}
