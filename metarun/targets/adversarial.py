"""Two players as a target: a generator makes examples from noise, and a critic tells them from real ones.

Gulrajani et al. 2017, "Improved Training of Wasserstein GANs", https://arxiv.org/abs/1704.00028 (equation 3). With real
examples x, made ones G(z) and points x̂ on the lines between pairs of them, drawn uniformly,

    critic      minimises  E D(G(z)) − E D(x) + λ E (|∇D(x̂)| − 1)²
    generator   minimises  −E D(G(z))

One number serves both players, so that any method which follows a gradient trains them. It is the loss of the critic,
and the generator's part of its gradient has the opposite sign, since the made examples go through an operation that
changes nothing but the sign of what is propagated back (Ganin and Lempitsky 2015, https://arxiv.org/abs/1409.7495,
§3.1). Both players then take a step at the same time.

The derivative of such a gradient is that of no loss, so the target offers a ``slope`` alone: methods that differentiate
through their adaptation would get wrong meta-gradients.

All noise comes from the task's seed: new noise whenever the loss is computed, or that of ``seed [examples]`` where data
have it, as in `metarun.targets.flow`.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metarun.contracts import Need, Predict, Tree
from metarun.data.portable import portable
from metarun.nn.transforms import gradient
from metarun.random import fold, normal, uniform
from metarun.targets.flow import along, seeds_of
from metarun.targets.metric import Metric
from metarun.targets.weights import mean_over

SAMPLE_DISTANCE = Metric("sample-distance", higher_is_better=False)
"""Kernel distance of the real examples to as many made ones."""


class Latent(NamedTuple):
    """The input of the generator; anything else is judged by the critic."""

    z: Tensor
    """Standard normal numbers ``[rows, latents]``."""


class Played(NamedTuple):
    """What the players did."""

    loss: Tensor
    """A scalar: the critic's loss, whose gradient serves both players."""
    made: Tensor
    """One made example per real one ``[examples, *example]``."""


def reversed_slope(x: Tensor) -> Tensor:
    """Return ``x``; what is propagated back through it changes its sign."""
    return 2 * x.detach() - x


@portable
@dataclass(frozen=True)
class Adversarial:
    """Examples ``x [examples, *shape]`` with values from −1 to 1, told from made ones."""

    shape: tuple[int, ...]
    """Shape of one example."""
    latents: int = 32
    """Number of components of the generator's noise."""
    penalty: float = 10.0
    """λ."""
    metrics: tuple[Metric, ...] = (SAMPLE_DISTANCE,)
    offers: tuple[Need, ...] = ("slope",)

    @property
    def outputs(self) -> int:
        """The number of channels of a made example."""
        return self.shape[0]

    @property
    def noise(self) -> tuple[int, ...]:
        """Shape of the noise from which one example is made."""
        return (self.latents,)

    def sampled(self, predict: Predict, noise: Tensor, steps: int) -> Tensor:
        """Return what the generator makes of noise ``[examples, latents]``, in one step whatever ``steps`` is."""
        made: Tensor = predict(Latent(noise))
        return made

    def nothing(self, given: Any) -> Tensor:
        """Return examples of zeros, or judgements of zero ``[rows]``."""
        if isinstance(given, Latent):
            return given.z.new_zeros(len(given.z), *self.shape)
        return torch.zeros_like(given.flatten(1)[:, 0])

    def played(self, predict: Predict, data: Tree) -> Played:
        """Return the loss of one task; ``predict`` maps `Latent` to examples, and examples to judgements ``[rows]``."""
        real, seeds = data["x"], seeds_of(data)
        made = predict(Latent(normal(fold(seeds, 0), (self.latents,)).to(real)))
        share = along(uniform(fold(seeds, 1), (1,)).to(real)[:, 0], real)
        between = share * real + (1 - share) * made.detach()
        # The critic judges each example by itself, so the slope of the sum holds that of every example.
        slope = gradient(lambda at: predict(at["x"]).sum(), {"x": between})["x"]
        steepness = (slope.flatten(1).square().sum(1) + 1e-12).sqrt()
        judged, of_made = predict(real), predict(reversed_slope(made))
        return Played(mean_over(of_made - judged + self.penalty * (steepness - 1).square(), data), made.detach())
