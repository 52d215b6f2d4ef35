"""Memory-augmented neural network with least-recently-used access.

Santoro, Bartunov, Botvinick, Wierstra, Lillicrap 2016, "Meta-Learning with Memory-Augmented Neural Networks",
https://arxiv.org/abs/1605.06065.

The support set is a sequence, and each example comes with the label of the previous one (§2.2): the network has to
hold an example in memory until its label arrives. From the controller's state h_t, a key k and a gate α for each
of n read heads (§3.2):

    read       w^r = softmax of β cos(k, M_i),   r = w^r M                                                  (2 to 4)
    write      w^w = α w^r_(t−1) + (1 − α) w^lu_(t−1),   M ← M with the least used rows set to 0, + w^w k     (7, 8)
    usage      w^u ← γ w^u + w^r + w^w;   w^lu is 1 at the n least used rows                                  (5, 6)
    output     linear in (h, r);   r is also an input of the next step

The meta-loss is the mean over all predictions of the sequence, including those for the support set. Each query is
presented by itself after the support set, from the same memory. `instances.csv` gives the accuracy on the k-th example
of a class, before its label is seen, along the support set: the paper's table 1 (``experiment=mann_omniglot``). With
five classes and five labels the first one can be guessed in 45.7 % of cases, from the labels that are still to come.

Some texts call another method MANN: "model-agnostic neural architecture search" is `metanas` here.

Three things differ from the paper, so that it learns in minutes (as printed, it only learned to count labels in
14,000 episodes):

    key strength    β, as in Neural Turing Machines (Graves et al. 2014, equation 5). The paper has none, which is
                    β = 1: no row of 128 can then receive more than 6 % of the attention.
    order           The memory is read before it is written, so that a head does not find the key just written.
    input           The features of the model's trunk, layer-normalised and concatenated with the example's raw
                    values. The paper reads pixels alone; an untrained trunk separates classes worse than pixels do.
"""

from math import prod
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.func import vmap

from metarun.contracts import Algorithm, Loss, MetaLoss, Numbers, Report, Spec, Task, Tree, Weights
from metarun.errors import require
from metarun.inner import embed_together, keep_support, padding_first
from metarun.nn.functional import forward_of, own_network, parameters_of, trunk_and_head
from metarun.nn.normalisation import normalised
from metarun.nn.ops import kept, lstm, one_hot, unit_rows
from metarun.nn.padding import weighing
from metarun.targets.classes import own_classes
from metarun.targets.weights import count_of

USAGE_DECAY = 0.99


class Memory(NamedTuple):
    """The state that passes from step to step."""

    hidden: Tensor
    """``[controller]``; so is the LSTM's cell."""
    cell: Tensor
    read: Tensor
    """What the heads have read ``[heads × width]``."""
    rows: Tensor
    """``[slots, width]``."""
    usage: Tensor
    """``[slots]``."""
    attention: Tensor
    """Weights of the read heads ``[heads, slots]``."""


def empty(like: Tensor, controller: int, slots: int, width: int, heads: int) -> Memory:
    """Return the memory before the first step."""
    zeros = like.new_zeros
    state = zeros(controller), zeros(controller), zeros(heads * width)
    return Memory(*state, zeros(slots, width), zeros(slots), zeros(heads, slots))


class Look(NamedTuple):
    """What a step computes from its token and the memory, before it writes."""

    hidden: Tensor
    cell: Tensor
    read: Tensor
    keys: Tensor
    """``[heads, width]``."""
    alpha: Tensor
    """The gates ``[heads, 1]``."""
    attention: Tensor
    """``[heads, slots]``."""


class Mann(nn.Module):
    """The reading half of a step: (memory, token) → (what it saw, output)."""

    def __init__(self, token: int, outputs: int, controller: int, width: int, heads: int, key_strength: float) -> None:
        super().__init__()
        self.key_strength = key_strength
        self.gates = nn.Linear(token + heads * width + controller, 4 * controller)
        self.keys, self.alpha = nn.Linear(controller, heads * width), nn.Linear(controller, heads)
        self.out = nn.Linear(controller + heads * width, outputs)

    def forward(self, given: tuple[Memory, Tensor]) -> tuple[Look, Tensor]:
        """``token [numbers]`` → ``[outputs]``."""
        memory, token = given
        hidden, cell = lstm(self.gates(torch.cat([token, memory.read, memory.hidden])), memory.cell)
        keys, alpha = torch.stack(self.keys(hidden).tanh().chunk(len(memory.attention))), self.alpha(hidden).sigmoid()
        attention = (self.key_strength * unit_rows(keys) @ unit_rows(memory.rows).T).softmax(-1)
        read = torch.cat((attention @ memory.rows).unbind(0))
        return Look(hidden, cell, read, keys, alpha[:, None], attention), self.out(torch.cat([hidden, read]))


def written(memory: Memory, look: Look) -> Memory:
    """Return the memory after the step that computed ``look``: the writing half of that step."""
    heads, slots = memory.attention.shape
    least = one_hot((-memory.usage).topk(heads).indices, slots, memory.usage).sum(0)
    write = look.alpha * memory.attention + (1 - look.alpha) * least
    rows = memory.rows * (1 - least[:, None]) + write.T @ look.keys
    usage = USAGE_DECAY * memory.usage + look.attention.sum(0) + write.sum(0)
    return Memory(look.hidden, look.cell, look.read, rows, usage, look.attention)


def instance_of(y: Tensor) -> Tensor:
    """Return which example of its class each row of one-hot ``y [examples, ways]`` is, in order: 1 for the first.

    Padding, whose row is zero, gets 0.
    """
    return (y.cumsum(0) * y).sum(-1)


def mann(
    model: nn.Module,
    spec: Spec,
    controller: int = 200,
    slots: int = 128,
    width: int = 40,
    heads: int = 4,
    key_strength: float = 10.0,
) -> Algorithm:
    """Memory-augmented neural network.

    Args:
        model: a module with ``trunk`` and ``head``; of the head only its width is used.
        spec: that of a regression or classification task.
        controller: width of the LSTM, at least 1.
        slots: number of rows of the memory, at least ``heads``.
        width: width of a row, at least 1.
        heads: number of heads that read and write, at least 1.
        key_strength: β, above 0; the paper's 1 makes the attention nearly uniform.
    """
    for name, value in {"controller": controller, "width": width, "heads": heads}.items():
        require(value >= 1, f"{name} must be at least 1, not {value}")
    require(slots >= heads, f"slots must be at least heads={heads}, not {slots}")
    require(key_strength > 0, f"key_strength must be above 0, not {key_strength}")
    trunk, head = trunk_and_head(model, "mann")
    features = forward_of(trunk)
    numbers = prod(spec.inputs.shape) if isinstance(spec.inputs, Numbers) else 0
    token = head.in_features + numbers + spec.target.outputs
    look, drawn = own_network(lambda: Mann(token, spec.target.outputs, controller, width, heads, key_strength), model)

    def embed(weights: Weights, x: Tensor) -> Tensor:
        z = normalised(features(weights, x), (-1,), 1e-5)
        return torch.cat([z, x.flatten(1)], -1) if numbers else z

    def init(generator: torch.Generator) -> Tree:
        weights = parameters_of(trunk)
        return {"weights": weights, "memory": drawn(generator)}

    def read(theta: Tree, z: Tensor, y: Tensor, weight: Tensor | None) -> tuple[Memory, Tensor]:
        """Return the memory after features ``z`` with targets ``y``, and the predictions along it ``[n, outputs]``.

        Padding, whose ``weight`` is 0, comes first and leaves the memory empty.
        """
        memory, outputs = empty(z, controller, slots, width, heads), []
        for i, token in enumerate(torch.cat([z, torch.cat([torch.zeros_like(y[:1]), y[:-1]])], -1)):
            seen, output = look(theta["memory"], (memory, token))
            new = written(memory, seen)
            memory = new if weight is None else kept(weight[i], new, memory)
            outputs.append(output)
        return memory, torch.stack(outputs)

    def answers(theta: Tree, memory: Memory, last: Tensor, queries: Tensor) -> Tensor:
        tokens = torch.cat([queries, last.expand(len(queries), -1)], -1)
        return cast(Tensor, vmap(lambda token: look(theta["memory"], (memory, token))[1])(tokens))

    def sequence(theta: Tree, support: Tree, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return predictions along the support set, whose padding comes first, and for the queries after it."""
        z, queries = embed_together(embed, theta["weights"], support, x)
        memory, along = read(theta, z, support["y"], support.get("weight"))
        return along, answers(theta, memory, support["y"][-1], queries)

    def predict(theta: Tree, state: Tree, x: Any) -> Tensor:
        return sequence(theta, padding_first(state), x)[1]

    def meta_loss(theta: Tree, task: Task, loss: Loss) -> MetaLoss:
        support = padding_first(task.support)
        with weighing(task.query.get("weight")):
            along, behind = sequence(theta, support, task.query["x"])
        before, _ = loss(lambda x: along, support)
        after, scores = loss(lambda x: behind, task.query)
        n, m = count_of(support), count_of(task.query)
        return MetaLoss((n * before + m * after) / (n + m), scores)

    def by_instance(theta: Tree, task: Task, loss: Loss, steps: int) -> Tensor:
        """Return the accuracy on the first, second, … example of a class ``[shots]``, given what was seen before it.

        It is NaN where no class of a task has that many examples.
        """
        support = padding_first(task.support)
        with weighing(task.query.get("weight")):
            along, _ = sequence(theta, support, task.query["x"])
        y = support["y"]
        correct = ((own_classes(along, support).argmax(-1) == y.argmax(-1)) & along.isfinite().all(-1)).to(y.dtype)
        each = one_hot(instance_of(y).long() - 1, spec.sizes.shots, y)
        return cast(Tensor, correct @ each / each.sum(0))

    instances = Report(
        "instances", {"instance": tuple(str(k + 1) for k in range(spec.sizes.shots))}, spec.metrics[0], by_instance
    )
    return Algorithm(
        init,
        keep_support,
        predict,
        approach="dependent",
        needs="targets",
        paper="https://arxiv.org/abs/1605.06065",
        meta_loss=meta_loss,
        report=instances if spec.offers("classes") else None,
        adapted_parameters=lambda theta: slots * width,
    )
