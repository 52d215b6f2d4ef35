"""The page ``docs/algorithms.md``: what each algorithm learns and adapts, read from the algorithms themselves.

python -m metarun.command.catalogue > docs/algorithms.md
"""

from functools import partial
from importlib.resources import files
from typing import cast

import torch
from torch import nn

from metarun.assemble import NEEDS, algorithm_names, aliases, default_algorithm
from metarun.command.help import description
from metarun.contracts import Algorithm, Family, Tree
from metarun.engine.batch import adapted, adapted_parameters
from metarun.engine.choose import Counted
from metarun.models.conv4 import Conv4
from metarun.models.mlp import MLP
from metarun.models.policy import FastWeightsPolicy
from metarun.nn.functional import seeded
from metarun.nn.transforms import task_of
from metarun.random import drawing, stream
from metarun.targets.scoring import loss_of
from metarun.tasks.bandit import Bandit
from metarun.tasks.mdp import MDP
from metarun.tasks.omniglot import Omniglot
from metarun.tasks.sinusoid import Sinusoid
from metarun.tree import learned, size, tree_map

HEAD = """# Algorithms

`python -m metarun.command.catalogue > docs/algorithms.md` generates this page from the algorithms themselves, and a
test checks that it is up to date.

- *algorithm*: the value of `algo=`. A second name is an alias. `cavia` is `adaptive` with a context vector on any task.
- *needs*: what the algorithm asks of a task's target. Text and images are examples of classes.
- *meta-learned*: the parts that the outer optimizer changes, and the number of parameters in them.
- *adapted*: how many numbers adaptation sets per task; 0 where the support set is read and nothing is fitted.
- *cost*: the products and convolutions of adapting to one task, with the number of steps used in training, and
  answering one query, in units of a forward pass of the model on the same examples. The gradients of meta-training are
  extra.

The numbers are for 5-way 1-shot images of 28×28 with conv4. Where an algorithm does not serve images, they are for ten
points of a sine wave with the mlp, and where it serves neither, for a bandit with five arms (`psrl`: a tabular MDP) and
a policy with a memory. All use the algorithm's own defaults.
"""
FAMILIES = {"agnostic": "model-agnostic", "dependent": "model-dependent", "baseline": "baselines"}


Reference = tuple[Family, nn.Module]


def references() -> list[Reference]:
    """Return families with models, in the order in which an algorithm is tried on them."""
    images = Omniglot(dataset="procedural", queries=1)
    waves, pulls, tables = Sinusoid(), Bandit(shots=5, queries=5), MDP(shots=5, queries=5)
    with seeded(torch.Generator().manual_seed(0)):
        return [
            (cast(Family, images), Conv4(images.spec)),
            (cast(Family, waves), MLP(waves.spec)),
            (cast(Family, pulls), FastWeightsPolicy(pulls.spec)),
            (cast(Family, tables), FastWeightsPolicy(tables.spec)),
        ]


def first_that_fits(name: str, tried: list[Reference]) -> tuple[Algorithm, nn.Module, Family]:
    """Return the algorithm built for the first reference that it fits, with its model and that reference's family."""
    for family, model in tried:
        if found := default_algorithm(name, family, model):
            return *found, family
    raise AssertionError(f"{name} fits none of the references")


def cost(algorithm: Algorithm, model: nn.Module, family: Family, theta: Tree) -> str:
    """Return the work of adapting to a task and answering a query, in forward passes on the same examples."""
    loss = loss_of(family)
    support, query, _ = task_of(family.sample("test", 1, stream(0, "test")), 0)
    query = tree_map(lambda leaf: leaf[:1], query)
    with Counted() as forward:
        loss(model, support)
        loss(model, query)
    with Counted() as adapting, drawing(torch.tensor(0), training=False):
        state = adapted(algorithm, theta, support, loss, algorithm.train_steps)
        loss(partial(algorithm.predict, theta, state), query)
    return f"{adapting.work / forward.work:.1f}"


def row(name: str, tried: list[Reference]) -> tuple[str, str]:
    """Return an algorithm's family and its line of the table."""
    algorithm, model, family = first_that_fits(name, tried)
    theta = algorithm.init(stream(0, "algorithm"))
    parts = ", ".join(learned(theta)) if algorithm.meta_learns else ""
    meta = f"{parts} ({size(learned(theta)):,})" if parts else "nothing"
    paper = f"[paper]({algorithm.paper})" if algorithm.paper else ""
    what = description((files("metarun.conf") / "algo" / f"{name}.yaml").read_text()).rpartition(" (")[0]
    others = sorted(alias for alias, original in aliases().items() if original == name)
    cells = [
        ", ".join(f"`{own}`" for own in (name, *others)),
        what,
        NEEDS[algorithm.needs],
        meta,
        f"{adapted_parameters(algorithm, theta):,}",
        cost(algorithm, model, family, theta),
        paper,
    ]
    return algorithm.approach, "| " + " | ".join(cells) + " |"


def catalogue() -> str:
    """Return the whole page."""
    tried = references()
    rows = [row(name, tried) for name in algorithm_names()]
    text = HEAD
    for family, title in FAMILIES.items():
        text += f"\n## {title.capitalize()}\n\n"
        text += "| algorithm | | needs | meta-learned | adapted | cost | paper |\n|---|---|---|---|---|---|---|\n"
        text += "".join(f"{line}\n" for own, line in rows if own == family)
    return text


if __name__ == "__main__":
    print(catalogue(), end="")
