"""Intervals and tests for claims about methods, not only about the models that a few seeds have given.

The score of seed s on episode e is modelled as

    y[s, e] = μ + a[s] + b[e] + r[s, e]        (two-way random effects without replication)

where a is what the seed of training changes, b the difficulty of the episode, and r the rest. The seeds of a method are
tested on the same episodes. The analysis of variance splits the variance of the mean (Cornfield and Tukey 1956):

    Var(mean) = v_seeds + v_episodes,   v_seeds = MS_seeds / n,   v_episodes = (MS_episodes − MS_rest) / n

with n = seeds · episodes and seeds − 1 and episodes − 1 degrees of freedom. With V = Var(mean), the share ρ of each
part in V, and Student's quantile t of its degrees of freedom, the half-width h of the interval is

    h² = V (z² + Σ ρ^1.25 (t² − z²)),   z = 1.96

The exponent 1 is Banerjee's interval (1960, Sankhyā 22), which for normal scores provably covers at least 95 % of the
time, and up to 97.7 % with three seeds. p-values use it, so that verdicts among many methods are safe. Satterthwaite's
degrees of freedom cover only 92 % where seeds matter most, and err up to five times too often in the far tail that such
verdicts need. 1.25 lies between the two: ``benchmarks/coverage.py`` measures 94.5 to 97 %.

A difference of two methods that share seeds and episodes is treated in the same way, after subtraction. Where they
share only the episodes, the part of the seeds is the sum of both, with Welch's degrees of freedom. A method that gives
the same with any seed has no such part.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from metarun.results.comparison.distributions import studentised_range, t_quantile, t_two_sided

Array = NDArray[np.float64]

EXPONENT, SAFE = 1.25, 1.0
"""For intervals and for p-values."""

quantile = lru_cache(maxsize=4096)(t_quantile)


@lru_cache(maxsize=4096)
def levels(df: float) -> tuple[Array, Array]:
    """Return logarithms of two-sided probabilities, rising, and of the t that have them."""
    t = np.geomspace(1e8, 1e-4, 600)
    p = np.array([max(t_two_sided(float(one), df), 1e-300) for one in t])
    return np.log(p), np.log(t)


@dataclass(frozen=True)
class Estimate:
    """A mean, and the parts of its variance with their degrees of freedom."""

    mean: float
    parts: tuple[tuple[float, float], ...]

    @property
    def variance(self) -> float:
        """The variance of the mean."""
        return sum(variance for variance, _ in self.parts)

    def squared_width(self, squares: Sequence[float], normal: float, exponent: float) -> float:
        """Return the squared half-width, given the squared quantiles of the parts and that of a normal distribution."""
        total = self.variance
        if not total > 0:
            return total
        shares = (variance / total for variance, _ in self.parts)
        return total * (normal + sum(float(r**exponent) * (t - normal) for r, t in zip(shares, squares, strict=True)))

    def half_width(self, level: float, exponent: float = EXPONENT) -> float:
        """Return the half-width of the interval that misses the truth with probability ``level``."""
        squares = [quantile(df, level) ** 2 for _, df in self.parts]
        return math.sqrt(self.squared_width(squares, quantile(math.inf, level) ** 2, exponent))

    @property
    def ci95(self) -> float:
        """The half-width of the 95 % confidence interval."""
        return self.half_width(0.05)

    @property
    def p(self) -> float:
        """The level at which Banerjee's interval just reaches 0."""
        if math.isnan(self.mean) or math.isnan(self.variance):
            return math.nan
        if self.variance == 0:
            return float(self.mean == 0)
        low, high = -690.0, 0.0
        for _ in range(60):
            middle = (low + high) / 2
            squares = [
                math.exp(2 * float(np.interp(middle, *levels(df)))) for df in (*(d for _, d in self.parts), math.inf)
            ]
            within = self.squared_width(squares[:-1], squares[-1], SAFE) >= self.mean**2
            low, high = (middle, high) if within else (low, middle)
        return math.exp(high)


def over_episodes(scores: Array) -> Estimate:
    """Return the mean of one trained model's scores ``[episodes]``, with Student's interval.

    It is the normal interval of ``result.csv`` but for few episodes, of which that one holds the truth less often.
    """
    variance = float(scores.var(ddof=1)) / len(scores) if len(scores) > 1 else math.nan
    return Estimate(float(scores.mean()), ((variance, max(len(scores) - 1, 1)),))


def mean_squares(scores: Array) -> tuple[float, float, float]:
    """Return the mean squares of seeds, episodes and the rest for ``[seeds, episodes]``, divided by their number."""
    seeds, episodes = scores.shape
    rest = scores - scores.mean(1, keepdims=True) - scores.mean(0) + scores.mean()
    return (
        float(scores.mean(1).var(ddof=1)) / seeds,
        float(scores.mean(0).var(ddof=1)) / episodes,
        float((rest**2).sum()) / ((seeds - 1) * (episodes - 1) * seeds * episodes),
    )


def over_seeds_and_episodes(scores: Array) -> Estimate:
    """Return the mean of a method's ``scores [seeds, episodes]``, for 2 seeds and 2 episodes or more."""
    by_seed, by_episode, rest = mean_squares(scores)
    seeds, episodes = scores.shape
    # Not max(…, 0) alone, which would turn NaN into 0.
    of_episodes = by_episode - rest if not by_episode < rest else 0.0
    return Estimate(float(scores.mean()), ((by_seed, seeds - 1), (of_episodes, episodes - 1)))


def difference_of_methods(a: Array, b: Array, same_seeds: bool) -> Estimate:
    """Return the mean of ``a − b``, both ``[seeds, episodes]`` on the same episodes.

    ``same_seeds`` says that row by row the two were trained with the same seed. A single seed is taken as it is.
    """
    if max(len(a), len(b)) == 1:
        return over_episodes(a[0] - b[0])
    if same_seeds or min(len(a), len(b)) == 1:
        return over_seeds_and_episodes(a - b)
    episodes = a.mean(0) - b.mean(0)
    squares = [mean_squares(one) for one in (a, b)]
    # The parts of the seeds already hold the rest.
    by_episode = float(episodes.var(ddof=1)) / len(episodes) - sum(rest for *_, rest in squares)
    of_seeds = welch([(by_seed, len(one) - 1) for (by_seed, *_), one in zip(squares, (a, b), strict=True)])
    of_episodes = (by_episode if not by_episode < 0 else 0.0, len(episodes) - 1)
    return Estimate(float(episodes.mean()), (of_seeds, of_episodes))


def of_pooled(scores: Array) -> Estimate:
    """Return the mean of scores of all episodes together ``[seeds, 1 + resamplings]``, the scores themselves first.

    The same resamplings of the same episodes gave the scores of all seeds, so that the standard deviation of their
    means is the standard error over episodes. The part of two or more seeds holds the rest too, so that the interval
    is rather too wide.
    """
    mean = scores.mean(0)
    # A resampling may hold nothing to measure.
    there = mean[1:][~np.isnan(mean[1:])]
    of_episodes = (float(there.var(ddof=1)) if len(there) > 1 else math.nan, math.inf)
    if len(scores) == 1:
        return Estimate(float(mean[0]), (of_episodes,))
    return Estimate(float(mean[0]), ((float(scores[:, 0].var(ddof=1)) / len(scores), len(scores) - 1), of_episodes))


def difference_of_pooled(a: Array, b: Array, same_seeds: bool) -> Estimate:
    """Return the mean of ``a − b``, both as in `of_pooled` and of the same episodes.

    ``same_seeds`` says that row by row these are the same. A single seed is taken as it is.
    """
    if same_seeds or min(len(a), len(b)) == 1:
        return of_pooled(a - b)
    difference = of_pooled((a.mean(0) - b.mean(0))[None])
    return Estimate(difference.mean, (welch([of_pooled(one).parts[0] for one in (a, b)]), *difference.parts))


def welch(parts: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the sum of the variances of independent means, with Welch's degrees of freedom."""
    total = sum(variance for variance, _ in parts)
    spread = sum(variance**2 / df for variance, df in parts)
    # To three digits, so that the quantiles of many rows are found once.
    return total, float(f"{total**2 / spread:.3g}") if spread > 0 else min(df for _, df in parts)


def of_summaries(means: Array, variances: Array, episodes: int, about_methods: bool) -> Estimate:
    """Return the mean of models of which only the mean over episodes and its variance are known ``[seeds]``.

    The part of the episodes is the variance of one model, which for several seeds is rather too large.
    """
    by_seed = ((float(means.var(ddof=1)) / len(means), len(means) - 1),) if about_methods else ()
    return Estimate(float(means.mean()), (*by_seed, (float(variances.mean()), max(episodes - 1, 1))))


def unpaired(a: Estimate, b: Estimate) -> Estimate:
    """Return the difference of two independent means, both over seeds and episodes, or both over episodes alone."""
    return Estimate(a.mean - b.mean, tuple(welch(pair) for pair in zip(a.parts, b.parts, strict=True)))


def holm(p: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number (Holm 1979), NaN where there is none.

    The chance of any false verdict is at most 5 % if differences count where the adjusted value is at most 0.05.
    """
    order = sorted((i for i, value in enumerate(p) if not math.isnan(value)), key=lambda i: p[i])
    adjusted, largest = [math.nan] * len(p), 0.0
    for place, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - place) * p[i]))
        adjusted[i] = largest
    return adjusted


def effect_size(a: Array, b: Array) -> float:
    """Return Cohen's d: the difference of the means of ``[seeds, episodes]``, in standard deviations over episodes."""
    spread = math.sqrt((a.var(axis=1, ddof=1).mean() + b.var(axis=1, ddof=1).mean()) / 2)
    return float(a.mean() - b.mean()) / spread if spread > 0 else math.nan


def share_better(a: Array, b: Array, higher_is_better: bool) -> float:
    """Return the share of episodes on which ``a [seeds, episodes]`` has a better mean over seeds; a tie counts half."""
    difference = (a.mean(0) - b.mean(0)) * (1 if higher_is_better else -1)
    if np.isnan(difference).any():
        return math.nan
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())


@dataclass(frozen=True)
class Ranks:
    """Average ranks of methods over settings (Demšar 2006, https://www.jmlr.org/papers/v7/demsar06a.html)."""

    mean: Array
    """The average rank of each method; 1 is the best."""
    p: float
    """Of Friedman's test: are all methods equally good?"""
    critical_difference: float
    """Nemenyi's: average ranks that are further apart differ at the level of 5 %."""


def ranks_of(scores: Array, higher_is_better: Sequence[bool]) -> Ranks:
    """Return the average ranks of methods for ``scores [settings, methods]``, with ties sharing their mean rank."""
    settings, methods = scores.shape
    signed = scores * np.where(higher_is_better, -1, 1)[:, None]
    below = (signed[:, :, None] > signed[:, None, :]).sum(-1)
    equal = (signed[:, :, None] == signed[:, None, :]).sum(-1)
    ranks = below + (equal + 1) / 2
    critical = studentised_range(methods) / math.sqrt(2) * math.sqrt(methods * (methods + 1) / (6 * settings))
    return Ranks(ranks.mean(0), friedman(ranks), critical)


DRAWN = 20_000
"""Permutations from which the p-value of Friedman's test is taken where there are more."""


def friedman(ranks: Array) -> float:
    """Return the p-value of Friedman's test for ``ranks [settings, methods]``; NaN if all ranks are tied.

    It is the share of permutations within the settings whose average ranks are as far apart: of all permutations where
    these are few, else of random ones. The usual approximations by χ² and F are for more settings than there often are:
    for two methods in the same order in two settings, Iman and Davenport's p is 0, while every other time chance gives
    the same.
    """
    settings, methods = ranks.shape
    middle = (methods + 1) / 2
    if not (ranks != middle).any():
        return math.nan
    found = float(((ranks.mean(0) - middle) ** 2).sum())
    # The order of the first setting can be held, since only the others relative to it count.
    if math.lgamma(methods + 1) * (settings - 1) <= math.log(DRAWN):
        orders = [np.array(order) for order in permutations(range(methods))]
        sums = ranks[0][None]
        for own in ranks[1:]:
            sums = (sums[:, None] + np.stack([own[order] for order in orders])).reshape(-1, methods)
        return float((((sums / settings - middle) ** 2).sum(1) >= found - 1e-9).mean())
    drawn = np.zeros((DRAWN, methods))
    generator = np.random.default_rng(0)
    for own in ranks:
        drawn += generator.permuted(np.broadcast_to(own, drawn.shape), axis=1)
    extreme = int((((drawn / settings - middle) ** 2).sum(1) >= found - 1e-9).sum())
    return (1 + extreme) / (1 + DRAWN)
