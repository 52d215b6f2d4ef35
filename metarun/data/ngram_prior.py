"""What an n-gram model expects after each token, as a table that a learner starts from.

The probabilities are those of `metarun.data.ngrams`. They depend on the longest end of the text so far, of at most
order − 1 tokens, that occurs in the counted texts: each such history is a *state*, and has a row in a table.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from metarun.data.ngrams import Ids, Ngrams
from metarun.data.pieces import BOUNDARY, RESERVED


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


def prior_of(counts: Ngrams, device: str = "cpu") -> Prior:
    """Return the table of an n-gram model."""
    lower = np.full((1, counts.ids), 1 / (counts.ids - RESERVED + 2))
    tables, histories = list[np.ndarray](), list[Ids]()
    for n, (pairs, _, types) in enumerate(counts.orders):
        codes = types.codes
        own = np.zeros((len(codes), counts.ids))
        own[np.searchsorted(codes, pairs.codes // counts.ids), pairs.codes % counts.ids] = pairs.counts
        follow = types.counts[:, None]
        before = lower[np.searchsorted(histories[-1], codes % counts.ids ** (n - 1))] if n else lower
        lower = (own + follow * before) / (own.sum(1, keepdims=True) + follow)
        tables.append(np.log(lower))
        histories.append(codes)
    return Prior(
        counts.ids,
        [torch.from_numpy(codes).to(device) for codes in histories],
        torch.from_numpy(np.concatenate(tables)).to(device, torch.get_default_dtype()),
    )
