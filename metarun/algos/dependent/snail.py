"""SNAIL: temporal convolutions and attention over the support set in its order, followed by the query.

Mishra, Rohaninejad, Chen, Abbeel 2018, "A Simple Neural Attentive Meta-Learner", https://arxiv.org/abs/1707.03141.

    token            features of x_t concatenated with y_t, or with zeros for the query            (§2.2)
    dense block      [x_t, tanh(F · (x_t−d, x_t)) ⊙ σ(G · (x_t−d, x_t))]                           (§2.1)
    TC block         dense blocks with d = 1, 2, 4, … until the whole sequence is in reach
    attention        [x_t, softmax(q_t · k_s / √K over s ≤ t) v_s]
    network          attention, TC, attention, TC, attention, linear                               (appendix A)

Every layer is causal, so the support set's activations are the same for all queries and are computed once. A query
takes the last position and sees no other query. The prediction depends on the order of the support set, which tasks
draw at random.

Inputs are the features of the model's trunk. Where we deviate: support and query examples are embedded in one batch.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metarun.contracts import Algorithm, Rows, Spec, Tree
from metarun.errors import require
from metarun.inner import by_row, keep_support, padding_first, rows_together
from metarun.nn.functional import forward_of, own_network, parameters_of, trunk_and_head
from metarun.nn.ops import seen, without_padding

AT_ONCE = 1024
"""Largest number of queries that are answered at once."""


class Sequences(NamedTuple):
    """Activations along the support set, and of each query at the position after it."""

    support: Tensor
    """``[examples, channels]``."""
    query: Tensor
    """``[queries, channels]``."""
    weight: Tensor | None = None
    """Weights of the support examples ``[examples]``: 0 for padding, which comes first; None: there is no padding."""

    def where_real(self) -> "Sequences":
        """Return the sequences with zeros in place of padding, as before the start of a sequence."""
        return self._replace(support=without_padding(self.support, self.weight))


class Dense(nn.Module):
    """A gated causal convolution of width 2, concatenated with its input."""

    def __init__(self, channels: int, filters: int, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.now, self.before = nn.Linear(channels, 2 * filters), nn.Linear(channels, 2 * filters, bias=False)

    def forward(self, given: Sequences) -> Sequences:
        """Append ``filters`` channels."""
        support, query, weight = given.where_real()
        # Row n holds the activation ``dilation`` positions before position n; the last row is for the query.
        before = torch.cat([support.new_zeros(self.dilation, support.shape[1]), support])[: len(support) + 1]
        early = self.before(before)

        def joined(x: Tensor, early: Tensor) -> Tensor:
            value, gate = (self.now(x) + early).chunk(2, -1)
            return torch.cat([x, value.tanh() * gate.sigmoid()], -1)

        return Sequences(joined(support, early[: len(support)]), joined(query, early[len(support)]), weight)


class Attend(nn.Module):
    """Causal attention with one head, concatenated with its input."""

    def __init__(self, channels: int, keys: int, values: int) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(channels, keys), nn.Linear(channels, keys)
        self.value = nn.Linear(channels, values)

    def forward(self, given: Sequences) -> Sequences:
        """Append ``values`` channels."""
        support, query, weight = given
        n, root = len(support), math.sqrt(self.key.out_features)
        keys, values = self.key(support), self.value(support)
        later = torch.ones(n, n, dtype=torch.bool, device=support.device).triu(1)
        among = (self.query(support) @ keys.T / root).masked_fill(later, -math.inf)
        if weight is not None:
            # Padding is seen only by itself, since a row that sees nothing would have no softmax.
            alone = torch.eye(n, dtype=torch.bool, device=support.device)
            among = among.masked_fill((weight == 0) & ~alone, -math.inf)
        among = among.softmax(-1)
        asked = self.query(query)
        own = (asked * self.key(query)).sum(-1, keepdim=True)
        weights = (torch.cat([seen(asked @ keys.T, weight), own], -1) / root).softmax(-1)
        read = weights[:, :n] @ values + weights[:, n:] * self.value(query)
        return Sequences(torch.cat([support, among @ values], -1), torch.cat([query, read], -1), weight)


class Snail(nn.Module):
    """The network on tokens: ``([support, token], [queries, token])`` → ``[queries, outputs]``."""

    def __init__(self, token: int, outputs: int, length: int, width: int) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        channels = token

        def attend(keys: int, values: int) -> None:
            nonlocal channels
            blocks.append(Attend(channels, keys, values))
            channels += values

        def convolve() -> None:
            nonlocal channels
            for power in range(math.ceil(math.log2(length))):
                blocks.append(Dense(channels, width, 2**power))
                channels += width

        attend(width // 2, width // 4)
        convolve()
        attend(2 * width, width)
        convolve()
        attend(4 * width, 2 * width)
        self.blocks = nn.Sequential(*blocks)
        self.out = nn.Linear(channels, outputs)

    def forward(self, given: Sequences) -> Tensor:
        """Return one prediction per query."""
        out: Tensor = self.out(self.blocks(given).query)
        return out


def labelled(z: Tensor, y: Tensor) -> Tensor:
    """Return features ``z [n, features]`` concatenated with their targets ``y [n, outputs]``."""
    return torch.cat([z, y], -1)


def unlabelled(z: Tensor, like: Tensor) -> Tensor:
    """Return features ``z [n, features]`` concatenated with zeros as wide as the targets ``like``."""
    return torch.cat([z, z.new_zeros(len(z), like.shape[1])], -1)


def reader(model: nn.Module, spec: Spec, name: str, network: Any, paper: str) -> Algorithm:
    """A network that reads features and targets of the support set and predicts the targets of the queries.

    Args:
        model: a module with ``trunk`` and ``head``; of the head only its width is used.
        spec: that of a regression or classification task.
        name: of the algorithm.
        network: function of the width of a token that makes the network on (support tokens, query tokens).
        paper: address of its source.
    """
    trunk, head = trunk_and_head(model, name)
    embed = forward_of(trunk)
    read, drawn = own_network(lambda: network(head.in_features + spec.row_outputs), model)

    def init(generator: torch.Generator) -> Tree:
        weights = parameters_of(trunk)
        return {"weights": weights, "reader": drawn(generator)}

    def predict(theta: Tree, state: Tree, x: Any) -> Tensor:
        rows, features = rows_together(spec, embed, theta["weights"], state, x)
        z, y, weight = rows if rows.weight is None else Rows(**padding_first(rows._asdict()))
        known = labelled(z, y)

        def answer(queries: Tensor) -> Tensor:
            # A picture has thousands of locations; all at once, and for many tasks, they would not fit into memory.
            parts = (Sequences(known, unlabelled(part, y), weight) for part in torch.split(queries, AT_ONCE))
            return torch.cat([read(theta["reader"], part) for part in parts])

        return by_row(answer, features)

    return Algorithm(
        init,
        keep_support,
        predict,
        approach="dependent",
        needs="rows",
        paper=paper,
        adapted_parameters=lambda theta: 0,
    )


def snail(model: nn.Module, spec: Spec, width: int = 128) -> Algorithm:
    """SNAIL.

    Args:
        model: a module with ``trunk`` and ``head``; of the head only its width is used.
        spec: that of a regression or classification task.
        width: number of filters of a dense block, at least 4; attention has a quarter to four times as many channels.
    """
    require(width >= 4, f"width must be at least 4, not {width}")
    length = spec.sizes.shots * (spec.sizes.ways or 1) + 1
    return reader(
        model,
        spec,
        "snail",
        lambda token: Snail(token, spec.row_outputs, length, width),
        "https://arxiv.org/abs/1707.03141",
    )
