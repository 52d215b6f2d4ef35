"""Numbers: mean squared error, and for single numbers with a unit also mean absolute error and R²."""

from dataclasses import dataclass

import torch
from torch import Tensor

from metarun.contracts import Need, Rows, Scores, Tree
from metarun.data.portable import portable
from metarun.targets.metric import Metric
from metarun.targets.weights import mean_over, weight_of

MSE = Metric("mse", higher_is_better=False)
MAE = Metric("mae", higher_is_better=False)
R2 = Metric("r2", higher_is_better=True)


@portable
@dataclass(frozen=True)
class Real:
    """Targets ``y [examples, outputs]`` that are numbers."""

    outputs: int
    metrics: tuple[Metric, ...] = (MSE,)
    offers: tuple[Need, ...] = ("loss", "examples", "rows", "numbers", "targets")

    def loss(self, output: Tensor, data: Tree) -> Tensor:
        """Return the mean squared error over examples and outputs."""
        # Not mse_loss: inside vmap torch takes that apart in Python, and imports sympy for it.
        square = (output - data["y"]).square()
        return mean_over(square.mean(-1), data) if "weight" in data else square.mean()

    def scores(self, output: Tensor, data: Tree) -> Scores:
        """Return the mean squared error."""
        return {MSE.name: self.loss(output, data).detach()}

    def rows(self, z: Tensor, data: Tree) -> Rows:
        """Return a row per example."""
        return Rows(z, data["y"], data.get("weight"))


@portable
@dataclass(frozen=True)
class Measured(Real):
    """Targets ``y [examples, 1]`` that are (number − shift) / scale, so that a model sees numbers of about 1.

    The loss is that of standardised targets; all scores are in the unit of the numbers.
    """

    outputs: int = 1
    metrics: tuple[Metric, ...] = (MSE, MAE, R2)
    shift: float = 0.0
    scale: float = 1.0

    def scores(self, output: Tensor, data: Tree) -> Scores:
        """Return the mean squared error: what is computed in every meta-step."""
        return {MSE.name: self.loss(output, data).detach() * self.scale**2}

    def further(self, output: Tensor, data: Tree) -> Scores:
        """Return the mean absolute error and R², which only tests need."""
        output = output.detach()
        mae = mean_over((output - data["y"]).abs(), data) * self.scale
        return {MAE.name: mae, R2.name: r_squared(output[:, 0], data["y"][:, 0], weight_of(data))}


def r_squared(output: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Return 1 − squared errors / squared deviations from the mean of ``y [examples]``; 0 where ``y`` is constant."""
    deviations = weight @ (y - weight @ y / weight.sum()).square()
    # Rounding leaves deviations of equal numbers from their mean.
    varies = deviations > 1e-10 * (weight @ y.square())
    errors = weight @ (output - y).square()
    return torch.where(varies, 1 - errors / torch.where(varies, deviations, 1.0), 0.0)
