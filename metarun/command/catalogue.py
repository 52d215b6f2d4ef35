"""Pages that are read from the algorithms themselves: ``python -m metarun.command.catalogue docs``.

``algorithms.md`` says in tables what each algorithm learns and adapts, and ``methods_*.md`` has the papers, equations
and deviations of each family of methods, from the docstrings of the modules.
"""

import re
import sys
from collections.abc import Mapping
from functools import partial
from importlib import import_module
from importlib.resources import files
from inspect import getdoc
from pathlib import Path
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

`python -m metarun.command.catalogue docs` generates this page from the algorithms themselves, and a test checks that it
is up to date. The equations are on the pages of [model-agnostic methods](methods_agnostic.md),
[model-dependent methods](methods_dependent.md) and [baselines](methods_baseline.md).

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
OPENINGS = {
    "agnostic": """# Model-agnostic methods

These methods adapt the weights of any differentiable model, and `metanas` also its architecture. Most need nothing of a
task but a loss; `protomaml` needs classes, and `imaml` a loss that stays the same from one step to the next.
""",
    "dependent": """# Model-dependent methods

The architecture is the method: it reads the support set, or has parts that each task sets. Most of these methods adapt
in one pass, without a gradient.
""",
    "baseline": """# Baselines

These show what the same budget buys without meta-learning, and how much can be had at best.
""",
}
SAME_FOR_ALL = """
Each section comes from the docstring of the module that implements the method
(`python -m metarun.command.catalogue docs`), next to which the code can be read.
"""


Reference = tuple[Family, nn.Module]
Fitted = Mapping[str, tuple[Algorithm, nn.Module, Family]]
"""Each algorithm by its name, with the model and the family that it was built for."""


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


def row(name: str, algorithm: Algorithm, model: nn.Module, family: Family) -> str:
    """Return an algorithm's line of the table."""
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
    return "| " + " | ".join(cells) + " |"


def tables(fitted: Fitted) -> str:
    """Return the page ``algorithms.md``."""
    text = HEAD
    for family, title in FAMILIES.items():
        text += f"\n## {title.capitalize()}\n\n"
        text += "| algorithm | | needs | meta-learned | adapted | cost | paper |\n|---|---|---|---|---|---|---|\n"
        text += "".join(f"{row(name, *own)}\n" for name, own in fitted.items() if own[0].approach == family)
    return text


def as_markdown(docstring: str) -> str:
    """Return a module's docstring as Markdown: indented lines are equations, and web addresses are links."""
    lines: list[str] = []
    inside = False
    for line in docstring.splitlines():
        equation = line.startswith("    ")
        if equation != inside and (equation or line):
            # An empty line between two equations belongs to them.
            while lines and not lines[-1]:
                lines.pop()
            lines += ["", "```text"] if equation else ["```", ""]
            inside = equation
        lines.append(line[4:] if inside else line)
    lines += ["```"] if inside else []
    text, code = [], False
    for line in lines:
        fence = line.startswith("```")
        code ^= fence
        if not (code or fence):
            line = re.sub(r"(?<![<(\]])(https?://\S+?)(?=[).,;:]*(\s|$))", r"<\1>", line).replace("``", "`")
        text.append(line)
    return "\n".join(text).strip()


def methods(approach: str, fitted: Fitted) -> str:
    """Return the page of the methods of a family, one section per module."""
    algorithms: dict[str, list[str]] = {}
    for name, (algorithm, *_) in fitted.items():
        if algorithm.approach == approach:
            target = re.search(
                r"^_target_: (\S+)\.\w+$", (files("metarun.conf") / "algo" / f"{name}.yaml").read_text(), re.M
            )
            assert target is not None
            algorithms.setdefault(target[1], []).append(name)
    text = OPENINGS[approach] + SAME_FOR_ALL
    for module, names in algorithms.items():
        title, _, rest = (getdoc(import_module(module)) or "").partition("\n")
        text += f"\n## {title.rstrip('.')}\n\n{', '.join(f'`algo={name}`' for name in names)}\n"
        text += f"\n{as_markdown(rest)}\n" if rest.strip() else ""
    return text


def pages() -> dict[str, str]:
    """Return the pages by the name of their file."""
    tried = references()
    fitted = {name: first_that_fits(name, tried) for name in algorithm_names()}
    of_families = {f"methods_{approach}.md": methods(approach, fitted) for approach in FAMILIES}
    return {"algorithms.md": tables(fitted), **of_families}


if __name__ == "__main__":
    for page, content in pages().items():
        (Path(sys.argv[1]) / page).write_text(content)
