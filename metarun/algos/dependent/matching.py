"""Matching Networks.

Vinyals, Blundell, Lillicrap, Kavukcuoglu, Wierstra 2016, "Matching Networks for One Shot Learning",
https://arxiv.org/abs/1606.04080.

    P(y | x) = Σ_i a(x, x_i) y_i,   a = softmax over the support set of c(f(x), g(x_i))       (equations 1 and 2)

c is the cosine, as in the paper, or minus the squared distance, which independent re-implementations prefer.

Without full context embeddings f and g are the trunk: each example is embedded by itself, except for batch statistics.
With them (``full_context``, §2.1.2 and appendix A), from the trunk's features f' and g':

    g(x_i) = g'(x_i) + →h_i + ←h_i                      an LSTM in each direction over the support set in its order
    f(x) = h_K:   ĥ_k, c_k = LSTM(f'(x), [h_(k−1), r_(k−1)], c_(k−1)),   h_k = ĥ_k + f'(x)
                  r_k = Σ_i softmax_i(h_k · g(x_i)) g(x_i)               K steps of reading, from h_0 = f'(x)
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from metarun.contracts import Algorithm, Spec, Tree
from metarun.errors import require
from metarun.inner import by_row, keep_support, rows_together
from metarun.nn.functional import forward_of, own_network, parameters_of, trunk_and_head
from metarun.nn.ops import kept, lstm, seen, squared_distances, unit_rows

LEAST_CHANCE = 1e-6
"""Added to each probability, so that a class without any attention still has a logarithm."""


class FullContext(nn.Module):
    """Embeddings of support examples and queries that depend on the whole support set."""

    def __init__(self, width: int, reads: int) -> None:
        super().__init__()
        self.reads = reads
        self.forwards, self.backwards = (nn.Linear(2 * width, 4 * width) for _ in range(2))
        self.reading = nn.Linear(3 * width, 4 * width)

    def along(self, gates: nn.Module, z: Tensor, weight: Tensor | None) -> Tensor:
        """Return hidden states of an LSTM over the rows of ``z [examples, width]``; padding leaves them unchanged."""
        hidden = cell = torch.zeros_like(z[0])
        states = []
        for i, row in enumerate(z):
            new = lstm(gates(torch.cat([row, hidden])), cell)
            hidden, cell = new if weight is None else kept(weight[i], new, (hidden, cell))
            states.append(hidden)
        return torch.stack(states)

    def forward(self, given: tuple[Tensor, Tensor, Tensor | None]) -> tuple[Tensor, Tensor]:
        """Map features of support set and queries, with the support set's weights, to embeddings of both."""
        z, queries, weight = given
        back = None if weight is None else weight.flip(0)
        support = z + self.along(self.forwards, z, weight) + self.along(self.backwards, z.flip(0), back).flip(0)
        hidden, cell = queries, torch.zeros_like(queries)
        for _ in range(self.reads):
            read = seen(hidden @ support.T, weight).softmax(-1) @ support
            hidden, cell = lstm(self.reading(torch.cat([queries, hidden, read], -1)), cell)
            hidden = hidden + queries
        return support, hidden


def matching(
    model: nn.Module,
    spec: Spec,
    distance: Literal["cosine", "euclidean"] = "cosine",
    full_context: bool = False,
    reads: int = 5,
) -> Algorithm:
    """Matching networks.

    Args:
        model: a module with ``trunk`` and ``head``; of the head only its width is used.
        spec: that of a task with classes.
        distance: how far a query is from a support example.
        full_context: whether embeddings depend on the whole support set.
        reads: K, number of reading steps, at least 1.
    """
    require(reads >= 1, f"reads must be at least 1, not {reads}")
    trunk, head = trunk_and_head(model, "matching")
    embed = forward_of(trunk)

    in_context, drawn = own_network(lambda: FullContext(head.in_features, reads), model)

    def init(generator: torch.Generator) -> Tree:
        weights = parameters_of(trunk)
        return {"weights": weights, "context": drawn(generator)} if full_context else {"weights": weights}

    def predict(theta: Tree, state: Tree, x: Any) -> Tensor:
        rows, features = rows_together(spec, embed, theta["weights"], state, x)

        def answer(queries: Tensor) -> Tensor:
            z = rows.z
            if full_context:
                z, queries = in_context(theta["context"], (z, queries, rows.weight))
            near = unit_rows(queries) @ unit_rows(z).T if distance == "cosine" else -squared_distances(queries, z)
            chances: Tensor = seen(near, rows.weight).softmax(-1) @ rows.y + LEAST_CHANCE
            return chances.log()

        return by_row(answer, features)

    return Algorithm(
        init,
        keep_support,
        predict,
        approach="dependent",
        needs="classes",
        paper="https://arxiv.org/abs/1606.04080",
        any_ways=True,
        open_ways=True,
        embed=lambda theta, x: embed(theta["weights"], x),
        adapted_parameters=lambda theta: 0,
    )
