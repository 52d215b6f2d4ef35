"""The statistics of a comparison: tables of distributions, closed forms, and coverage by simulation."""

import math

import numpy as np
import pytest

from benchmarks.coverage import coverage
from metarun.results.comparison.distributions import incomplete_beta, studentised_range, t_quantile, t_two_sided
from metarun.results.comparison.pictures import groups_without_difference
from metarun.results.comparison.statistics import (
    difference_of_methods,
    difference_of_pooled,
    effect_size,
    holm,
    of_pooled,
    over_seeds_and_episodes,
    ranks_of,
    share_better,
)
from metarun.results.plots import new_figure, readable_log
from metarun.results.tables import PooledScore
from metarun.targets.metric import Metric


def test_quantiles_are_those_of_the_tables():
    for df, level, t in (
        (1, 0.05, 12.706),
        (2, 0.05, 4.303),
        (4, 0.01, 4.604),
        (30, 0.05, 2.042),
        (math.inf, 0.05, 1.960),
    ):
        assert t_quantile(df, level) == pytest.approx(t, abs=6e-4)
        assert t_two_sided(t_quantile(df, level), df) == pytest.approx(level)
    # Demšar 2006, table 5(a): the critical values of Nemenyi's test are these divided by √2.
    for count, critical in ((2, 1.960), (3, 2.344), (5, 2.728), (10, 3.164)):
        assert studentised_range(count) / math.sqrt(2) == pytest.approx(critical, abs=6e-4)


def test_without_noise_of_episodes_the_interval_is_students():
    means = np.array([0.1, 0.4, 0.2, 0.35])
    found = over_seeds_and_episodes(np.tile(means[:, None], (1, 50)))
    assert found.ci95 == pytest.approx(3.182446 * means.std(ddof=1) / 2, rel=1e-6)
    t = found.mean / (means.std(ddof=1) / 2)
    assert found.p == pytest.approx(t_two_sided(t, 3), rel=1e-3)


def test_without_an_effect_of_seeds_the_interval_is_that_over_episodes():
    episodes = np.random.default_rng(0).normal(size=400)
    found = over_seeds_and_episodes(np.tile(episodes, (3, 1)))
    assert found.ci95 == pytest.approx(1.966 * episodes.std(ddof=1) / 20, rel=1e-3)


def test_seeds_that_are_not_shared_give_welchs_interval():
    a, b = np.array([0.1, 0.4, 0.2, 0.35]), np.array([0.9, 0.8, 1.3])
    found = difference_of_methods(*(np.tile(one[:, None], (1, 50)) for one in (a, b)), same_seeds=False)
    parts = a.var(ddof=1) / 4, b.var(ddof=1) / 3
    df = sum(parts) ** 2 / (parts[0] ** 2 / 3 + parts[1] ** 2 / 2)
    assert found.ci95 == pytest.approx(t_quantile(df) * math.sqrt(sum(parts)), rel=2e-3)


def test_a_single_seed_is_taken_as_it_is():
    """The difference from it has the seeds of the other method, of single scores or of pooled ones."""
    rng = np.random.default_rng(0)
    episodes = rng.normal(0, 0.1, 400)
    a, b = np.array([0.6, 0.7, 0.8])[:, None] + episodes, (0.5 + episodes)[None]
    expected = t_quantile(2) * 0.1 / 3**0.5
    for found in (
        difference_of_methods(a, b, same_seeds=False),
        difference_of_methods(b, a, same_seeds=False),
        difference_of_pooled(a, b, same_seeds=False),
        difference_of_pooled(b, a, same_seeds=False),
    ):
        assert abs(found.mean) == pytest.approx(0.2)
        assert found.ci95 == pytest.approx(expected, rel=1e-6)
    assert difference_of_methods(a[:1], b, same_seeds=False).ci95 == pytest.approx(0, abs=1e-9)


def test_resamplings_that_hold_nothing_to_measure_do_not_count():
    scores = np.random.default_rng(0).normal(size=21)
    some = np.insert(scores, 5, np.nan)
    assert PooledScore(scores[0], some[1:]).half_width == PooledScore(scores[0], scores[1:]).half_width
    assert of_pooled(some[None]).ci95 == of_pooled(scores[None]).ci95
    assert np.isnan(PooledScore(np.nan, [np.nan] * 20).half_width)
    assert Metric("f1", True, percent=True).interval(np.nan, np.nan) == "–"


def test_a_difference_of_pooled_scores_has_a_part_of_episodes_and_one_of_seeds():
    """Resamplings that hit both alike cancel; without them, the interval is Student's, or Welch's for other seeds."""
    shared, own = np.random.default_rng(0).normal(size=(2, 201))
    one = difference_of_pooled((0.5 + shared + 0.1 * own)[None], (0.2 + shared)[None], same_seeds=False)
    assert one.mean == pytest.approx(0.3 + 0.1 * own[0])
    assert one.ci95 == pytest.approx(1.96 * 0.1 * own[1:].std(ddof=1), rel=1e-4)
    a, b = (np.tile(np.array(means)[:, None], (1, 201)) for means in ([0.3, 0.5, 0.4], [0.1, 0.3, 0.1]))
    paired = difference_of_pooled(a, b, same_seeds=True)
    assert paired.ci95 == pytest.approx(4.302653 * (a - b)[:, 0].std(ddof=1) / math.sqrt(3), rel=1e-4)
    assert of_pooled(a).ci95 == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-4)
    # What one seed gains on the resamplings that another loses on cancels in their mean.
    assert of_pooled(np.stack([0.5 + own, 0.5 - own + 2 * own * (np.arange(201) == 0)])).ci95 < 1e-6
    apart = difference_of_pooled(a, b, same_seeds=False)
    assert apart.ci95 == pytest.approx(difference_of_methods(a, b, same_seeds=False).ci95, rel=1e-2)


def test_the_level_is_where_banerjees_interval_reaches_zero():
    scores = np.random.default_rng(3).normal(0.05, 0.3, (4, 60)) + np.array([[0.0], [0.1], [0.05], [-0.02]])
    found = over_seeds_and_episodes(scores)
    assert found.half_width(found.p, exponent=1.0) == pytest.approx(abs(found.mean), rel=1e-3)
    assert math.isnan(over_seeds_and_episodes(np.where(scores > 0.6, np.nan, scores)).p)


def test_holm_on_a_worked_example():
    assert holm([0.01, 0.04, 0.03, math.nan, 0.005]) == pytest.approx([0.03, 0.06, 0.06, math.nan, 0.02], nan_ok=True)


def test_effect_sizes():
    a, b = np.array([[1.0, 2.0, 3.0]]), np.array([[0.0, 2.0, 4.0]])
    assert effect_size(a, b) == 0
    assert effect_size(a + 1, b) == pytest.approx(1 / math.sqrt(2.5))
    assert share_better(a, b, True) == share_better(a, b, False) == 0.5
    assert share_better(a + 0.5, b, True) == pytest.approx(2 / 3)


def test_ranks_against_the_formulas_without_ties():
    scores = np.random.default_rng(0).normal(size=(7, 4)) + np.arange(4) / 4
    found = ranks_of(scores, [True] * 7)
    ranks = (-scores).argsort(1).argsort(1) + 1.0
    np.testing.assert_allclose(found.mean, ranks.mean(0))
    chi = 12 * 7 / (4 * 5) * ((ranks.mean(0) ** 2).sum() - 4 * 25 / 4)
    f = 6 * chi / (7 * 3 - chi)
    # Iman and Davenport's approximation by F, with 3 and 18 degrees of freedom.
    assert found.p == pytest.approx(incomplete_beta(9, 1.5, 18 / (18 + 3 * f)), rel=0.25)
    assert found.critical_difference == pytest.approx(2.569 * math.sqrt(4 * 5 / (6 * 7)), abs=1e-3)
    tied = ranks_of(np.array([[1.0, 1.0, 0.0], [1.0, 2.0, 2.0]]), [True, False])
    np.testing.assert_allclose(tied.mean, [(1.5 + 1) / 2, (1.5 + 2.5) / 2, (3 + 2.5) / 2])


def test_of_few_episodes_the_difference_of_two_models_is_students_paired_test():
    a, b = np.random.default_rng(0).normal(size=(2, 1, 6))
    a += 1
    found, difference = difference_of_methods(a, b, same_seeds=False), (a - b)[0]
    error = difference.std(ddof=1) / 6**0.5
    # The upper 2.5 % point for five degrees of freedom is 2.571.
    assert found.ci95 == pytest.approx(2.571 * error, rel=1e-3)
    assert found.p == pytest.approx(t_two_sided(difference.mean() / error, 5), rel=1e-3)


def test_friedmans_test_is_exact_for_few_settings():
    same_order = np.array([[0.3, 0.2, 0.1]])
    assert ranks_of(np.repeat(same_order[:, :2], 2, axis=0), [True] * 2).p == pytest.approx(1 / 2)
    assert ranks_of(np.repeat(same_order, 2, axis=0), [True] * 2).p == pytest.approx(1 / 6)
    # Tables of Friedman's χ² (Hollander and Wolfe, table A.22): 3 methods, 4 settings, χ² = 6.5 and 4.5.
    for orders, p in (([[1, 2, 3]] * 3 + [[2, 1, 3]], 0.042), ([[1, 2, 3]] * 2 + [[1, 3, 2], [2, 1, 3]], 0.125)):
        assert ranks_of(np.array(orders, dtype=float), [False] * 4).p == pytest.approx(p, abs=6e-4)
    assert math.isnan(ranks_of(np.ones((2, 3)), [True] * 2).p)


def test_labels_of_a_logarithmic_axis_are_plain_numbers():
    figure, axis = new_figure()
    axis.plot([1, 2], [0.3, 4000])
    readable_log(axis.yaxis, 0.3, 4000)
    figure.canvas.draw()
    labels = [label.get_text() for label in axis.get_yticklabels(which="both") if label.get_text()]
    assert {"1", "10", "100", "1,000"} <= set(labels)
    assert not any("$" in label or "^" in label for label in labels)


def test_groups_in_the_picture_of_ranks():
    assert groups_without_difference([1.0, 1.5, 2.6, 3.0], 1.2) == [(0, 1), (1, 2), (2, 3)]
    assert groups_without_difference([1.0, 3.0], 1.2) == []


@pytest.mark.parametrize(("seeds", "spread", "shape"), [(3, 1.0, "skewed"), (5, 5.0, "normal")])
def test_intervals_cover_and_verdicts_are_rarely_false(seeds, spread, shape):
    """A share of 5 % is found with a standard error of 1.5 % in 200 repetitions; the wide table is in the docs."""
    found = coverage(np.random.default_rng(0), seeds, spread, shape, 200)
    for name in ("mean", "difference", "of other seeds"):
        assert 0.92 < found[name] < 0.99
    assert max(share for name, share in found.items() if name.startswith("false")) < 0.08
    # What the interval over episodes would claim about methods.
    assert found["episodes alone"] < 0.93


@pytest.mark.parametrize(
    ("score", "half_width", "error", "accuracy"),
    [
        (0.12, 0.0151, "0.120 ± 0.015", "12.00 ± 1.51 %"),
        (0.0, 0.0, "0.000 ± 0.000", "0.00 ± 0.00 %"),
        (0.2, 1e-17, "0.200 ± 0.000", "20.00 ± 0.00 %"),
        # A loss that would look like a tie.
        (-0.00031, 0.00012, "-0.00031 ± 0.00012", "-0.03 ± 0.01 %"),
        (0.99999, 0.000012, "0.999990 ± 0.000012", "99.9990 ± 0.0012 %"),
        (3e-5, 0.0, "0.000030 ± 0.000000", "0.0030 ± 0.0000 %"),
        (2.34e-11, 1.2e-12, "2.3e-11 ± 1.2e-12", "2.3e-09 ± 1.2e-10 %"),
    ],
)
def test_what_is_not_zero_is_not_rounded_to_zero(score, half_width, error, accuracy):
    assert Metric("mse", False).interval(score, half_width) == error
    assert Metric("accuracy", True, percent=True).interval(score, half_width) == accuracy
    assert Metric("mse", False).text(score) != "0.000" or score == 0
