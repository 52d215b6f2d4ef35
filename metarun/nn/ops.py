"""Small functions that several algorithms and models share, correct under the transforms of ``torch.func``."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor


def channels_last(x: Tensor) -> Tensor:
    """Images ``[n, channels, height, width]`` with channels innermost in memory.

    This also works under ``torch.func.vmap``, which does not support torch's own memory format.
    """
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def unit_rows(x: Tensor) -> Tensor:
    """``x [n, d]`` with rows of length one; a row of zeros stays one, with finite derivatives."""
    return x / (x.square().sum(1, keepdim=True) + 1e-12).sqrt()


MOST_DIFFERENCES = 2**22
"""Above so many numbers, distances are computed without the differences of all pairs of rows."""


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared Euclidean distance of every row of ``a [n, d]`` to every row of ``b [m, d]``: ``[n, m]``.

    Many distances, as between the locations of pictures, are ‖a‖² + ‖b‖² − 2 a·b around the mean of ``b``, since their
    differences ``[n, m, d]`` would fill the memory.
    """
    if len(a) * b.numel() <= MOST_DIFFERENCES:
        return (a[:, None] - b[None]).square().sum(-1)
    middle = b.mean(0)
    a, b = a - middle, b - middle
    return (a.square().sum(-1)[:, None] + b.square().sum(-1) - 2 * a @ b.T).clamp(min=0)


def mean_row(z: Tensor, weight: Tensor | None) -> Tensor:
    """Mean ``[d]`` of the rows of ``z [n, d]``, each by its ``weight [n]``; None: all alike."""
    return z.mean(0) if weight is None else weight @ z / weight.sum()


def without_padding(z: Tensor, weight: Tensor | None) -> Tensor:
    """``z [n, d]`` with rows of zeros where the ``weight [n]`` is 0; None: there is no padding."""
    return z if weight is None else z * (weight > 0).to(z.dtype)[:, None]


def seen(logits: Tensor, weight: Tensor | None) -> Tensor:
    """``logits [..., n]`` for a softmax that gives nothing where the ``weight [n]`` is 0; None: there is no padding."""
    return logits if weight is None else logits.masked_fill(weight == 0, -math.inf)


def kept(weight: Tensor, new: Any, old: Any) -> Any:
    """The ``new`` state of a recurrent network (a tuple of tensors), or the ``old`` one after padding of weight 0."""
    states = [torch.where(weight > 0, after, before) for after, before in zip(new, old, strict=True)]
    return type(new)(*states) if hasattr(new, "_fields") else tuple(states)


def class_means(z: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean ``[ways, d]`` of the rows of ``z [n, d]`` of each class, from one-hot ``y [n, ways]``, zero for padding.

    Where there is padding (a ``weight [n]``), a class may be absent: its mean is zero.
    """
    counts = y.sum(0)[:, None]
    return (y.T @ z) / (counts if weight is None else counts.clamp(min=1))


def multi_head(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    heads: int,
    weight: Tensor | None = None,
    nothing: Tensor | None = None,
) -> Tensor:
    """Multi-head scaled dot-product attention of ``queries [m, width]`` to ``keys`` and ``values [n, width]``.

    Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, §3.2. The result ``[m, width]`` concatenates the heads,
    without the output projection. Values whose ``weight [n]`` is 0 are ignored. With ``nothing [heads]``, a query may
    also attend to a value of zeros, whose logit that is.
    """

    def by_head(z: Tensor) -> Tensor:
        return z.view(len(z), heads, -1).movedim(1, 0)

    q, k, v = map(by_head, (queries, keys, values))
    logits = seen(q @ k.transpose(1, 2) / math.sqrt(k.shape[-1]), weight)
    if nothing is not None:
        logits = torch.cat([logits, nothing[:, None, None].expand(-1, len(queries), 1)], -1)
    return torch.cat((logits.softmax(-1)[..., : len(keys)] @ v).unbind(0), -1)


@contextmanager
def full_precision(like: Tensor) -> Iterator[None]:
    """Inside, autocast is off on the device of ``like``."""
    device = like.device.type
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
        yield


def lstm(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """One step of an LSTM (Hochreiter and Schmidhuber 1997): hidden state and cell ``[..., width]``.

    ``gates [..., 4 width]`` are linear in the input and the hidden state. Written out, so that it can be mapped and
    differentiated twice.
    """
    enter, keep, leave, new = gates.chunk(4, -1)
    # A forget-gate bias of 1, so that the cell remembers before anything is learned (Gers et al. 2000).
    cell = (keep + 1).sigmoid() * cell + enter.sigmoid() * new.tanh()
    return leave.sigmoid() * cell.tanh(), cell


def one_hot(index: Tensor, size: int, like: Tensor) -> Tensor:
    """One-hot ``[..., size]`` of ``index [...]`` in the dtype of ``like``; torch's fails in ``grad`` under ``vmap``."""
    return (index[..., None] == torch.arange(size, device=index.device)).to(like.dtype)
