"""Memory-augmented neural network with least-recently-used access.

Santoro, Bartunov, Botvinick, Wierstra, Lillicrap 2016, "Meta-Learning with Memory-Augmented Neural Networks",
https://arxiv.org/abs/1605.06065.

The support set is a sequence, and each example comes with the label of the one before it (§2.2): the network has to
hold an example in memory until its label arrives. From the controller's state h_t, a key k and a gate α for each
of n read heads (§3.2):

    write      w^w = α w^r_(t−1) + (1 − α) w^lu_(t−1),   M ← M with the least used rows set to 0, + w^w k     (7, 8)
    read       w^r = softmax of cos(k, M_i),   r = w^r M                                                    (2 to 4)
    usage      w^u ← γ w^u + w^r + w^w;   w^lu is 1 at the n least used rows                                  (5, 6)
    output     linear in (h, r);   r is also an input of the next step

The meta-loss is the mean over all predictions of the sequence, the support set's own included; queries are asked one
by one behind it, each from the same memory. `instances.csv` tells the accuracy on the k-th example of a class, before
its label is seen, along the support set: the paper's table 1 (``experiment=mann_omniglot``). With five classes and
five labels the first one can be guessed in 45.7 % of cases, from the labels that are still to come.

Some texts call another method MANN: "model-agnostic neural architecture search" is `metanas` here.

Inputs are the features of the model's trunk; the paper reads pixels.
"""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.func import vmap

from metarun.errors import require
from metarun.functional import (
    embed_together,
    forward_of,
    keep_support,
    lstm,
    one_hot,
    own_network,
    parameters_of,
    trunk_and_head,
    unit_rows,
)
from metarun.types import Algorithm, Loss, Observation, Spec, Task, Tree

USAGE_DECAY = 0.99


class Memory(NamedTuple):
    """What passes from step to step."""

    hidden: Tensor
    """``[controller]``, and the LSTM's cell likewise."""
    cell: Tensor
    read: Tensor
    """What the heads have read ``[heads × width]``."""
    rows: Tensor
    """``[slots, width]``."""
    usage: Tensor
    """``[slots]``."""
    attention: Tensor
    """Of the read heads ``[heads, slots]``."""


def empty(like: Tensor, controller: int, slots: int, width: int, heads: int) -> Memory:
    """The memory before the first step."""
    zeros = like.new_zeros
    state = zeros(controller), zeros(controller), zeros(heads * width)
    return Memory(*state, zeros(slots, width), zeros(slots), zeros(heads, slots))


class Mann(nn.Module):
    """One step: (memory, token) → (memory, output)."""

    def __init__(self, token: int, outputs: int, controller: int, width: int, heads: int) -> None:
        super().__init__()
        self.gates = nn.Linear(token + heads * width + controller, 4 * controller)
        self.keys, self.alpha = nn.Linear(controller, heads * width), nn.Linear(controller, heads)
        self.out = nn.Linear(controller + heads * width, outputs)

    def forward(self, given: tuple[Memory, Tensor]) -> tuple[Memory, Tensor]:
        """``token [numbers]`` → ``[outputs]``."""
        memory, token = given
        heads, slots = memory.attention.shape
        hidden, cell = lstm(self.gates(torch.cat([token, memory.read, memory.hidden])), memory.cell)
        keys, alpha = torch.stack(self.keys(hidden).tanh().chunk(heads)), self.alpha(hidden).sigmoid()[:, None]
        least = one_hot((-memory.usage).topk(heads).indices, slots, memory.usage).sum(0)
        write = alpha * memory.attention + (1 - alpha) * least
        rows = memory.rows * (1 - least[:, None]) + write.T @ keys
        attention = (unit_rows(keys) @ unit_rows(rows).T).softmax(-1)
        read = torch.cat((attention @ rows).unbind(0))
        usage = USAGE_DECAY * memory.usage + attention.sum(0) + write.sum(0)
        after = Memory(hidden, cell, read, rows, usage, attention)
        return after, self.out(torch.cat([hidden, read]))


def instance_of(y: Tensor) -> Tensor:
    """Which example of its class each row of one-hot ``y [examples, ways]`` is, in its order: 1 for the first."""
    return (y.cumsum(0) * y).sum(-1)


def mann(
    model: nn.Module,
    spec: Spec,
    controller: int = 200,
    slots: int = 128,
    width: int = 40,
    heads: int = 4,
) -> Algorithm:
    """Memory-augmented neural network.

    Args:
        model: a module with ``trunk`` and ``head``; of the head only its width is used.
        spec: of a regression or classification task.
        controller: width of the LSTM, at least 1.
        slots: rows of the memory, at least ``heads``.
        width: of a row, at least 1.
        heads: that read and write, at least 1.
    """
    for name, value in {"controller": controller, "width": width, "heads": heads}.items():
        require(value >= 1, f"{name} must be at least 1, not {value}")
    require(slots >= heads, f"slots must be at least heads={heads}, not {slots}")
    trunk, head = trunk_and_head(model, spec, "mann")
    embed = forward_of(trunk)

    step, drawn = own_network(lambda: Mann(head.in_features + spec.outputs, spec.outputs, controller, width, heads))

    def init(model: nn.Module, generator: torch.Generator) -> Tree:
        weights = parameters_of(trunk_and_head(model, spec, "mann")[0])
        return {"weights": weights, "memory": drawn(model, generator)}

    def read(theta: Tree, z: Tensor, y: Tensor) -> tuple[Memory, Tensor]:
        """The memory after features ``z`` with targets ``y``, and the predictions made on the way ``[n, outputs]``."""
        memory, outputs = empty(z, controller, slots, width, heads), []
        for token in torch.cat([z, torch.cat([torch.zeros_like(y[:1]), y[:-1]])], -1):
            memory, output = step(theta["memory"], (memory, token))
            outputs.append(output)
        return memory, torch.stack(outputs)

    def answers(theta: Tree, memory: Memory, last: Tensor, queries: Tensor) -> Tensor:
        tokens = torch.cat([queries, last.expand(len(queries), -1)], -1)
        return cast(Tensor, vmap(lambda token: step(theta["memory"], (memory, token))[1])(tokens))

    def sequence(theta: Tree, support: Tree, x: Tensor) -> tuple[Tensor, Tensor]:
        """Predictions along the support set, and of queries behind it."""
        z, queries = embed_together(embed, theta["weights"], support, x)
        memory, along = read(theta, z, support["y"])
        return along, answers(theta, memory, support["y"][-1], queries)

    def predict(theta: Tree, state: Tree, x: Any) -> Tensor:
        return sequence(theta, state, x)[1]

    def meta_loss(theta: Tree, task: Task, loss: Loss) -> tuple[Tensor, Tensor]:
        along, behind = sequence(theta, task.support, task.query["x"])
        before, _ = loss(lambda x: along, task.support)
        after, score = loss(lambda x: behind, task.query)
        n, m = len(along), len(behind)
        return (n * before + m * after) / (n + m), score

    def by_instance(theta: Tree, task: Task, loss: Loss, steps: int) -> Tensor:
        """Accuracy on the first, second, … example of a class ``[shots]``, by what was seen before it."""
        y = task.support["y"]
        along, _ = sequence(theta, task.support, task.query["x"])
        correct = ((along.argmax(-1) == y.argmax(-1)) & along.isfinite().all(-1)).to(y.dtype)
        each = one_hot(instance_of(y).long() - 1, spec.shots, y)
        return cast(Tensor, correct @ each / each.sum(0))

    instances = Observation(
        "instances", {"instance": tuple(str(k + 1) for k in range(spec.shots))}, "accuracy", by_instance
    )
    return Algorithm(
        init,
        keep_support,
        predict,
        family="dependent",
        kinds=("regression", "classification"),
        paper="https://arxiv.org/abs/1605.06065",
        meta_loss=meta_loss,
        observation=instances if spec.kind == "classification" else None,
        adapted_parameters=lambda theta: slots * width,
    )
