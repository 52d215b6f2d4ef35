"""Average precision and recall of boxes that were found, by the rules of COCO.

Lin et al. 2014, "Microsoft COCO: Common Objects in Context", https://arxiv.org/abs/1405.0312, as its official code
computes them (https://github.com/cocodataset/cocoapi, ``pycocotools/cocoeval.py``), without crowds and for any area.
In each picture the boxes found of a class are taken by falling score; each is a hit if a true box of the class that no
earlier one has taken overlaps it enough, and takes the one that overlaps it most. Average precision is the mean, over
101 levels of recall, of the highest precision at that recall or a higher one. Average recall is the mean over the
thresholds of overlap of the share of true boxes that were hit.

All functions work under ``torch.func.vmap``. They compute in float64, since whether a recall of 0.35 reaches the level
of 0.35 depends on the last digit.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from metarun.targets.metric import Metric

AP50 = Metric("ap50", higher_is_better=True, percent=True)
"""Average precision where boxes must overlap by half."""
AP = Metric("ap50-95", higher_is_better=True, percent=True)
"""Average precision, averaged over thresholds of overlap from 0.5 to 0.95."""
AR = Metric("ar", higher_is_better=True, percent=True)
"""Average recall over the same thresholds."""

THRESHOLDS = tuple(float(t) for t in np.linspace(0.5, 0.95, 10))
"""The least overlap of a hit."""
LEVELS = torch.from_numpy(np.linspace(0.0, 1.0, 101))
"""Levels of recall, with the rounding of the official code."""
TINY = float(np.spacing(1))


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Return intersection over union of boxes ``a [..., n, 4]`` and ``b [..., m, 4]``: ``[..., n, m]``.

    A box is left, top, right, bottom.
    """
    a, b = a[..., :, None, :].double(), b[..., None, :, :].double()
    sides = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    both = sides.prod(-1)
    either = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - both
    return both / torch.where(either > 0, either, 1.0)


def hits(close: Tensor, thresholds: tuple[float, ...] = THRESHOLDS) -> Tensor:
    """Return which boxes found are hits ``[thresholds, pictures, found]``.

    Args:
        close: overlap of the boxes found, by falling score, with the true ones ``[pictures, found, true]``; −1 where
            the classes differ or one of the two is padding.
        thresholds: least overlaps.
    """
    least = close.new_tensor([min(t, 1 - 1e-10) for t in thresholds])[:, None, None]
    number = torch.arange(1, close.shape[-1] + 1, device=close.device)
    free = close.new_ones(len(thresholds), close.shape[0], close.shape[2], dtype=torch.bool)
    found = []
    for one in close.unbind(1):
        rivals = torch.where(free, one, -1.0)
        best = rivals.amax(-1, keepdim=True)
        hit = best >= least
        # Of true boxes that overlap equally, the last is taken, as in the official code.
        place = torch.where(rivals == best, number, 0)
        taken = hit & (place == place.amax(-1, keepdim=True))
        free = free & ~taken
        found.append(hit[..., 0])
    return torch.stack(found, -1)


def first_reaching(rising: Tensor, levels: Tensor) -> Tensor:
    """Return the first position in ``rising [..., n]`` that reaches each of ``levels [m]``, or n: ``[..., m]``.

    It is ``torch.searchsorted``, which ``vmap`` does not know.
    """
    size = rising.shape[-1]
    low = torch.zeros(*rising.shape[:-1], len(levels), dtype=torch.long, device=rising.device)
    high = low + size
    for _ in range(size.bit_length()):
        middle = (low + high) // 2
        below = rising.gather(-1, middle.clamp(max=size - 1)) < levels
        going = low < high
        low, high = torch.where(going & below, middle + 1, low), torch.where(going & ~below, middle, high)
    return low


def precision_and_recall(score: Tensor, hit: Tensor, counted: Tensor, positives: Tensor) -> tuple[Tensor, Tensor]:
    """Return average precision and recall of each class at each threshold ``[classes, thresholds]``.

    Both are 0 without positives.

    Args:
        score: of all boxes found, picture by picture ``[found]``.
        hit: whether each is a hit ``[thresholds, found]``.
        counted: whether each is of the class, and no padding ``[classes, found]``.
        positives: number of true boxes of each class ``[classes]``.
    """
    order = torch.where(counted, score.double(), -torch.inf).argsort(stable=True, dim=-1, descending=True)
    counted = counted.gather(-1, order)[:, None]
    right = hit[None].expand(len(order), -1, -1).gather(-1, order[:, None].expand(-1, len(hit), -1)) & counted
    true, false = right.double().cumsum(-1), (counted & ~right).double().cumsum(-1)
    number = positives.double()[:, None]
    recall = true / number.clamp(min=1)[..., None]
    precision = (true / (true + false + TINY)).flip(-1).cummax(-1).values.flip(-1)
    at = first_reaching(recall, LEVELS.to(score.device))
    # One more entry, for levels that are never reached.
    precision = torch.cat([precision, torch.zeros_like(precision[..., :1])], -1)
    found: Tensor = precision.gather(-1, at).mean(-1)
    return found * (number > 0), recall[..., -1]


def mean_over_classes(values: Tensor, positives: Tensor) -> Tensor:
    """Return the mean of ``values [classes, thresholds]`` over thresholds and over the classes that have true boxes."""
    there = (positives > 0).double()
    return (values.mean(-1) * there).sum() / there.sum().clamp(min=1)


def pooled_metrics() -> tuple[Metric, ...]:
    """Return the metrics of `pooled_scores`."""
    return tuple(metric._replace(name=f"pooled-{metric.name}") for metric in (AP50, AP, AR))


def pooled_scores(counts: Tensor) -> dict[str, float]:
    """Return average precision and recall of the boxes found in all tasks, ranked together whatever their class.

    Args:
        counts: ``[tasks, 1 + found, 1 + thresholds]``. The first row of a task has the number of true boxes in its
            first column; each other row has the score of a box found, negative for padding, and 1 at the thresholds at
            which it is a hit.
    """
    counted: np.ndarray[Any, Any] = counts.numpy()
    positives = counted[:, 0, 0].sum()
    found = counted[:, 1:].reshape(-1, counted.shape[-1])
    found = found[found[:, 0] >= 0]
    found = found[np.argsort(-found[:, 0], kind="stable")]
    levels, precisions, recalls = LEVELS.numpy(), list[float](), list[float]()
    for hit in found[:, 1:].T:
        # Where the c-th hit is, there are c hits.
        at = np.flatnonzero(hit)
        true = np.arange(1, len(at) + 1)
        precision = np.maximum.accumulate((true / (at + 1))[::-1])[::-1]
        first = np.searchsorted(true / max(positives, 1), levels)
        precisions.append(float(np.append(precision, 0.0)[np.minimum(first, len(at))].mean()))
        recalls.append(len(at) / max(positives, 1))
    values = (precisions[0], float(np.mean(precisions)), float(np.mean(recalls)))
    return {metric.name: value for metric, value in zip(pooled_metrics(), values, strict=True)}
