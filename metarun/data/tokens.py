"""Sentences as rows of integers: words, and character n-grams hashed into buckets; and words as rows of integers.

A row holds ``MAX_WORDS`` columns of word ids and then the ids of all n-grams, both in the sentence's order and
padded with 0. Ids are numbered in this order: padding, the words of the vocabulary, ``UNKNOWN`` ids among which
other words are spread by a hash (so that a word never seen in training still equals itself), and the buckets.

N-grams are taken within words that carry one space on either side, as in scikit-learn's ``char_wb``.
"""

import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache

import torch
from torch import Tensor

from metarun.data.portable import portable
from metarun.data.spelling import small
from metarun.nn.ops import unit_rows

UNKNOWN = 1024
MAX_WORDS, MAX_GRAMS = 48, 512
"""Longer sentences are truncated."""

WORD = re.compile(r"\w+|[^\w\s]")


JOINERS = "\u200c\u200d"
"""Characters without width that stand inside words of Persian and of Indian languages."""


@cache
def with_marks() -> re.Pattern[str]:
    """The pattern of words with all that belongs to a letter before it, and of single other characters.

    Vowel signs, accents and dots that are characters by themselves are no letters to Python.
    """
    marks = [c for c in map(chr, range(0x300, 0x20000)) if unicodedata.category(c)[0] == "M"]
    return re.compile(rf"\w[\w{''.join(marks)}{JOINERS}]*|[^\w\s]")


def words(sentence: str) -> list[str]:
    """The words of a sentence in lower case, and its punctuation marks one by one."""
    text = small(sentence)
    return (WORD if text.isascii() else with_marks()).findall(text)


def grams_of(part: str, lengths: tuple[int, int]) -> list[str]:
    """Character n-grams, from the shortest to the longest, of a word with a space on either side."""
    padded, (shortest, longest) = f" {part} ", lengths
    grams = []
    for n in range(shortest, longest + 1):
        grams += [padded[i : i + n] for i in range(max(len(padded) - n, 0) + 1)]
        if n >= len(padded):
            break
    return grams


def is_cut(sentence: str, lengths: tuple[int, int]) -> bool:
    """Whether a sentence has more words or n-grams than a row holds."""
    shortest, longest = lengths
    grams = 0
    for size in (len(part) + 2 for part in small(sentence).split()):
        # As many as `grams_of` the word.
        grams += sum(max(size - n, 0) + 1 for n in range(shortest, min(longest, max(size, shortest)) + 1))
    return grams > MAX_GRAMS or len(words(sentence)) > MAX_WORDS


def are_full(rows: Tensor) -> Tensor:
    """Which rows have no room for another word, or none for another n-gram: the only ones that may be cut."""
    return (rows[:, MAX_WORDS - 1] > 0) | (rows[:, MAX_WORDS:] > 0).sum(1).eq(MAX_GRAMS)


def spread(text: str, buckets: int) -> int:
    """A bucket for ``text``, the same on every machine."""
    return zlib.crc32(text.encode()) % buckets


@portable
@dataclass(frozen=True)
class Tokenizer:
    """Turns sentences into rows of ids; created by `fit`.

    Args:
        vocabulary: the words of the training classes.
        buckets: how many ids the n-grams share.
        grams: length of the shortest and of the longest n-gram.
    """

    vocabulary: tuple[str, ...]
    buckets: int
    grams: tuple[int, int]

    @cached_property
    def _position(self) -> dict[str, int]:
        return {word: i + 1 for i, word in enumerate(self.vocabulary)}

    @property
    def first_bucket(self) -> int:
        """The id of the first bucket; smaller ids are words."""
        return 1 + len(self.vocabulary) + UNKNOWN

    @property
    def ids(self) -> int:
        """The number of ids."""
        return self.first_bucket + self.buckets

    def word_id(self, word: str) -> int:
        """The id of a word, known or not."""
        return self._position.get(word) or 1 + len(self.vocabulary) + spread(word, UNKNOWN)

    def __call__(self, sentences: Iterable[str]) -> Tensor:
        """Rows ``[sentences, columns]`` of int32; the columns after ``MAX_WORDS`` are the n-grams'."""
        # Cached, because the same words occur again and again.
        word_id = cache(self.word_id)
        gram_ids = cache(lambda part: [self.first_bucket + spread(g, self.buckets) for g in grams_of(part, self.grams)])
        rows = []
        for sentence in sentences:
            known = [word_id(word) for word in words(sentence)][:MAX_WORDS]
            hashed = [i for part in small(sentence).split() for i in gram_ids(part)][:MAX_GRAMS]
            rows.append(known + [0] * (MAX_WORDS - len(known)) + hashed)
        width = max(map(len, rows))
        return torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.int32)


def fit(sentences: Sequence[str], buckets: int, grams: tuple[int, int]) -> Tokenizer:
    """A tokenizer whose vocabulary is the words that occur at least twice in ``sentences``."""
    counts = Counter(word for sentence in sentences for word in words(sentence))
    return Tokenizer(tuple(sorted(word for word, count in counts.items() if count > 1)), buckets, grams)


def inverse_document_frequency(rows: Tensor, ids: int) -> Tensor:
    """ln((1 + n) / (1 + n_i)) + 1 for every id i that n_i of the n rows contain: ``[ids]``; 0 for padding."""
    ordered = rows.long().sort(1).values
    # In sorted order, an id occurs for the first time in its row where it differs from the previous one.
    new = torch.cat([torch.ones_like(ordered[:, :1], dtype=torch.bool), ordered[:, 1:] != ordered[:, :-1]], 1)
    here = torch.bincount(ordered[new], minlength=ids)
    weights = torch.log((1 + len(rows)) / (1 + here)) + 1
    weights[0] = 0
    return weights


def term_frequencies(rows: Tensor, ids: int, weights: Tensor) -> Tensor:
    """Weighted counts of the ids in each row, scaled to length one: ``[sentences, ids]``."""
    columns = rows.long()
    counts = weights.new_zeros(len(rows), ids).scatter_add(1, columns, weights[columns])
    return unit_rows(counts)


SHAPES, STRANGE = 512, 2048
"""How many ids shapes share, and how many share all else that training has not seen."""
AFFIX, TRIGRAMS, LONGEST_SHAPE = 4, 5, 8
"""Length of the longest prefix and suffix, the most inner trigrams of a word, and the most signs of a shape."""
COLUMNS = 3 + 2 * AFFIX + TRIGRAMS
"""Number of features of a word."""
OFTEN = 3
"""How often training must have seen a feature of a word for the feature to have an id among those known."""


def sign(character: str) -> str:
    """Return what kind of character this is: X and x for upper and lower case, 9 for digits, c for other letters."""
    if character.isupper():
        return "X"
    if character.islower():
        return "x"
    if character.isdigit():
        return "9"
    return "c" if character.isalpha() else character


def shape_of(word: str) -> str:
    """Return the signs of a word's characters, of each run of equal ones at most two: ``McDonald's`` is XxXxx'x."""
    found = ""
    for one in map(sign, word):
        if found[-2:] != one + one:
            found += one
    return found[:LONGEST_SHAPE]


@lru_cache(2**18)
def looks_of(word: str, first: bool) -> tuple[int, ...]:
    """Return hashes of the features of a word, as many for each word, -1 where it has no more.

    The features are the word in lower case, its shape by itself and by its place, then its prefixes, suffixes and inner
    trigrams in lower case.
    """
    shape, lower = shape_of(unicodedata.normalize("NFC", word)), small(word)
    inside, lengths = f" {lower} ", range(1, min(AFFIX, len(lower)) + 1)
    parts = [f"word {lower}", f"shape {shape}", f"{'first' if first else 'later'} {shape[:3]}"]
    parts += [f"prefix {lower[:n]}" for n in lengths] + [f"suffix {lower[-n:]}" for n in lengths]
    parts += [f"trigram {inside[i : i + 3]}" for i in range(1, len(inside) - 3)][:TRIGRAMS]
    return (*(zlib.crc32(part.encode()) for part in parts), *[-1] * (COLUMNS - len(parts)))


@portable
@dataclass(frozen=True)
class WordFeatures:
    """Turns the words of sentences into rows of ids; created by `fit_words`.

    Ids are numbered in this order: padding, ``SHAPES`` for shapes, ``buckets`` for features that training has seen
    often enough, and ``STRANGE`` for all others. All are hashed, so that a feature never seen still equals itself, and
    in the first columns are the word itself and the two features of its shape.

    Args:
        known: hashes of the features that training has seen often enough, rising.
        buckets: how many ids these share.
        longest: number of words of the longest sentence; longer ones are truncated.
    """

    known: Tensor
    buckets: int
    longest: int

    @property
    def first_known(self) -> int:
        """The first id of a feature that training has seen often enough; smaller ones are shapes."""
        return 1 + SHAPES

    @property
    def first_strange(self) -> int:
        """The first id of a feature that training has not seen often enough."""
        return self.first_known + self.buckets

    @property
    def ids(self) -> int:
        """The number of ids."""
        return self.first_strange + STRANGE

    def __call__(self, sentences: Iterable[Sequence[str]]) -> Tensor:
        """Rows ``[sentences, longest, columns]`` of int32 for sentences that are sequences of words."""
        position: dict[tuple[str, bool], int] = {}
        places = []
        for words_of in sentences:
            shown = [(word, i == 0) for i, word in enumerate(words_of[: self.longest])]
            places.append(
                [position.setdefault(one, len(position) + 1) for one in shown] + [0] * (self.longest - len(shown))
            )
        hashes = torch.tensor([[-1] * COLUMNS, *(looks_of(*one) for one in position)])
        return self._ids(hashes).to(torch.int32)[torch.tensor(places)]

    def _ids(self, hashes: Tensor) -> Tensor:
        """Return the ids of features ``[words, columns]`` from their hashes."""
        place = torch.searchsorted(self.known, hashes).clamp(max=max(len(self.known) - 1, 0))
        known = self.known[place] == hashes if len(self.known) else torch.zeros_like(hashes, dtype=torch.bool)
        ids = torch.where(known, self.first_known + hashes % self.buckets, self.first_strange + hashes % STRANGE)
        ids[:, 1:3] = 1 + hashes[:, 1:3] % SHAPES
        return ids.masked_fill(hashes < 0, 0)


def fit_words(sentences: Iterable[Sequence[str]], buckets: int, longest: int) -> WordFeatures:
    """Features of words that know what occurs at least ``OFTEN`` times in ``sentences``."""
    counts = Counter((word, i == 0) for one in sentences for i, word in enumerate(one[:longest]))
    hashes = torch.tensor([looks_of(*one) for one in counts])
    found, place = torch.unique(hashes, return_inverse=True)
    times = torch.tensor(list(counts.values()))[:, None].expand_as(place)
    total = torch.zeros(len(found), dtype=torch.long).index_add_(0, place.flatten(), times.flatten())
    return WordFeatures(found[(total >= OFTEN) & (found >= 0)], buckets, longest)
