"""Dropout and other random numbers of a forward pass, drawn from the task's seed (`metarun.random`).

Dropout is on only in meta-training; in validation and test it is off, as if ``eval()`` had been called.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metarun import random
from metarun.errors import UserError


def kept(input: Tensor, p: float, shape: tuple[int, ...]) -> Tensor:
    """A mask of ``shape``, drawn from the task's seed: 1 with probability 1 − ``p``, and 0 otherwise."""
    return (random.uniform(random.fresh_seed(), shape).to(input.device) >= p).to(input.dtype)


def changed(input: Tensor, scale: Tensor, shift: Tensor | float, inplace: bool) -> Tensor:
    """``input · scale + shift``, in place if asked for."""
    return input.mul_(scale).add_(shift) if inplace else input * scale + shift


def dropped(input: Tensor, p: float, training: bool, inplace: bool, shape: tuple[int, ...], alpha: bool) -> Tensor:
    """Dropout with one independent decision per element of ``shape``, which broadcasts over ``input``.

    Srivastava et al. 2014; with ``alpha`` as Klambauer et al. 2017 (https://arxiv.org/abs/1706.02515, §5), which keeps
    mean 0 and variance 1.
    """
    if not 0 <= p <= 1:
        raise UserError(f"The probability of dropout must be from 0 to 1, not {p}.")
    if not (training and random.in_training()) or p == 0:
        return input
    if p == 1:
        return changed(input, torch.zeros_like(input), 0.0, inplace)
    mask = kept(input, p, shape)
    if not alpha:
        return changed(input, mask / (1 - p), 0.0, inplace)
    low = -1.7580993408473766
    scale = (1 - p + p * (1 - p) * low**2) ** -0.5
    return changed(input, scale * mask, scale * low * (1 - mask) - p * scale * low, inplace)


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Arguments of ``F.dropout``."""
    return dropped(input, p, training, inplace, tuple(input.shape), False)


def alpha_dropout(input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False) -> Tensor:
    """Arguments of ``F.alpha_dropout``."""
    return dropped(input, p, training, inplace, tuple(input.shape), True)


def of_features(input: Tensor, spatial: int | None) -> tuple[int, ...]:
    """The shape with one element per channel and example; ``spatial`` tells whether the batch axis is missing."""
    leading = 1 if spatial is not None and input.ndim == spatial + 1 else 2
    return (*input.shape[:leading], *[1] * (input.ndim - leading))


def dropout_of_features(spatial: int | None, alpha: bool) -> Callable[..., Tensor]:
    """``F.dropout1d`` and its siblings for inputs with ``spatial`` axes after the channels."""

    def drop(input: Tensor, p: float = 0.5, training: bool = not alpha, inplace: bool = False) -> Tensor:
        return dropped(input, p, training, inplace, of_features(input, spatial), alpha)

    return drop


def rrelu(
    input: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, inplace: bool = False
) -> Tensor:
    """Randomised leaky ReLU (Xu et al. 2015, https://arxiv.org/abs/1505.00853); arguments of ``F.rrelu``."""
    slope: Tensor | float = (lower + upper) / 2
    if training and random.in_training():
        slope = lower + (upper - lower) * random.uniform(random.fresh_seed(), tuple(input.shape)).to(input)
    out = torch.where(input >= 0, input, slope * input)
    return input.copy_(out) if inplace else out


def like_options(input: Tensor, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a call, with dtype and device of ``input`` unless they name others."""
    return {**options, "dtype": options.get("dtype") or input.dtype, "device": options.get("device") or input.device}


def drawn(
    numbers: Callable[[Tensor, tuple[int, ...]], Tensor], size: tuple[Any, ...], options: dict[str, Any]
) -> Tensor:
    """Random numbers from the task's seed.

    A call may be ``torch.rand(2, 3)``, ``torch.rand((2, 3))`` or ``torch.rand(size=(2, 3))``.

    Raises:
        UserError: the call asks for what is not drawn here.
    """
    refuse_options(options)
    if not size and "size" in options:
        size = (options["size"],)
    shape = tuple(size[0]) if len(size) == 1 and isinstance(size[0], tuple | list) else size
    whole = tuple(map(int, shape))
    return numbers(random.fresh_seed(), whole).to(dtype=options.get("dtype"), device=options.get("device"))


def refuse_options(options: dict[str, Any]) -> None:
    """Raise an error if random numbers are to be of another kind, from another source or at another place.

    Raises:
        UserError: they are.
    """
    if options.get("out") is not None:
        raise UserError("Random numbers cannot be written to a tensor with out= here; take what the function returns.")
    if options.get("generator") is not None:
        raise UserError(
            "Random numbers are drawn from the task's seed here, not from a generator; leave generator= out, and keep "
            "numbers that shall stay the same in a buffer."
        )
    if (dtype := options.get("dtype")) is not None and not dtype.is_floating_point:
        raise UserError(
            f"Random numbers are real numbers with a point here, not {dtype}; draw them so, and convert them."
        )


def rand(*size: Any, **options: Any) -> Tensor:
    """``torch.rand`` from the task's seed."""
    return drawn(random.uniform, size, options)


def randn(*size: Any, **options: Any) -> Tensor:
    """``torch.randn`` from the task's seed."""
    return drawn(random.normal, size, options)


def rand_like(input: Tensor, **options: Any) -> Tensor:
    """``torch.rand_like`` from the task's seed."""
    return drawn(random.uniform, tuple(input.shape), like_options(input, options))


def randn_like(input: Tensor, **options: Any) -> Tensor:
    """``torch.randn_like`` from the task's seed."""
    return drawn(random.normal, tuple(input.shape), like_options(input, options))


def bernoulli(input: Tensor, p: float | Tensor | None = None, *, generator: Any = None, out: Any = None) -> Tensor:
    """``torch.bernoulli`` from the task's seed; ``input`` contains probabilities, unless all are ``p``."""
    refuse_options({"generator": generator, "out": out})
    chance = input if p is None else p
    # Compared as they are drawn: in the type of the result, they might all be 0.
    return (random.uniform(random.fresh_seed(), tuple(input.shape)).to(input.device) < chance).to(input.dtype)
