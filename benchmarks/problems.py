"""The problems that all contestants solve: the same weights and the same tasks, as numpy arrays."""

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Problem:
    """One meta-step to be timed."""

    name: str
    title: str
    model: str
    """``mlp`` (1-40-40-1) or ``conv4`` (four blocks of 64 filters on 28×28 images)."""
    method: str
    """``maml``, ``fomaml`` or ``protonet``."""
    tasks: int
    ways: int
    shots: int
    queries: int
    """Number of examples per class, or per task where there are no classes."""
    inner_lr: float
    inner_steps: int
    max_pool: bool
    cores: int

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Return the shapes of the parameters, in the order of the module."""
        if self.model == "mlp":
            return [(40, 1), (40,), (40, 40), (40,), (1, 40), (1,)]
        blocks = [shape for i in range(4) for shape in [(64, 64 if i else 1, 3, 3), (64,), (64,)]]
        return blocks if self.method == "protonet" else [*blocks, (self.ways, 64), (self.ways,)]

    def weights(self) -> list[Array]:
        """Return initial parameters like those of a torch user, with normalisation at scale 1 and shift 0."""
        rng, found = np.random.default_rng(0), []
        for i, shape in enumerate(self.shapes):
            if self.model == "conv4" and i < 12 and i % 3:
                found.append(np.full(shape, 2.0 - i % 3, dtype=np.float32))
                continue
            bound = 1 / max(prod(shape[1:]), 1) ** 0.5
            found.append(rng.uniform(-bound, bound, shape).astype(np.float32))
        return found

    def batch(self, number: int) -> dict[str, Array]:
        """Return the tasks of one meta-step: ``sx``, ``sy``, ``qx``, ``qy``, each ``[tasks, examples, ...]``."""
        rng = np.random.default_rng(number + 1)
        found: dict[str, Any] = {}
        if self.model == "mlp":
            amplitude, phase = rng.uniform(0.1, 5, (self.tasks, 1, 1)), rng.uniform(0, np.pi, (self.tasks, 1, 1))
            for part, count in (("s", self.shots), ("q", self.queries)):
                x = rng.uniform(-5, 5, (self.tasks, count, 1))
                found |= {f"{part}x": x, f"{part}y": amplitude * np.sin(x - phase)}
        else:
            patterns = rng.uniform(0, 1, (self.tasks, self.ways, 1, 28, 28))
            for part, count in (("s", self.shots), ("q", self.queries)):
                label = np.tile(np.arange(self.ways), count)
                noise = rng.uniform(0, 0.5, (self.tasks, len(label), 1, 28, 28))
                one_hot = np.broadcast_to(np.eye(self.ways)[label], (self.tasks, len(label), self.ways))
                found |= {f"{part}x": patterns[:, label] + noise, f"{part}y": one_hot}
        return {name: np.ascontiguousarray(value, dtype=np.float32) for name, value in found.items()}

    def multiplications(self) -> float:
        """Return the floating-point operations of a meta-step in matrix products and convolutions, counted by hand.

        A forward pass counts once and its derivative twice. A second-order inner step costs its forward pass, its
        gradient, and twice both for the derivative of the gradient.
        """
        if self.model == "mlp":
            forward = 2 * (40 + 1600 + 40)
        else:
            sides = [28, 14, 7, 3] if self.max_pool else [14, 7, 4, 2]
            forward = sum(2 * 9 * 64 * (64 if i else 1) * side**2 for i, side in enumerate(sides))
        classes = self.ways if self.model == "conv4" else 1
        support, query = classes * self.shots, classes * self.queries
        if self.method == "protonet":
            return float(3 * forward * (support + query) * self.tasks)
        inner = 3 if self.method == "fomaml" else 9
        return float(forward * self.tasks * (inner * self.inner_steps * support + 3 * query))


SINUSOID = {"model": "mlp", "tasks": 25, "ways": 1, "shots": 10, "queries": 10, "inner_lr": 0.01, "max_pool": False}
IMAGES = {"model": "conv4", "tasks": 32, "ways": 5, "shots": 1, "queries": 15, "inner_lr": 2.0, "inner_steps": 1}
PROBLEMS = {
    p.name: p
    for p in (
        Problem("sinusoid_1", "sinusoid MAML, 1 inner step", method="maml", inner_steps=1, cores=1, **SINUSOID),  # type: ignore[arg-type]
        Problem("sinusoid_5", "sinusoid MAML, 5 inner steps", method="maml", inner_steps=5, cores=1, **SINUSOID),  # type: ignore[arg-type]
        Problem("omniglot_maml", "image MAML, second order", method="maml", max_pool=False, cores=2, **IMAGES),  # type: ignore[arg-type]
        Problem("omniglot_fomaml", "image MAML, first order", method="fomaml", max_pool=False, cores=2, **IMAGES),  # type: ignore[arg-type]
        Problem("protonet", "prototypical networks, 60-way", "conv4", "protonet", 1, 60, 5, 5, 0.0, 0, True, 2),
    )
}
