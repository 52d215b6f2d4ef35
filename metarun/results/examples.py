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
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from numpy.typing import NDArray

from metarun.assemble import Experiment
from metarun.contracts import Algorithm, Numbers, Predict, Samples, Task, Tree
from metarun.engine.batch import adapted
from metarun.errors import first_line, require
from metarun.evaluation import episodes
from metarun.nn.padding import weighing
from metarun.nn.transforms import over_tasks
from metarun.results.files import write_text
from metarun.results.plots import AGNOSTIC, DEPENDENT, plain_axis, save_figure
from metarun.targets.classes import own_classes
from metarun.tree import first_tasks, tree_map

log = logging.getLogger(__name__)

Array = NDArray[np.float64]
TASKS = 3
"""Number of tasks in a picture of curves or paths."""
POINTS = 200
ROWS, SUPPORT, QUERIES, EDGE = 8, 3, 8, 2
"""Largest numbers of classes, and of support and query images per class; width of a border in pixels."""
RIGHT, WRONG, NEUTRAL = "#009E73", "#D55E00", "#ffffff"
MARKERS = "osD^vP*X<>hp"


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
        except (RuntimeError, ValueError, TypeError, LookupError) as error:
            # A picture must not cost a finished run its results.
            log.warning("  %s cannot be shown: %s", draw.__name__, first_line(error))
            continue
        if isinstance(shown, str):
            write_text(directory / f"{draw.__name__}.md", f"# {title}: {TASKS} test tasks\n\n{shown}")
        else:
            save_figure(shown, directory / f"{draw.__name__}.png")


def curves(experiment: Experiment, algorithm: Algorithm, theta: Tree, title: str) -> Figure:
    """Draw predictions as curves, with the support points and the true values at the query points."""
    shown = first_tasks(next(episodes(experiment, "test", TASKS)), TASKS)
    every = torch.cat([shown.support["x"].flatten(), shown.query["x"].flatten()])
    grid = torch.linspace(float(every.min()), float(every.max()), POINTS).to(every)[:, None]

    def predicted(task: Task) -> Tree:
        predictors = both_predictors(algorithm, theta, task, experiment)
        with weighing(None):
            return {name: predict(grid) for name, predict in predictors.items()}

    tasks, found = on_tasks(experiment, TASKS, predicted)
    figure = Figure(figsize=(3.6 * TASKS, 3.4), layout="constrained")
    axes = figure.subplots(1, TASKS, sharey=True)
    for i, axis in enumerate(axes):
        plain_axis(axis)
        (x, y), (support_x, support_y) = (
            [data[name][i].cpu()[torch.from_numpy(real(data, i))].flatten() for name in ("x", "y")]
            for data in (tasks.query, tasks.support)
        )
        axis.scatter(x, y, s=5, color="#999999", label="queries")
        if "before" in found:
            axis.plot(grid.cpu(), found["before"][i], "--", color=DEPENDENT, linewidth=1.2, label="before adaptation")
        if "after" in found:
            axis.plot(grid.cpu(), found["after"][i], color=AGNOSTIC, linewidth=1.8, label="after adaptation")
        axis.scatter(support_x, support_y, s=34, color="black", marker="^", zorder=3, label="support")
        axis.set_xlabel("x")
    axes[0].set_ylabel("y")
    figure.suptitle(f"{title}: {TASKS} test tasks")
    with_legend(figure, axes[0])
    return figure


def with_legend(figure: Figure, axis: Any) -> None:
    """Put the legend of one axis below all."""
    handles, names = axis.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=9)


def episode(experiment: Experiment, algorithm: Algorithm, theta: Tree, title: str) -> Figure:
    """Draw an episode of images: a row per class with its support images, then queries, framed by right or wrong."""

    def answers(task: Task) -> Tree:
        *_, predict = both_predictors(algorithm, theta, task, experiment).values()
        with weighing(task.query.get("weight")):
            return {"answer": own_classes(predict(task.query["x"]), task.query).argmax(-1)}

    tasks, found = on_tasks(experiment, 1, answers)
    answer = found["answer"][0].astype(int)
    parts = {}
    for name, data in (("support", tasks.support), ("query", tasks.query)):
        kept = real(data, 0)
        parts[name] = (data["x"][0].cpu().double().numpy(), np.where(kept, data["y"][0].argmax(-1).cpu().numpy(), -1))
    low, high = parts["query"][0].min(), parts["query"][0].max()
    height, width = parts["query"][0].shape[-2:]
    classes = [k for k in range(experiment.family.spec.target.outputs) if (parts["query"][1] == k).any()][:ROWS]
    shots, columns = (
        min(most, max(int((parts[name][1] == own).sum()) for own in classes))
        for name, most in (("support", SUPPORT), ("query", QUERIES))
    )
    columns += shots
    across, down = width + 4 * EDGE, height + 4 * EDGE
    canvas, notes, total = np.ones((len(classes) * down, columns * across + 3 * EDGE, 3)), [], 0
    for row, own in enumerate(classes):
        for name, first, most in (("support", 0, SUPPORT), ("query", shots, QUERIES)):
            images, labels = parts[name]
            for place, i in enumerate(np.flatnonzero(labels == own)[:most]):
                right = answer[i] == own
                frame = NEUTRAL if name == "support" else RIGHT if right else WRONG
                x = (first + place) * across + (3 * EDGE if name == "query" else 0)
                image = (images[i] - low) / (high - low or 1)
                put(canvas, image.transpose(1, 2, 0), row * down, x, frame)
                total += name == "query"
                if name == "query" and not right:
                    notes.append((x + across - 2 * EDGE, row * down + down - 2 * EDGE, str(answer[i] + 1)))
    figure = Figure(figsize=(7.2, 0.9 + 6.4 * canvas.shape[0] / canvas.shape[1]), layout="constrained")
    axis = figure.subplots()
    axis.imshow(canvas.clip(0, 1), interpolation="nearest")  # rounding leaves −1e-8
    for x, y, text in notes:
        label: dict[str, Any] = {"facecolor": WRONG, "edgecolor": "none", "pad": 1.2}
        axis.text(x, y, text, ha="right", va="bottom", fontsize=8, color="white", weight="bold", bbox=label)
    axis.set_yticks([row * down + down / 2 for row in range(len(classes))], [f"class {own + 1}" for own in classes])
    axis.set_xticks([shots * across / 2, (shots + columns) * across / 2], ["support", "queries"])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.axvline(shots * across + EDGE, color="#bbbbbb", linewidth=1)
    wrong = f"{len(notes)} of {total} shown answers are wrong (orange, with the class that was answered)"
    axis.set_title(
        f"{title}: a test episode\n{wrong if notes else f'all {total} shown answers are right'}", fontsize=10
    )
    return figure


def put(canvas: Array, image: Array, y: int, x: int, frame: str) -> None:
    """Paint an image ``[height, width, 1 or 3]`` with a frame, its outer corner at (y, x) plus a margin."""
    height, width, _ = image.shape
    y, x = y + EDGE // 2, x + EDGE // 2
    canvas[y : y + height + 2 * EDGE, x : x + width + 2 * EDGE] = to_rgb(frame)
    canvas[y + EDGE : y + EDGE + height, x + EDGE : x + EDGE + width] = image


def paths(experiment: Experiment, algorithm: Algorithm, theta: Tree, title: str) -> Figure:
    """Draw the paths of a policy and its goals."""
    follow = experiment.family.paths  # type: ignore[attr-defined]

    def walked(task: Task) -> Tree:
        predictors = both_predictors(algorithm, theta, task, experiment)
        found = {name: follow(predict, task.query) for name, predict in predictors.items()}
        return {f"{name} {leaf}": value for name, own in found.items() for leaf, value in own.items()}

    _, found = on_tasks(experiment, TASKS, walked)
    walks = np.concatenate([value.reshape(-1, 2) for name, value in found.items()])
    across, up = np.ptp(walks[~np.isnan(walks).any(-1)], axis=0) + 1e-9
    figure = Figure(figsize=(3.4 * TASKS, 1.3 + 3.1 * min(max(up / across, 0.3), 1.5)), layout="constrained")
    axes = figure.subplots(1, TASKS, sharex=True, sharey=True)
    for i, axis in enumerate(axes):
        for when, colour, width in (("before", "#999999", 0.7), ("after", AGNOSTIC, 1.0)):
            for place, path in enumerate(islice(found.get(f"{when} path", [[]] * TASKS)[i], 8)):
                label = f"{when} adaptation" if place == 0 else None
                axis.plot(path[:, 0], path[:, 1], color=colour, linewidth=width, alpha=0.8, label=label)
        goal = next(value for name, value in found.items() if name.endswith("goal"))[i]
        axis.plot(0, 0, "o", color="black", markersize=5, label="start")
        axis.plot(*goal, "*", color=DEPENDENT, markersize=13, label="goal")
        axis.set_aspect("equal")
        axis.grid(color="#eeeeee", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{title}: {TASKS} test tasks")
    with_legend(figure, axes[0])
    return figure


def samples(experiment: Experiment, algorithm: Algorithm, theta: Tree, title: str) -> Figure | str:
    """Return what the family shows of a few test tasks, as text or as a figure."""
    own: Samples = experiment.family.samples  # type: ignore[attr-defined]

    def made(task: Task) -> Tree:
        predictors = both_predictors(algorithm, theta, task, experiment)
        with weighing(task.query.get("weight")):
            return {name: own.make(predict, task) for name, predict in predictors.items()}

    tasks = first_tasks(next(episodes(experiment, "test", TASKS)), TASKS)
    with torch.no_grad():
        found = over_tasks(made, tasks, training=False)
    shown: Figure | str = own.show(tree_map(torch.Tensor.cpu, found), tree_map(torch.Tensor.cpu, tasks))
    if isinstance(shown, Figure):
        shown.suptitle(f"{title}: {TASKS} test tasks", fontsize=10)
    return shown


def embedding(experiment: Experiment, algorithm: Algorithm, theta: Tree, title: str) -> Figure:
    """Draw the two principal components of the embeddings of an episode.

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
    flat = z @ directions[:2].T
    share = 100 * (strength[:2] ** 2).sum() / max((strength**2).sum(), 1e-300)
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axis = figure.subplots()
    colours = colormaps["tab10" if label.max() < 10 else "tab20"]
    for own in np.unique(label):
        colour, marker = colours(own % colours.N), MARKERS[own % len(MARKERS)]
        query, support = (flat[(label == own) & (is_support == part)] for part in (False, True))
        axis.scatter(query[:, 0], query[:, 1], c=[colour], marker=marker, s=22, alpha=0.7, label=f"class {own + 1}")
        axis.scatter(support[:, 0], support[:, 1], c=[colour], marker=marker, s=110, edgecolors="black", linewidths=1.2)
    axis.scatter([], [], color="white", edgecolors="black", s=110, label="support")
    axis.set(xlabel="first principal component", ylabel="second principal component")
    axis.set_title(f"{title}: embeddings of a test episode ({share:.0f} % of their variance)", fontsize=10)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8, ncols=1 if label.max() < 20 else 2)
    return figure
