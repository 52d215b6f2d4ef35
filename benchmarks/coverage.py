"""How often the intervals of ``metarun-compare`` contain the truth, and how often it sees a difference where none is.

Made-up scores with known differences: method m, seed s, episode e score

    y = μ_m + σ · a[m, s] + b[e] + c[m, e] + r[m, s, e]

with b, c and r as large as those of accuracies of 5-way episodes, or skewed as squared errors are. σ, the spread that
seeds add, is nothing, as large as the standard error over episodes, or five times that.

    python benchmarks/coverage.py [--repetitions N] [--seed N]
"""

import argparse
import itertools
import math
import time
from collections import Counter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from metarun.results.comparison.statistics import (
    Estimate,
    difference_of_methods,
    holm,
    over_episodes,
    over_seeds_and_episodes,
)

Array = NDArray[np.float64]

EPISODES, METHODS, DIFFERENCE = 200, 10, 0.02
STANDARD_ERROR = 0.1 / math.sqrt(EPISODES)
SEEDS, SPREADS = (3, 5, 10), (0.0, 1.0, 5.0)
SHAPES = ("normal", "skewed")


class MadeUp(NamedTuple):
    """Scores of made-up methods."""

    test: Array
    """``[methods, seeds, episodes]``."""
    validation: Array
    """Mean validation scores of the same models, on other episodes ``[methods, seeds]``."""


def made_up(rng: np.random.Generator, means: Array, seeds: int, spread: float, shape: str) -> MadeUp:
    """Return scores of methods with these true ``means``."""
    count = len(means)

    def noise(*size: int) -> Array:
        drawn = rng.normal(size=size) if shape == "normal" else rng.gamma(0.5, math.sqrt(2), size) - math.sqrt(0.5)
        return np.asarray(0.1 * drawn)

    models = means[:, None] + spread * STANDARD_ERROR * rng.normal(size=(count, seeds))
    of_episodes = noise(EPISODES) + 0.5 * noise(count, 1, EPISODES) + noise(count, seeds, EPISODES)
    return MadeUp(models[:, :, None] + of_episodes, models + STANDARD_ERROR * rng.normal(size=models.shape))


def level_of(estimate: Estimate) -> float:
    """Return the p-value, or 1 where the 95 % interval holds 0, so that no verdict depends on it."""
    return estimate.p if abs(estimate.mean) > estimate.ci95 else 1.0


def against_one(scores: Array) -> bool:
    """Whether any of the methods is found to differ from the first, with Holm's correction."""
    return min(holm([level_of(difference_of_methods(one, scores[0], same_seeds=True)) for one in scores[1:]])) <= 0.05


def family_verdict(scores: MadeUp) -> bool:
    """Whether the best of all but one method, by validation, is found to differ from that one."""
    best = scores.test[scores.validation[1:].mean(1).argmax() + 1]
    found = difference_of_methods(best, scores.test[0], same_seeds=True)
    return abs(found.mean) > found.half_width(0.05 / (METHODS - 1))


def coverage(rng: np.random.Generator, seeds: int, spread: float, shape: str, repetitions: int) -> dict[str, float]:
    """Return how often each interval holds the truth and how often each verdict is false."""
    two, equal = np.array([0.5, 0.5 + DIFFERENCE]), np.full(METHODS, 0.5)
    hits: Counter[str] = Counter()
    for _ in range(repetitions):
        a, b = made_up(rng, two, seeds, spread, shape).test
        intervals = {
            "mean": (over_seeds_and_episodes(a), two[0]),
            "difference": (difference_of_methods(b, a, same_seeds=True), DIFFERENCE),
            "of other seeds": (difference_of_methods(b, a, same_seeds=False), DIFFERENCE),
            "episodes alone": (over_episodes((b - a).mean(0)), DIFFERENCE),
        }
        for name, (found, truth) in intervals.items():
            hits[name] += abs(found.mean - truth) <= found.ci95
        scores = made_up(rng, equal, seeds, spread, shape)
        pair = difference_of_methods(scores.test[1], scores.test[0], same_seeds=True)
        hits["false: two"] += abs(pair.mean) > pair.ci95
        hits["false: ten, Holm"] += against_one(scores.test)
        hits["false: best of nine"] += family_verdict(scores)
    return {name: count / repetitions for name, count in hits.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    began, first = time.perf_counter(), True
    for shape, seeds, spread in itertools.product(SHAPES, SEEDS, SPREADS):
        rng = np.random.default_rng(arguments.seed)
        found = coverage(rng, seeds, spread, shape, arguments.repetitions)
        if first:
            print("| scores | seeds | spread | " + " | ".join(found) + " |\n|" + "---|" * (3 + len(found)))
            first = False
        cells = " | ".join(f"{100 * share:.1f}" for share in found.values())
        print(f"| {shape} | {seeds} | {spread:g} | {cells} |", flush=True)
    print(f"\n{arguments.repetitions} repetitions of each row, {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
