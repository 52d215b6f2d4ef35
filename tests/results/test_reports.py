"""What is shown of test tasks besides scores, and metrics beyond the first."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import composed
from omegaconf import OmegaConf

from metarun.assemble import assemble
from metarun.contracts import Pooled, Report, Samples
from metarun.evaluation import episodes as held_out
from metarun.results.compare import compare
from metarun.results.reports import mean_and_half_width
from metarun.run import run
from metarun.targets.metric import Metric
from metarun.targets.real import MSE
from metarun.tasks.sinusoid import Sinusoid

MAE = Metric("mae", higher_is_better=False)
LARGEST = Metric("largest error", higher_is_better=False)
RATIO = Metric("unexplained", higher_is_better=False, percent=True)
POWER = Metric("power", higher_is_better=False)
QUICK = (
    *("train.steps=2", "train.eval_every=1", "train.val_episodes=3", "eval.episodes=4", "eval.adapt_steps=1"),
    "engine=eager",
)


class Shown(Sinusoid):
    """Sine waves with a further metric in tests, and a report of the error left and right of 0."""

    def __init__(self, device="cpu"):
        super().__init__(device=device)
        object.__setattr__(self.spec, "metrics", (MSE, MAE, LARGEST))
        sides = {"side": ("left", "right")}
        self.report = Report("sides", sides, Metric("squared error", higher_is_better=False), self.by_side)
        self.pooled = Pooled((RATIO, POWER), self.sums, self.ratios)
        self.samples = Samples(lambda predict, task: {"answer": predict(task.query["x"])}, self.written)

    def scores(self, predict, data):
        error = (predict(data["x"]) - data["y"]).abs()
        return {"mae": error.mean(), "largest error": error.max()}

    def sums(self, predict, task):
        y = task.query["y"]
        return torch.stack([(predict(task.query["x"]) - y).square().mean(), (y.square() + 5).mean()])

    def ratios(self, sums):
        error, power = sums.sum(0)
        return {RATIO.name: (error / power).item(), POWER.name: power.item()}

    def written(self, found, tasks):
        return "\n".join(
            f"{when}: {(leaf['answer'] - tasks.query['y']).square().mean((1, 2)).tolist()}"
            for when, leaf in found.items()
        )

    def by_side(self, predict, task):
        x = task.query["x"]
        square = (predict(x) - task.query["y"]).square()
        return torch.stack([(square * side).sum() / side.sum() for side in (x < 0, x >= 0)])


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return shown(tmp_path_factory.mktemp("reports") / "run", "algo=maml")


def shown(directory, *overrides):
    config, names = composed("task=sinusoid", *QUICK, *overrides)
    config.task = OmegaConf.create({"_target_": "results.test_reports.Shown"})
    run(config, names, directory)
    return directory


def test_a_family_may_show_something_besides_scores(directory):
    table = pd.read_csv(directory / "sides.csv")
    assert list(table.columns) == ["episode", "group", "side", "squared error", "replica"]
    assert (directory / "sides.png").stat().st_size > 1000
    # Queries are even on both sides, so the mean of both is near the episode's score, and never outside of them.
    by_episode = table.groupby("episode")["squared error"]
    scores = pd.read_csv(directory / "episodes.csv").query("adapt_step == 1").set_index("episode")["score"]
    assert (by_episode.min() <= scores).all()
    assert (scores <= by_episode.max()).all()


def test_every_metric_reaches_the_tables_and_the_comparison(directory):
    row = pd.read_csv(directory / "result.csv").iloc[0]
    assert row["metrics"] == "mse;mae;largest error;unexplained;power"
    episodes = pd.read_csv(directory / "episodes.csv").query("adapt_step == 1")
    for name in ("mae", "largest error"):
        assert row[name] == pytest.approx(episodes[name].mean())
        assert row[f"{name}_ci95"] == pytest.approx(1.96 * episodes[name].std() / 2)
    assert (episodes["mae"] ** 2 <= episodes["score"]).all()
    assert (episodes["largest error"] >= np.sqrt(episodes["score"])).all()
    printed = compare([directory], directory)
    assert "mae ± CI95" in printed
    assert f"{row['largest error']:.3f} ± {row['largest error_ci95']:.3f}" in printed


def test_a_metric_of_all_episodes_together_is_no_mean_over_them(directory):
    row, episodes = pd.read_csv(directory / "result.csv").iloc[0], pd.read_csv(directory / "episodes.csv")
    assert "unexplained" not in episodes
    # A ratio of sums over episodes, whose denominators come from the tasks themselves.
    config, names = composed("algo=maml", "task=sinusoid", *QUICK)
    config.task = OmegaConf.create({"_target_": "results.test_reports.Shown"})
    squares = next(iter(held_out(assemble(config, names), "test", 4))).query["y"].square().mean((1, 2)) + 5
    errors = torch.tensor(episodes.query("adapt_step == 1")["score"].to_numpy())
    assert row["unexplained"] == pytest.approx((errors.sum() / squares.sum()).item(), rel=1e-5)
    # The spread over resamplings of so few episodes, against the delta method.
    residual = errors - row["unexplained"] * squares
    expected = 1.96 * residual.std(correction=0) / len(errors) ** 0.5 / squares.mean()
    assert row["unexplained_ci95"] == pytest.approx(expected.item(), rel=0.5)
    printed = compare([directory], directory)
    assert f"{100 * row['unexplained']:.2f} ± {100 * row['unexplained_ci95']:.2f} %" in printed


def test_metrics_of_all_episodes_together_are_paired_by_resampling(directory, tmp_path):
    """The resamplings of a run with another seed are those of the same episodes."""
    other = shown(tmp_path / "other", "algo=transfer", "seed=1")
    tables = [pd.read_csv(one / "pooled.csv") for one in (directory, other)]
    for table, row in zip(tables, (pd.read_csv(one / "result.csv").iloc[0] for one in (directory, other)), strict=True):
        assert table["resampling"].tolist() == list(range(len(table)))
        assert table["unexplained"][0] == pytest.approx(row["unexplained"])
        assert 1.96 * table["unexplained"][1:].std() == pytest.approx(row["unexplained_ci95"])
    # What the learner has no part in is the same in both.
    assert (tables[0]["power"] == tables[1]["power"]).all()
    difference = tables[1]["unexplained"] - tables[0]["unexplained"]
    printed = compare([directory, other], tmp_path, "maml").partition("| − maml")[2]
    sign = "+" if difference[0] >= 0 else ""
    assert f"{sign}{100 * difference[0]:.2f} ± {196 * difference[1:].std():.2f} % (m)" in printed


def test_an_episode_with_nothing_to_measure_is_left_out_of_a_mean_and_one_that_diverged_is_not():
    numbers = np.array([[1.0, math.nan, 2.0, math.nan], [3.0, math.nan, math.inf, 5.0], [5.0, math.nan, 1.0, 7.0]])
    mean, half_width = mean_and_half_width(numbers)
    np.testing.assert_array_equal(mean, [3.0, math.nan, math.inf, 6.0])
    np.testing.assert_allclose(half_width, [1.96 * 2 / 3**0.5, math.nan, math.nan, 1.96])


def test_samples_of_the_first_test_tasks_are_shown_before_and_after_adaptation(directory):
    episodes = pd.read_csv(directory / "episodes.csv").query("episode < 3")
    *_, before, after = (directory / "samples.md").read_text().splitlines()
    for line, scores in zip(
        (before, after), (episodes.query("adapt_step == 0"), episodes.query("adapt_step == 1")), strict=True
    ):
        shown = [float(number) for number in line.partition("[")[2].rstrip("]").split(",")]
        assert shown == pytest.approx(scores["score"].tolist(), rel=1e-4)
