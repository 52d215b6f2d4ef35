"""Relation Networks.

Sung, Yang, Zhang, Xiang, Torr, Hospedales 2018, "Learning to Compare: Relation Network for Few-Shot Learning",
https://arxiv.org/abs/1711.06025.

    relation     r_ij = g([Σ f(x_i of class j), f(x)]) in (0, 1)                     (equation 1; sums, §3.2)
    meta-loss    mean squared error of r to 1 for the class of x, 0 for others        (equation 2)
    output       logit_j(x) = ln r_ij, so that the probability of class j is r_ij / Σ_k r_ik

The paper says which class is chosen, that of the largest relation, and nothing of probabilities.

Where the model's features are maps (conv4 with ``readout=flatten``), g is the paper's: two blocks of 64 filters and
2×2 max-pooling over both maps concatenated, then two linear layers. Where the features are vectors, g consists of the
linear layers alone.

Where we deviate: the first convolution of the concatenated maps is the sum of one of the class's maps and one of the
query's, computed once per class and per query instead of once per pair; only the time differs.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from metarun.contracts import Algorithm, Loss, MetaLoss, RowTarget, Spec, Task, Tree
from metarun.errors import require
from metarun.inner import by_row, keep_support, rows_together
from metarun.nn.functional import forward_of, own_network, parameters_of, trunk_and_head
from metarun.nn.padding import present_weight, weighing
from metarun.targets.weights import mean_over

FILTERS = 64


class CompareVectors(nn.Module):
    """g of features ``classes [ways, d]`` and ``queries [m, d]`` before its sigmoid: ``[m, ways]``."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2 * features, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, given: tuple[Tensor, Tensor]) -> Tensor:
        """Return the log odds of relations ``[m, ways]``."""
        classes, queries = given
        pairs = torch.cat([classes.expand(len(queries), -1, -1), queries[:, None].expand(-1, len(classes), -1)], -1)
        return cast(Tensor, self.layers(pairs)[..., 0])


class CompareMaps(nn.Module):
    """g of features that are flattened maps of a shape ``(channels, height, width)``."""

    def __init__(self, maps: tuple[int, int, int], width: int) -> None:
        super().__init__()
        self.maps = maps
        self.of_class = nn.Conv2d(maps[0], FILTERS, 3, padding=1, bias=False)
        self.of_query = nn.Conv2d(maps[0], FILTERS, 3, padding=1, bias=False)
        # The two halves of one convolution with twice the channels, initialised like that convolution.
        for half in (self.of_class, self.of_query):
            half.weight.data /= 2**0.5
        # With ceil_mode small maps have something to pool and large ones keep their edges.
        self.blocks = nn.Sequential(
            *(nn.BatchNorm2d(FILTERS, track_running_stats=False), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)),
            nn.Conv2d(FILTERS, FILTERS, 3, padding=1, bias=False),
            *(
                nn.BatchNorm2d(FILTERS, track_running_stats=False),
                nn.ReLU(),
                nn.MaxPool2d(2, ceil_mode=True),
                nn.Flatten(),
            ),
        )
        with torch.no_grad():
            features = self.blocks(torch.zeros(2, FILTERS, *maps[1:])).shape[1]
        self.layers = nn.Sequential(nn.Linear(features, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, given: tuple[Tensor, Tensor]) -> Tensor:
        """Return the log odds of relations ``[m, ways]``."""
        classes, queries = (part.view(-1, *self.maps) for part in given)
        joined = self.of_class(classes)[None] + self.of_query(queries)[:, None]
        odds: Tensor = self.layers(self.blocks(joined.flatten(0, 1)))
        return odds.view(joined.shape[:2])


def weight_of_pairs(weight: Tensor | None, queries: int, ways: Tensor | None) -> Tensor | None:
    """Return the weight of each pair of a query and a class ``[queries · ways]``; None where all pairs count alike.

    Args:
        weight: of each query ``[queries]``; None: all are 1.
        queries: number of queries.
        ways: 1, or 0 for a class that the task lacks ``[ways]``; None: it has all.
    """
    if ways is None:
        return weight
    return ((ways.new_ones(queries) if weight is None else weight)[:, None] * ways).flatten()


def relation(model: nn.Module, spec: Spec, width: int = 64) -> Algorithm:
    """Relation networks.

    Args:
        model: a module with ``trunk`` and ``head``; of the head only its width is used. If it says in ``maps`` what
            shape its features have, they are compared as maps.
        spec: that of a task with classes.
        width: width of the hidden linear layer of g, at least 1 (8 in the paper).
    """
    require(width >= 1, f"width must be at least 1, not {width}")
    require(
        spec.row_outputs == spec.target.outputs,
        "relation learns relations to classes alone, and this task asks for more; choose another, such as protonet",
    )
    trunk, head = trunk_and_head(model, "relation")
    embed = forward_of(trunk)
    maps: tuple[int, int, int] | None = getattr(model, "maps", None)

    def comparer() -> nn.Module:
        return CompareVectors(head.in_features, width) if maps is None else CompareMaps(maps, width)

    compare, drawn = own_network(comparer, model)

    def init(generator: torch.Generator) -> Tree:
        weights = parameters_of(trunk)
        return {"weights": weights, "relation": drawn(generator)}

    def odds_of(theta: Tree, state: Tree, x: Any) -> Tensor:
        """Return the log odds of relations."""
        rows, features = rows_together(spec, embed, theta["weights"], state, x)
        classes, ways = rows.y.T @ rows.z, state["ways"][0] if "ways" in state else None

        def compared(queries: Tensor) -> Tensor:
            if maps is None:
                return cast(Tensor, compare(theta["relation"], (classes, queries)))
            # Its normalisation is over all pairs, of which those with a class that the task lacks do not count.
            with weighing(weight_of_pairs(present_weight(), len(queries), ways)):
                return cast(Tensor, compare(theta["relation"], (classes, queries)))

        return by_row(compared, features)

    def predict(theta: Tree, state: Tree, x: Any) -> Tensor:
        # The logarithm of the relation itself would be the same for all classes whose relation rounds to 1, or to 0.
        return logsigmoid(odds_of(theta, state, x))

    def meta_loss(theta: Tree, task: Task, loss: Loss) -> MetaLoss:
        with weighing(task.query.get("weight")):
            odds = odds_of(theta, task.support, task.query["x"])
        _, scores = loss(lambda x: logsigmoid(odds), task.query)
        found, true, weight = cast(RowTarget, spec.target).rows(odds.sigmoid(), task.query)
        errors = (found - true).square()
        if "ways" in task.query:
            errors = errors @ task.query["ways"][0] / task.query["ways"][0].sum()
        return MetaLoss(mean_over(errors, {} if weight is None else {"weight": weight}), scores)

    return Algorithm(
        init,
        keep_support,
        predict,
        approach="dependent",
        needs="classes",
        paper="https://arxiv.org/abs/1711.06025",
        meta_loss=meta_loss,
        any_ways=True,
        open_ways=True,
        adapted_parameters=lambda theta: 0,
    )
