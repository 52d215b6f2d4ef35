"""A language model that counts n-grams, to compare learners with.

Witten and Bell 1991, https://doi.org/10.1109/18.87000, method C, interpolated as in Chen and Goodman 1999
(https://doi.org/10.1006/csla.1999.0128, §2.4):

    p(w | h) = (c(h w) + t(h) · p(w | h')) / (c(h) + t(h))

c counts, t(h) is the number of different tokens that follow the history h, and h' is h without its first token. After a
history that never occurs, p(w | h) = p(w | h'). The empty history is followed by all ids alike before anything is
counted.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from metarun.data.pieces import BOUNDARY, RESERVED

Ids = NDArray[np.int64]


class Counted(NamedTuple):
    """How often what occurs: sorted codes, and the number of each."""

    codes: Ids
    counts: Ids

    def of(self, codes: Ids) -> Ids:
        """Return how often each of ``codes [codes]`` occurs."""
        if not len(self.codes):
            return np.zeros_like(codes)
        # Sorted codes are looked up in the order in which memory holds the answers, which is several times faster.
        different, back = np.unique(codes, return_inverse=True)
        place = np.searchsorted(self.codes, different).clip(max=len(self.codes) - 1)
        found: Ids = np.where(self.codes[place] == different, self.counts[place], 0)[back]
        return found


def counted(codes: Ids) -> Counted:
    """Count codes."""
    return Counted(*np.unique(codes, return_counts=True))


class Order(NamedTuple):
    """Counts of the n-grams of one length."""

    pairs: Counted
    """Histories with the token after them."""
    histories: Counted
    types: Counted
    """Each history, and how many different tokens follow it."""


class Ngrams:
    """Counts of a set of texts.

    Args:
        texts: rows of ids ``[texts, columns]``, padded with 0, without boundaries before them.
        order: length of the longest n-gram.
        ids: number of ids; ``ids ** order`` must be below 2⁶³.
    """

    def __init__(self, texts: Ids, order: int, ids: int) -> None:
        self.order, self.ids = order, ids
        self.orders = [self._counts(*self._codes(texts, n)) for n in range(1, order + 1)]

    def _codes(self, texts: Ids, n: int) -> tuple[Ids, Ids]:
        """Return codes of the histories of length n − 1 and of the n-grams of each token: both ``[texts, columns]``."""
        padded = np.concatenate([np.full((len(texts), self.order - 1), BOUNDARY), texts], 1)
        history, columns = np.zeros_like(texts), texts.shape[1]
        for back in range(n - 1, 0, -1):
            first = self.order - 1 - back
            history = history * self.ids + padded[:, first : first + columns]
        return history, np.where(texts > 0, history * self.ids + texts, -1)

    def _counts(self, history: Ids, pair: Ids) -> Order:
        real = pair >= 0
        pairs = counted(pair[real])
        return Order(pairs, counted(history[real]), counted(pairs.codes // self.ids))

    def nats(self, texts: Ids, further: "Ngrams | None" = None) -> NDArray[np.float64]:
        """Return −ln p of each token ``[texts, columns]``, 0 for padding; ``further`` are counts to be added."""
        real = texts > 0
        # The end of a text and unknown characters occur too.
        p = np.full(int(real.sum()), 1 / (self.ids - RESERVED + 2))
        for n in range(1, self.order + 1):
            history, pair = (codes[real] for codes in self._codes(texts, n))
            own = self.orders[n - 1]
            seen, histories, types = own.pairs.of(pair), own.histories.of(history), own.types.of(history)
            if further is not None:
                more = further.orders[n - 1]
                new = more.pairs.codes[own.pairs.of(more.pairs.codes) == 0]
                seen, histories = seen + more.pairs.of(pair), histories + more.histories.of(history)
                types = types + counted(new // self.ids).of(history)
            total = histories + types
            p = np.where(total > 0, (seen + types * p) / np.maximum(total, 1), p)
        found = np.zeros(texts.shape)
        found[real] = -np.log(p)
        return found
