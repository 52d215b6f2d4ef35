"""Flow matching: a target whose outputs are velocities that carry noise to examples.

Lipman et al. 2023, "Flow Matching for Generative Modeling", https://arxiv.org/abs/2210.02747 (equation 23 with
σ_min = 0), and Liu et al. 2023, "Flow Straight and Fast", https://arxiv.org/abs/2209.03003 (equation 1). With noise
x_0 ~ N(0, 1), an example x_1 and a time t uniform on (0, 1):

    x_t = (1 − t) x_0 + t x_1
    loss = E |v(x_t, t) − (x_1 − x_0)|²,  the mean over the numbers of an example

A sample solves dx/dt = v(x, t) from noise at t = 0 to t = 1.

Because x_t is Gaussian given x_1, the same network is the denoiser x_1(x_t) = x_t + (1 − t) v of a diffusion, whose
variational bound gives bits per number (Kingma et al. 2021, "Variational Diffusion Models",
https://arxiv.org/abs/2107.00630, equations 11 and 17). With the signal-to-noise ratio t² / (1 − t)² it is

    −log p(x) ≤ E_{t ≤ T} weight · |v − (x_1 − x_0)|² · t / (1 − t)  −  E log p(x | x_T),

where x has 16 levels per number and p(x | x_T) is proportional to N(x_T; T x, (1 − T)²) over the levels (their equation
33). At t = 0 nothing is left of the example, so the prior costs no bits.

Noise and times come from the task's seed, new ones whenever the loss is computed, so that each adaptation step sees
other noise. Data that carry ``seed [examples]`` get the noise of these seeds instead: that of the queries of validation
and test, whose losses before and after adaptation are thereby comparable.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metarun.contracts import Need, Predict, Scores, Tree
from metarun.data.portable import portable
from metarun.random import fold, fresh_seed, normal, uniform
from metarun.targets.metric import Metric
from metarun.targets.weights import mean_over

FLOW_LOSS = Metric("flow-loss", higher_is_better=False)
BITS = Metric("bits-per-number", higher_is_better=False)
"""A bound of −log₂ p(x) per number of an example, rounded to 16 levels: 4 for one that knows nothing."""
LEVELS = 16
"""Number of levels to which examples are rounded where bits are counted. Of 256, most bits would go into noise that no
reader sees."""
STEP = 2 / (LEVELS - 1)
"""The distance between levels."""
LAST = 1 / (1 + STEP / 8)
"""T: the time at which levels are read off; their distance is then eight standard deviations of the noise."""


class Noisy(NamedTuple):
    """The input of a model of velocities."""

    x: Tensor
    """x_t ``[rows, *example]``."""
    t: Tensor
    """``[rows]``, from 0 to 1."""


def noisy_of(x: Any) -> Noisy:
    """Return the input of a model of velocities; plain examples ``[rows, *example]`` are those of time 1."""
    return x if isinstance(x, Noisy) else Noisy(x, x.new_ones(len(x)))


class Mixed(NamedTuple):
    """Examples mixed with noise."""

    noisy: Noisy
    velocity: Tensor
    """x_1 − x_0 ``[rows, *example]``."""


def along(t: Tensor, x: Tensor) -> Tensor:
    """Return ``t [rows]`` in a shape that broadcasts over ``x [rows, ...]``."""
    return t.view(-1, *[1] * (x.ndim - 1))


def mixed(x: Tensor, noise: Tensor, t: Tensor) -> Mixed:
    """Return x_t and the velocity x_1 − x_0 for examples ``x [rows, ...]``, noise of that shape and ``t [rows]``."""
    share = along(t, x)
    return Mixed(Noisy((1 - share) * noise + share * x, t), x - noise)


def seeds_of(data: Tree) -> Tensor:
    """Return a seed per example ``[examples]``; padding changes nothing about those of the others."""
    if "seed" in data:
        seeds: Tensor = data["seed"]
        return seeds
    count = len(data["x"])
    place = torch.arange(count, device=data["x"].device)
    if "weight" in data:
        place = (data["weight"] > 0).long().cumsum(0) - 1
    return fold(fresh_seed(), place)


def spread_out(u: Tensor) -> Tensor:
    """Spread ``u [examples, draws]`` of (0, 1) evenly: the j-th draw of an example lies in the j-th of equal parts."""
    return (torch.arange(u.shape[1], device=u.device) + u) / u.shape[1]


@portable
@dataclass(frozen=True)
class Flow:
    """Velocities of examples ``x [examples, *shape]`` with values of about −1 to 1."""

    shape: tuple[int, ...]
    """Shape of one example."""
    draws: int = 4
    """Number of draws of noise and time per example whenever the loss is computed."""
    metrics: tuple[Metric, ...] = (FLOW_LOSS, BITS)
    offers: tuple[Need, ...] = ("loss",)

    @property
    def outputs(self) -> int:
        """The number of channels of a velocity."""
        return self.shape[0]

    @property
    def noise(self) -> tuple[int, ...]:
        """Shape of the noise from which one example is made."""
        return self.shape

    def nothing(self, given: Any) -> Tensor:
        """Return velocities of zero for the input of a model."""
        return torch.zeros_like(noisy_of(given).x)

    def errors(
        self, predict: Predict, data: Tree, time: Callable[[Tensor], Tensor], draws: int
    ) -> tuple[Tensor, Tensor]:
        """Return the mean squared error of the velocity at every draw, and its time: both ``[examples, draws]``.

        ``time`` turns numbers ``[examples, draws]`` that are spread evenly over (0, 1) into times.
        """
        seeds, x = seeds_of(data), data["x"]
        noise = normal(fold(seeds, 0), (draws, *self.shape)).to(x)
        t = time(spread_out(uniform(fold(seeds, 1), (draws,)).to(x)))
        found = mixed(x.repeat_interleave(draws, 0), noise.flatten(0, 1), t.flatten())
        error = (predict(found.noisy) - found.velocity).square().flatten(1).mean(1)
        return error.view(-1, draws), t

    def task_loss(self, predict: Predict, data: Tree) -> tuple[Tensor, Scores]:
        """Return the mean squared error of velocities, also as a score (`metarun.contracts.Loss`)."""
        error, _ = self.errors(predict, data, lambda u: u, self.draws)
        loss = mean_over(error.mean(1), data)
        return loss, {FLOW_LOSS.name: loss.detach()}

    def bits(self, predict: Predict, data: Tree, draws: int) -> Tensor:
        """Return the bound in bits per number, averaged over the examples.

        Times have the density t / (1 − t) up to a factor, which is the weight of the error in the bound.
        """
        total = -math.log(1 - LAST) - LAST
        data = {**data, "x": ((data["x"] + 1) / STEP).round() * STEP - 1}
        error, _ = self.errors(predict, data, lambda u: time_of(u * total), draws)
        nats = total * error.mean(1) + self._levels(data)
        return mean_over(nats, data) / math.log(2)

    def _levels(self, data: Tree) -> Tensor:
        """Return −log p(x | x_T) in nats per number ``[examples]``, with one draw of x_T."""
        x = data["x"]
        noise = normal(fold(seeds_of(data), 2), self.shape).to(x)
        std = (1 - LAST) / LAST
        # Levels further away than two steps have no chance.
        offset = torch.arange(-2, 3, device=x.device).to(x) * STEP
        beyond = (x[..., None] + offset).abs() > 1 + STEP / 2
        fit = (-0.5 * ((std * noise[..., None] - offset) / std).square()).masked_fill(beyond, -torch.inf)
        return (0.5 * noise.square() + fit.logsumexp(-1)).flatten(1).mean(1)

    def sampled(self, predict: Predict, noise: Tensor, steps: int) -> Tensor:
        """Return examples ``[rows, *shape]`` from noise of that shape, by ``steps`` steps of the midpoint rule."""
        x, step = noise, 1 / steps
        for i in range(steps):
            t = noise.new_full((len(noise),), i * step)
            half = x + step / 2 * predict(Noisy(x, t))
            x = x + step * predict(Noisy(half, t + step / 2))
        return x


def time_of(area: Tensor) -> Tensor:
    """Return the t for which the integral of t / (1 − t) from 0 on, −log(1 − t) − t, is ``area``; by Newton's method.

    The unknown is s = −log(1 − t), for which s + exp(−s) − 1 is the area.
    """
    s = area + (2 * area).sqrt()
    for _ in range(8):
        s = s - (s + (-s).exp() - 1 - area) / (1 - (-s).exp()).clamp(min=1e-6)
    return 1 - (-s).exp()


class Mixture(NamedTuple):
    """A mixture of normal distributions with independent components of x_1."""

    means: Tensor
    """``[parts, *example]``."""
    variance: Tensor
    """Of each number, broadcast over ``means``."""
    log_weights: Tensor
    """``[parts]``; −∞ for a part that does not count."""

    def velocity(self, given: Any) -> Tensor:
        """Return E[x_1 − x_0 | x_t], the velocity with the least loss for this distribution, ``[rows, *example]``."""
        noisy = noisy_of(given)
        t = noisy.t.view(-1, 1, *[1] * (self.means.ndim - 1))
        around = noisy.x[:, None] - t * self.means
        spread = (1 - t).square() + t.square() * self.variance
        fit = (-0.5 * (around.square() / spread + spread.log())).flatten(2).sum(-1)
        share = (fit + self.log_weights).softmax(1)
        of_part = self.means + (t * self.variance - (1 - t)) / spread * around
        return (share.view(*share.shape, *[1] * (self.means.ndim - 1)) * of_part).sum(1)
