"""Answers without a learner, which any learner has to beat.

Families name their own: the mean training picture where pixels are to be completed, the density of the support pictures
where pictures are to be generated. Where targets are numbers there are two more:

- ``nearest``: the target of the nearest support example, by the Euclidean distance of inputs;
- ``mean``: the mean target of the support set.

Expected: MSE 1.46 ± 0.14 (``metarun algo=reference task=sinusoid``).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from metarun.contracts import Algorithm, Spec, Tree, flat
from metarun.errors import require
from metarun.inner import keep_support
from metarun.nn.ops import mean_row, squared_distances


def nearest(support: Tree, x: Tensor) -> Tensor:
    """Return for each of ``x [examples, ...]`` the target of the nearest support example."""
    distances = squared_distances(flat(x), flat(support["x"]))
    if "weight" in support:
        distances = distances.masked_fill(support["weight"] == 0, torch.inf)
    answer: Tensor = support["y"][distances.argmin(-1)]
    return answer


def mean_target(support: Tree, x: Tensor) -> Tensor:
    """Return the mean target of the support set for each of ``x [examples, ...]``."""
    return mean_row(support["y"], support.get("weight")).expand(len(x), -1)


OF_NUMBERS: dict[str, Callable[[Tree, Any], Tensor]] = {"nearest": nearest, "mean": mean_target}


def reference(spec: Spec, of: str | None = None) -> Algorithm:
    """Build an answer without a learner.

    Args:
        spec: the task family's, whose facts name its references.
        of: which one; null: the first that the family names, otherwise ``nearest``.
    """
    known: Mapping[str, Callable[[Tree, Any], Tensor]] = {
        **spec.facts.references,
        **(OF_NUMBERS if spec.offers("numbers") else {}),
    }
    require(
        len(known) > 0,
        "reference needs targets that are numbers or a family that names references, and this task has neither; "
        "choose another baseline, such as algo=scratch",
    )
    name = next(iter(known)) if of is None else of
    require(name in known, f"of must be one of {', '.join(known)}, not {name}")
    answer = known[name]

    def init(generator: torch.Generator) -> Tree:
        return {"carried": {}}

    def predict(theta: Tree, state: Tree, x: Any) -> Tensor:
        return answer(state, x)

    return Algorithm(
        init,
        keep_support,
        predict,
        approach="baseline",
        needs="loss",
        paper="",
        meta_learns=False,
        adapted_parameters=lambda theta: 0,
    )
