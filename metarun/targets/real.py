"""Numbers: mean squared error."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import mse_loss

from metarun.contracts import Need, Rows, Scores, Tree
from metarun.portable import portable
from metarun.targets.metric import Metric
from metarun.targets.weights import mean_over

MSE = Metric("mse", higher_is_better=False)


@portable
@dataclass(frozen=True)
class Real:
    """Targets ``y [examples, outputs]`` that are numbers."""

    outputs: int
    metrics: tuple[Metric, ...] = (MSE,)
    offers: tuple[Need, ...] = ("loss", "examples", "rows", "numbers")

    def loss(self, output: Tensor, data: Tree) -> Tensor:
        """Return the mean squared error over examples and outputs."""
        if "weight" not in data:
            return mse_loss(output, data["y"])
        return mean_over((output - data["y"]).square().mean(-1), data)

    def scores(self, output: Tensor, data: Tree) -> Scores:
        """Return the mean squared error."""
        return {MSE.name: self.loss(output, data).detach()}

    def rows(self, z: Tensor, data: Tree) -> Rows:
        """Return a row per example."""
        return Rows(z, data["y"], data.get("weight"))
