"""Few-shot generation: pictures of a new class from a few of its pictures.

A task is one class. Its support set is K pictures, to which a model of velocities (`metarun.targets.flow`) is adapted,
and its queries are other pictures of the class. Test classes are new. `metarun.tasks.generate_adversarial` has the same
tasks with an adversarial model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import grid_sample

from metarun.contracts import Facts, Numbers, Pooled, Predict, Samples, Scores, Sizes, Spec, Split, Task, Tree
from metarun.data.converters import Drawings
from metarun.data.descriptors import described, kernel_distance
from metarun.data.generated import Drawn
from metarun.data.pictures import Pictures
from metarun.data.portable import portable
from metarun.errors import require
from metarun.nn.ops import squared_distances
from metarun.random import fold, normal
from metarun.results.pictures import grid_of_pictures, mosaic
from metarun.targets.flow import BITS, FLOW_LOSS, Flow, Mixture
from metarun.targets.metric import Metric
from metarun.tasks.few_shot import Cells, Shots, classes_with, sizes_without_classes
from metarun.tasks.images import Pool
from metarun.tasks.picture_pools import Asked, Dataset, picture_pools, pixels_of

KERNEL_DISTANCE = Metric("kernel-distance", higher_is_better=False)
KERNEL_DISTANCE_AUGMENTED = Metric("kernel-distance-augmented", higher_is_better=False)
ACCURACIES = {
    source: Metric(f"accuracy-{source}", higher_is_better=True, percent=True)
    for source in ("generated", "support", "augmented")
}
"""Accuracy on real pictures of a classifier trained on generated pictures, on the K real ones, and on their changes."""
COPIES = Metric("copies", higher_is_better=False, percent=True)
"""Share of generated pictures that are nearer to a support picture than any of the real query pictures is."""
POOLED = (KERNEL_DISTANCE, KERNEL_DISTANCE_AUGMENTED, *ACCURACIES.values(), COPIES)

MEASURED, COMPONENTS, RIDGE = 2000, 32, 0.2
"""Number of training pictures that features are fitted to, number of features, and share of their mean variance that is
added to each within a class."""
TIED = 1e-7
"""Difference of the scores of two classes, as a share of the largest one, below which a picture is equally near."""
SHOWN = 8
CHANGES = (0.15, 0.12, 0.15, 0.1)
"""Standard deviations of the changes of augmented pictures: rotation, logarithm of the scale, shear, shift."""


@portable
@dataclass(frozen=True)
class KernelDensity:
    """The velocity of the support pictures, each blurred by a normal distribution."""

    variance: float

    def __call__(self, support: Tree, noisy: Any) -> Tensor:
        """Return velocities ``[rows, channels, size, size]``."""
        own = support["x"]
        return Mixture(own, own.new_tensor(self.variance), weight_of_examples(support).log()).velocity(noisy)


@portable
@dataclass(frozen=True)
class OneNormal:
    """The velocity of a normal distribution around the mean of the support pictures, shrunk to that of all classes."""

    mean: Tensor
    """Of all training pictures."""
    variance: Tensor
    """Of training pictures around the mean of their class."""
    share: float
    """Number of pictures that the mean of all counts as much as."""

    def __call__(self, support: Tree, noisy: Any) -> Tensor:
        """Return velocities ``[rows, channels, size, size]``."""
        own, weight = support["x"], weight_of_examples(support)
        mean = torch.einsum("n,nchw->chw", weight, own) + self.share * self.mean.to(own)
        mean = mean / (weight.sum() + self.share)
        return Mixture(mean[None], self.variance.to(own), mean.new_zeros(1)).velocity(noisy)


def weight_of_examples(data: Tree) -> Tensor:
    """Return the weight of each example ``[examples]``."""
    weight: Tensor = data["weight"] if "weight" in data else data["x"].new_ones(len(data["x"]))
    return weight


def references(pool: Pool, pictures: Tensor, label: Tensor) -> dict[str, KernelDensity | OneNormal]:
    """Return densities that need no learning, fitted to training ``pictures [n, ...]`` with classes ``label [n]``."""
    flat = pictures.flatten(1)
    distances = torch.cdist(flat, flat)
    other = (label[:, None] != label) | torch.eye(len(flat), dtype=torch.bool)
    nearest = distances.masked_fill(other, torch.inf).amin(1)
    blur = nearest[nearest.isfinite()].square().mean() / flat.shape[1]
    counts = torch.bincount(label)
    there = counts > 0
    means = torch.zeros(len(counts), flat.shape[1]).index_add(0, label, flat) / counts.clamp(min=1)[:, None]
    within = (flat - means[label]).square().sum(0) / (len(flat) - there.sum()).clamp(min=1)
    share = float(within.mean() / means[there].var(0).mean().clamp(min=1e-6))
    shape = pictures.shape[1:]
    return {
        "kernel_density": KernelDensity(float(blur)),
        "one_normal": OneNormal(flat.mean(0).view(shape), within.clamp(min=1e-4).view(shape), share),
    }


@dataclass(frozen=True)
class Space:
    """A fixed space of features: principal components of descriptors, all of variance 1 on training pictures."""

    mean: Tensor
    directions: Tensor
    """``[d, components]``."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return features ``[n, components]`` of pictures with values from −1 to 1."""
        return (described((x.clamp(-1, 1) + 1) / 2) - self.mean.to(x)) @ self.directions.to(x)


def space_of(pictures: Tensor) -> Space:
    """Fit the space to training pictures ``[n, channels, size, size]``."""
    z = described((pictures + 1) / 2)
    mean = z.mean(0)
    _, strength, directions = torch.linalg.svd(z - mean, full_matrices=False)
    kept = min(COMPONENTS, int((strength > 1e-4 * strength[0]).sum()))
    return Space(mean, directions[:kept].T * (len(z) ** 0.5 / strength[:kept]))


def changed(x: Tensor, numbers: Tensor) -> Tensor:
    """Return pictures ``x [n, channels, size, size]`` turned, scaled, sheared and shifted by ``numbers [n, 5]``."""
    angle, scale, shear = (std * numbers[:, i] for i, std in enumerate(CHANGES[:3]))
    cos, sin, size = angle.cos(), angle.sin(), scale.exp()
    shift = CHANGES[3] * numbers[:, 3:5]
    rows = torch.stack([size * cos, size * (shear * cos - sin), shift[:, 0]], -1)
    columns = torch.stack([size * sin, size * (shear * sin + cos), shift[:, 1]], -1)
    axis = (torch.arange(x.shape[-1], device=x.device).to(x) + 0.5) * 2 / x.shape[-1] - 1
    down, across = torch.meshgrid(axis, axis, indexing="ij")
    places = torch.stack([across, down, torch.ones_like(down)], -1)
    grid = torch.einsum("hwi,nji->nhwj", places, torch.stack([rows, columns], 1))
    return grid_sample(x, grid, padding_mode="border", align_corners=False)


class Generate:
    """Tasks of one class each; ``x [pictures, channels, size, size]`` with values from −1 to 1.

    Args:
        dataset: ``omniglot``, ``procedural`` (characters that metarun draws), ``emoji`` (the folder ``emoji`` in
            ``data_dir``; a class is a subcategory in one design), or ``auto``: omniglot if it is there, else
            procedural.
        path: your own pictures in place of ``dataset``, laid out as for ``task=images``; null: ``dataset``.
        shots: number of support pictures, at least 1; or a range from which each task draws this number.
        queries: number of query pictures, at least 2.
        train_shots: number of support pictures in training, or a range; null: ``shots``.
        train_queries: number of query pictures in training; null: ``queries``.
        draws: number of noises and times per picture whenever the loss is computed, at least 1.
        test_draws: the same for the bound in bits.
        generated: number of pictures that are generated per test task, at least 2.
        sampler_steps: number of steps from noise to a picture, each of two evaluations, at least 1.
        ways: number of classes among which the classifier that is trained on generated pictures chooses.
        split: for your own pictures as for ``task=images``; for omniglot ``vinyals``, ``random`` or ``auto``; for emoji
            ``random``, or a folder with lists of subcategories.
        split_seed: seed of a random split.
        class_of: for your own pictures as for ``task=images``.
        train_design: the design of the emoji of training, validation and test having the others; null: all designs.
        image_size: edge in pixels to which pictures are resized, 8 to 128.
        channels: 1 for grey, 3 for RGB; null: 1 for characters, otherwise 3.
        device: where the tasks are put.
        data_dir: holds the data sets.

    Raises:
        UserError: data are missing or broken.
    """

    def __init__(
        self,
        dataset: Dataset = "auto",
        path: str | None = None,
        shots: Shots = 5,
        queries: int = 10,
        train_shots: Shots | None = None,
        train_queries: int | None = None,
        draws: int = 2,
        test_draws: int = 4,
        generated: int = 100,
        sampler_steps: int = 6,
        ways: int = 5,
        split: str = "auto",
        split_seed: int = 0,
        class_of: str | None = None,
        train_design: str | None = None,
        image_size: int = 20,
        channels: int | None = None,
        device: str = "cpu",
        data_dir: str = "data",
    ) -> None:
        for key, value, least in (
            *(("queries", queries, 2), ("train_queries", train_queries, 1), ("draws", draws, 1)),
            *(("test_draws", test_draws, 1), ("generated", generated, 2), ("sampler_steps", sampler_steps, 1)),
            ("ways", ways, 2),
        ):
            require(value is None or value >= least, f"{key} must be at least {least}, not {value}")
        self.sizes = sizes_without_classes(shots, queries, train_shots, train_queries)
        smallest = max(sizes.examples for sizes in self.sizes.values())
        name, self.pools, self.channels, self.units = picture_pools(
            Asked(dataset, path, split, split_seed, class_of, train_design, image_size, channels, smallest, data_dir)
        )
        for part, pool in self.pools.items():
            sizes = self.sizes[part == "train"]
            require(
                classes_with(pool.cells.size, sizes.examples) >= 1,
                f"shots + queries = {sizes.shots.most} + {sizes.queries} are more pictures than any {part} class of "
                f"{name} has; lower them",
            )
        self.device, self.ways, self.generated, self.steps = device, ways, generated, sampler_steps
        self.test_draws = test_draws
        self.ink = path is None and name.startswith(("omniglot", "procedural"))
        self.dataset = ":".join(["generate", name, *self.sizes[False].text(), f"draws={draws}"])
        shape = (self.channels, image_size, image_size)
        self.target = Flow(shape, draws)
        pictures, label = self._some(self.pools["train"])
        self.space = space_of(pictures)
        form = Drawings(image_size) if self.ink else Pictures(image_size, self.channels)
        self.converter = Drawn(form, self.target, sampler_steps)
        self.spec = Spec(
            Numbers(shape),
            self.target,
            Sizes(self.sizes[False].shots.most, queries),
            metrics=(FLOW_LOSS, BITS),
            facts=Facts(references=references(self.pools["train"], pictures, label)),
        )
        self.pooled = Pooled(POOLED, self._counts, self._pooled_scores)
        self.samples = Samples(self._make, self._show)

    def _some(self, pool: Pool) -> tuple[Tensor, Tensor]:
        """Return about ``MEASURED`` pictures of a pool, in whole classes, and the class of each."""
        sizes = pool.cells.size.flatten()
        classes = torch.arange(len(sizes)).repeat_interleave(sizes)
        chosen = torch.arange(len(sizes))[:: int(sizes.sum()) // MEASURED + 1]
        places = torch.isin(classes, chosen).nonzero()[:, 0]
        return self._pictures(pool, places).cpu(), classes[places]

    def _pictures(self, pool: Pool, places: Tensor) -> Tensor:
        """Return pictures ``[..., channels, size, size]`` with values from −1 to 1."""
        return 2 * pixels_of(pool, places, self.device) - 1

    def sample(self, split: Split, count: int, generator: torch.Generator) -> Task:
        """Draw ``count`` classes; leaves ``[count, pictures, ...]``, and ``weight`` where shots vary.

        Queries of validation and test also carry ``seed``, that of their noise, and the number of their ``class``.
        """
        pool, sizes = self.pools[split], self.sizes[split == "train"]
        support, query = pool.cells.draw(sizes, count, generator)
        parts = {}
        for name, dealt in (("support", support), ("query", query)):
            x = self._pictures(pool, dealt.example)
            parts[name] = {"x": x}
            if dealt.real is not None:
                real = dealt.real.to(self.device)
                parts[name] = {"x": x.masked_fill(~real[..., None, None, None], 0), "weight": real.to(x.dtype)}
        if split != "train":
            seeds = torch.randint(2**62, query.label.shape, generator=generator)
            cell = self._cell_of(pool.cells, query.example)
            parts["query"] |= {"seed": seeds.to(self.device), "class": cell.to(self.device)}
        return Task(parts["support"], parts["query"])

    @staticmethod
    def _cell_of(cells: Cells, places: Tensor) -> Tensor:
        """Return the number of the cell, counted over groups and classes, in which each place lies."""
        return torch.searchsorted(cells.first.flatten().contiguous(), places.contiguous(), right=True) - 1

    def scores(self, predict: Predict, data: Tree) -> Scores:
        """Return the bound in bits per number, which only tests need."""
        return {BITS.name: self.target.bits(predict, data, self.test_draws)}

    def made(self, predict: Predict, task: Task, count: int) -> Tensor:
        """Return ``count`` generated pictures, whose noise depends on the task alone."""
        assert task.seed is not None
        maker = self.converter.target
        noise = normal(fold(task.seed, 1000), (count, *maker.noise)).to(task.query["x"])
        return maker.sampled(predict, noise, self.steps).clamp(-1, 1)

    def augmented(self, task: Task, count: int) -> Tensor:
        """Return ``count`` support pictures, changed a little at random."""
        assert task.seed is not None
        own, weight = task.support["x"], weight_of_examples(task.support)
        # The support pictures in turn, padding left out.
        order = (weight == 0).to(torch.uint8).argsort(stable=True)
        turn = order[torch.arange(count, device=own.device) % weight.sum().long()]
        return changed(own[turn], normal(fold(task.seed, 1001), (count, 5)).to(own))

    def _counts(self, predict: Predict, task: Task) -> Tensor:
        """Return what the pooled metrics are computed from, of one task, as one row of numbers."""
        generated, augmented = self.made(predict, task, self.generated), self.augmented(task, self.generated)
        support, query, weight = task.support["x"], task.query["x"], weight_of_examples(task.support)
        z = {"generated": self.space(generated), "support": self.space(support), "augmented": self.space(augmented)}
        real = self.space(query)
        sums = []
        for name, own in z.items():
            w = weight if name == "support" else own.new_ones(len(own))
            sums += [w.sum()[None], w @ own, ((w[:, None] * own).T @ own).flatten()]
        unseen = torch.where(weight > 0, 0.0, torch.inf)
        near, near_real = (
            (squared_distances(x.flatten(1), support.flatten(1)) + unseen).amin(1) for x in (generated, query)
        )
        copies = torch.where(near.isfinite().all(), (near < near_real.min()).to(query.dtype).mean(), torch.nan)
        distances = [kernel_distance(z[name], real) for name in ("generated", "augmented")]
        kind = task.query["class"][0].to(query.dtype)
        return torch.cat([torch.stack([kind, *distances, copies]), *sums, real.flatten()])

    def _pooled_scores(self, counts: Tensor) -> dict[str, float]:
        """Return every pooled metric from ``counts [tasks, numbers]``."""
        kind, own, augmented, copies = counts[:, :4].double().T
        d = self.space.directions.shape[1]
        real = counts[:, 4 + len(ACCURACIES) * (1 + d + d * d) :].double().view(len(counts), -1, d)
        rivals = rivals_of(kind.long().tolist(), self.ways)
        found = {
            KERNEL_DISTANCE.name: own.mean().item(),
            KERNEL_DISTANCE_AUGMENTED.name: augmented.mean().item(),
            COPIES.name: copies.mean().item(),
        }
        for i, metric in enumerate(ACCURACIES.values()):
            first = 4 + i * (1 + d + d * d)
            sums = counts[:, first : first + 1 + d + d * d].double()
            found[metric.name] = discriminant_accuracy(sums, real, rivals)
        return {metric.name: found[metric.name] for metric in POOLED}

    def _make(self, predict: Predict, task: Task) -> Tree:
        """Return a few generated pictures, and the support picture that is nearest to each."""
        made = self.made(predict, task, SHOWN)
        unseen = torch.where(weight_of_examples(task.support) > 0, 0.0, torch.inf)
        near = (squared_distances(made.flatten(1), task.support["x"].flatten(1)) + unseen).argmin(1)
        return {"generated": made, "nearest": task.support["x"][near]}

    def _show(self, found: Mapping[str, Tree], tasks: Task) -> Figure:
        """Draw support, generated and nearest support pictures, and real ones, a row per task."""
        columns: dict[str, list[Tensor]] = {"support": []}
        columns |= {f"generated {when}": [] for when in found}
        columns |= {"nearest in support": [], "real, of the class": []}
        for i in range(len(tasks.support["x"])):
            real = weight_of_examples({name: leaf[i] for name, leaf in tasks.support.items()}) > 0
            support = tasks.support["x"][i][real][:SHOWN]
            blank = support.new_full((SHOWN - len(support), *support.shape[1:]), torch.nan)
            columns["support"].append(mosaic(torch.cat([support, blank]), 4))
            for when, leaf in found.items():
                columns[f"generated {when}"].append(mosaic(leaf["generated"][i], 4))
            columns["nearest in support"].append(mosaic(found["after"]["nearest"][i], 4))
            others = tasks.query["x"][i][:SHOWN]
            blank = others.new_full((SHOWN - len(others), *others.shape[1:]), torch.nan)
            columns["real, of the class"].append(mosaic(torch.cat([others, blank]), 4))
        rows = {name: [(picture + 1) / 2 for picture in column] for name, column in columns.items()}
        return grid_of_pictures(rows, ink=self.ink)


def rivals_of(kinds: list[int], ways: int) -> Tensor:
    """Return the tasks among which each one's queries are told apart ``[tasks, ways]``: itself and the next others.

    The others are of different classes. Where there are too few classes, fewer are told apart.
    """
    ways = min(ways, len(set(kinds)))
    rows = []
    for i, kind in enumerate(kinds):
        seen, chosen = {kind}, [i]
        for j in (*range(i + 1, len(kinds)), *range(i)):
            if len(chosen) == ways:
                break
            if kinds[j] not in seen:
                seen.add(kinds[j])
                chosen.append(j)
        rows.append(chosen)
    return torch.tensor(rows)


def discriminant_accuracy(sums: Tensor, real: Tensor, rivals: Tensor) -> float:
    """Return the mean accuracy of linear discriminants on real pictures.

    A discriminant has a mean per class and the covariance within classes, to whose diagonal a share ``RIDGE`` of its
    mean is added; all classes are equally likely (Hastie, Tibshirani, Friedman 2009, §4.3). Of several classes that are
    equally near, each has an equal share of a picture. Training pictures that are not finite tell nothing apart.

    Args:
        sums: of the training pictures of each task: number, sum and sum of squares ``[tasks, 1 + d + d²]``.
        real: features of the real pictures of each task ``[tasks, pictures, d]``.
        rivals: tasks among which the pictures of each task are told apart, the task itself first ``[tasks, ways]``.
    """
    d = real.shape[-1]
    number, total, square = sums[:, :1], sums[:, 1 : 1 + d], sums[:, 1 + d :].view(-1, d, d)
    mean = total / number
    scatter = square - number[..., None] * mean[:, :, None] * mean[:, None, :]
    within = scatter[rivals].sum(1) / number[rivals].sum(1)[..., None]
    scale = within.diagonal(dim1=1, dim2=2).mean(-1).clamp(min=1e-6)
    within = within + RIDGE * scale[:, None, None] * torch.eye(d, dtype=within.dtype)
    weights = torch.linalg.solve(within, mean[rivals].transpose(1, 2))
    scores = real @ weights - 0.5 * (mean[rivals].transpose(1, 2) * weights).sum(1)[:, None]
    least = scores.amax(-1, keepdim=True) - TIED * scores.abs().amax(-1, keepdim=True)
    best = (scores >= least).double()
    # What is not a number is best nowhere.
    return float((best[..., 0] / best.sum(-1).clamp(min=1)).mean())
