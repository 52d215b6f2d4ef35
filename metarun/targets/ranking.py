"""How well scores rank positives above negatives, exact where scores are tied.

A group of tied scores is a single threshold: what counts is the state at the end of the group. Sorting and running sums
give it without loops, so that these functions work under ``torch.func.vmap``. Examples of weight 0 do not count.
"""

import torch
from torch import Tensor

from metarun.targets.metric import Metric

AUROC = Metric("auroc", higher_is_better=True)
AVERAGE_PRECISION = Metric("average-precision", higher_is_better=True)
PRECISION_GAIN = Metric("average-precision-gain", higher_is_better=True)
"""Average precision minus the share of positives, which is what a random order gives."""


def caught(score: Tensor, positive: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return, by falling score: weights of positives and negatives, and how much of both each threshold lets pass."""
    score, order = score.sort(descending=True)
    own = torch.stack([weight * positive, weight * (1 - positive)])[:, order]
    last = torch.cat([score[1:] != score[:-1], score.new_ones(1, dtype=torch.bool)])
    # Running sums never fall, so that of the end of a group is the smallest among the ends from here on.
    ends = own.cumsum(-1).masked_fill(~last, torch.inf)
    passed = ends.flip(-1).cummin(-1).values.flip(-1)
    return own[0], own[1], passed[0], passed[1]


def auroc(score: Tensor, positive: Tensor, weight: Tensor) -> Tensor:
    """Return the area under the ROC curve: the share of pairs in which the positive has the higher score.

    A tie counts half (Hanley and McNeil 1982). Without positives or without negatives there is no pair, and the area
    is 0.5.

    Args:
        score: the higher, the more likely positive ``[examples]``.
        positive: 1 for positives, 0 for negatives ``[examples]``.
        weight: weight of each example ``[examples]``.
    """
    positives, negatives, _, above_or_tied = caught(score, positive, weight)
    _, _, _, below_or_tied = caught(-score, positive, weight)
    # Of the negatives, above + tied + below are all, and below + tied / 2 is what a positive wins.
    wins = (below_or_tied.flip(0) + negatives.sum() - above_or_tied) / 2
    pairs = positives.sum() * negatives.sum()
    return torch.where(pairs > 0, (positives * wins).sum() / pairs.clamp(min=1e-12), 0.5)


def average_precision(score: Tensor, positive: Tensor, weight: Tensor) -> Tensor:
    """Return the mean over positives of the precision at their score; 0 without positives.

    It is Σ (R_n − R_{n−1}) P_n over the thresholds, without interpolation. Arguments as for ``auroc``.
    """
    positives, _, true, false = caught(score, positive, weight)
    precision = true / (true + false).clamp(min=1e-12)
    return (positives * precision).sum() / positives.sum().clamp(min=1e-12)


def base_rate(positive: Tensor, weight: Tensor) -> Tensor:
    """Return the share of positives."""
    return (weight * positive).sum() / weight.sum()
