"""Pictures of a few test tasks: what a run has learned, as far as it can be seen.

- ``curves.png``: numbers as a function of one number, before and after adaptation, with the support points;
- ``episode.png``: an episode of images with right and wrong answers;
- ``paths.png``: the paths of a policy in the plane, before and after adaptation;
- ``samples.md`` or ``samples.png``: what a family shows of its learners' output, before and after adaptation;
- ``embedding.png``: where a method that classifies by distance puts the examples of an episode.

Which of them a run has depends only on the kinds of its inputs and targets, so that families from outside the
repository have them too.
"""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from metarun.assemble import Experiment
from metarun.contracts import Algorithm, Numbers, Predict, Samples, Task, Tree
from metarun.engine.batch import adapted
from metarun.errors import first_line, require
from metarun.evaluation import episodes
from metarun.nn.padding import weighing
from metarun.nn.transforms import over_tasks
from metarun.results import drawer
from metarun.results.drawings import Curves, Images, draw_curves, draw_embedding, draw_episode, draw_paths
from metarun.results.plots import save_figure
from metarun.system.files import write_text
from metarun.targets.classes import own_classes
from metarun.tree import first_tasks, tree_map

log = logging.getLogger(__name__)

Array = NDArray[np.float64]
TASKS = 3
"""Number of tasks in a picture of curves or paths."""
POINTS = 200

Drawing: TypeAlias = tuple[Callable[..., None], tuple[Any, ...]]
"""A function of `metarun.results.drawings`, and what it takes besides the path."""


def both_predictors(algorithm: Algorithm, theta: Tree, task: Task, experiment: Experiment) -> dict[str, Predict]:
    """Return the learner before adaptation, unless it has no state without a support set, and after it."""
    first = next(iter(algorithm.adapt(theta, task.support, experiment.loss)))
    steps = experiment.config.eval.adapt_steps
    states = {"before": first, "after": adapted(algorithm, theta, task.support, experiment.loss, steps)}
    if steps == 0:
        states.pop("after")
    return {name: partial(algorithm.predict, theta, state) for name, state in states.items() if state is not None}


@torch.no_grad()
def on_tasks(experiment: Experiment, count: int, function: Callable[[Task], Tree]) -> tuple[Task, Mapping[str, Array]]:
    """Return the first ``count`` test tasks, and a function's results for them as arrays ``[count, ...]``."""
    tasks = first_tasks(next(episodes(experiment, "test", count)), count)
    found = over_tasks(function, tasks, training=False)
    return tasks, {name: leaf.cpu().double().numpy() for name, leaf in found.items()}


def real(data: Tree, index: int) -> NDArray[np.bool_]:
    """Return which examples of a task are none of the padding."""
    weight = data["weight"][index].cpu().numpy() > 0 if "weight" in data else np.ones(len(data["x"][index]), dtype=bool)
    return np.asarray(weight)


def write_examples(experiment: Experiment, index: int, theta: Tree, directory: Path) -> None:
    """Write the pictures that the ``index``-th replica can have."""
    spec, algorithm = experiment.family.spec, experiment.replicas[index].algorithm
    title = f"{experiment.names['algo']} on {experiment.names['task']}"
    shape = spec.inputs.shape if isinstance(spec.inputs, Numbers) else ()
    possible = {
        curves: spec.offers("numbers") and shape == (1,) and spec.target.outputs == 1,
        episode: spec.offers("labels") and len(shape) == 3 and shape[0] in (1, 3),
        paths: hasattr(experiment.family, "paths"),
        samples: hasattr(experiment.family, "samples"),
        embedding: spec.offers("labels") and algorithm.embed is not None,
    }
    for draw in (draw for draw, can in possible.items() if can):
        try:
            shown = draw(experiment, algorithm, theta, title)
        except drawer.FORGIVEN as error:
            log.warning("  %s cannot be shown: %s", draw.__name__, first_line(error))
            continue
        if isinstance(shown, str):
            write_text(directory / f"{draw.__name__}.md", f"# {title}: {TASKS} test tasks\n\n{shown}")
        elif isinstance(shown, tuple):
            function, arguments = shown
            drawer.draw(draw.__name__, function, directory / f"{draw.__name__}.png", *arguments)
        else:
            save_figure(shown, directory / f"{draw.__name__}.png")


def curves(experiment: Experiment, algorithm: Algorithm, theta: Tree, title: str) -> Drawing:
    """Show predictions as curves, with the support points and the true values at the query points."""
    shown = first_tasks(next(episodes(experiment, "test", TASKS)), TASKS)
    every = torch.cat([shown.support["x"].flatten(), shown.query["x"].flatten()])
    grid = torch.linspace(float(every.min()), float(every.max()), POINTS).to(every)[:, None]

    def predicted(task: Task) -> Tree:
        predictors = both_predictors(algorithm, theta, task, experiment)
        with weighing(None):
            return {name: predict(grid) for name, predict in predictors.items()}

    tasks, found = on_tasks(experiment, TASKS, predicted)

    def points(data: Tree, index: int) -> tuple[Array, Array]:
        x, y = (data[name][index].cpu().double().numpy()[real(data, index)].ravel() for name in ("x", "y"))
        return x, y

    every_task = [
        Curves(
            points(tasks.support, i),
            points(tasks.query, i),
            grid.cpu().double().numpy(),
            {name: values[i] for name, values in found.items()},
        )
        for i in range(TASKS)
    ]
    return draw_curves, (title, every_task)


def episode(experiment: Experiment, algorithm: Algorithm, theta: Tree, title: str) -> Drawing:
    """Show an episode of images: a row per class with its support images, then queries, framed by right or wrong."""

    def answers(task: Task) -> Tree:
        *_, predict = both_predictors(algorithm, theta, task, experiment).values()
        with weighing(task.query.get("weight")):
            return {"answer": own_classes(predict(task.query["x"]), task.query).argmax(-1)}

    tasks, found = on_tasks(experiment, 1, answers)

    def images(data: Tree) -> Images:
        labels = np.where(real(data, 0), data["y"][0].argmax(-1).cpu().numpy(), -1)
        return Images(data["x"][0].cpu().double().numpy(), labels)

    answer, ways = found["answer"][0].astype(int), experiment.family.spec.target.outputs
    return draw_episode, (title, images(tasks.support), images(tasks.query), answer, ways)


def paths(experiment: Experiment, algorithm: Algorithm, theta: Tree, title: str) -> Drawing:
    """Show the paths of a policy and its goals."""
    follow = experiment.family.paths  # type: ignore[attr-defined]

    def walked(task: Task) -> Tree:
        predictors = both_predictors(algorithm, theta, task, experiment)
        found = {name: follow(predict, task.query) for name, predict in predictors.items()}
        return {f"{name} {leaf}": value for name, own in found.items() for leaf, value in own.items()}

    _, found = on_tasks(experiment, TASKS, walked)
    return draw_paths, (title, dict(found))


def samples(experiment: Experiment, algorithm: Algorithm, theta: Tree, title: str) -> Any:
    """Return what the family shows of a few test tasks, as text or as a figure."""
    own: Samples = experiment.family.samples  # type: ignore[attr-defined]

    def made(task: Task) -> Tree:
        predictors = both_predictors(algorithm, theta, task, experiment)
        with weighing(task.query.get("weight")):
            return {name: own.make(predict, task) for name, predict in predictors.items()}

    tasks = first_tasks(next(episodes(experiment, "test", TASKS)), TASKS)
    with torch.no_grad():
        found = over_tasks(made, tasks, training=False)
    shown = own.show(tree_map(torch.Tensor.cpu, found), tree_map(torch.Tensor.cpu, tasks))
    if not isinstance(shown, str):
        shown.suptitle(f"{title}: {TASKS} test tasks", fontsize=10, parse_math=False)
    return shown


def embedding(experiment: Experiment, algorithm: Algorithm, theta: Tree, title: str) -> Drawing:
    """Show the two principal components of the embeddings of an episode.

    Raises:
        ValueError: there is not one finite embedding per example.
    """
    embed = algorithm.embed
    assert embed is not None

    def embedded(task: Task) -> Tree:
        both = torch.cat([task.support["x"], task.query["x"]])
        weights = [data["weight"] for data in (task.support, task.query) if "weight" in data]
        with weighing(torch.cat(weights) if weights else None):
            return {"z": embed(theta, both)}

    tasks, found = on_tasks(experiment, 1, embedded)
    z = found["z"][0].reshape(len(found["z"][0]), -1)
    label = np.concatenate([data["y"][0].argmax(-1).cpu().numpy() for data in (tasks.support, tasks.query)])
    kept = np.concatenate([real(tasks.support, 0), real(tasks.query, 0)])
    require(len(z) == len(label) and bool(np.isfinite(z).all()), "there is not one finite embedding per example")
    is_support = np.arange(len(z)) < len(tasks.support["y"][0])
    z, label, is_support = z[kept] - z[kept].mean(0), label[kept], is_support[kept]
    _, strength, directions = np.linalg.svd(z, full_matrices=False)
    share = 100 * (strength[:2] ** 2).sum() / max((strength**2).sum(), 1e-300)
    return draw_embedding, (title, z @ directions[:2].T, label, is_support, float(share))
