"""Normalisation that is right inside ``torch.func`` transforms."""

import torch
from torch import Tensor, nn


class BatchStatistics(nn.Module):
    """Normalise each channel of ``[batch, channels, height, width]`` by the statistics of this very batch.

    Batch normalisation (Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167) as MAML uses it: no
    running averages, in training and test alike, so the queries of a task see each other ("transductive").
    Written out, because differentiating twice through ``torch.nn.functional.batch_norm`` under
    ``torch.func.vmap`` gives a wrong gradient without a warning (tests/algos/test_meta_gradients.py).
    """

    def __init__(self, channels: int, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, channels, height, width]`` → the same shape."""
        # One centred copy serves variance and output: a tenth faster in second order than torch.var_mean, whose
        # derivative takes the mean again.
        centred = x - x.mean((0, 2, 3), keepdim=True)
        return self.normalised(centred, (centred * centred).mean((0, 2, 3)))

    def normalised(self, centred: Tensor, variance: Tensor) -> Tensor:
        """``centred [batch, channels, height, width]``, its ``variance [channels]`` made that of the parameters."""
        scale = torch.rsqrt(variance + self.epsilon) * self.weight
        return centred * scale[:, None, None] + self.bias[:, None, None]


def layer_normalised(x: Tensor, epsilon: float = 1e-5) -> Tensor:
    """``x [..., width]`` with mean 0 and variance 1 over its last axis (Ba et al. 2016,
    https://arxiv.org/abs/1607.06450).

    Written out for the same reason: torch's own gives a wrong second-order gradient under ``torch.func.vmap``.
    """
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred * centred).mean(-1, keepdim=True)
    return centred * torch.rsqrt(variance + epsilon)


class LayerStatistics(nn.Module):
    """Layer normalisation over the last axis, with a learned scale and shift of each number."""

    def __init__(self, width: int, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., width]`` → the same shape."""
        return layer_normalised(x, self.epsilon) * self.weight + self.bias
