"""A check whether the queries of a task see each other."""

import torch
from torch import Tensor

from metarun.contracts import Algorithm, Family, Predict, Scores, Task, Tree
from metarun.engine.batch import adapt_and_score
from metarun.targets.scoring import loss_of
from metarun.tree import first_tasks

TOLERANCE = 1e-5
"""Share of the largest output by which rounding may move an output."""


def is_transductive(algorithm: Algorithm, theta: Tree, family: Family, tasks: Task, steps: int) -> bool:
    """Whether the predictions for some queries of a task change when its other queries are changed.

    The learner adapts to the first of ``tasks`` by ``steps`` steps. Then half of the queries stay, and the others
    become copies of the first one. Episodes of a policy do not see each other.
    """
    if family.spec.offers("policy"):
        return False
    task = first_tasks(tasks, 1)
    x = task.query["x"]
    if "weight" in task.query:
        x = x[:, task.query["weight"][0] > 0]
    count = x.shape[1]
    stay = (count + 1) // 2
    changed = torch.cat([x[:, :stay], x[:, :1].expand(-1, count - stay, *x.shape[2:])], 1)

    loss = loss_of(family)

    def answers(predict: Predict, data: Tree) -> tuple[Tensor, Scores]:
        if "changed" not in data:
            return loss(predict, data)
        return torch.stack([predict(data[name])[:stay] for name in ("x", "changed")]), {}

    looked_at = task._replace(query={"x": x, "changed": changed})
    pair = adapt_and_score(algorithm, theta, looked_at, answers, steps)[0]
    before, after = pair.nan_to_num()
    return bool((before - after).abs().max() > TOLERANCE * before.abs().max())
