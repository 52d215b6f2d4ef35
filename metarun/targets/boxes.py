"""Boxes: where the objects of a task's classes are in a picture.

A picture is covered by a grid of locations. At each of them a model says how likely it is the centre of an object of
each class, how large this object is, and how far its centre is from the middle of the location (Zhou, Wang, Krähenbühl
2019, "Objects as Points", https://arxiv.org/abs/1904.07850, §3 and §4):

    heat       Y_k = max over the objects of class k of exp(−(Δx² / 2σ_x² + Δy² / 2σ_y²))
    focal loss −1/N Σ (1 − p)² log p where Y = 1,  (1 − Y)⁴ p² log(1 − p) elsewhere           (equation 1; α = 2, β = 4)
    boxes      at a peak of p among its eight neighbours: its class, centre and size           (§4)

Where we deviate: p is a softmax over the classes and background, so that a method which knows only classes of locations
can serve; the spread σ follows the size of the box in each direction; sizes are logarithms;
size and centre are also learned at the neighbours of the centre, by their heat (as in Liu et al. 2019, "Training-Time-
Friendly Network for Real-Time Object Detection", https://arxiv.org/abs/1909.00700); errors of both have a smooth L1
loss.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from metarun.contracts import Need, Rows, Scores, Tree
from metarun.data.portable import portable
from metarun.errors import require
from metarun.targets.detections import (
    AP,
    AP50,
    AR,
    THRESHOLDS,
    hits,
    mean_over_classes,
    overlap,
    precision_and_recall,
)
from metarun.targets.metric import Metric

GEOMETRY = 4
"""Numbers per location that say where a box is: logarithms of width and height, and both distances to the centre."""
SPREAD = 1 / 8
"""σ as a share of a box's width and height."""
LEAST_SPREAD = 0.5
"""Smallest σ in locations."""
CLEAR = 0.1
"""Heat below which a location is background, and nothing is learned of geometry."""
SMOOTH = 0.25
"""Errors below which the smooth L1 loss is quadratic."""
LARGEST = 4.0
"""Largest magnitude of the logarithm of a size that a box is made of."""
NEVER = -1e9
"""Logit of what has no chance."""
LATTICE = 4
"""Every so many locations in each direction, one is an example of background for learners that read rows."""


class Found(NamedTuple):
    """Boxes found in each picture, by falling score."""

    boxes: Tensor
    """Left, top, right, bottom in pixels ``[pictures, found, 4]``."""
    label: Tensor
    """Class ``[pictures, found]``."""
    score: Tensor
    """Chance from 0 to 1, or −1 where there are no further boxes ``[pictures, found]``."""


def smooth(error: Tensor) -> Tensor:
    """Return the smooth L1 loss of errors (Girshick 2015, equation 3), quadratic below ``SMOOTH``."""
    size = error.abs()
    # The square of the magnitude has no second derivative at 0.
    return torch.where(size < SMOOTH, error.square() / (2 * SMOOTH), size - SMOOTH / 2)


@portable
@dataclass(frozen=True)
class Boxes:
    """Targets ``y [pictures, locations, outputs]``, drawn from boxes by ``drawn``.

    The columns of ``y`` are the heat of each class, whether the location is background, and the geometry. What is
    scored also has ``boxes [pictures, most, 4]`` in pixels and ``label [pictures, most, ways]``, one-hot, with zeros
    for padding.
    """

    ways: int
    size: int
    """Edge of a picture in pixels."""
    stride: int = 4
    """Edge of a location in pixels; it divides ``size``."""
    most: int = 8
    """Largest number of true boxes in a picture."""
    most_found: int = 20
    """Number of boxes that are kept of a picture, those with the highest scores."""
    metrics: tuple[Metric, ...] = (AP50, AP, AR)
    offers: tuple[Need, ...] = ("loss", "examples", "rows", "classes")

    def __post_init__(self) -> None:
        require(self.size % self.stride == 0, f"size must be a multiple of {self.stride}, not {self.size}")

    @property
    def outputs(self) -> int:
        """The numbers per location: a logit for each class and for background, and the geometry."""
        return self.ways + 1 + GEOMETRY

    @property
    def shared(self) -> int:
        """Of these, how many at the end are not told by the class of a location."""
        return GEOMETRY

    @property
    def edge(self) -> int:
        """Locations in each direction."""
        return self.size // self.stride

    @property
    def locations(self) -> int:
        """Locations of a picture, row by row."""
        return self.edge**2

    @property
    def unit(self) -> float:
        """The size whose logarithm is 0, in pixels."""
        return self.size / 4

    def middles(self, like: Tensor) -> Tensor:
        """Return x and y of the middle of each location, in locations ``[locations, 2]``."""
        along = torch.arange(self.edge, device=like.device, dtype=like.dtype) + 0.5
        return torch.stack([along.repeat(self.edge), along.repeat_interleave(self.edge)], -1)

    def drawn(self, boxes: Tensor, label: Tensor) -> Tensor:
        """Return targets ``y [..., locations, outputs]`` of boxes.

        Args:
            boxes: left, top, right, bottom in pixels ``[..., most, 4]``; anything finite for padding.
            label: one-hot class of each box, zeros for padding ``[..., most, ways]``.
        """
        real = label.sum(-1) > 0
        boxes = boxes.masked_fill(~real[..., None], 0.0)
        centre, size = (boxes[..., :2] + boxes[..., 2:]) / 2, (boxes[..., 2:] - boxes[..., :2]).clamp(min=1e-3)
        middle, place = self.middles(boxes), centre / self.stride
        at = place.floor().clamp(0, self.edge - 1) + 0.5
        spread = (SPREAD * size / self.stride).clamp(min=LEAST_SPREAD)
        # [..., most, locations]
        far = ((middle - at[..., None, :]) / spread[..., None, :]).square().sum(-1)
        near = (-far / 2).exp() * real[..., None]
        heat = (near[..., None] * label[..., None, :]).amax(-3)
        top = near.amax(-2)
        background = (top < CLEAR).to(heat.dtype)
        # The box whose heat is highest, as one-hot [..., locations, most].
        owner = near.argmax(-2)[..., None] == torch.arange(near.shape[-2], device=near.device)
        own = owner.to(heat.dtype) @ torch.cat([(size / self.unit).log(), place], -1)
        own = torch.cat([own[..., :2], own[..., 2:] - middle], -1) * (1 - background)[..., None]
        return torch.cat([heat, background[..., None], own], -1)

    def chances(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """Return log p and log(1 − p) of the chance p of each class ``[..., locations, ways]``."""
        logits = output[..., : self.ways + 1]
        all_of_them = logits.logsumexp(-1, keepdim=True)
        own = torch.eye(self.ways, self.ways + 1, dtype=torch.bool, device=output.device)
        others = logits[..., None, :].masked_fill(own, NEVER).logsumexp(-1)
        return logits[..., : self.ways] - all_of_them, others - all_of_them

    def loss(self, output: Tensor, data: Tree) -> Tensor:
        """Return the focal loss per object, and the mean errors of size and centre."""
        y = data["y"]
        heat, own = y[..., : self.ways], y[..., self.ways + 1 :]
        seen = data["weight"][:, None, None] if "weight" in data else torch.ones_like(heat[:, :1, :1])
        output = output.masked_fill(seen == 0, 0.0)
        (log_chance, log_other), geometry = self.chances(output), output[..., self.ways + 1 :]
        centre = (heat == 1).to(heat.dtype) * seen
        hit = -(2 * log_other).exp() * log_chance
        miss = -(1 - heat).pow(4) * (2 * log_chance).exp() * log_other * seen
        focal = torch.where(centre > 0, hit, miss).sum() / centre.sum().clamp(min=1)
        weight = heat.amax(-1, keepdim=True) * seen * (1 - y[..., self.ways : self.ways + 1])
        errors = smooth(geometry - own) * weight
        loss: Tensor = focal + errors.sum() / weight.sum().clamp(min=1e-6)
        return loss

    def found(self, output: Tensor) -> Found:
        """Return the boxes that an output ``[pictures, locations, outputs]`` tells of: peaks of the chances."""
        output = output.detach().nan_to_num()
        log_chance, log_other = self.chances(output)
        geometry, pictures, edge = output[..., self.ways + 1 :], len(output), self.edge
        # Log odds have the order of chances, and are not tied where chances round to 1.
        maps = (log_chance - log_other).movedim(-1, -2).reshape(pictures, self.ways, edge, edge)
        peak = maps == max_pool2d(maps, 3, 1, 1)
        ranked = torch.where(peak, maps, -torch.inf).flatten(1)
        best = ranked.topk(min(self.most_found, ranked.shape[1]), -1)
        label, place = best.indices // self.locations, best.indices % self.locations
        own = geometry.gather(1, place[..., None].expand(-1, -1, GEOMETRY))
        centre = (self.middles(output)[place] + own[..., 2:]) * self.stride
        half = own[..., :2].clamp(-LARGEST, LARGEST).exp() * self.unit / 2
        boxes = torch.cat([centre - half, centre + half], -1).clamp(0, self.size)
        score = torch.where(best.values.isfinite(), best.values.sigmoid(), -1.0)
        return Found(boxes, label, score)

    def compared(self, output: Tensor, data: Tree, thresholds: tuple[float, ...]) -> tuple[Found, Tensor]:
        """Return the boxes found, and which are hits ``[thresholds, pictures, found]``."""
        found = self.found(output)
        own = data["label"].gather(-1, found.label[:, None].expand(-1, data["label"].shape[1], -1)).movedim(-1, -2)
        close = overlap(found.boxes, data["boxes"])
        return found, hits(torch.where((own > 0) & (found.score >= 0)[..., None], close, -1.0), thresholds)

    def at_thresholds(self, output: Tensor, data: Tree, thresholds: tuple[float, ...]) -> tuple[Tensor, Tensor]:
        """Return average precision and average recall over thresholds and the task's classes, both in float64."""
        found, hit = self.compared(output, data, thresholds)
        classes = torch.arange(self.ways, device=output.device)
        there = found.score >= 0
        if "weight" in data:
            there = there & (data["weight"] > 0)[:, None]
        counted = (found.label == classes[:, None, None]) & there
        positives = data["label"].sum((0, 1))
        precision, recall = precision_and_recall(found.score.flatten(), hit.flatten(1), counted.flatten(1), positives)
        return mean_over_classes(precision, positives), mean_over_classes(recall, positives)

    def scores(self, output: Tensor, data: Tree) -> Scores:
        """Return AP50: what is computed in every meta-step; 0 where the data hold no boxes to compare with."""
        if "boxes" not in data:
            return {AP50.name: output.new_zeros(())}
        return {AP50.name: self.at_thresholds(output, data, (0.5,))[0].to(output.dtype)}

    def further(self, output: Tensor, data: Tree) -> Scores:
        """Return the other metrics, which only tests need."""
        precision, recall = self.at_thresholds(output, data, THRESHOLDS)
        return {AP.name: precision.to(output.dtype), AR.name: recall.to(output.dtype)}

    def counts(self, output: Tensor, data: Tree, thresholds: tuple[float, ...]) -> Tensor:
        """Return what `metarun.targets.detections.pooled_scores` needs ``[1 + found, 1 + thresholds]``."""
        found, hit = self.compared(output, data, thresholds)
        score = found.score
        if "weight" in data:
            score = torch.where(data["weight"][:, None] > 0, score, -1.0)
        rows = torch.cat([score.flatten()[:, None], hit.flatten(1).T.to(score.dtype)], -1)
        first = torch.zeros_like(rows[:1])
        return torch.cat([first + data["label"].sum(), rows])

    def corrected(self, geometry: Tensor, of_support: Tensor, support: Tree) -> Tensor:
        """Return geometry with all sizes scaled by what those of the support set's objects lack.

        Otherwise a learner that reads rows could not find objects of a size that training has not had. The mean error
        of n objects counts n / (n + 1) of its size, so that few objects change little.

        Args:
            geometry: what the model says of any locations ``[..., 4]``.
            of_support: what it says of the support set's ``[pictures, locations, 4]``.
            support: the data of the support set.
        """
        y = support["y"]
        centre = (y[..., : self.ways] == 1).any(-1, keepdim=True).to(y.dtype)
        if "weight" in support:
            centre = centre * support["weight"][:, None, None]
        lack = ((y[..., self.ways + 1 :] - of_support) * centre).sum((0, 1)) / (centre.sum() + 1)
        return torch.cat([geometry[..., :2] + lack[:2], geometry[..., 2:]], -1)

    def rows(self, z: Tensor, data: Tree) -> Rows:
        """Return a row for the centre of each object, and rows of background, the last class, from a lattice.

        Rows of all locations would be nearly all background.

        Args:
            z: features of each location ``[pictures, locations, d]``.
            data: the data of one task.
        """
        y = data["y"]
        heat, background = y[..., : self.ways], y[..., self.ways]
        place = heat.amax(-1).topk(min(self.most, self.locations), -1).indices
        along = torch.arange(LATTICE // 2, self.edge, LATTICE, device=y.device)
        lattice = (along[:, None] * self.edge + along).flatten().expand(len(y), -1)
        place = torch.cat([place, lattice], -1)[..., None]
        own = heat.gather(1, place.expand(-1, -1, self.ways))
        clear = background.gather(1, place[..., 0])
        # Lattice locations near an object are neither; a centre of two classes is none of them.
        centre = (own == 1).to(y.dtype) * ((own == 1).sum(-1, keepdim=True) == 1)
        objects = min(self.most, self.locations)
        first = (torch.arange(place.shape[1], device=y.device) < objects).to(y.dtype)[:, None]
        kind = torch.cat([centre * first, (clear[..., None] * (1 - first))], -1)
        if "weight" in data:
            kind = kind * data["weight"][:, None, None]
        rows = z.gather(1, place.expand(-1, -1, z.shape[-1]))
        return Rows(rows.flatten(0, 1), kind.flatten(0, 1), kind.sum(-1).flatten())
