"""Normalisation by plain formulas, which can be differentiated twice under ``torch.func``."""

import torch
from torch import Tensor, nn

from metarun.errors import UserError
from metarun.nn.padding import weight_of_rows


def normalised(x: Tensor, dims: tuple[int, ...], epsilon: float) -> Tensor:
    """``x`` with mean 0 and variance 1 over ``dims``."""
    # One centred copy serves both variance and output. In second order this is a tenth faster than torch.var_mean,
    # whose derivative computes the mean again.
    centred = x - x.mean(dims, keepdim=True)
    return centred * torch.rsqrt((centred * centred).mean(dims, keepdim=True) + epsilon)


def along_channels(vector: Tensor, x: Tensor) -> Tensor:
    """``vector [channels]`` in a shape that broadcasts over ``x [batch, channels, ...]``."""
    return vector.view(-1, *[1] * (x.ndim - 2))


def scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """``x [batch, channels, ...]`` times ``weight [channels]`` plus ``bias [channels]``, where they are given."""
    x = x if weight is None else x * along_channels(weight, x)
    return x if bias is None else x + along_channels(bias, x)


def with_variance(
    centred: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float
) -> Tensor:
    """``centred [batch, channels, ...]`` over its standard deviation, then scaled and shifted by the parameters."""
    scale = torch.rsqrt(variance + epsilon)
    return scaled(centred, scale if weight is None else scale * weight, bias)


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of every channel of ``x [batch, channels, ...]``, over what is no padding."""
    dims = tuple(d for d in range(x.ndim) if d != 1)
    weight = weight_of_rows(len(x))
    if weight is not None:
        share = (weight / (weight.sum() * x[0, 0].numel())).view(-1, *[1] * (x.ndim - 1))
        mean = (x * share).sum(dims)
        return mean, ((x - along_channels(mean, x)).square() * share).sum(dims)
    mean = x.mean(dims)
    centred = x - along_channels(mean, x)
    return mean, (centred * centred).mean(dims)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167; arguments of ``F.batch_norm``."""
    if running_mean is not None and running_var is not None and (not training or all_frozen(weight, bias)):
        return with_variance(input - along_channels(running_mean, input), running_var, weight, bias, eps)
    if input.numel() == input.shape[1]:
        raise UserError(
            "Batch normalisation in a batch of one value per channel has no variance to divide by; give tasks more "
            "examples, or take another normalisation."
        )
    mean, variance = batch_statistics(input)
    return with_variance(input - along_channels(mean, input), variance, weight, bias, eps)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Ulyanov et al. 2016, https://arxiv.org/abs/1607.08022; arguments of ``F.instance_norm``."""
    if running_mean is not None and running_var is not None and (not use_input_stats or all_frozen(weight, bias)):
        return with_variance(input - along_channels(running_mean, input), running_var, weight, bias, eps)
    if input.numel() == input.shape[0] * input.shape[1]:
        raise UserError(
            "Instance normalisation of one value per channel and example has no variance to divide by; give it larger "
            "inputs, or take another normalisation."
        )
    return scaled(normalised(input, tuple(range(2, input.ndim)), eps), weight, bias)


def all_frozen(*parameters: Tensor | None) -> bool:
    """Whether there are parameters and all of them are frozen."""
    present = [p for p in parameters if p is not None]
    return bool(present) and all(isinstance(p, nn.Parameter) and not p.requires_grad for p in present)


def layer_norm(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Ba et al. 2016, https://arxiv.org/abs/1607.06450; arguments of ``F.layer_norm``."""
    out = normalised(input, tuple(range(-len(normalized_shape), 0)), eps)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Salimans and Kingma 2016, https://arxiv.org/abs/1602.07868: ``g v / ‖v‖``, norms over all axes but ``dim``."""
    dims = [d for d in range(v.ndim) if d != dim % v.ndim] if dim != -1 else list(range(v.ndim))
    return v * (g / v.square().sum(dims, keepdim=True).sqrt())
