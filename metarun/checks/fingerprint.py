"""A hash of the sampled tensors, which tells whether two runs were tested on the same episodes."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from metarun.checks.family import named_leaves
from metarun.contracts import Family, Predict, Task
from metarun.targets.scoring import loss_of, scores_in_test
from metarun.tasks.units import UNIT
from metarun.tree import first_tasks, tree_map

DIGITS = 4
"""Number of digits of the probe's score, so that the last bits of another machine's arithmetic do not count."""


def probe_score(family: Family, tasks: Task) -> list[str]:
    """Return how the first of ``tasks`` scores a learner that always predicts 0.

    Tensors do not show all that a score depends on: an environment's rules, or a family's weight of an error, may come
    from its own keys.
    """
    spec, task = family.spec, first_tasks(tasks, 1)
    query = tree_map(lambda leaf: leaf[0], task.query)

    def nothing(given: Any) -> Tensor:
        if (own := getattr(spec.target, "nothing", None)) is not None:
            answer: Tensor = own(given)
            return answer
        if not spec.offers("policy"):
            if "y" not in query:
                return torch.zeros(len(given), spec.target.outputs, device=given.device)
            y: Tensor = query["y"]
            # Whole numbers are ids of tokens, for each of which there is a row of logits.
            ids = () if y.is_floating_point() else (spec.target.outputs,)
            return torch.zeros(*y.shape, *ids, device=y.device)
        observation: Tensor = given.observation
        return observation.new_zeros(*observation.shape[:2], spec.target.outputs)

    predict: Predict = nothing
    with torch.no_grad():
        _, scores = loss_of(family)(predict, query)
        scores = {**scores, **scores_in_test(family, predict, query)}
    return [f"{name} {float(score):.{DIGITS}g}" for name, score in scores.items()]


class Fingerprint:
    """A hash of the tasks that pass through ``over``, and of how they are scored."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.hash = hashlib.sha256()
        self.first = True

    def add(self, tasks: Task) -> None:
        """Add a block of tasks: names, shapes, types and bytes of its leaves."""
        if self.first:
            spec = self.family.spec
            facts = [self.family.dataset, *map(list, spec.metrics), *probe_score(self.family, tasks)]
            self.hash.update(json.dumps(facts).encode())
            self.first = False
        for part in ("support", "query"):
            # What classes and tasks are called changes neither answers nor scores.
            own = {name: leaf for name, leaf in getattr(tasks, part).items() if name not in ("identity", UNIT)}
            for name, leaf in sorted(named_leaves(own, part), key=lambda pair: pair[0]):
                self.hash.update(f"{name} {list(leaf.shape)} {leaf.dtype}".encode())
                self.hash.update(leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())

    def over(self, blocks: Iterable[Task]) -> Iterator[Task]:
        """Yield the same blocks, adding each one to the hash."""
        for block in blocks:
            self.add(block)
            yield block

    def text(self) -> str:
        """Return the hash of all that was added, as 12 hexadecimal digits."""
        return self.hash.hexdigest()[:12]
