"""What can be said of entities without a learner, from the support set of a task alone."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from metarun.contracts import Tree
from metarun.data.portable import portable
from metarun.data.tokens import COLUMNS
from metarun.nn.ops import unit_rows


@portable
def gazetteer(support: Tree, x: Any) -> Tensor:
    """Return the logarithm of how often each word has each tag in the support set ``[sentences, words, tags]``.

    Half an occurrence outside of entities is added, so that words which the support set lacks are outside. Tags that a
    word never has count as a millionth, so that the logarithms are logits.
    """
    words, known = x[..., 0].flatten(), support["x"][..., 0].flatten()  # ids, which are whole numbers
    same = (words[:, None] == known).to(support["y"].dtype)
    times: Tensor = (same @ support["y"].flatten(0, 1)).view(*x.shape[:2], -1)
    outside: Tensor = pad(times.new_full((1,), 0.5), (0, times.shape[-1] - 1))
    votes: Tensor = times + outside
    return votes.clamp(min=1e-6).log()


@portable
@dataclass(frozen=True)
class Logistic:
    """Logistic regression of tags on what a word and its two neighbours look like.

    Features are hashed into ``width`` columns and scaled to length one, and a 1 is appended. The objective is the sum
    of the cross-entropies plus strength / 2 · ‖W‖². Steps use Böhning's bound on the Hessian (1992,
    https://doi.org/10.1007/BF00048682), half of ZᵀZ for each tag, and never raise it.
    """

    strength: float = 0.003
    width: int = 1024
    steps: int = 40

    def features(self, x: Tensor) -> Tensor:
        """Return rows of words ``[sentences · words, width + 1]``; numbers of a frozen model are not looked at."""
        x = x[..., :COLUMNS].long()
        blank = torch.zeros_like(x[:, :1])
        around = torch.stack([torch.cat([blank, x[:, :-1]], 1), x, torch.cat([x[:, 1:], blank], 1)], 2)
        place = torch.arange(3, device=x.device)[:, None]
        columns = ((3 * around + place) * 2654435761 % 2**32) % self.width
        there = (around > 0).to(torch.get_default_dtype()).flatten(2).flatten(0, 1)
        rows = there.new_zeros(len(there), self.width).scatter_add(1, columns.flatten(2).flatten(0, 1), there)
        return pad(unit_rows(rows), (0, 1), value=1.0)

    def fitted(self, z: Tensor, y: Tensor) -> Tensor:
        """Return weights ``[columns, tags]`` for rows ``z [words, columns]`` with tags ``y``, zero for padding."""
        real = y.sum(-1, keepdim=True)
        identity = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
        bound = torch.linalg.cholesky(z.T @ (real * z) / 2 + self.strength * identity)
        w = z.new_zeros(z.shape[1], y.shape[1])
        for _ in range(self.steps):
            slope = z.T @ (((z @ w).softmax(-1) - y) * real) + self.strength * w
            w = w - torch.cholesky_solve(slope, bound)
        return w

    def __call__(self, support: Tree, x: Any) -> Tensor:
        """Return logits ``[sentences, words, tags]``."""
        w = self.fitted(self.features(support["x"]), support["y"].flatten(0, 1))
        return (self.features(x) @ w).view(*x.shape[:2], -1)
