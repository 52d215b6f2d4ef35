"""Embeddings, bilinear products, distances, PReLU and hard sigmoids by plain formulas."""

import torch
import torch.nn.functional as F
from torch import Tensor

from metarun.errors import UserError


def prelu(input: Tensor, weight: Tensor) -> Tensor:
    """He et al. 2015, https://arxiv.org/abs/1502.01852, equation 1; arguments of ``F.prelu``.

    Under two nested vmaps, torch's own derivative takes the wrong axis for the channels.
    """
    slope = weight.view(-1, *[1] * (input.ndim - 2)) if weight.numel() > 1 and input.ndim > 1 else weight
    return torch.where(input > 0, input, slope * input)


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """Arguments of ``F.hardsigmoid``, whose own second derivative is missing."""
    out = F.relu6(input + 3) / 6
    return input.copy_(out) if inplace else out


def cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str | None = None) -> Tensor:
    """Distances of rows ``[..., n, d]`` and ``[..., m, d]``; arguments of ``torch.cdist``, which has one derivative."""
    out: Tensor = torch.linalg.vector_norm(x1[..., :, None, :] - x2[..., None, :, :], ord=p, dim=-1)
    return out


def pdist(input: Tensor, p: float = 2.0) -> Tensor:
    """Distances of all pairs of rows ``[n, d]``; arguments of ``F.pdist``, which has one derivative."""
    first, second = torch.triu_indices(len(input), len(input), 1, device=input.device)
    out: Tensor = torch.linalg.vector_norm(input[first] - input[second], ord=p, dim=-1)
    return out


def bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Arguments of ``F.bilinear``."""
    out = torch.einsum("...i,oij,...j->...o", input1, weight, input2)
    return out if bias is None else out + bias


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Rows of ``weight``; arguments of ``F.embedding``. The row of padding gets no gradient."""
    if max_norm is not None or scale_grad_by_freq or sparse:
        raise UserError(
            "nn.Embedding with max_norm, scale_grad_by_freq or sparse is not supported here, since its gradient is not "
            "that of its output; leave them out."
        )
    out = F.embedding(input, weight)
    if padding_idx is None:
        return out
    return torch.where((input == padding_idx % len(weight))[..., None], out.detach(), out)


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Sums, means or maxima of rows of ``weight``; arguments of ``F.embedding_bag``, for bags of equal size."""
    if offsets is not None:
        raise UserError("nn.EmbeddingBag with offsets is not supported here: give it bags of one size, padded.")
    rows = embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    counts = torch.ones_like(input, dtype=rows.dtype)
    if padding_idx is not None:
        counts = (input != padding_idx % len(weight)).to(rows.dtype)
    if mode == "max":
        rows = rows.masked_fill(counts[..., None] == 0, -torch.inf)
        # A bag that contains only padding is zero.
        return rows.amax(-2).masked_fill((counts.sum(-1) == 0)[..., None], 0.0)
    factors = counts if per_sample_weights is None else counts * per_sample_weights
    total = (rows * factors[..., None]).sum(-2)
    return total if mode == "sum" else total / counts.sum(-1, keepdim=True).clamp(min=1)
