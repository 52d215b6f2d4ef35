"""Policies: what was seen → the distribution of the next action (`metarun.types.Seen`)."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metarun.errors import require
from metarun.models.mlp import fully_connected
from metarun.types import Control, Seen, Spec


def control_of(spec: Spec, model: str) -> Control:
    """The environment that ``spec`` describes; a task without one is refused."""
    require(
        spec.control is not None,
        f"{model} is a policy, and this task has no actions; choose a task with actions (such as bandit), or another "
        "algorithm and model",
    )
    assert spec.control is not None
    return spec.control


class Outputs(nn.Module):
    """A linear layer to the parameters of the action's distribution.

    Continuous actions are normal with a spread of their own for each dimension, which depends on nothing.
    """

    def __init__(self, features: int, spec: Spec, continuous: bool, initial_std: float) -> None:
        super().__init__()
        self.linear = nn.Linear(features, spec.outputs)
        self.continuous = continuous
        if continuous:
            self.log_std = nn.Parameter(torch.full((spec.outputs,), math.log(initial_std)))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., features]`` → ``[..., outputs]``."""
        out: Tensor = self.linear(x)
        return torch.cat([out, self.log_std.expand_as(out)], -1) if self.continuous else out


class Policy(nn.Module):
    """Fully connected layers on the observation; no memory.

    Args:
        spec: of a control task.
        widths: width of each hidden layer.
        activation: between the layers.
        initial_std: of continuous actions, in units of the largest one; above 0.
    """

    def __init__(
        self,
        spec: Spec,
        widths: Sequence[int] = (100, 100),
        activation: Literal["relu", "tanh", "gelu", "silu"] = "relu",
        initial_std: float = 0.5,
    ) -> None:
        super().__init__()
        control = control_of(spec, "policy")
        require(initial_std > 0, f"initial_std must be above 0, not {initial_std}")
        self.trunk = nn.Sequential(*fully_connected(spec.input_shape[0], widths, activation))
        self.head = Outputs(widths[-1], spec, control.continuous, initial_std)

    def forward(self, seen: Seen) -> Tensor:
        """Outputs ``[steps, episodes, outputs]``."""
        out: Tensor = self.head(self.trunk(seen.observation))
        return out


class GRUPolicy(nn.Module):
    """A gated recurrent unit (Cho et al. 2014) over observation, previous action, reward and end of episode.

    One layer reads them first, and is given the product of action and reward too: which action paid is what a
    policy must remember, and a sum of inputs does not tell it. Written out, since the fused cells cannot be
    differentiated twice.

    Args:
        spec: of a control task.
        width: of the hidden state, at least 1.
        initial_std: of continuous actions, in units of the largest one; above 0.
    """

    def __init__(self, spec: Spec, width: int = 64, initial_std: float = 0.5) -> None:
        super().__init__()
        control = control_of(spec, "gru_policy")
        require(width >= 1, f"width must be at least 1, not {width}")
        require(initial_std > 0, f"initial_std must be above 0, not {initial_std}")
        self.width = width
        self.encoder = nn.Sequential(nn.Linear(spec.input_shape[0] + 2 * spec.outputs + 2, width), nn.ReLU())
        self.inputs = nn.Linear(width, 3 * width)
        self.gates = nn.Linear(width, 2 * width, bias=False)
        self.candidate = nn.Linear(width, width, bias=False)
        for layer in (self.gates, self.candidate):
            nn.init.orthogonal_(layer.weight)
        self.head = Outputs(width, spec, control.continuous, initial_std)

    def forward(self, seen: Seen) -> tuple[Tensor, Any]:
        """Outputs ``[steps, episodes, outputs]`` and the hidden state behind them ``[episodes, width]``."""
        given = [seen.observation, seen.action, seen.reward, seen.done, seen.action * seen.reward]
        x = self.inputs(self.encoder(torch.cat(given, -1)))
        hidden = x.new_zeros(x.shape[1], self.width) if seen.carry is None else seen.carry
        states = []
        for now in x:
            # Reset and update gate, then the state between the old one and its candidate.
            reset, update = (now[:, : 2 * self.width] + self.gates(hidden)).sigmoid().chunk(2, -1)
            candidate = (now[:, 2 * self.width :] + self.candidate(reset * hidden)).tanh()
            hidden = candidate + update * (hidden - candidate)
            states.append(hidden)
        return self.head(torch.stack(states)), hidden
