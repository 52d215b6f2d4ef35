"""Text as rows of integers that can be turned back into text: characters, or word pieces.

Ids are numbered in this order: ``PADDING``, ``BOUNDARY`` (before the first and after the last piece of a text),
``UNKNOWN`` (a character that training has not seen), the characters, and the pieces that merges of neighbours have
made (byte pair encoding: Sennrich, Haddow and Birch 2016, https://arxiv.org/abs/1508.07909, algorithm 1). A piece lies
within a word together with the space before it.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from metarun.data.portable import portable

PADDING, BOUNDARY, UNKNOWN = 0, 1, 2
RESERVED = 3
"""Number of ids before the first character."""
UNREADABLE = "\ufffd"
"""What an unknown character is read as."""

SYMBOLS = 0xE000
"""The first of the characters that no script uses (Unicode's private use area); they stand for values and acts."""
CHUNK = re.compile(r" ?[\ue000-\uf8ff]| ?\w+| ?[^\w\s\ue000-\uf8ff]+|\s")
"""What pieces do not cross: a word, a symbol or punctuation marks, with the space before; or any other space."""


def symbol(index: int) -> str:
    """The ``index``-th character that no script uses."""
    return chr(SYMBOLS + index)


def _merged(parts: Sequence[str], pair: tuple[str, str]) -> list[str]:
    """``parts`` with every occurrence of the pair of neighbours made one."""
    found: list[str] = []
    place = 0
    while place < len(parts):
        together = tuple(parts[place : place + 2]) == pair
        found.append(parts[place] + parts[place + 1] if together else parts[place])
        place += 2 if together else 1
    return found


@portable
@dataclass(frozen=True)
class Pieces:
    """Turns texts into rows of ids and back; created by `fit`.

    Args:
        characters: the characters of the training texts.
        merges: the pairs of neighbours that become one piece, in their order.
    """

    characters: tuple[str, ...]
    merges: tuple[tuple[str, str], ...] = ()

    @cached_property
    def strings(self) -> list[str]:
        """What each id reads as; nothing for padding and boundaries."""
        return ["", "", UNREADABLE, *self.characters, *(first + second for first, second in self.merges)]

    @cached_property
    def _position(self) -> dict[str, int]:
        return {text: RESERVED + i for i, text in enumerate(self.strings[RESERVED:])}

    @cached_property
    def _rank(self) -> dict[tuple[str, str], int]:
        return {(first, second): rank for rank, (first, second) in enumerate(self.merges)}

    @cached_property
    def _known(self) -> dict[str, list[int]]:
        """The ids of chunks that have been met."""
        return {}

    @property
    def ids(self) -> int:
        """The number of ids."""
        return len(self.strings)

    def lengths(self) -> Tensor:
        """The number of characters of each id ``[ids]``; the end of a text counts as one, as the end of a line does."""
        return torch.tensor([0.0, 1.0, *(float(len(text)) for text in self.strings[UNKNOWN:])])

    def _of_chunk(self, chunk: str) -> list[int]:
        if chunk not in self._known:
            parts = list(chunk)
            while len(parts) > 1:
                rank, pair = min((self._rank.get(pair, len(self._rank)), pair) for pair in pairwise(parts))
                if rank == len(self._rank):
                    break
                parts = _merged(parts, pair)
            self._known[chunk] = [self._position.get(part, UNKNOWN) for part in parts]
        return self._known[chunk]

    def encoded(self, text: str) -> list[int]:
        """The ids of a text, without boundaries."""
        if not self.merges:
            return [self._position.get(character, UNKNOWN) for character in text]
        return [i for chunk in CHUNK.findall(text) for i in self._of_chunk(chunk)]

    def decoded(self, ids: Iterable[int]) -> str:
        """The text of ids up to the first boundary; padding is left out."""
        found = []
        for i in ids:
            if i == BOUNDARY:
                break
            found.append(self.strings[i])
        return "".join(found)

    def rows(self, texts: Iterable[str], columns: int, ended: bool = True) -> Tensor:
        """Rows ``[texts, columns]`` of int64, padded with 0; a text that fits is ``ended`` by a boundary."""
        rows = [(self.encoded(text) + [BOUNDARY] * ended)[:columns] for text in texts]
        return torch.tensor([row + [PADDING] * (columns - len(row)) for row in rows], dtype=torch.int64).view(
            -1, columns
        )


def fit(texts: Iterable[str], merges: int, alphabet: Iterable[str] = ()) -> Pieces:
    """Pieces of ``texts``: their characters and those of ``alphabet``, and at most this number of merges.

    Each merge joins the most frequent pair of neighbours, and of equally frequent pairs the first in the alphabet; a
    pair that occurs only once is not joined.
    """
    texts = list(texts)
    characters = tuple(sorted({character for text in texts for character in text} | set(alphabet)))
    if not merges:
        return Pieces(characters)
    chunks = Counter(chunk for text in texts for chunk in CHUNK.findall(text))
    parts = {chunk: list(chunk) for chunk in chunks}
    counts: Counter[tuple[str, str]] = Counter()
    where: dict[tuple[str, str], set[str]] = defaultdict(set)

    def count(chunk: str, sign: int) -> None:
        own = parts[chunk]
        for pair in pairwise(own):
            counts[pair] += sign * chunks[chunk]
            where[pair].add(chunk)

    for chunk in chunks:
        count(chunk, 1)
    chosen: list[tuple[str, str]] = []
    while len(chosen) < merges and counts:
        best, times = min(counts.items(), key=lambda item: (-item[1], item[0]))
        if times < 2:
            break
        chosen.append(best)
        for chunk in sorted(where.pop(best)):
            count(chunk, -1)
            parts[chunk] = _merged(parts[chunk], best)
            count(chunk, 1)
        del counts[best]
    return Pieces(characters, tuple(chosen))
