"""What an n-gram model expects after each token, as a table that a learner starts from.

The model is interpolated modified Kneser-Ney (Chen and Goodman 1999, https://doi.org/10.1006/csla.1999.0128, §3):

    p(w | h) = (max(c(h w) − D(c(h w)), 0) + Σ_v D(c(h v)) · p(w | h')) / Σ_v c(h v)

c counts n-grams of the largest length; of a shorter one it is the number of different tokens that come before it,
unless it begins where a text begins, before which there is nothing else. D(1), D(2) and D(3 or more) follow from how
many n-grams of a length have c = 1, 2, 3 and 4. h' is h without its first token, and after a history that never occurs,
p(w | h) = p(w | h'). The shortest history is interpolated with all ids alike, of which padding is none.

Probabilities so depend on the longest end of the text so far that occurs in the counted texts: each such history is a
*state*, and has a row in a table.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metarun.data.ngrams import Ids, Ngrams, counted
from metarun.data.pieces import BOUNDARY, PADDING, RESERVED

Numbers = NDArray[np.float64]

LEAST = 1e-9
"""The smallest probability of a token, so that its logarithm is finite."""


def found_at(codes: Tensor, values: Tensor) -> Tensor:
    """Return where each of ``values`` stands among rising ``codes [codes]``, −1 where it does not; works under vmap."""
    low, high = torch.zeros_like(values), torch.full_like(values, len(codes) - 1)
    for _ in range(max(len(codes) - 1, 1).bit_length()):
        middle = (low + high) // 2
        above = codes[middle] < values
        low, high = torch.where(above, middle + 1, low), torch.where(above, high, middle)
    low = low.clamp(max=len(codes) - 1)
    return torch.where(codes[low] == values, low, -1)


@dataclass(frozen=True)
class Prior:
    """A table of next tokens for each history; created by `prior_of`."""

    ids: int
    """Number of ids."""
    histories: Sequence[Tensor]
    """Codes of the histories of length 0, 1, …, each rising; the first has a single one."""
    table: Tensor
    """ln p of each next token after each history ``[states, ids]``, shorter histories first."""

    def states(self, x: Tensor) -> Tensor:
        """Return the row of ``table`` that tells the next token at each position of ``x [..., columns]``.

        ``x`` are tokens so far, the first of which is a boundary; works under vmap.
        """
        state = torch.zeros_like(x)
        code, power, first = torch.zeros_like(x), 1, 1
        earlier = x
        for codes in self.histories[1:]:
            # Before the first token are further boundaries, and before what is padding nothing matters.
            code = code + earlier * power
            place = found_at(codes, code)
            state = torch.where(place >= 0, first + place, state)
            first, power = first + len(codes), power * self.ids
            earlier = torch.cat([torch.full_like(earlier[..., :1], BOUNDARY), earlier[..., :-1]], -1)
        return state


def discounts(counts: Numbers) -> Numbers:
    """Return D(0), D(1), D(2) and D(3 or more) for the counts of the n-grams of one length.

    Where no n-gram has one of the counts that these follow from, they are those of absolute discounting by a half.
    """
    n1, n2, n3, n4 = ((counts == k).sum() for k in range(1, 5))
    if not n1 * n2 * n3 * n4:
        return np.array([0.0, 0.5, 0.5, 0.5])
    y = n1 / (n1 + 2 * n2)
    found: Numbers = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    return found.clip(0, [0, 1, 2, 3])


def adjusted(counts: Ngrams, n: int) -> Numbers:
    """Return the counts c of the n-grams of length ``n``, in the order of their codes."""
    codes, ids = counts.orders[n - 1].pairs.codes, counts.ids
    seen = counts.orders[n - 1].pairs.counts
    if n == counts.order:
        return seen.astype(float)
    before = counted(counts.orders[n].pairs.codes % ids**n).of(codes)
    begins = (codes // ids ** (n - 1) == BOUNDARY) & (n > 1)
    return np.where(begins, seen, before).astype(float)


def prior_of(counts: Ngrams, device: str = "cpu") -> Prior:
    """Return the table of the n-gram model with these counts."""
    ids = counts.ids
    # The end of a text and unknown characters occur too.
    lower = np.full((1, ids), 1 / (ids - RESERVED + 2))
    lower[:, PADDING] = 0
    tables, histories = list[Numbers](), list[Ids]()
    for n, (pairs, _, types) in enumerate(counts.orders, 1):
        codes, c = types.codes, adjusted(counts, n)
        off = discounts(c)[c.clip(max=3).astype(int)]
        row = np.searchsorted(codes, pairs.codes // ids)
        own = np.zeros((len(codes), ids))
        own[row, pairs.codes % ids] = c - off
        total, left = (np.bincount(row, numbers, len(codes))[:, None] for numbers in (c, off))
        before = lower[np.searchsorted(histories[-1], codes % ids ** (n - 2))] if n > 1 else lower
        lower = (own + left * before) / total
        tables.append(np.log(lower.clip(min=LEAST)))
        histories.append(codes)
    return Prior(
        ids,
        [torch.from_numpy(codes).to(device) for codes in histories],
        torch.from_numpy(np.concatenate(tables)).to(device, torch.get_default_dtype()),
    )
