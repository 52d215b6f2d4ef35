"""How the pictures of test tasks look; `metarun.results.examples` says what they show.

Nothing here needs torch, so that a process can draw without importing it (`metarun.results.drawer`).
"""

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from metarun.results.plots import AGNOSTIC, DEPENDENT, blank_figure, plain_axis, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[np.float64]
Points = tuple[Array, Array]
"""x and y."""
ROWS, SUPPORT, QUERIES, EDGE = 8, 3, 8, 2
"""The most classes of an episode, support images and queries of a class, and pixels around an image."""
RIGHT, WRONG, NEUTRAL = "#009E73", "#D55E00", "#ffffff"
MARKERS = "osD^vP*X<>hp"


class Curves(NamedTuple):
    """A task whose inputs and targets are numbers."""

    support: Points
    query: Points
    grid: Array
    predicted: Mapping[str, Array]
    """The answers at ``grid``, ``before`` and ``after`` adaptation."""


def draw_curves(path: Path, title: str, tasks: Sequence[Curves]) -> None:
    """Draw predictions as curves, with the support points and the true values at the query points."""
    figure = blank_figure(3.6 * len(tasks), 3.4)
    axes = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for axis, task in zip(axes, tasks, strict=True):
        plain_axis(axis)
        axis.scatter(*task.query, s=5, color="#999999", label="queries")
        if "before" in task.predicted:
            style: dict[str, Any] = {"color": DEPENDENT, "linewidth": 1.2, "label": "before adaptation"}
            axis.plot(task.grid, task.predicted["before"], "--", **style)
        if "after" in task.predicted:
            axis.plot(task.grid, task.predicted["after"], color=AGNOSTIC, linewidth=1.8, label="after adaptation")
        axis.scatter(*task.support, s=34, color="black", marker="^", zorder=3, label="support")
        axis.set_xlabel("x")
    axes[0].set_ylabel("y")
    figure.suptitle(f"{title}: {len(tasks)} test tasks")
    with_legend(figure, axes[0])
    save_figure(figure, path)


def with_legend(figure: "Figure", axis: Any) -> None:
    """Put the legend of one axis below all."""
    handles, names = axis.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=9)


class Images(NamedTuple):
    """The images of one part of an episode: ``[n, 1 or 3, height, width]``, and a class each; −1 for padding."""

    pixels: Array
    labels: NDArray[np.int64]


def draw_episode(path: Path, title: str, support: Images, query: Images, answer: NDArray[np.int64], ways: int) -> None:
    """Draw an episode of images: a row per class with its support images, then queries, framed by right or wrong."""
    low, high = query.pixels.min(), query.pixels.max()
    height, width = query.pixels.shape[-2:]
    classes = [k for k in range(ways) if (query.labels == k).any()][:ROWS]
    shots, columns = (
        min(most, max(int((part.labels == own).sum()) for own in classes))
        for part, most in ((support, SUPPORT), (query, QUERIES))
    )
    columns += shots
    across, down = width + 4 * EDGE, height + 4 * EDGE
    canvas, notes, total = np.ones((len(classes) * down, columns * across + 3 * EDGE, 3)), [], 0
    for row, own in enumerate(classes):
        for part, first, most in ((support, 0, SUPPORT), (query, shots, QUERIES)):
            asked = part is query
            for place, i in enumerate(np.flatnonzero(part.labels == own)[:most]):
                right = answer[i] == own
                frame = (RIGHT if right else WRONG) if asked else NEUTRAL
                x = (first + place) * across + (3 * EDGE if asked else 0)
                image = (part.pixels[i] - low) / (high - low or 1)
                put(canvas, image.transpose(1, 2, 0), row * down, x, frame)
                total += asked
                if asked and not right:
                    notes.append((x + across - 2 * EDGE, row * down + down - 2 * EDGE, str(answer[i] + 1)))
    figure = blank_figure(7.2, 0.9 + 6.4 * canvas.shape[0] / canvas.shape[1])
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
    save_figure(figure, path)


def put(canvas: Array, image: Array, y: int, x: int, frame: str) -> None:
    """Paint an image ``[height, width, 1 or 3]`` with a frame, its outer corner at (y, x) plus a margin."""
    height, width, _ = image.shape
    y, x = y + EDGE // 2, x + EDGE // 2
    colour = [int(frame[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    canvas[y : y + height + 2 * EDGE, x : x + width + 2 * EDGE] = colour
    canvas[y + EDGE : y + EDGE + height, x + EDGE : x + EDGE + width] = image


def draw_paths(path: Path, title: str, found: Mapping[str, Array]) -> None:
    """Draw the paths of a policy and its goals: ``before path`` and ``after path`` ``[tasks, episodes, time, 2]``."""
    walks = np.concatenate([value.reshape(-1, 2) for value in found.values()])
    count = len(next(iter(found.values())))
    across, up = np.ptp(walks[~np.isnan(walks).any(-1)], axis=0) + 1e-9
    figure = blank_figure(3.4 * count, 1.3 + 3.1 * min(max(up / across, 0.3), 1.5))
    axes = figure.subplots(1, count, sharex=True, sharey=True, squeeze=False)[0]
    for i, axis in enumerate(axes):
        for when, colour, width in (("before", "#999999", 0.7), ("after", AGNOSTIC, 1.0)):
            walked = found[f"{when} path"][i] if f"{when} path" in found else []
            for place, own in enumerate(islice(walked, 8)):
                label = f"{when} adaptation" if place == 0 else None
                axis.plot(own[:, 0], own[:, 1], color=colour, linewidth=width, alpha=0.8, label=label)
        goal = next(value for name, value in found.items() if name.endswith("goal"))[i]
        axis.plot(0, 0, "o", color="black", markersize=5, label="start")
        axis.plot(*goal, "*", color=DEPENDENT, markersize=13, label="goal")
        axis.set_aspect("equal")
        axis.grid(color="#eeeeee", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{title}: {count} test tasks")
    with_legend(figure, axes[0])
    save_figure(figure, path)


def draw_embedding(
    path: Path,
    title: str,
    flat: Array,
    label: NDArray[np.int64],
    is_support: NDArray[np.bool_],
    share: float,
) -> None:
    """Draw the two principal components ``flat [examples, 2]`` of embeddings, and the share of their variance."""
    from matplotlib import colormaps

    figure = blank_figure(6.4, 4.8)
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
    save_figure(figure, path)
