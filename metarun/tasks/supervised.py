"""Losses and scores of supervised tasks."""

from torch import Tensor
from torch.nn.functional import log_softmax, mse_loss

from metarun.contracts import Predict, Tree


def regression_loss(predict: Predict, data: Tree) -> tuple[Tensor, Tensor]:
    """Mean squared error, as loss and as score; ``y [examples, outputs]``."""
    loss = mse_loss(predict(data["x"]), data["y"])
    return loss, loss.detach()


def classification_loss(predict: Predict, data: Tree) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy, and accuracy as a fraction; ``y [examples, ways]`` is one-hot.

    A prediction that is not finite counts as wrong.
    """
    logits, y = predict(data["x"]), data["y"]
    loss = -(y * log_softmax(logits, -1)).sum(-1).mean()
    correct = (logits.argmax(-1) == y.argmax(-1)) & logits.isfinite().all(-1)
    return loss, correct.to(logits.dtype).mean()
