"""What families of detection tasks share: their spec, their scores, and a picture of the boxes found."""

from collections.abc import Mapping
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from metarun.contracts import Facts, Numbers, Pooled, Predict, Samples, Scores, Sizes, Spec, Task, Tree
from metarun.data.objects import Objects
from metarun.data.pictures import Pictures
from metarun.targets.boxes import Boxes
from metarun.targets.detections import THRESHOLDS, pooled_metrics, pooled_scores
from metarun.tasks.templates import TemplateMatching

SHOWN = 4
"""Number of test pictures of each task that are drawn."""
LEAST_SHOWN = 0.2
"""Score of the boxes that are drawn."""


class BoxFamily:
    """Tasks of finding objects: ``x [pictures, 3, size, size]``, and what `metarun.targets.boxes.Boxes` says.

    Args:
        target: the target of a validation or test task.
        sizes: sizes of the tasks.
        pictures: how pictures become inputs.
    """

    def __init__(self, target: Boxes, sizes: Sizes, pictures: Pictures) -> None:
        self.target, self.pictures, self.converter = target, pictures, Objects(pictures, target)
        inputs = Numbers((pictures.channels, pictures.size, pictures.size))
        facts = Facts(references={"template": TemplateMatching(target)})
        self.spec = Spec(inputs, target, sizes, target.metrics, facts)
        self.pooled = Pooled(pooled_metrics(), self._counts, pooled_scores)
        self.samples = Samples(self._made, self._shown)

    def scores(self, predict: Predict, data: Tree) -> Scores:
        """Return the metrics that only tests need."""
        return self.target.further(predict(data["x"]), data)

    def _counts(self, predict: Predict, task: Task) -> Tensor:
        return self.target.counts(predict(task.query["x"]), task.query, THRESHOLDS)

    def _made(self, predict: Predict, task: Task) -> Tree:
        return self.target.found(predict(task.query["x"][:SHOWN]))._asdict()

    def _shown(self, made: Mapping[str, Tree], tasks: Task) -> Figure:
        """Draw pictures of each task in a row, with true boxes as dashed lines and found ones with their scores."""
        count = len(tasks.query["x"])
        shown = min(SHOWN, tasks.query["x"].shape[1])
        figure = Figure(figsize=(2.1 * shown * len(made), 2.2 * count + 0.5), layout="constrained")
        axes = figure.subplots(count, shown * len(made), squeeze=False)
        for row in range(count):
            for block, (when, found) in enumerate(made.items()):
                for place in range(shown):
                    axis = axes[row][block * shown + place]
                    self._draw_picture(axis, tasks.query, {key: leaf[row] for key, leaf in found.items()}, row, place)
                    if row == 0 and place == 0:
                        axis.set_title(f"{when} adaptation", fontsize=9, loc="left")
        return figure

    def _draw_picture(self, axis: Axes, query: Tree, found: Tree, row: int, place: int) -> None:
        pixels = self.pictures.shares(query["x"][row, place]).clamp(0, 1)
        axis.imshow(pixels.movedim(0, -1).float().numpy(), cmap="gray", interpolation="nearest", extent=self._extent())
        axis.set_xticks([])
        axis.set_yticks([])
        colours = colormaps["tab10"]
        label = query["label"][row, place]
        for box, own in zip(query["boxes"][row, place].tolist(), label, strict=True):
            if own.sum() > 0:
                axis.add_patch(rectangle(box, colours(int(own.argmax()) % 10), linestyle="--", linewidth=1.0))
        triples = zip(found["boxes"][place].tolist(), found["label"][place], found["score"][place], strict=True)
        for box, kind, score in triples:
            if score >= LEAST_SHOWN:
                colour = colours(int(kind) % 10)
                axis.add_patch(rectangle(box, colour, linewidth=1.6))
                axis.text(
                    box[0], box[1], f"{100 * float(score):.0f}", fontsize=6, color="white", backgroundcolor=colour
                )

    def _extent(self) -> tuple[float, float, float, float]:
        size = self.target.size
        return 0, size, size, 0


def rectangle(box: list[float], colour: Any, **style: Any) -> Rectangle:
    """Return the outline of a box."""
    left, top, right, bottom = box
    return Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, **style)


def leaves(target: Boxes, x: Tensor, boxes: Tensor, label: Tensor, device: str) -> dict[str, Tensor]:
    """Return the leaves of one part of tasks, from pictures and boxes ``[tasks, pictures, ...]``."""
    dtype = torch.get_default_dtype()
    boxes, label = boxes.to(dtype), label.to(dtype)
    parts = {"x": x.to(dtype), "y": target.drawn(boxes, label), "boxes": boxes, "label": label}
    return {name: leaf.to(device) for name, leaf in parts.items()}
