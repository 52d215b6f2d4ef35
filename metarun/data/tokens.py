"""Sentences as rows of integers: words, and character n-grams hashed into buckets.

A row holds ``MAX_WORDS`` columns of word ids and then the ids of all n-grams, both in the sentence's order and
padded with 0. Ids are numbered in this order: padding, the words of the vocabulary, ``UNKNOWN`` ids among which
other words are spread by a hash (so that a word never seen in training still equals itself), and the buckets.

N-grams are taken within words that carry one space on either side, as in scikit-learn's ``char_wb``.
"""

import math
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

UNKNOWN = 1024
MAX_WORDS, MAX_GRAMS = 48, 512
"""A longer sentence is cut."""

WORD = re.compile(r"\w+|[^\w\s]")


def words(sentence: str) -> list[str]:
    """Lower-case words and single punctuation marks."""
    return WORD.findall(sentence.lower())


def character_grams(sentence: str, shortest: int, longest: int) -> list[str]:
    """Character n-grams of the white-space separated parts, each with a space on either side."""
    grams = []
    for part in sentence.lower().split():
        padded = f" {part} "
        for n in range(shortest, longest + 1):
            grams += [padded[i : i + n] for i in range(max(len(padded) - n, 0) + 1)]
            if n >= len(padded):
                break
    return grams


def spread(text: str, buckets: int) -> int:
    """A bucket for ``text``, the same on every machine."""
    return zlib.crc32(text.encode()) % buckets


@dataclass(frozen=True)
class Tokenizer:
    """Turns sentences into rows; made by `fit`.

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
        """The id of the first bucket; smaller ones are words."""
        return 1 + len(self.vocabulary) + UNKNOWN

    @property
    def ids(self) -> int:
        """How many ids there are."""
        return self.first_bucket + self.buckets

    def word_id(self, word: str) -> int:
        """The id of a word, known or not."""
        return self._position.get(word) or 1 + len(self.vocabulary) + spread(word, UNKNOWN)

    def __call__(self, sentences: Iterable[str]) -> Tensor:
        """Rows ``[sentences, columns]`` of int32; the columns after ``MAX_WORDS`` are the n-grams'."""
        rows = []
        for sentence in sentences:
            known = [self.word_id(word) for word in words(sentence)][:MAX_WORDS]
            hashed = [self.first_bucket + spread(g, self.buckets) for g in character_grams(sentence, *self.grams)]
            rows.append((known, hashed[:MAX_GRAMS]))
        width = max(len(hashed) for _, hashed in rows)
        out = torch.zeros(len(rows), MAX_WORDS + width, dtype=torch.int32)
        for row, (known, hashed) in zip(out, rows, strict=True):
            row[: len(known)] = torch.tensor(known, dtype=torch.int32)
            row[MAX_WORDS : MAX_WORDS + len(hashed)] = torch.tensor(hashed, dtype=torch.int32)
        return out


def fit(sentences: Sequence[str], buckets: int, grams: tuple[int, int]) -> Tokenizer:
    """The tokenizer whose vocabulary are the words that occur twice or more in ``sentences``."""
    counts = Counter(word for sentence in sentences for word in words(sentence))
    return Tokenizer(tuple(sorted(word for word, count in counts.items() if count > 1)), buckets, grams)


def inverse_document_frequency(rows: Tensor, ids: int) -> Tensor:
    """ln((1 + n) / (1 + n_i)) + 1 for every id i, where n_i of the n rows hold it: ``[ids]``; 0 for padding."""
    here = torch.zeros(ids)
    for row in rows:
        here[row.unique().long()] += 1
    weights = torch.log((1 + len(rows)) / (1 + here)) + 1
    weights[0] = 0
    return weights


def term_frequencies(rows: Tensor, ids: int, weights: Tensor) -> Tensor:
    """Weighted counts of the ids in each row, scaled to length one: ``[sentences, ids]``."""
    columns = rows.long()
    counts = weights.new_zeros(len(rows), ids).scatter_add(1, columns, weights[columns])
    length: Tensor = counts.norm(dim=1, keepdim=True).clamp_min(math.sqrt(torch.finfo(counts.dtype).tiny))
    return counts / length
