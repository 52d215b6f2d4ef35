"""metarun-compare on hand-made runs whose means, intervals and differences are known."""

import csv
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from metarun.engine.batch import Evaluated
from metarun.errors import UserError
from metarun.results import compare as module
from metarun.results.compare import compare, compared
from metarun.results.comparison.pictures import draw_comparison, draw_costs, short_names
from metarun.results.comparison.reading import final_scores
from metarun.results.plots import blank_figure
from metarun.results.tables import RESULT_COLUMNS, write_episodes, write_results
from metarun.targets.metric import Metric


def make_run(root, name, algo, family, seed, scores, overrides=(), units=None, **columns):
    directory = root / name
    scores = np.asarray(scores, dtype=float)
    row = dict.fromkeys(RESULT_COLUMNS) | {
        "run": name,
        "status": "completed",
        "algo": algo,
        "family": family,
        "task": "omniglot",
        "dataset": "procedural",
        "model": "conv4",
        "seed": seed,
        "ways": 5,
        "shots": 1,
        "queries": 15,
        "metric": "accuracy",
        "adapt_steps": 1,
        "score_before": 0.2,
        "score": scores.mean(),
        "ci95": 1.96 * scores.std(ddof=1) / len(scores) ** 0.5,
        "n_episodes": len(scores),
        "val_score": scores.mean(),
        "meta_steps": 10,
        "transductive": True,
        "train_seconds": 5.0,
        "adapt_ms_per_task": 0.5,
        "peak_memory_mb": 100.0,
        "meta_parameters": 10,
        "adapted_parameters": 10,
        "config_hash": f"{algo}{seed}{overrides}",
        "episodes_hash": "same",
        "higher_is_better": columns.get("metric", "accuracy") == "accuracy",
        "replica": 0,
        "metrics": columns.get("metric", "accuracy"),
        "percent": "accuracy",
    }
    row |= columns
    metric = Metric(row["metrics"], row["higher_is_better"], row["metrics"] == "accuracy")
    write_results(directory, [row], [metric])
    values = torch.tensor([[0.2, score] for score in scores], dtype=torch.float64)
    write_episodes(directory, [(0, Evaluated([0, 1], values, {metric.name: values}, units=units))], [metric])
    if overrides:
        (directory / ".hydra").mkdir()
        (directory / ".hydra" / "overrides.yaml").write_text("\n".join(f"- {o}" for o in overrides))
    return directory


@pytest.fixture(autouse=True)
def _pictures(request, monkeypatch):
    """Draw pictures only in the tests that look at them, since they take longer than all the rest."""
    if "pictures" not in request.keywords:
        for name in ("plot_comparison", "plot_costs", "plot_ranks"):
            monkeypatch.setattr(f"metarun.results.comparison.pictures.{name}", lambda *arguments: None)


@pytest.fixture
def runs(tmp_path):
    rng = np.random.default_rng(0)
    difficulty = rng.normal(0, 0.1, 200)
    maml = 0.80 + difficulty + rng.normal(0, 0.01, 200)
    maml_again = maml + 0.02
    protonet = 0.85 + difficulty + rng.normal(0, 0.01, 200)
    make_run(tmp_path, "a", "maml", "agnostic", 0, maml)
    make_run(tmp_path, "b", "maml", "agnostic", 1, maml_again)
    make_run(tmp_path, "c", "protonet", "dependent", 0, protonet)
    make_run(tmp_path, "d", "scratch", "baseline", 0, 0.5 + difficulty)
    return tmp_path, (maml + maml_again) / 2, protonet


@pytest.mark.pictures
def test_means_intervals_and_the_paired_difference(runs):
    root, maml, protonet = runs
    text = compare([root], root)
    table = pd.read_csv(root / "comparison.csv").set_index("algo")
    assert list(table["family"]) == ["agnostic", "dependent", "baseline"]
    assert table.loc["maml", "score"] == pytest.approx(maml.mean())
    assert table.loc["maml", "seeds"] == 2
    assert table.loc["maml", "seed_std"] == pytest.approx(0.02 / 2**0.5)
    assert np.isnan(table.loc["protonet", "seed_std"])
    assert table.loc["maml", "ci95"] == pytest.approx(1.96 * maml.std(ddof=1) / 200**0.5)
    families = pd.read_csv(root / "families.csv").iloc[0]
    difference = protonet - maml
    assert families["paired"]
    assert not families["about_methods"]
    assert families["difference"] == pytest.approx(difference.mean())
    assert families["ci95"] == pytest.approx(1.972 * difference.std(ddof=1) / 200**0.5, rel=1e-4)
    # Pairing is what it is for: the shared difficulty of the episodes cancels.
    assert families["ci95"] < 0.2 * table["ci95"].min()
    assert "model-dependent is better, for these trained models" in text
    assert (root / "comparison.md").read_text() == text
    for name in ("comparison.png", "costs.png"):
        assert (root / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("seeds", [1, 2])
def test_intervals_are_over_the_few_tasks_that_the_episodes_are_of(tmp_path, seeds):
    rng = np.random.default_rng(0)
    units = torch.arange(300) % 6
    # Of each patient the one method is as much better in all episodes.
    better = rng.normal(0.05, 0.1, 6)
    for seed in range(seeds):
        scores = rng.normal(0.5, 0.01, 300)
        make_run(tmp_path, f"maml{seed}", "maml", "agnostic", seed, scores, units=units, different_tests=6)
        scores = scores + better[units]
        make_run(tmp_path, f"protonet{seed}", "protonet", "dependent", seed, scores, units=units, different_tests=6)
    text = compare([tmp_path], tmp_path)
    (families,) = pd.read_csv(tmp_path / "families.csv").to_dict("records")
    assert families["difference"] == pytest.approx(better.mean())
    # Student's quantile for six patients, not the 1.97 for three hundred episodes.
    assert families["ci95"] == pytest.approx(2.571 * better.std(ddof=1) / 6**0.5, rel=1e-3)
    assert "300 episodes of 6 different tasks" in text
    assert "The test episodes are of 6 different tasks: intervals over seeds and intervals of differences" in text
    if seeds == 2:
        table = pd.read_csv(tmp_path / "comparison.csv").set_index("algo")
        assert table.loc["protonet", "method_ci95"] == pytest.approx(families["ci95"], rel=0.05)


def test_runs_on_other_episodes_are_not_paired(runs):
    root, maml, protonet = runs
    make_run(root, "c", "protonet", "dependent", 0, protonet, episodes_hash="other")
    compare([root], root)
    families = pd.read_csv(root / "families.csv").iloc[0]
    table = pd.read_csv(root / "comparison.csv").set_index("algo")
    assert not families["paired"]
    expected = np.hypot(1.972 * maml.std(ddof=1) / 200**0.5, table.loc["protonet", "ci95"])
    assert families["ci95"] == pytest.approx(expected, rel=2e-3)


def test_an_unpaired_difference_of_models_holds_what_is_particular_to_each_seed(tmp_path):
    rng = np.random.default_rng(0)
    scores = rng.normal(0.5, 0.1, (3, 200))
    for seed, own in enumerate(scores):
        make_run(tmp_path, f"maml{seed}", "maml", "agnostic", seed, own)
    other = rng.normal(0.5, 0.01, 200)
    make_run(tmp_path, "protonet", "protonet", "dependent", 0, other, episodes_hash="other")
    compare([tmp_path], tmp_path)
    families = pd.read_csv(tmp_path / "families.csv").iloc[0]
    assert not families["about_methods"]
    variance = (scores.mean(0).var(ddof=1) + other.var(ddof=1)) / 200
    assert families["ci95"] == pytest.approx(1.97 * variance**0.5, rel=1e-3)


def test_settings_and_datasets_are_never_mixed(runs):
    root, maml, _ = runs
    make_run(root, "e", "maml", "agnostic", 0, maml, dataset="omniglot:vinyals")
    make_run(root, "f", "maml", "agnostic", 0, maml, shots=5)
    compare([root], root)
    table = pd.read_csv(root / "comparison.csv")
    assert len(table.groupby(["dataset", "shots"])) == 3
    assert sorted(table["seeds"]) == [1, 1, 1, 1, 2]


def test_a_sweep_gets_a_row_for_each_value_and_validation_chooses(tmp_path):
    rng = np.random.default_rng(0)
    base = rng.normal(0.8, 0.05, 100)
    shared = ("train.steps=10",)
    make_run(tmp_path, "a", "maml", "agnostic", 0, base, (*shared, "algo.inner_lr=1"), val_score=0.9)
    make_run(tmp_path, "b", "maml", "agnostic", 0, base + 0.05, (*shared, "algo.inner_lr=2"), val_score=0.7)
    make_run(tmp_path, "c", "protonet", "dependent", 0, base, (*shared, "seed=0"))
    compare([tmp_path], tmp_path)
    table = pd.read_csv(tmp_path / "comparison.csv")
    assert list(table["variant"].fillna("")) == ["algo.inner_lr=2", "algo.inner_lr=1", ""]
    assert pd.read_csv(tmp_path / "families.csv").iloc[0]["agnostic"] == "maml algo.inner_lr=1"


@pytest.mark.parametrize("metric", ["mse", "an error of one's own"])
def test_lower_is_better_for_errors(tmp_path, metric):
    rng = np.random.default_rng(0)
    error = rng.uniform(0.5, 1, 50)
    make_run(tmp_path, "a", "maml", "agnostic", 0, error, metric=metric, task="sinusoid", ways=None)
    make_run(tmp_path, "b", "reptile", "agnostic", 0, error / 2, metric=metric, task="sinusoid", ways=None)
    make_run(tmp_path, "c", "shared_params", "dependent", 0, error / 4, metric=metric, task="sinusoid", ways=None)
    text = compare([tmp_path], tmp_path)
    assert list(pd.read_csv(tmp_path / "comparison.csv")["algo"]) == ["reptile", "maml", "shared_params"]
    assert "shared_params (model-dependent) − reptile (model-agnostic) = -" in text
    assert "model-dependent is better" in text


def test_a_diverged_run_shows_and_gives_no_verdict(runs):
    root, maml, _ = runs
    maml[3] = np.nan
    make_run(root, "b", "maml", "agnostic", 1, maml, val_score=0.9)
    text = compare([root], root)
    assert np.isnan(pd.read_csv(root / "comparison.csv").set_index("algo").loc["maml", "score"])
    assert "no verdict" in text


def test_unfinished_and_repeated_runs_are_left_out_by_name(runs):
    root, maml, _ = runs
    make_run(root, "g", "fomaml", "agnostic", 0, maml, status="failed", score=None)
    make_run(root, "h", "maml", "agnostic", 0, maml)
    text = compare([root], root)
    assert "(failed)" in text
    assert "1 older runs of the same configuration are left out" in text
    assert pd.read_csv(root / "comparison.csv").set_index("algo").loc["maml", "seeds"] == 2


def test_the_last_adaptation_step_is_compared(runs):
    root, *_ = runs
    with (root / "a" / "episodes.csv").open() as file:
        last = [float(row["score"]) for row in csv.DictReader(file) if row["adapt_step"] == "1"]
    np.testing.assert_allclose(final_scores(str(root / "a"))[0]["score"], last)


def test_bad_input_gets_one_sentence(tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match="There is no"):
        compare([tmp_path / "nowhere"], tmp_path)
    with pytest.raises(UserError, match=r"No result\.csv under"):
        compare([tmp_path], tmp_path)
    (tmp_path / "result.csv").write_text("run,score\nx,1\n")
    with pytest.raises(UserError, match="it lacks the column status"):
        compare([tmp_path], tmp_path)
    monkeypatch.setattr(sys, "argv", ["metarun-compare", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        module.main()
    assert str(stopped.value).startswith("metarun-compare: ")


def test_a_filter_takes_values_with_commas_as_they_are(runs):
    root, maml, _ = runs
    make_run(root, "e", "maml", "agnostic", 0, maml, ("model.widths=[64,64]",), dataset="a,b")
    make_run(root, "f", "maml", "agnostic", 0, maml, dataset="a")
    for wanted in ("dataset=a,b", "model.widths=[64, 64]"):
        compare([root], root, filters=[wanted])
        assert list(pd.read_csv(root / "comparison.csv")["dataset"]) == ["a,b"]
    compare([root], root, filters=["dataset=a,procedural"])
    assert set(pd.read_csv(root / "comparison.csv")["dataset"]) == {"a", "procedural"}


def test_a_filter_does_not_hide_that_runs_have_failed(runs):
    root, maml, _ = runs
    make_run(root, "g", "maml", "agnostic", 2, maml, status="failed", score=None)
    assert "Note: runs without a usable result: 1;" in compare([root], root, filters=["algo=maml"])


def test_what_an_earlier_comparison_has_written_is_not_left_with_other_numbers(runs):
    root, maml, _ = runs
    (root / "ranks.png").write_text("of other runs")
    (root / "comparison.tex").write_text("of other runs")
    compare([root], root, filters=["algo=maml"])
    assert not (root / "ranks.png").exists()
    assert f"{100 * maml.mean():.2f}" in (root / "comparison.tex").read_text()
    # With one family, the table of differences has a header and no row.
    assert pd.read_csv(root / "families.csv").empty


def test_every_row_against_a_reference(runs, capsys, monkeypatch):
    root, maml, protonet = runs
    monkeypatch.setattr(sys, "argv", ["metarun-compare", str(root), "--against", "protonet"])
    module.main()
    table = pd.read_csv(root / "comparison.csv").set_index("algo")
    difference = maml - protonet
    assert table.loc["maml", "against"] == pytest.approx(difference.mean())
    assert table.loc["maml", "against_ci95"] == pytest.approx(1.972 * difference.std(ddof=1) / 200**0.5, rel=1e-4)
    assert table.loc["maml", "against_better"] == (difference > 0).mean()
    assert np.isnan(table.loc["protonet", "against_p"])
    assert table.loc["maml", "against_paired"]
    assert table.loc["protonet", "against"] == 0
    assert set(table["reference"]) == {"protonet"}
    said = capsys.readouterr().out
    assert "− protonet" in said
    assert f"{100 * difference.mean():.2f} ± " in said


def test_a_reference_that_did_not_run_is_refused(runs):
    with pytest.raises(UserError, match="None of the runs used anil; compare against one of maml, protonet, scratch"):
        compare([runs[0]], runs[0], "anil")


@pytest.fixture
def seeds(tmp_path):
    """Two methods with three seeds each on the same episodes, and a baseline with one."""
    rng = np.random.default_rng(1)
    difficulty = rng.normal(0, 0.1, 100)
    for seed, shift in enumerate((-0.03, 0.0, 0.03)):
        for algo, family, mean in (("maml", "agnostic", 0.7), ("protonet", "dependent", 0.8)):
            scores = mean + shift + difficulty + rng.normal(0, 0.05, 100)
            make_run(tmp_path, f"{algo}{seed}", algo, family, seed, scores, train_seconds=10 * mean)
    make_run(tmp_path, "scratch", "scratch", "baseline", 0, 0.5 + difficulty, train_seconds=1.0)
    return tmp_path


def test_several_seeds_make_claims_about_methods(seeds):
    text = compare([seeds], seeds, "maml")
    table = pd.read_csv(seeds / "comparison.csv").set_index("algo")
    families = pd.read_csv(seeds / "families.csv").iloc[0]
    assert families["about_methods"]
    assert families["paired_seeds"]
    assert ": model-dependent is better. It is over seeds and 100 episodes, paired by both." in text
    # The same shift of both methods by the seed cancels; in the interval of one method it does not.
    assert table.loc["maml", "method_ci95"] > 3 * table.loc["maml", "ci95"] > 3 * families["ci95"] / 2
    assert not table.loc["scratch", "against_methods"]
    assert "(m): for these trained models alone" in text
    assert "*: differs from maml at the level of 5 % (Holm, 2 comparisons)" in text


@pytest.mark.parametrize("same_episodes", [True, False])
def test_a_method_without_parameters_needs_no_second_seed(seeds, same_episodes):
    """Three models of maml differ by 0.03, so that no interval of their difference can be narrow."""
    scores, none = np.linspace(0.4, 0.6, 100), {"meta_parameters": 0, "adapted_parameters": 0}
    episodes = "same" if same_episodes else "others"
    make_run(seeds, "reference", "reference", "baseline", 0, scores, **none, episodes_hash=episodes)
    text = compare([seeds], seeds, "reference")
    table = pd.read_csv(seeds / "comparison.csv").set_index("algo")
    assert table.loc["maml", "against_methods"]
    assert table.loc["maml", "against_ci95"] > 0.9 * 4.303 * 0.03 / 3**0.5
    assert not table.loc["scratch", "against_methods"]
    lines = {line.split("|")[2].split()[0]: line for line in text.splitlines() if line.startswith("| ")}
    assert [" (m)" in lines[name] for name in ("reference", "maml", "scratch")] == [False, False, True]


def test_what_is_worth_its_cost(seeds):
    compare([seeds], seeds)
    table = pd.read_csv(seeds / "pareto.csv").set_index("algo")
    assert list(table.index[table["pareto_training"]]) == ["scratch", "maml", "protonet"]
    assert list(table.index[table["pareto_adaptation"]]) == ["protonet"]


def test_rows_and_columns_that_are_asked_for(seeds):
    text = compare([seeds], seeds, sort="train_seconds:falling", columns=["algo", "val_score"], latex=True)
    assert (seeds / "comparison.tex").read_text() == text
    rows = [line.split("&")[0].strip() for line in text.splitlines() if "&" in line]
    assert rows == ["algorithm", "protonet (t)", "maml (t)", "scratch (t)"]
    assert r"\toprule" in text
    text = compare([seeds], seeds, filters=["algo=maml,protonet", "seed=1"])
    assert list(pd.read_csv(seeds / "comparison.csv")["seeds"]) == [1, 1]
    assert "scratch" not in text
    for wrong in (
        {"sort": "nothing"},
        {"columns": ["nothing"]},
        {"filters": ["nothing=1"]},
        {"filters": ["algo=nothing"]},
        {"filters": ["algo"]},
    ):
        with pytest.raises(UserError, match=r"^--(sort|columns|filter)"):
            compare([seeds], seeds, **wrong)


def test_a_key_of_the_configuration_filters(seeds):
    for seed, steps in enumerate((10, 20, 20)):
        for algo in ("maml", "protonet"):
            folder = seeds / f"{algo}{seed}" / ".hydra"
            folder.mkdir()
            (folder / "config.yaml").write_text(f"train:\n  steps: {steps}\n")
            (folder / "overrides.yaml").write_text(f"- seed={seed}\n")
    compare([seeds], seeds, filters=["train.steps=20"])
    assert list(pd.read_csv(seeds / "comparison.csv")["seeds"]) == [2, 2]


@pytest.mark.pictures
def test_ranks_over_settings(seeds):
    for shots in (2, 3):
        for algo, family, score in (("maml", "agnostic", 0.9), ("protonet", "dependent", 0.8)):
            scores = score + np.random.default_rng(shots).normal(0, 0.01, 50)
            make_run(seeds, f"{algo}{shots}shots", algo, family, 0, scores, shots=shots)
    text = compare([seeds], seeds)
    assert "maml 1.33, protonet 1.67" in text
    assert "Not in every setting: scratch" in text
    assert (seeds / "ranks.png").read_bytes().startswith(b"\x89PNG")


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "binary": lambda path: path.write_bytes(bytes(range(256)) * 40),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 2]),
    "no number": lambda path: path.write_text(path.read_text().replace(",100,", ",many,")),
    "another family": lambda path: path.write_text(path.read_text().replace("agnostic", "of its own")),
    "another truth": lambda path: path.write_text(path.read_text().replace("True", "perhaps")),
    "too many cells": lambda path: path.write_text(path.read_text().rstrip() + "," * 200),
    "a huge cell": lambda path: path.write_text(path.read_text() + "x" * 200_000),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_results_are_named_and_the_rest_is_compared(seeds, damage):
    DAMAGE[damage](seeds / "maml1" / "result.csv")
    text = compare([seeds], seeds)
    assert f"left out: {seeds / 'maml1'}" in text
    assert pd.read_csv(seeds / "comparison.csv").set_index("algo").loc["maml", "seeds"] == 2


@pytest.mark.parametrize("content", ["[", "a: 1", "- 1", "- [a]", "\x00", "- !!python/object:os.system x"])
def test_unreadable_overrides_are_named_and_the_rest_is_compared(seeds, content):
    (seeds / "maml1" / ".hydra").mkdir()
    (seeds / "maml1" / ".hydra" / "overrides.yaml").write_text(content)
    text = compare([seeds], seeds)
    assert "maml1/result.csv (its .hydra/overrides.yaml does not hold the keys of a run)" in text
    assert pd.read_csv(seeds / "comparison.csv").set_index("algo").loc["maml", "seeds"] == 2


@pytest.mark.parametrize("damage", ["empty", "binary", "cut off", "a directory"])
def test_damaged_episodes_leave_an_interval_over_seeds(seeds, damage):
    DAMAGE[damage](seeds / "maml1" / "episodes.csv")
    text = compare([seeds], seeds)
    row = pd.read_csv(seeds / "comparison.csv").set_index("algo").loc["maml"]
    assert not row["from_episodes"]
    assert row["method_ci95"] > 4.3 * row["seed_std"] / 3**0.5
    assert "(s): the scores of the episodes are missing" in text
    assert not pd.read_csv(seeds / "families.csv").iloc[0]["paired"]


def test_runs_without_a_result_are_listed(seeds):
    (seeds / "sweep" / "0_maml" / ".hydra").mkdir(parents=True)
    (seeds / "sweep" / "0_maml" / ".hydra" / "overrides.yaml").write_text("- algo=maml\n- seed=7\n")
    (seeds / "sweep" / "sweep.json").write_text('{"jobs": [["algo=maml", "seed=7"], ["algo=maml", "seed=8"]]}')
    text = compare([seeds], seeds)
    assert f"left out: {seeds / 'sweep' / '0_maml'} (cut off)" in text
    assert f"left out: algo=maml seed=8 of {seeds / 'sweep'} (not begun)" in text
    # A run that is found by two names is neither counted twice nor missed.
    again = seeds / "sweep" / ".."
    compare([again, seeds / "maml1"], seeds)
    assert pd.read_csv(seeds / "comparison.csv").set_index("algo").loc["maml", "seeds"] == 3
    assert "maml1" not in compare([again, seeds / "maml1"], seeds)


def test_runs_whose_configuration_is_not_known_are_all_kept(seeds):
    for path in seeds.glob("*/result.csv"):
        pd.read_csv(path).assign(config_hash="", episodes_hash="").to_csv(path, index=False)
    compare([seeds], seeds)
    assert pd.read_csv(seeds / "comparison.csv").set_index("algo")["seeds"].to_dict() == {
        **{"maml": 3, "protonet": 3},
        "scratch": 1,
    }


def test_a_table_of_the_first_version_is_read(seeds):
    path = seeds / "maml1" / "result.csv"
    table = pd.read_csv(path).drop(columns=["metrics", "percent", "reason", "replica", "varied", "engine", "task_map"])
    table.to_csv(path, index=False)
    compare([seeds], seeds)
    row = pd.read_csv(seeds / "comparison.csv").set_index("algo").loc["maml"]
    assert row["seeds"] == 3
    assert row["from_episodes"]


def test_runs_with_other_defaults_are_not_taken_for_seeds_of_one_method(tmp_path):
    scores = np.random.default_rng(0).normal(0.8, 0.1, 50)
    for seed, rate in enumerate((0.1, 0.1, 0.001)):
        run = make_run(tmp_path, f"maml{seed}", "maml", "agnostic", seed, scores, (f"seed={seed}",))
        # The tracker, a key that an older version did not have yet and one that refers to another change no numbers.
        older = "  final: ${x}\n" if seed else "  clip: null\n  final: 0\n"
        (run / ".hydra" / "config.yaml").write_text(f"seed: {seed}\ntracker: {seed}\ntrain:\n  lr: {rate}\n{older}")
    compare([tmp_path], tmp_path)
    table = pd.read_csv(tmp_path / "comparison.csv").set_index("variant")
    assert table["seeds"].to_dict() == {"train.lr=0.1": 2, "train.lr=0.001": 1}


def test_a_seed_that_has_run_twice_counts_once(tmp_path):
    """With a key that changes no number, such as task.download, or in a version that had fewer keys."""
    episodes = np.linspace(0, 0.1, 20)
    for name, seed, level in (("a", 0, 0.2), ("b", 1, 0.8), ("again", 1, 0.8)):
        make_run(tmp_path, name, "maml", "agnostic", seed, level + episodes, config_hash=name)
    for seed in (0, 1):
        make_run(tmp_path, f"other{seed}", "protonet", "dependent", seed, 0.5 + 2 * episodes)
    table = compared([tmp_path], "protonet").settings[0].table.set_index("algo")
    assert table["score"]["maml"] == pytest.approx(0.55)
    assert table["seed_std"]["maml"] == pytest.approx(np.std([0.2, 0.8], ddof=1))
    assert table["against"]["maml"] == pytest.approx(table["score"]["maml"] - table["score"]["protonet"])
    make_run(tmp_path, "twice", "reptile", "agnostic", 0, episodes, config_hash="one")
    make_run(tmp_path, "more", "reptile", "agnostic", 0, episodes, config_hash="two")
    table = compared([tmp_path]).settings[0].table.set_index("algo")
    assert np.isnan(table["seed_std"]["reptile"])


def test_names_in_pictures_are_short_and_different():
    long = "algo.inner_lr=0.1 algo.inner_steps=5 eval.adapt_steps=10 train.lr="
    variants = [f"{long}0.1", f"{long}0.01", "x" * 90, "x" * 80, ""]
    names = short_names([pd.Series({"algo": "maml", "variant": variant}) for variant in variants], 40)
    assert names == ["maml … train.lr=0.1", "maml … train.lr=0.01", "maml … #1", "maml … #2", "maml"]


def test_what_a_narrow_picture_says_is_not_cut(seeds):
    for seed in range(3):
        scores = np.random.default_rng(seed).normal(0.9, 0.1, 20)
        make_run(
            seeds, f"anil{seed}", "anil", "agnostic", seed, scores, ("train.optimizer=a.long.name",), train_seconds=9
        )
    (one,) = compared([seeds]).settings
    figure = blank_figure(5.4, 3)
    left, right = figure.subplots(1, 1), blank_figure(5.4, 3).subplots()
    draw_comparison(left, one.metric, one.drawable)
    draw_costs(right, one.metric, one.drawable, "train_seconds", "pareto_training")
    for axis in (left, right):
        axis.figure.canvas.draw()
        written = [axis.xaxis.label, *axis.texts]
        assert all(text.get_window_extent().x1 <= axis.figure.bbox.width for text in written)
        assert all(text.get_window_extent().x0 >= 0 for text in written)
