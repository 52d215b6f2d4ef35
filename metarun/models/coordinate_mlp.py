"""A multi-layer perceptron on waves of its inputs, for functions of a place such as pictures."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from metarun.contracts import Moments, Spec, Tokens
from metarun.errors import require
from metarun.models.mlp import fully_connected
from metarun.nn.waves import Waves


class CoordinateMLP(nn.Module):
    """Waves of the inputs, fully connected layers, then a linear head.

    Args:
        spec: sizes of input and output.
        widths: width of each hidden layer.
        highest: number of half periods of the fastest wave across inputs from −1 to 1, 0 for none.
        activation: nonlinearity after each hidden layer.
    """

    def __init__(
        self,
        spec: Spec,
        widths: Sequence[int] = (64, 64, 64),
        highest: int = 6,
        activation: Literal["relu", "tanh", "gelu", "silu"] = "relu",
    ) -> None:
        super().__init__()
        require(
            not isinstance(spec.inputs, Tokens | Moments) and len(spec.inputs.shape) == 1,
            "coordinate_mlp needs inputs that are a few numbers, such as the place of a pixel; choose another model",
        )
        waves = Waves(spec.inputs.shape[0], highest)
        self.trunk = nn.Sequential(waves, *fully_connected(waves.width, widths, activation))
        self.head = nn.Linear([waves.width, *widths][-1], spec.target.outputs)

    def forward(self, x: Tensor) -> Tensor:
        """``[examples, inputs]`` → ``[examples, outputs]``."""
        out: Tensor = self.head(self.trunk(x))
        return out
