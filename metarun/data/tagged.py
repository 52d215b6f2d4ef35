"""Tagged sentences in CoNLL and IOB2 files: a word per line with its tag, and an empty line between sentences."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from metarun.contracts import Examples, Predict, Request, Tree
from metarun.data.portable import portable
from metarun.data.tokens import WordFeatures
from metarun.data.word_vectors import WordVectors
from metarun.errors import UserError, require
from metarun.targets.tags import Tags, f1, hits

SUFFIXES = (".conll", ".conllu", ".iob2", ".iob", ".bio", ".txt", ".tsv")
"""Suffixes of files with tagged sentences."""
OUTSIDE = ("O", "-")
"""Tags of words outside of entities; Universal NER has a few bare dashes."""
TAG = re.compile(r"([BI])-(\S+)|O|-")
MULTIWORD = re.compile(r"\d+[-.]\d+")
"""The number of a line for several words at once, or for a word that is not there, as in CoNLL-U."""
NOT_DATA = re.compile(r"(?i)(licen[cs]e|readme|source|changes)")
"""Names of files in a folder of data that hold something else."""

Scheme = Literal["iob2", "iob1"]


class Sentence(NamedTuple):
    """A sentence and the entities in it."""

    words: tuple[str, ...]
    tags: tuple[str, ...]
    """``O``, or ``B-TYPE`` for the first word of an entity and ``I-TYPE`` for its other words."""
    name: str
    """What the file calls it, or its position in the file, counted from 1."""


def text_of(content: bytes, place: str) -> str:
    """Return a file's text.

    Raises:
        UserError: it is not in UTF-8; the sentence names the line.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(
            f"{place}, line {line}, is not text in UTF-8 (byte {content[error.start]:#04x}); save the whole file in "
            "this encoding."
        ) from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise UserError(
            f"{place}, line {line}, holds a zero byte, so it is no text in UTF-8; save it in this encoding."
        )
    return text


def blocks(text: str) -> Iterator[list[tuple[int, str]]]:
    """Yield the lines of each sentence with their numbers, counted from 1."""
    found: list[tuple[int, str]] = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            found.append((number, line.rstrip("\r")))
        elif found:
            yield found
            found = []
    if found:
        yield found


def is_comment(line: str) -> bool:
    """Whether a line is a comment, which may hold tabs; a word may be ``#`` too, and then only its tag follows."""
    parts = line.split()
    return line.startswith("# ") and not (len(parts) == 2 and TAG.fullmatch(parts[1]))


def cells_of(line: str) -> list[str]:
    """Return the columns of a line, separated by tabs, or by spaces where there is no tab.

    Spaces that never separate, as in a number of a French text, belong to words.
    """
    return line.split("\t") if "\t" in line else [cell for cell in line.split(" ") if cell]


def sentences_of(content: bytes, place: str, column: int | None = None, scheme: Scheme = "iob2") -> list[Sentence]:
    """Return the sentences of a file.

    The word is the first column, or the second where the first one numbers the words of each sentence. The tag is the
    last column; the files of Universal NER (``.iob2``) have it in the third, with annotators after it.

    Args:
        content: the file.
        place: its name, for messages.
        column: the column of the tag, counted from 1; None: by these rules.
        scheme: ``iob2``, where every entity begins with a B- tag; or ``iob1``, where one may begin with an I- tag.

    Raises:
        UserError: the file is not of this kind; the sentence names the line.
    """
    found, width = list[Sentence](), 0
    for index, block in enumerate(blocks(text_of(content, place)), 1):
        head = []
        while block and is_comment(block[0][1]):
            head.append(block.pop(0)[1])
        rows = [(number, cells_of(line)) for number, line in block]
        # In two columns the first one holds words, such as 1937-1938, and no numbers of words.
        rows = [(number, cells) for number, cells in rows if len(cells) == 2 or not MULTIWORD.fullmatch(cells[0])]
        if not rows or rows[0][1][0] == "-DOCSTART-":
            continue
        width = width or len(rows[0][1])
        found.append(_sentence(rows, _name(head) or str(index), place, width, column, scheme))
    if not found:
        raise UserError(f"{place} holds no sentence; put tagged sentences there, or take the file away.")
    return found


def _name(head: Sequence[str]) -> str | None:
    """Return the name that a sentence has in its comments, ``# sent_id = NAME`` or ``# id = NAME``."""
    for line in head:
        key, equals, value = line.lstrip("# ").partition("=")
        if equals and key.strip() in ("sent_id", "id"):
            return value.strip()
    return None


def _sentence(
    rows: Sequence[tuple[int, list[str]]], name: str, place: str, width: int, column: int | None, scheme: Scheme
) -> Sentence:
    """Return the sentence in the lines of a block, whose comments are gone."""
    numbered = rows[0][1][0] == "1" and all(cells[0] == str(i) for i, (_, cells) in enumerate(rows, 1))
    word_at = 1 if numbered and width > 2 else 0
    tag_at = column - 1 if column is not None else 2 if place.endswith(".iob2") else width - 1
    words, tags, before = list[str](), list[str](), "O"
    for line, cells in rows:
        here = f"{place}, line {line},"
        if len(cells) <= max(tag_at, word_at) or tag_at <= word_at:
            raise UserError(
                f"{here} has {len(cells)} column{'' if len(cells) == 1 else 's'}, and a word and its tag are needed, "
                "separated by a tab; add the tag, or name its column in task.column."
            )
        if len(cells) != width:
            raise UserError(
                f"{here} has {len(cells)} columns, and the first line of the file has {width}; give each word as many."
            )
        word, tag = cells[word_at], cells[tag_at]
        if not word.strip():
            raise UserError(f"{here} has a tag without a word; add the word, or delete the line.")
        if not (matched := TAG.fullmatch(tag)):
            raise UserError(
                f"{here} has the tag {tag!r}, which is none of O, B-TYPE and I-TYPE; convert the file to IOB2, or name "
                "the column of the tag in task.column."
            )
        kind = matched[2]
        if matched[1] == "I" and before[2:] != kind:
            if scheme == "iob2":
                raise UserError(
                    f"{here} has the tag {tag} after {before}, so it continues no entity; write B-{kind}, or set "
                    "task.scheme=iob1 if entities may begin with I- tags."
                )
            tag = f"B-{kind}"
        tags.append("O" if tag in OUTSIDE else tag)
        words.append(word)
        before = tags[-1]
    return Sentence(tuple(words), tuple(tags), name)


def tags_found(target: Tags, predict: Predict, data: Tree) -> Tensor:
    """Return the tag of each word ``[sentences, words]``."""
    return target.decoded(predict(data["x"]).nan_to_num(), data)


class OnSentences:
    """Tagged sentences of one task, and tags of further ones (`metarun.contracts.UserTask`)."""

    def __init__(self, form: "TaggedWords", x: Any, y: Any) -> None:
        self.form, words = form, form.listed(x)
        require(y is not None, "y must hold a list of tags for each sentence, and is None")
        tags = [list(own) if not isinstance(own, str) else own for own in y]
        require(
            len(words) == len(tags), f"x has {len(words)} sentences and y has {len(tags)} lists of tags; give one each"
        )
        self.types = form.types_of(tags)
        for row, own in zip(words, tags, strict=True):
            require(len(row) == len(own), f"a sentence of {len(row)} words has {len(own)} tags; give one for each word")
        self.x, self.y = form.inputs(words), form.targets(tags)

    def _ways(self, sentences: int) -> dict[str, Tensor]:
        """Return the leaf that says which tags the task has, unless it has all."""
        used, outputs = 1 + 2 * len(self.types), self.y.shape[-1]
        own = (torch.arange(outputs) < used).to(self.y)
        return {} if used == outputs else {"ways": own.expand(sentences, -1)}

    @cached_property
    def support(self) -> Tree:
        """The support set ``x``, ``y`` (`metarun.targets.tags.Tags`), and ``ways`` where places for types are free."""
        return {"x": self.x, "y": self.y, **self._ways(len(self.x))}

    def ask(self, x: Any) -> Request:
        """Return the request for the tags of sentences, a list of tags for each."""
        words, names = self.form.listed(x), ["O", *(f"{prefix}-{name}" for name in self.types for prefix in "BI")]
        there = torch.zeros(len(words), *self.y.shape[1:])
        for row, own in zip(there, words, strict=True):
            row[: len(own), 0] = 1

        def answers(tags: Tensor) -> list[list[str]]:
            return [[names[tag] for tag in row[: len(own)]] for row, own in zip(tags.tolist(), words, strict=True)]

        data = {"x": self.form.inputs(words), "y": there.to(self.y), **self._ways(len(words))}
        return Request(data, partial(tags_found, self.form.decoding), answers)

    def rows(self, answer: Sequence[str], truth: Sequence[str] | None) -> list[dict[str, Any]]:
        """Return the tags of a sentence as a row of a table."""
        return [{"prediction": " ".join(answer)} | ({} if truth is None else {"target": " ".join(truth)})]

    def compared(self, answers: Sequence[Sequence[str]], y: Sequence[Sequence[str]]) -> str:
        """Return the F1 of entities, exact in span and type."""
        names = list(dict.fromkeys(tag[2:] for rows in (answers, y) for row in rows for tag in row if tag[2:]))
        longest = max(map(len, y))

        def numbered(rows: Sequence[Sequence[str]]) -> Tensor:
            tags = [[1 + 2 * names.index(tag[2:]) + (tag[0] == "I") if tag[2:] else 0 for tag in row] for row in rows]
            return torch.tensor([row + [0] * (longest - len(row)) for row in tags])

        right, found, true, _ = hits(numbered(answers), numbered(y))
        return f"entity F1 {100 * float(f1(right, found, true)):.2f} % with their own tags"


@portable
@dataclass(frozen=True)
class TaggedWords:
    """Sentences of words with tags as their owner has them (`metarun.contracts.Converter`)."""

    features: WordFeatures
    types: tuple[str, ...]
    """The names of the types with tags of their own."""
    places: int
    """Number of places for other types, which come after these."""
    vectors: WordVectors | None = None
    """Numbers of a frozen model that follow what words look like."""
    target: Tags | None = None
    """How outputs become tags; None: word by word."""
    column: int | None = None
    """The column of the tag in files, counted from 1; None: see `sentences_of`."""
    scheme: Scheme = "iob2"
    """Whether entities in files may begin with an I- tag (``iob1``)."""

    @property
    def embed(self) -> str | None:
        """What embeds words; None: nothing does."""
        return None if self.vectors is None else self.vectors.embed

    @property
    def decoding(self) -> Tags:
        """How outputs become tags."""
        return self.target or Tags((*self.types, *(f"new{i}" for i in range(self.places))))

    def task(self, x: Any, y: Any) -> OnSentences:
        """Return a user's task.

        Args:
            x: sentences as lists of words.
            y: for each sentence a list of tags: ``O``, ``B-TYPE`` or ``I-TYPE``.

        Raises:
            ValueError: they are something else.
        """
        return OnSentences(self, x, y)

    def listed(self, x: Any) -> list[Sequence[str]]:
        """Return sentences as they are, once it is sure that they are lists of words.

        Raises:
            ValueError: there is something else, or a sentence has too many words.
        """
        rows = [x] if isinstance(x, str) else list(x)
        require(len(rows) > 0, "x must hold at least one sentence")
        for row in rows:
            words = not isinstance(row, str) and all(isinstance(word, str) and word for word in row) and len(row) > 0
            require(words, f"these inputs are sentences as lists of words, and this is none: {row!r}")
            require(
                len(row) <= self.features.longest,
                f"a sentence has {len(row)} words, and the learner reads at most {self.features.longest}; cut it, or "
                "train with a larger task.longest",
            )
        return rows

    def inputs(self, x: Any) -> Tensor:
        """Return what words look like, and numbers of a frozen model if there is one: ``[sentences, words, columns]``.

        Raises:
            ValueError: there is something that is no list of words, or a sentence has too many of them.
        """
        rows = self.listed(x)
        looks = self.features(rows).long()
        if self.vectors is None:
            return looks
        numbers = self.vectors.of(rows, self.features.longest)
        return torch.cat([looks.to(numbers), numbers], -1)

    def types_of(self, y: Sequence[Any]) -> list[str]:
        """Return the known types, and then the others in tags, in the order in which they appear.

        Raises:
            ValueError: a tag is no IOB tag, or there are more new types than places.
        """
        names = list(self.types)
        for tags in y:
            require(not isinstance(tags, str), "y must hold a list of tags for each sentence, such as ['B-PER', 'O']")
            for tag in tags:
                matched = TAG.fullmatch(str(tag))
                require(matched is not None, f"y holds the tag {tag!r}, which is none of O, B-TYPE and I-TYPE")
                kind = matched[2] if matched else None
                if kind is not None and kind not in names:
                    names.append(kind)
                    require(
                        len(names) <= len(self.types) + self.places,
                        f"y holds the type {kind}; the learner knows {', '.join(self.types) or 'none'}, and has "
                        f"{self.places} places for others",
                    )
        return names

    def targets(self, y: Any) -> Tensor:
        """Return one-hot tags ``[sentences, words, tags]`` of lists of tags, 0 where a sentence has ended.

        Types that training did not have get the places for new ones, in the order in which they appear.

        Raises:
            ValueError: a tag is no IOB tag, or there are more new types than places.
        """
        names = self.types_of(y)
        found = torch.zeros(len(y), self.features.longest, 1 + 2 * (len(self.types) + self.places))
        for row, tags in enumerate(y):
            for place, tag in enumerate(tags[: self.features.longest]):
                kind = tag[2:]
                found[row, place, 1 + 2 * names.index(kind) + (tag[0] == "I") if kind else 0] = 1
        return found.to(torch.get_default_dtype())

    def read(self, path: Path) -> Examples:
        """Read a CoNLL or IOB2 file as the run has read its own.

        Raises:
            UserError: the file is broken; the sentence names the line.
        """
        found = sentences_of(path.read_bytes(), str(path), self.column, self.scheme)
        return Examples([s.words for s in found], [s.tags for s in found], [s.name for s in found])
