"""Sinusoid regression.

Finn, Abbeel, Levine 2017 (https://arxiv.org/abs/1703.03400, §5.1): y = A sin(x − φ) with A uniform on
[0.1, 5], φ uniform on [0, π] and x uniform on [−5, 5]. Training, validation and test tasks are separate draws from the
same continuous distribution.
"""

import math

import torch
from torch import Tensor

from metarun.contracts import Facts, Numbers, Sizes, Spec, Split, Task
from metarun.data.portable import portable
from metarun.errors import require
from metarun.targets.real import MSE, Real
from metarun.tasks.few_shot import Shots, shot_ranges, with_padding

PAPER = {"amplitude": (0.1, 5.0), "phase": (0.0, math.pi), "inputs": (-5.0, 5.0)}


@portable
def waves(x: Tensor) -> Tensor:
    """Return the features in which A sin(x − φ) is linear: A cos φ · sin x − A sin φ · cos x."""
    return torch.cat([torch.sin(x), torch.cos(x)], -1)


class Sinusoid:
    """Sine waves of random amplitude and phase; ``x`` and ``y`` have shape ``[points, 1]``.

    Args:
        shots: number of support points, at least 1; or a range from which each task draws this number.
        queries: number of points that score a validation or test task, at least 1.
        train_shots: number of support points in training, or a range; null: ``shots``.
        train_queries: number of query points in training; null: as many as support points (the largest number, if that
            is a range), as in the paper.
        amplitude: range of A, rising.
        phase: range of φ in radians, rising.
        inputs: range of x, rising.
        device: where the tasks are put.
        data_dir: not used; every family receives it.
    """

    def __init__(
        self,
        shots: Shots = 10,
        queries: int = 100,
        train_shots: Shots | None = None,
        train_queries: int | None = None,
        amplitude: tuple[float, float] = PAPER["amplitude"],
        phase: tuple[float, float] = PAPER["phase"],
        inputs: tuple[float, float] = PAPER["inputs"],
        device: str = "cpu",
        data_dir: str = "data",
    ) -> None:
        for name, size in {"queries": queries, "train_queries": train_queries}.items():
            require(size is None or size >= 1, f"{name} must be at least 1, not {size}")
        ranges = {"amplitude": tuple(amplitude), "phase": tuple(phase), "inputs": tuple(inputs)}
        for name, (low, high) in ranges.items():
            require(low < high, f"{name} must be a rising range, not [{low}, {high}]")
        self.shots, self.train_shots = shot_ranges(shots, train_shots)
        self.train_queries = train_queries or self.train_shots.most
        self.amplitude, self.phase, self.inputs = amplitude, phase, inputs
        self.device = device
        others = [f"{name}={list(ranges[name])}" for name in ranges if ranges[name] != PAPER[name]]
        self.dataset = ":".join(["sinusoid", *others, *self.shots.text("shots")])
        self.spec = Spec(
            Numbers((1,)),
            Real(1),
            Sizes(self.shots.most, queries),
            metrics=(MSE,),
            facts=Facts(truth=waves),
        )

    def sample(self, split: Split, count: int, generator: torch.Generator) -> Task:
        """Draw ``count`` sine waves; leaves ``[count, points, 1]``, and ``weight [count, points]`` if shots vary."""
        train = split == "train"
        shots = self.train_shots if train else self.shots
        queries = self.train_queries if train else self.spec.sizes.queries

        def uniform(bounds: tuple[float, float], *shape: int) -> Tensor:
            low, high = bounds
            # In place: a short meta-step takes only a few times as long as drawing its tasks.
            return torch.rand(count, *shape, generator=generator).mul_(high - low).add_(low)

        amplitude, phase = uniform(self.amplitude, 1, 1), uniform(self.phase, 1, 1)
        x = uniform(self.inputs, shots.most + queries, 1)
        y = torch.sub(x, phase).sin_().mul_(amplitude)

        def part(columns: slice, real: Tensor | None) -> dict[str, Tensor]:
            return with_padding(x[:, columns].to(self.device), y[:, columns].to(self.device), real)

        of_support, of_query = slice(shots.most), slice(shots.most, None)
        if shots.fixed:
            return Task(part(of_support, None), part(of_query, None))
        # Drawn last, so that tasks with fewer points are those with the most, less the last points.
        real = torch.arange(shots.most) < shots.draw((count, 1), generator)
        return Task(part(of_support, real), part(of_query, torch.ones(count, queries, dtype=torch.bool)))
