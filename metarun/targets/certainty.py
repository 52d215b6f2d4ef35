"""How good the probabilities of a classifier are, and what it confuses. Examples of weight 0 do not count."""

import torch
from torch import Tensor

from metarun.targets.metric import Metric

LOG_LOSS = Metric("negative-log-likelihood", higher_is_better=False)
CALIBRATION_ERROR = Metric("calibration-error", higher_is_better=False)
MACRO_F1 = Metric("macro-f1", higher_is_better=True, percent=True)

BINS = 15
"""Number of bins of the confidence, as in Guo et al. 2017."""


def calibration_error(probability: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Return the expected calibration error of the most likely class.

    Guo et al. 2017, https://arxiv.org/abs/1706.04599, equation 5: confidences are put into ``BINS`` equal bins
    (from, to], and the distances of mean confidence and accuracy in each bin are averaged by the weight of the bins.

    Args:
        probability: of each class ``[examples, classes]``.
        y: one-hot classes ``[examples, classes]``.
        weight: weight of each example ``[examples]``.
    """
    confidence, chosen = probability.max(-1)
    correct = y.gather(-1, chosen[:, None])[:, 0]
    bins = ((confidence * BINS).ceil() - 1).clamp(0, BINS - 1)
    member = (bins[:, None] == torch.arange(BINS, device=y.device)).to(y.dtype) * weight[:, None]
    return ((confidence - correct) @ member).abs().sum() / weight.sum()


def confusion(chosen: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Return the weight of the examples of each class that each class was chosen for: ``[classes, chosen classes]``.

    Args:
        chosen: index of the class that was chosen, −1 where none was ``[examples]``.
        y: one-hot classes ``[examples, classes]``.
        weight: weight of each example ``[examples]``.
    """
    predicted = (chosen[:, None] == torch.arange(y.shape[-1], device=y.device)).to(y.dtype)
    return (y * weight[:, None]).T @ predicted


def macro_f1(counts: Tensor) -> Tensor:
    """Return the mean F1 of the classes that were there or were chosen, from ``counts [classes, chosen classes]``.

    F1 of a class is twice its hits over the number of its examples and of the times that it was chosen.
    """
    hits, involved = counts.diagonal(), counts.sum(0) + counts.sum(1)
    f1 = 2 * hits / involved.clamp(min=1e-12)
    return f1.sum() / (involved > 0).sum().clamp(min=1)
