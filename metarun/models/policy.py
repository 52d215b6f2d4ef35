"""Policies: from what was seen (`metarun.contracts.Seen`) to the distribution of the next action."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metarun.contracts import Seen, Spec
from metarun.errors import require
from metarun.models.mlp import fully_connected
from metarun.targets.actions import Actions


def actions_of(spec: Spec, model: str) -> Actions:
    """Return the actions that ``spec`` describes; raise an error if the task has none."""
    require(
        isinstance(spec.target, Actions),
        f"{model} is a policy, and this task has no actions; choose a task with actions (such as bandit), or another "
        "algorithm and model",
    )
    assert isinstance(spec.target, Actions)
    return spec.target


class Outputs(nn.Module):
    """A linear layer to the parameters of the action's distribution.

    Continuous actions are normal, with a standard deviation per dimension that does not depend on the observation.
    """

    def __init__(self, features: int, actions: Actions, initial_std: float) -> None:
        super().__init__()
        require(initial_std > 0, f"initial_std must be above 0, not {initial_std}")
        self.linear = nn.Linear(features, actions.count)
        self.continuous = actions.continuous
        if actions.continuous:
            self.log_std = nn.Parameter(torch.full((actions.count,), math.log(initial_std)))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., features]`` → ``[..., outputs]``."""
        out: Tensor = self.linear(x)
        return torch.cat([out, self.log_std.expand_as(out)], -1) if self.continuous else out


class Policy(nn.Module):
    """Fully connected layers on the observation; no memory.

    Args:
        spec: that of a control task.
        widths: width of each hidden layer.
        activation: nonlinearity after each hidden layer.
        initial_std: initial standard deviation of continuous actions, in units of the largest action, above 0.
    """

    def __init__(
        self,
        spec: Spec,
        widths: Sequence[int] = (100, 100),
        activation: Literal["relu", "tanh", "gelu", "silu"] = "relu",
        initial_std: float = 0.5,
    ) -> None:
        super().__init__()
        actions = actions_of(spec, "policy")
        self.trunk = nn.Sequential(*fully_connected(spec.inputs.shape[0], widths, activation))
        self.head = Outputs([spec.inputs.shape[0], *widths][-1], actions, initial_std)

    def forward(self, seen: Seen) -> Tensor:
        """Return outputs ``[steps, episodes, outputs]``."""
        out: Tensor = self.head(self.trunk(seen.observation))
        return out


def happened(seen: Seen) -> Tensor:
    """Return the input of a memory: all that is seen, and the product of action and reward, which says what paid."""
    return torch.cat([seen.observation, seen.action, seen.reward, seen.done, seen.action * seen.reward], -1)


def happened_size(spec: Spec, actions: Actions) -> int:
    """Return how many numbers ``happened`` gives for a step."""
    return spec.inputs.shape[0] + 2 * actions.count + 2


class GRUPolicy(nn.Module):
    """A gated recurrent unit (Cho et al. 2014) over observation, previous action, reward and end of episode.

    A first layer reads these inputs together with the product of action and reward: a policy must remember which action
    paid, and a sum of inputs does not tell it. The cell is written out, since the fused cells cannot be differentiated
    twice.

    Args:
        spec: that of a control task.
        width: width of the hidden state, at least 1.
        initial_std: initial standard deviation of continuous actions, in units of the largest action, above 0.
    """

    def __init__(self, spec: Spec, width: int = 64, initial_std: float = 0.5) -> None:
        super().__init__()
        actions = actions_of(spec, "gru_policy")
        require(width >= 1, f"width must be at least 1, not {width}")
        self.width = self.memory = width
        self.encoder = nn.Sequential(nn.Linear(happened_size(spec, actions), width), nn.ReLU())
        self.inputs = nn.Linear(width, 3 * width)
        self.gates = nn.Linear(width, 2 * width, bias=False)
        self.candidate = nn.Linear(width, width, bias=False)
        for layer in (self.gates, self.candidate):
            nn.init.orthogonal_(layer.weight)
        self.head = Outputs(width, actions, initial_std)

    def forward(self, seen: Seen) -> tuple[Tensor, Any]:
        """Return outputs ``[steps, episodes, outputs]`` and the last hidden state ``[episodes, width]``."""
        x = self.inputs(self.encoder(happened(seen)))
        hidden = x.new_zeros(x.shape[1], self.width) if seen.carry is None else seen.carry
        states = []
        for now in x:
            # Reset and update gate, then an interpolation between the old state and its candidate.
            reset, update = (now[:, : 2 * self.width] + self.gates(hidden)).sigmoid().chunk(2, -1)
            candidate = (now[:, 2 * self.width :] + self.candidate(reset * hidden)).tanh()
            hidden = candidate + update * (hidden - candidate)
            states.append(hidden)
        return self.head(torch.stack(states)), hidden


class FastWeightsPolicy(nn.Module):
    """A memory of outer products, written at the previous observation and read at the current one.

    Fast weights (Schmidhuber 1992, https://doi.org/10.1162/neco.1992.4.1.131; as linear attention: Schlag et al. 2021,
    https://arxiv.org/abs/2102.11174):

        write    M ← M + k vᵀ,  n ← n + k    k = softmax(K o⁻),  v = f(action, reward, action · reward, done, o)
        read     qᵀM / (1 + qᵀn),  log(1 + qᵀn),                q = softmax(K o)

    with o the current observation and o⁻ the observation at which the previous action was taken, so that the memory
    maps an observation to the outcomes of actions taken there. Two layers read the memory together with o. A gated unit
    must learn to store such a map. Here the steps of a trial can also be computed in parallel once its actions are
    known.

    Args:
        spec: that of a control task.
        width: width of values and of the layers, at least 1.
        slots: length of the keys, at least 1.
        initial_std: initial standard deviation of continuous actions, in units of the largest action, above 0.
    """

    def __init__(self, spec: Spec, width: int = 64, slots: int = 32, initial_std: float = 0.5) -> None:
        super().__init__()
        actions = actions_of(spec, "fast_weights_policy")
        require(width >= 1, f"width must be at least 1, not {width}")
        require(slots >= 1, f"slots must be at least 1, not {slots}")
        self.width, self.slots = width, slots
        self.memory = slots * (width + 1)
        observation = spec.inputs.shape[0]
        self.key = nn.Linear(observation, slots)
        self.value = nn.Sequential(nn.Linear(happened_size(spec, actions), width), nn.ReLU())
        self.layers = nn.Sequential(
            nn.Linear(observation + width + 1, 2 * width), nn.ReLU(), nn.Linear(2 * width, width), nn.ReLU()
        )
        self.head = Outputs(width, actions, initial_std)

    def forward(self, seen: Seen) -> tuple[Tensor, Any]:
        """Return outputs ``[steps, episodes, outputs]``, and the memory and the last key after them."""
        value = self.value(happened(seen))
        value = torch.cat([value, torch.ones_like(value[..., :1])], -1)
        query = (3 * self.key(seen.observation)).softmax(-1)
        if seen.carry is None:
            memory = value.new_zeros(query.shape[1], self.slots, self.width + 1)
            before = torch.zeros_like(query[:1])
        else:
            memory, before = seen.carry
        key = torch.cat([before, query[:-1]])
        # What is written at a step, the outcome of the last action, is already read at that step.
        heard = torch.einsum("tes,ues->etu", query, key).tril()
        read = torch.einsum("etu,uev->tev", heard, value) + torch.einsum("tes,esv->tev", query, memory)
        total, count = read[..., :-1], read[..., -1:]
        features = torch.cat([seen.observation, total / (1 + count), count.log1p()], -1)
        output = self.head(self.layers(features))
        return output, (memory + torch.einsum("tes,tev->esv", key, value), query[-1:])
