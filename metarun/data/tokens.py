"""Sentences as rows of integers: words, and character n-grams hashed into buckets.

A row holds ``MAX_WORDS`` columns of word ids and then the ids of all n-grams, both in the sentence's order and
padded with 0. Ids are numbered in this order: padding, the words of the vocabulary, ``UNKNOWN`` ids among which
other words are spread by a hash (so that a word never seen in training still equals itself), and the buckets.

N-grams are taken within words that carry one space on either side, as in scikit-learn's ``char_wb``.
"""

import re
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from metarun.data.portable import portable
from metarun.nn.ops import unit_rows

UNKNOWN = 1024
MAX_WORDS, MAX_GRAMS = 48, 512
"""Longer sentences are truncated."""

WORD = re.compile(r"\w+|[^\w\s]")


def words(sentence: str) -> list[str]:
    """The words of a sentence in lower case, and its punctuation marks one by one."""
    return WORD.findall(sentence.lower())


def grams_of(part: str, lengths: tuple[int, int]) -> list[str]:
    """Character n-grams, from the shortest to the longest, of a word with a space on either side."""
    padded, (shortest, longest) = f" {part} ", lengths
    grams = []
    for n in range(shortest, longest + 1):
        grams += [padded[i : i + n] for i in range(max(len(padded) - n, 0) + 1)]
        if n >= len(padded):
            break
    return grams


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
            hashed = [i for part in sentence.lower().split() for i in gram_ids(part)][:MAX_GRAMS]
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
