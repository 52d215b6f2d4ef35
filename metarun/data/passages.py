"""Passages and questions as words with numbers that need no pretraining, in any language.

A text is cut at spaces. Punctuation at the edges of a word is cut off, each mark a word; characters of scripts without
spaces between words (Thai, Lao, Burmese, Khmer, Chinese, Japanese) are words one by one, with the marks above and below
them. A question and a passage are joined to one row of positions: a segment for the words of the question, then one for
those of the passage. `FEATURES` lists the first numbers of a position; a hashed vector of the word follows: its
character n-grams, or a character and the pairs that it forms with its neighbours, spread over buckets with signs, and
the shorter the rarer the word is.

A passage that is too long keeps those of its sentences that share most with the question; a position without a word
stands where words are missing.
"""

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from metarun.data.spelling import small
from metarun.data.tokens import WORD, grams_of, spread

Array = NDArray[Any]

UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
"""Characters of scripts that put no space between words: Thai, Lao, Burmese, Khmer, kana, Han."""
COMBINING = "[\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ece\u102b-\u103e\u17b6-\u17d3\u3099\u309a]"
"""Marks of these scripts that belong to the character before them."""
PIECES = re.compile(f"{UNSPACED.pattern}{COMBINING}*|[^\\s{UNSPACED.pattern[1:-1]}]+")
MARKS = frozenset(string.punctuation)
"""The punctuation of ASCII, which the evaluation of SQuAD removes."""
SENTENCE_END = re.compile(r"[.!?。！？।॥؟…]+[\"'”’»)\]]*")
THAI_SPACE = re.compile(r"(?<=[\u0e00-\u0e7f])\s+(?=[\u0e00-\u0e7f])")
THAI_SENTENCE = 100
"""The fewest characters of a sentence that a space ends."""
ARTICLES = re.compile(r"\b(a|an|the)\b")
GRAMS = (3, 5)
MATCH_BUCKETS = 256
"""Number of buckets of the n-grams by which words are compared."""
FEATURES = (
    "question",
    "passage",
    "occurs in both",
    "resembles a word of the other",
    "rarity",
    "overlap of the sentence",
    "best sentence",
    "overlap before",
    "overlap after",
    "digit",
    "capital",
    "mark",
    "start of a sentence",
    "length",
    "position",
)
"""The first numbers of a position; the hashed vector of the word follows."""
QUESTION, PASSAGE = 0, 1
ALIKE, RARITY, SENTENCE = 3, 4, 5
BEFORE, AFTER, DIGIT, CAPITAL, MARK, START = 7, 8, 9, 10, 11, 12
"""Columns of some features."""
ALIKE_FROM = 0.45
"""The cosine of n-grams from which two words count as forms of one."""
DECAY, REACH = 0.7, 10
"""How fast an overlap fades with the distance in words."""


@lru_cache(maxsize=2**18)
def number_of(word: str) -> int:
    """Return a number above 0 by which a word is compared, which does not depend on what other words there are."""
    return 1 + int.from_bytes(blake2b(word.encode(), digest_size=7).digest(), "big")


class Word(NamedTuple):
    """Where a word is in its text: characters ``[start, end)``."""

    start: int
    end: int


def _is_mark(character: str) -> bool:
    return character in MARKS or unicodedata.category(character)[0] == "P"


def words_of(text: str) -> list[Word]:
    """Return the words of a text in their order."""
    found = []
    for piece in PIECES.finditer(text):
        first, last = piece.start(), piece.end()
        while first < last and _is_mark(text[first]):
            found.append(Word(first, first + 1))
            first += 1
        end = last
        while end > first and _is_mark(text[end - 1]):
            end -= 1
        if len(normalised(text[first:end])) > 1:
            found += [Word(first + part.start(), first + part.end()) for part in WORD.finditer(text[first:end])]
        elif end > first:
            found.append(Word(first, end))
        found += [Word(i, i + 1) for i in range(end, last)]
    return found


@lru_cache(maxsize=2**18)
def normalised(text: str) -> tuple[str, ...]:
    """Return the words by which answers are compared.

    They are those of the official evaluation of SQuAD 1.1 (Rajpurkar et al. 2016, https://arxiv.org/abs/1606.05250):
    lower case, without the punctuation of ASCII, without a, an and the, cut at spaces. Characters of scripts without
    spaces are words one by one, as the evaluation of MLQA has it for Chinese.
    """
    kept = ARTICLES.sub(" ", "".join(c for c in text.lower() if c not in MARKS))
    return tuple(piece.group() for piece in PIECES.finditer(kept))


def sentences_of(text: str, words: Sequence[Word]) -> list[int]:
    """Return the number of the sentence of each word.

    A sentence ends after a full stop, a question mark or their kin, if a space or a character of a script without
    spaces follows. Thai has no such marks: there a space ends it once it has `THAI_SENTENCE` characters.
    """
    ends = {
        end.end()
        for end in SENTENCE_END.finditer(text)
        if end.end() == len(text) or text[end.end()].isspace() or UNSPACED.match(text[end.end()])
    }
    for space in THAI_SPACE.finditer(text):
        last = max((end for end in ends if end <= space.start()), default=0)
        if space.start() - last >= THAI_SENTENCE:
            ends.add(space.start())
    borders = iter([*sorted(ends), len(text) + 1])
    found, number, border = [], 0, next(borders)
    for word in words:
        while word.start >= border:
            border, number = next(borders), number + 1
        found.append(number)
    return _renumbered(found)


def _renumbered(numbers: Sequence[int]) -> list[int]:
    order = {number: i for i, number in enumerate(dict.fromkeys(numbers))}
    return [order[number] for number in numbers]


def grams_at(words: Sequence[Word], shown: Sequence[str]) -> list[tuple[str, ...]]:
    """Return what each word is compared by.

    They are its character n-grams between spaces, and for a character of a script without spaces, itself and the pairs
    that it forms with its neighbours.
    """
    found = []
    for i, word in enumerate(shown):
        if not UNSPACED.match(word):
            found.append(_grams(word))
            continue
        before = shown[i - 1] if i and words[i - 1].end == words[i].start else " "
        after = shown[i + 1] if i + 1 < len(words) and words[i + 1].start == words[i].end else " "
        found.append((word, before + word, word + after))
    return found


@lru_cache(maxsize=2**18)
def _grams(word: str) -> tuple[str, ...]:
    return (*grams_of(word, GRAMS), f" {word} ")


def _hashed(hashes: Array, buckets: int) -> Array:
    """Return the n-grams of a word, given by their hashes, with signs as a vector of length one ``[buckets]``."""
    signs = 1.0 - 2 * (hashes // buckets % 2)
    vector = np.bincount(hashes % buckets, signs, buckets)
    return vector / max(math.sqrt(float(vector @ vector)), 1e-6)


class Text(NamedTuple):
    """A text with its words; all arrays ``[words]`` unless stated otherwise."""

    text: str
    words: list[Word]
    gram: Array
    """The number of what the word is compared by, which is also that of its hashed vector."""
    token: Array
    """The number of the word by which answers are compared, 0 for one that does not count."""
    sentence: Array
    """The number of the word's sentence."""
    shape: Array
    """Digit, capital, mark, start of a sentence, length ``[words, 5]``."""


class Lexicon:
    """The different words of all texts.

    Args:
        buckets: length of their hashed vectors.
    """

    def __init__(self, buckets: int) -> None:
        self.buckets = buckets
        self.known: dict[tuple[str, ...], int] = {("",): 0}
        self.vectors = np.zeros((1024, buckets), dtype=np.float32)
        self.matches = np.zeros((1024, MATCH_BUCKETS), dtype=np.float16)

    def tokens(self, text: str) -> list[int]:
        """Return the numbers of the words by which answers are compared."""
        return [number_of(word) for word in normalised(text)]

    def token(self, word: str) -> int:
        """Return the number by which a word of a text is compared, 0 for one that does not count."""
        return next(iter(self.tokens(word)), 0)

    def number(self, grams: tuple[str, ...]) -> int:
        """Return the number of a word with these n-grams."""
        number = self.known.setdefault(grams, len(self.known))
        if number == len(self.vectors):
            self.vectors, self.matches = (np.concatenate([rows, 0 * rows]) for rows in (self.vectors, self.matches))
        if number == len(self.known) - 1:
            hashes = np.array([spread(gram, 2**31) for gram in grams])
            self.vectors[number], self.matches[number] = _hashed(hashes, self.buckets), _hashed(hashes, MATCH_BUCKETS)
        return number

    def match(self, text: Text) -> Array:
        """Return the vectors by which words are compared ``[words, MATCH_BUCKETS]``."""
        return self.matches[text.gram].astype(np.float32)

    def text(self, text: str) -> Text:
        """Cut a text into words."""
        words = words_of(text)
        own = [text[word.start : word.end] for word in words]
        shown = [small(word) for word in own]
        grams = grams_at(words, shown)
        gram = np.array([self.number(one) for one in grams], dtype=np.int64)
        sentence = np.array(sentences_of(text, words), dtype=np.int64)
        first = np.diff(sentence, prepend=-1) > 0
        shape = [
            (any(map(str.isdigit, word)), word[0].isupper(), all(map(_is_mark, word)), start, min(len(word) / 10, 1.5))
            for word, start in zip(own, first, strict=True)
        ]
        token = np.array([self.token(one) for one in own], dtype=np.int64)
        return Text(text, words, gram, token, sentence, np.array(shape, dtype=np.float32))


class Rarity:
    """How rare each word is among the sentences of texts: ln((1 + n) / (1 + n_i)) / ln(1 + n), from 0 to 1.

    n_i of the n sentences contain word i. Marks have none.
    """

    def __init__(self, texts: Iterable[Text]) -> None:
        counts: Counter[int] = Counter()
        total = 0
        for text in texts:
            counts.update({key for key, _ in set(zip(text.gram.tolist(), text.sentence.tolist(), strict=True))})
            total += int(text.sentence[-1]) + 1
        self.counts, self.total = counts, total

    def of(self, text: Text) -> Array:
        """Return the rarity of each word ``[words]``."""
        counts = np.array([self.counts[key] for key in text.gram.tolist()], dtype=np.float32)
        return np.where(text.shape[:, 2] > 0, 0, 1 - np.log1p(counts) / math.log1p(self.total)).astype(np.float32)


class Pair(NamedTuple):
    """A question joined with its passage."""

    numbers: Array
    """`FEATURES` of each position ``[length, features]``; zero where there is no word."""
    gram: Array
    """The number of the hashed vector at each position ``[length]``; 0 where there is no word."""
    word: Array
    """The number of the passage's word at each position after the question's ``[length − question]``, else −1."""


def _faded(overlap: Array) -> Array:
    """Return the largest overlap before each word, faded by its distance ``[words]``."""
    found = np.zeros_like(overlap)
    for distance in range(1, min(REACH, len(overlap) - 1) + 1):
        found[distance:] = np.maximum(found[distance:], DECAY**distance * overlap[:-distance])
    return found


def shares_of(question: Text, passage: Text, rare: Array, alike: Array) -> Array:
    """Return how much of the question, by rarity, each sentence of the passage has ``[sentences]``, from 0 to 1."""
    begins = np.flatnonzero(np.diff(passage.sentence, prepend=-1))
    best = np.maximum.reduceat(alike, begins, axis=1)
    return np.where(best > ALIKE_FROM, best, 0).T @ rare / max(float(rare.sum()), 1e-6)


def joined(
    question: Text, passage: Text, lexicon: Lexicon, rarity: Rarity, room: tuple[int, int], keep: Sequence[int] = ()
) -> Pair:
    """Return a question joined with its passage.

    Args:
        question: the question.
        passage: the passage.
        lexicon: that both were cut by.
        rarity: of words in their language.
        room: number of positions for the question and for the passage.
        keep: the numbers of sentences that are kept in any case.
    """
    q_rare, p_rare = rarity.of(question), rarity.of(passage)
    alike = lexicon.match(question) @ lexicon.match(passage).T
    same = question.gram[:, None] == passage.gram[None]
    share = shares_of(question, passage, q_rare, alike)
    at, place = _kept(passage, share, room[1], keep)
    shown = min(len(question.gram), room[0])
    largest = max(float(share.max()), 1e-6)
    resembling = np.where(alike > ALIKE_FROM, alike, 0)
    overlap = np.maximum(same.max(0), resembling.max(0)) * p_rare

    def rows(text: Text, rare: Array, axis: int, own: Array, of_passage: list[Array]) -> Array:
        count = len(rare)
        where = [np.full(count, float(axis == 1)), np.full(count, float(axis == 0))]
        matched = [same.max(axis), alike.max(axis), rare]
        position = np.arange(count) / count
        return np.column_stack([*where, *matched, *of_passage, text.shape, position])[own]

    nothing = [np.zeros(len(q_rare))] * 4
    in_sentence = share[passage.sentence]
    found = [in_sentence / largest, in_sentence >= largest, _faded(overlap), _faded(overlap[::-1])[::-1]]
    numbers = np.zeros((sum(room), len(FEATURES)), dtype=np.float32)
    gram, word = np.zeros(sum(room), dtype=np.int64), np.full(room[1], -1, dtype=np.int64)
    numbers[:shown] = rows(question, q_rare, 1, np.arange(shown), nothing)
    numbers[room[0] + place] = rows(passage, p_rare, 0, at, found)
    gram[:shown] = question.gram[:shown]
    gram[room[0] + place] = passage.gram[at]
    word[place] = at
    return Pair(numbers, gram, word)


def _kept(passage: Text, share: Array, room: int, keep: Sequence[int]) -> tuple[Array, Array]:
    """Return the numbers of the words that fit ``room``, and their positions; one is free where words are left out.

    They are whole sentences by falling share, those to ``keep`` first, of which the last may be cut.
    """
    count = len(passage.gram)
    if count <= room:
        return np.arange(count), np.arange(count)
    share = share.copy()
    share[list(keep)] = np.inf
    kept = np.zeros(count, dtype=bool)
    for sentence in np.argsort(-share, kind="stable"):
        own = np.flatnonzero(passage.sentence == sentence)
        # A free position for each of the sentences that are kept is enough.
        free = room - int(kept.sum()) - len(set(passage.sentence[kept].tolist()))
        kept[own[: max(free, 0)]] = True
    at = np.flatnonzero(kept)
    return at, np.arange(len(at)) + (np.diff(at, prepend=at[0]) > 1).cumsum()
