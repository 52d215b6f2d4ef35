"""Attention by its plain formula, since the fused kernels have no second derivative."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metarun.errors import UserError
from metarun.nn.noise import dropped


def attention_weights(query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Softmax of scaled dot products ``[..., queries, keys]``; ``mask`` is added, or is True where they count.

    All weights of a query that may see no key are 0, as in torch's own.
    """
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = query @ key.transpose(-2, -1) * factor
    if mask is None:
        return scores.softmax(-1)
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    blind = scores.amax(-1, keepdim=True) == -torch.inf
    return scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, equation 1; arguments of torch's own function."""
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if enable_gqa:
        times = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(times, -3), value.repeat_interleave(times, -3)
    weights = attention_weights(query, key, attn_mask, scale)
    return dropped(weights, dropout_p, True, False, tuple(weights.shape), False) @ value


def blocked(mask: Tensor | None, like: Tensor) -> Tensor | float:
    """A mask of ``nn.MultiheadAttention``, where True means blocked, as numbers to be added."""
    if mask is None:
        return 0.0
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else mask


def multi_head_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Vaswani et al. 2017, §3.2.2; arguments and results of ``F.multi_head_attention_forward``."""
    if static_k is not None or static_v is not None or bias_k is not None or bias_v is not None or add_zero_attn:
        raise UserError(
            "nn.MultiheadAttention with add_bias_kv, add_zero_attn or static keys is not supported here; leave them "
            "out."
        )
    batched = query.ndim == 3
    if not batched:
        query, key, value = (x[:, None] for x in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
    if use_separate_proj_weight:
        in_weights: tuple[Any, ...] = (q_proj_weight, k_proj_weight, v_proj_weight)
    else:
        assert in_proj_weight is not None
        in_weights = in_proj_weight.chunk(3)
    in_biases: tuple[Any, ...] = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)

    def heads(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``[steps, batch, width]`` → ``[batch, heads, steps, width of a head]``."""
        z = F.linear(x, weight, bias)
        return z.view(*z.shape[:2], num_heads, -1).permute(1, 2, 0, 3)

    q, k, v = (heads(x, w, b) for x, w, b in zip((query, key, value), in_weights, in_biases, strict=True))
    mask = blocked(attn_mask, q)
    if isinstance(mask, Tensor) and mask.ndim == 3:
        mask = mask.view(-1, num_heads, *mask.shape[1:])
    padding = blocked(key_padding_mask, q)
    if isinstance(padding, Tensor):
        mask = mask + padding[:, None, None]
    if is_causal and attn_mask is None:
        raise UserError("nn.MultiheadAttention with is_causal=True needs attn_mask, as torch's own does.")
    weights = attention_weights(q, k, mask if isinstance(mask, Tensor) else None, None)
    weights = dropped(weights, dropout_p, training, False, tuple(weights.shape), False)
    out = F.linear((weights @ v).permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias)
    shown = None
    if need_weights:
        shown = weights.mean(1) if average_attn_weights else weights
        shown = shown if batched else shown[0]
    return (out if batched else out[:, 0]), shown
