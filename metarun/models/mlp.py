"""A multi-layer perceptron."""

from collections.abc import Sequence
from itertools import pairwise
from math import prod
from typing import Literal

from torch import Tensor, nn

from metarun.contracts import Joined, Moments, Sequences, Spec, Tokens, Words
from metarun.errors import require

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU, "silu": nn.SiLU}

OTHERS: dict[type, tuple[str, str]] = {
    Tokens: ("has sentences", "text_embedding"),
    Words: ("has words to be tagged", "tagger"),
    Joined: ("has questions on passages", "reader"),
    Sequences: ("has texts", "gru_decoder"),
    Moments: ("needs a policy", "policy"),
}
"""Inputs that are no array of numbers: what a task with them has, and a model for it."""


def fully_connected(inputs: int, widths: Sequence[int], activation: str) -> list[nn.Module]:
    """Return linear layers of the given widths, each followed by the activation.

    Raises:
        ValueError: a layer has no width.
    """
    require(all(w > 0 for w in widths), f"widths must be positive, not {list(widths)}")
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise([inputs, *widths]):
        layers += [nn.Linear(n_in, n_out), ACTIVATIONS[activation]()]
    return layers


class MLP(nn.Module):
    """Fully connected layers of the given widths, then a linear head.

    Initialised as in MAML's code (https://github.com/cbfinn/maml): weights are drawn from a normal distribution with
    standard deviation ``initial_std``, truncated at two standard deviations, and biases are zero. With null, torch's
    own initialisation is used.

    Args:
        spec: sizes of input and output.
        widths: width of each hidden layer; with none the model is linear.
        activation: nonlinearity after each hidden layer.
        initial_std: standard deviation of the initial weights, above 0, or None.
    """

    def __init__(
        self,
        spec: Spec,
        widths: Sequence[int] = (40, 40),
        activation: Literal["relu", "tanh", "gelu", "silu"] = "relu",
        initial_std: float | None = None,
    ) -> None:
        super().__init__()
        if type(spec.inputs) in OTHERS:
            what, choice = OTHERS[type(spec.inputs)]
            require(False, f"mlp needs numbers, and this task {what}; choose model={choice}")
        require(initial_std is None or initial_std > 0, f"initial_std must be above 0, not {initial_std}")
        inputs = prod(spec.inputs.shape)
        layers = fully_connected(inputs, widths, activation)
        self.trunk = nn.Sequential(*([nn.Flatten()] if len(spec.inputs.shape) > 1 else []), *layers)
        self.head = nn.Linear([inputs, *widths][-1], spec.target.outputs)
        if initial_std is not None:
            for layer in self.modules():
                if isinstance(layer, nn.Linear):
                    bound = 2 * initial_std
                    nn.init.trunc_normal_(layer.weight, std=initial_std, a=-bound, b=bound)
                    nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[examples, *input]`` → ``[examples, outputs]``."""
        out: Tensor = self.head(self.trunk(x))
        return out
