"""Random numbers: generators for draws before a meta-step, and arithmetic from a seed for draws inside it.

`stream` gives a separate generator for each purpose of a run: initial weights, and tasks of training, validation and
test.

A generator keeps a state, so it works neither under ``torch.func.vmap`` nor in a recorded or compiled step. Inside a
step, a number is therefore a function of a seed and a counter: SplitMix64 (Steele, Lea, Flood 2014,
https://doi.org/10.1145/2660193.2660195). The same seed gives the same numbers on every engine and in a resumed run.

All randomness that belongs to one task (dropout, samples of a latent variable) is drawn from the task's own seed:
``drawing`` makes it the source of ``fresh_seed``, which counts the draws in program order.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from metarun.errors import UserError

STREAMS = {"weights": 0, "algorithm": 1, "train": 2, "val": 3, "test": 4, "resampling": 5}


def stream(seed: int, name: str, index: int = 0) -> torch.Generator:
    """A CPU generator for one purpose: the same (seed, name, index) always gives the same numbers."""
    state = np.random.SeedSequence([seed, STREAMS[name], index]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


GOLDEN = -7046029254386353131
"""2⁶⁴ divided by the golden ratio, the increment of SplitMix64, as a signed integer."""


def mixed(z: Tensor) -> Tensor:
    """The output function of SplitMix64: 64-bit integers → well-mixed 64-bit integers."""

    def shifted(z: Tensor, bits: int) -> Tensor:
        # A logical shift to the right: the copies of the sign bit are masked out.
        return (z >> bits) & ((1 << (64 - bits)) - 1)

    z = (z ^ shifted(z, 30)) * -4658895280553007687
    z = (z ^ shifted(z, 27)) * -7723592293110705685
    return z ^ shifted(z, 31)


def fold(seed: Tensor, index: int | Tensor) -> Tensor:
    """The seed of the ``index``-th independent stream of each ``seed [...]``: integers ``[...]``."""
    offset = (index + 1) * GOLDEN
    if isinstance(offset, int):
        # Wrapped to 64 bits here: a tensor made of a number could not be captured as a CUDA graph.
        offset = (offset + 2**63) % 2**64 - 2**63
    # Mixed twice, so that the streams of a seed share nothing with numbers drawn from the seed itself.
    return mixed(mixed(seed) + offset)


def uniform(seed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Numbers inside (0, 1) for every integer of ``seed [...]``: ``[..., *shape]``, in the default dtype."""
    # Without the mask, which changes nothing, the compiler treats the product as an index, which must not overflow in
    # C++, and computes some numbers incorrectly.
    counter = torch.arange(1, math.prod(shape) + 1, device=seed.device) & (2**62 - 1)
    z = mixed(seed[..., None] + counter * GOLDEN)
    bits = (z >> 41) & ((1 << 23) - 1)
    numbers = (bits.to(torch.get_default_dtype()) + 0.5) / 2**23
    return numbers.reshape((*seed.shape, *shape))


def normal(seed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers for every integer of ``seed [...]``: ``[..., *shape]``, in the default dtype.

    Box and Muller 1958, https://doi.org/10.1214/aoms/1177706645.
    """
    u = uniform(seed, (2, *shape))
    axis = u.ndim - len(shape) - 1
    radius, angle = u.unbind(axis)
    return (-2 * radius.log()).sqrt() * (2 * math.pi * angle).cos()


LARGEST_SUM = 8


def gamma(shape: Tensor, uniform: Tensor) -> Tensor:
    """Draw from the Gamma distribution with integer ``shape [...]`` ≥ 1, from ``uniform [..., LARGEST_SUM]``.

    Up to ``LARGEST_SUM`` the draw is a sum of that many exponential numbers. Beyond, it is the cube of a normal number
    (Wilson and Hilferty 1931), whose error there is below a thousandth.
    """
    terms = torch.arange(LARGEST_SUM, device=shape.device) < shape[..., None]
    exact = -(uniform.log() * terms).sum(-1)
    normal = (-2 * uniform[..., 0].log()).sqrt() * (2 * math.pi * uniform[..., 1]).cos()
    cube = shape * (1 - 1 / (9 * shape) + normal / (3 * shape.sqrt())) ** 3
    return torch.where(shape <= LARGEST_SUM, exact, cube.clamp_min(1e-6))


@dataclass
class Draws:
    """The source of one task's random numbers while it is adapted and scored."""

    seed: Tensor | None
    """An integer, or None where the caller has no seed to give."""
    training: bool
    """Whether this is meta-training, where dropout is on."""
    count: int = 0
    """How many seeds have been handed out."""


current: ContextVar[Draws | None] = ContextVar("draws", default=None)


@contextmanager
def drawing(seed: Tensor | None, training: bool) -> Iterator[None]:
    """Inside, ``fresh_seed`` draws from ``seed``, and ``in_training`` returns ``training``."""
    token = current.set(Draws(seed, training))
    try:
        yield
    finally:
        current.reset(token)


def in_training() -> bool:
    """Whether a training task is being computed; False in validation, in test and outside any task."""
    draws = current.get()
    return draws is not None and draws.training


def drawn_so_far() -> int:
    """How many seeds have been handed out for the present task; 0 outside any task."""
    draws = current.get()
    return 0 if draws is None else draws.count


@contextmanager
def drawing_again(count: int) -> Iterator[None]:
    """Inside, the seeds are those that follow the first ``count`` of the task; afterwards, they are new ones.

    What is computed several times in this way, such as a loss with dropout, is the same function every time.
    """
    draws = current.get()
    if draws is None:
        yield
        return
    before, draws.count = draws.count, count
    try:
        yield
    finally:
        draws.count = max(before, draws.count)


def fresh_seed() -> Tensor:
    """An integer that no other call for the same task returns.

    Raises:
        UserError: there is no task with a seed to draw from.
    """
    draws = current.get()
    if draws is None or draws.seed is None:
        raise UserError("Random numbers are drawn from a task's seed, and the tasks here have none: set Task.seed.")
    draws.count += 1
    return fold(draws.seed, draws.count)
