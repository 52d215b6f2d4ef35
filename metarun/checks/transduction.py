"""Whether the queries of a task see each other, found out by looking."""

import torch
from torch import Tensor

from metarun.checks.family import SUPERVISED
from metarun.contracts import Algorithm, Family, Predict, Task, Tree
from metarun.engine.batch import adapt_and_score
from metarun.tree import first_tasks

TOLERANCE = 1e-5
"""Of the largest output: what rounding may move."""


def is_transductive(algorithm: Algorithm, theta: Tree, family: Family, tasks: Task, steps: int) -> bool:
    """Whether the answers to some queries of a task move when its other queries are changed.

    The first of ``tasks`` is adapted to with ``steps`` steps; then half of its queries stay, and the others become
    copies of the first one. Episodes of a policy do not see each other.
    """
    if family.spec.kind not in SUPERVISED:
        return False
    task = first_tasks(tasks, 1)
    x = task.query["x"]
    count = x.shape[1]
    stay = (count + 1) // 2
    changed = torch.cat([x[:, :stay], x[:, :1].expand(-1, count - stay, *x.shape[2:])], 1)

    def answers(predict: Predict, data: Tree) -> tuple[Tensor, Tensor]:
        if "changed" not in data:
            return family.loss(predict, data)
        pair = torch.stack([predict(data[name])[:stay] for name in ("x", "changed")])
        return pair, pair

    looked_at = task._replace(query={"x": x, "changed": changed})
    pair = adapt_and_score(algorithm, theta, looked_at, answers, steps)[0]
    before, after = pair.nan_to_num()
    return bool((before - after).abs().max() > TOLERANCE * before.abs().max())
