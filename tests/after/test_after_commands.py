"""``metarun.train``, ``metarun-test`` and ``metarun-predict``."""

import contextlib
import csv
import io
import logging
import subprocess
import sys
from shutil import copyfile, copytree, ignore_patterns

import numpy as np
import pandas as pd
import pytest
from commands import QUICK, put_back, rows
from conftest import experiment_of
from learners import leave_a_checkpoint

import metarun
from metarun.after import later_test, predict
from metarun.after.rows import labels_of
from metarun.data.converters import Arrays
from metarun.results.compare import compare, compared
from metarun.results.status import jobs_in
from metarun.state import Best, Training, save_best
from metarun.system import lock
from metarun.system.files import write_csv

pytestmark = pytest.mark.usefixtures("without_pictures")


@pytest.fixture
def without_pictures(without_pictures, monkeypatch):
    monkeypatch.setattr("metarun.after.later_test.write_adaptation", lambda *arguments: None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that was trained from Python."""
    root = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("write_training", "write_adaptation", "write_examples"):
            patch.setattr(f"metarun.run.{name}", lambda *arguments: None)
        patch.chdir(root)
        return metarun.train("algo=maml", "task=sinusoid", "task.shots=5", *QUICK, directory=root / "run")


def command(module, *arguments, cwd):
    """A command's ``main`` in this process: exit code and what it said."""
    said, code = io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, put_back():
        patch.setattr(sys, "argv", ["command", *map(str, arguments)])
        patch.setattr(sys, "path", [*sys.path])
        patch.chdir(cwd)
        logging.getLogger().handlers[:] = []
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                module.main()
            except SystemExit as end:
                code = 1
                print(end.code, file=said)
    return code, said.getvalue()


def test_training_from_python_writes_the_files_of_the_command(trained):
    run = trained.directory
    assert {path.name for path in run.iterdir() if path.name[0] != "."} == {
        *("checkpoints", "episodes.csv", "metrics.csv", "result.csv", "run.log")
    }
    assert (run / ".hydra" / "overrides.yaml").read_text().splitlines()[:2] == ["- algo=maml", "- task=sinusoid"]
    row = trained.results.iloc[0]
    assert (row["status"], row["shots"], row["meta_steps"]) == ("completed", 5, 4)
    assert repr(trained.learner) == f"<maml trained on sinusoid, step {row['selected_step']}>"


def test_training_from_python_continues_a_run(trained, tmp_path):
    run = copytree(trained.directory, tmp_path / "run")
    (run / "result.csv").unlink()
    again = metarun.train(f"resume={run}")
    assert again.directory.resolve() == run.resolve()
    assert again.results["score"].tolist() == trained.results["score"].tolist()


def test_training_from_python_raises_what_the_command_says(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    handlers = logging.getLogger().handlers[:]
    for overrides, sentence in (
        (("algo=mam",), "There is no algo=mam; choose one of"),
        (("train.lr=-1",), "train.lr must be"),
        (("train.stepz=1",), "did you mean train.steps"),
        (("-m", "seed=0,1"), "-m is an option of the command"),
        ((f"hydra.run.dir={trained.directory}",), "holds a run already"),
        (("algo=protonet",), "needs examples of classes"),
    ):
        with pytest.raises(metarun.UserError, match=sentence):
            metarun.train(*overrides)
    assert logging.getLogger().handlers == handlers


def test_the_public_interface_is_imported_when_it_is_used():
    program = (
        "import sys, metarun; assert not {'torch', 'hydra', 'pandas', 'numpy'} & set(sys.modules), 'heavy'; "
        "assert set(metarun.__all__) <= set(dir(metarun)); print(hasattr(metarun, 'nothing'))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("False\n", "")
    assert all(hasattr(metarun, name) for name in metarun.__all__)


def test_a_later_test_gives_the_scores_of_the_run_and_of_other_settings(trained, tmp_path):
    run = copytree(trained.directory, tmp_path / "run")
    before = trained.results.iloc[0]
    code, said = command(later_test, run, cwd=tmp_path)
    assert code == 0, said
    again = rows(run / "tests" / "as_trained" / "result.csv")[0]
    for name in ("score", "ci95", "episodes_hash", "config_hash", "val_score", "meta_steps", "train_seconds"):
        assert again[name] == rows(run / "result.csv")[0][name], name
    code, said = command(later_test, run, "task.shots=3", "eval.episodes=6", "eval.adapt_steps=2", cwd=tmp_path)
    assert code == 0, said
    other = run / "tests" / "task.shots=3,eval.episodes=6,eval.adapt_steps=2"
    row = rows(other / "result.csv")[0]
    assert (row["shots"], row["n_episodes"], row["adapt_steps"]) == ("3", "6", "2")
    assert (row["seed"], row["algo"], row["run"]) == (str(before["seed"]), "maml", "run")
    assert len(rows(other / "episodes.csv")) == 6 * 3
    assert f"files: {other.relative_to(tmp_path)}" in said or str(other) in said
    # A separate table in a comparison, and no further run in a list of runs.
    text = compare([tmp_path], tmp_path)
    assert "5-shot" in text
    assert "3-shot" in text
    assert [job.directory for job in jobs_in(tmp_path)] == [run]


def test_a_later_test_calls_replicas_by_their_own_numbers(tmp_path):
    """Of three that were trained together, the second has diverged."""
    few = ("task.shots=2", "task.queries=2", "eval.episodes=2", "eval.adapt_steps=1", "replicas.count=3")
    experiment = experiment_of("algo=metanas", "model=supernet_mlp", "model.widths=[4]", *few)
    first, _, third = experiment.initial_thetas()
    save_best(experiment, Training({}, [Best(1, 0.5, first), None, Best(1, 0.5, third)], [[]] * 3), tmp_path)
    out = later_test.later_test(tmp_path)
    for name in ("result", "episodes", "architectures"):
        assert list(dict.fromkeys(row["replica"] for row in rows(out / f"{name}.csv"))) == ["0", "2"], name
    assert [row["seed"] for row in rows(out / "result.csv")] == ["0", "2"]


def test_predictions_for_a_folder_are_refused(tmp_path):
    code, said = command(predict, tmp_path, "--support", "s.csv", "--query", "q.csv", "--out", ".", cwd=tmp_path)
    assert (code, said) == (1, "metarun-predict: . is a folder; name a file for the predictions with --out.\n")


def test_a_later_test_leaves_out_what_the_run_calls_failed(tmp_path):
    """A replica that diverged after validation had selected something, and the share of the time of the others."""
    few = ("task.shots=2", "task.queries=2", "eval.episodes=2", "eval.adapt_steps=1", "replicas.count=3")
    experiment = experiment_of("algo=maml", "task=sinusoid", "model.widths=[4]", *few)
    best = [Best(1, 0.5, theta) for theta in experiment.initial_thetas()]
    save_best(experiment, Training({}, best, [[]] * 3), tmp_path)
    states = ("completed", "failed", "completed")
    own = [{"replica": i, "status": state, "train_seconds": 9} for i, state in enumerate(states)]
    write_csv(tmp_path / "result.csv", ("replica", "status", "train_seconds"), own)
    tested = rows(later_test.later_test(tmp_path) / "result.csv")
    assert [(row["replica"], row["train_seconds"]) for row in tested] == [("0", "6.0"), ("2", "6.0")]


@pytest.mark.parametrize("status", ["running", "interrupted", "failed", "pruned"])
def test_a_run_that_has_not_completed_is_not_tested_in_its_name(trained, tmp_path, status):
    """Its parameters have the hash of the configuration of the completed run, whose test they would pass for."""
    # Without the lock that this process may hold, with which the copy would pass for a run that goes on.
    run = copytree(trained.directory, tmp_path / "run", ignore=ignore_patterns(lock.FILE))
    write_csv(run / "result.csv", ("replica", "status"), [{"replica": 0, "status": status}])
    code, said = command(later_test, run, cwd=tmp_path)
    assert code == 1
    assert f"has not completed ({status.replace('running', 'cut off')})" in said
    assert not (run / "tests").exists()
    copy = copyfile(run / "checkpoints" / "best.pt", tmp_path / "best.pt")
    code, said = command(later_test, copy, "--out", tmp_path / "own", cwd=tmp_path)
    assert code == 0, said


def test_a_later_test_is_not_taken_for_a_run_that_was_trained_that_way(trained, tmp_path, monkeypatch):
    for name in ("write_training", "write_adaptation", "write_examples"):
        monkeypatch.setattr(f"metarun.run.{name}", lambda *arguments: None)
    run = copytree(trained.directory, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    metarun.train("algo=maml", "task=sinusoid", "task.shots=3", *QUICK, directory=tmp_path / "on three")
    command(later_test, run, "task.shots=3", cwd=tmp_path)
    (on_three,) = (one.table for one in compared([tmp_path]).settings if one.setting["shots"] == 3)
    assert sorted(on_three["variant"]) == ["task.shots=3", "tested with task.shots=3"]
    assert on_three["score"].nunique() == 2


def test_what_a_later_test_cannot_do_is_refused(trained, tmp_path):
    run = copytree(trained.directory, tmp_path / "run")
    for arguments, sentence in (
        (("train.steps=9",), "cannot be changed after training"),
        (("algo.inner_lr=9",), "cannot be changed after training"),
        (("task=text", "task.dataset=toy", "task.buckets=64"), "test it on data of the same kind"),
        (("task.shotz=3",), "did you mean task.shots"),
        (("eval.episodes=1",), "eval.episodes must be at least 2"),
    ):
        code, said = command(later_test, run, *arguments, cwd=tmp_path)
        assert code == 1
        assert sentence in said, said
        assert "Traceback" not in said
    assert not (run / "tests").exists()
    for link in ("tests", "tests/as_trained", "tests/as_trained/episodes.csv"):
        (run / link).parent.mkdir(parents=True, exist_ok=True)
        (run / link).symlink_to(tmp_path)
        code, said = command(later_test, run, cwd=tmp_path)
        assert code == 1
        assert "is a link to a place outside" in said
        (run / link).unlink()


def test_predictions_from_a_table(trained, tmp_path):
    x = np.linspace(-4, 4, 9)
    pd.DataFrame({"x": x, "y": np.sin(x)}).to_csv(tmp_path / "support.csv", index=False)
    pd.DataFrame({"x": [0.0, 1.0]}).to_csv(tmp_path / "query.csv", index=False)
    given = ("--support", "support.csv", "--query", "query.csv", "--steps", 2)
    code, said = command(predict, trained.directory, *given, cwd=tmp_path)
    assert (code, said) == (0, "2 predictions from 9 examples: predictions.csv\n")
    found = pd.read_csv(tmp_path / "predictions.csv")
    expected = trained.learner.adapt(x, np.sin(x), steps=2).predict([0.0, 1.0])
    np.testing.assert_allclose(found["prediction"], expected, rtol=1e-5)
    assert list(found["example"]) == [1, 2]
    # Known targets are scored.
    code, said = command(
        predict, trained.directory, "--support", "support.csv", "--query", "support.csv", "--out", "o.csv", cwd=tmp_path
    )
    found = pd.read_csv(tmp_path / "o.csv")
    error = np.square(found["prediction"] - found["target"]).mean()
    assert said == f"9 predictions from 9 examples: o.csv; mean squared error on their own targets {error:.4g}\n"
    for support, sentence in (("nothing.csv", "There is no nothing.csv"), ("query.csv", "has no targets")):
        code, said = command(predict, trained.directory, "--support", support, "--query", "query.csv", cwd=tmp_path)
        assert code == 1
        assert sentence in said
        assert "Traceback" not in said


def test_columns_in_another_order_are_the_same_examples(tmp_path):
    sizes = ("task=teachers", "task.shots=4", "task.queries=2", "model.widths=[4]", "eval.adapt_steps=2")
    leave_a_checkpoint(experiment_of("algo=maml", *sizes), tmp_path / "run")
    table = pd.DataFrame(np.random.default_rng(0).normal(size=(6, 3)), columns=["height", "width", "y"])
    found = []
    table[["height", "width"]].to_csv(tmp_path / "query.csv", index=False)
    for shown in (["height", "width", "y"], ["y", "width", "height"]):
        table[shown].to_csv(tmp_path / "support.csv", index=False)
        predict.predict(tmp_path / "run", tmp_path / "support.csv", tmp_path / "query.csv", tmp_path / "out.csv")
        found.append(pd.read_csv(tmp_path / "out.csv")["prediction"])
    # The learner takes columns in the order of the examples that it is shown.
    learner = metarun.load(tmp_path / "run")
    for order, predictions in zip((["height", "width"], ["width", "height"]), found, strict=True):
        adapted = learner.adapt(table[order], table["y"])
        np.testing.assert_allclose(predictions, adapted.predict(table[order].to_numpy()), rtol=1e-5)
        np.testing.assert_allclose(predictions, adapted.predict(table[order[::-1]]), rtol=1e-5)
    (tmp_path / "t.csv").write_text("a,y2,y1\n1,2,3\n")
    assert Arrays((1,), outputs=2).read(tmp_path / "t.csv").y == [[3, 2]]


def test_examples_without_a_label_are_refused_and_without_a_truth_not_counted(trained):
    for missing in (float("nan"), pd.NA, pd.NaT):
        with pytest.raises(ValueError, match="example 2 has none"):
            labels_of(["a", missing, "b"])
    rows = trained.learner.adapt([0.0, 1.0, 2.0], [0.0, 1.0, 2.0]).task
    said = rows.compared(np.array([0.0, 1.0, 2.0]), [0.0, float("nan"), 4.0])
    assert said == "mean squared error on their own targets 2 (of 2 of 3 examples, as the others have none)"
    assert rows.compared(np.zeros(1), [float("nan")]) == "no targets to compare with"


def test_predictions_of_classes_have_their_names_and_probabilities(tmp_path):
    sizes = ("task.dataset=toy", "task.buckets=64", "task.ways=3", "task.train_ways=3", "model.width=8")
    leave_a_checkpoint(experiment_of("algo=protonet", "task=text", *sizes), tmp_path / "run")
    with (tmp_path / "support.csv").open("w") as file:
        csv.writer(file).writerows(
            [("text", "label"), ("good day, all", "hi"), ("hello", "hi"), ("see you", "bye"), ("play, stop", "go")]
        )
    given = ("--support", "support.csv", "--query", "support.csv")
    code, said = command(predict, tmp_path / "run", *given, cwd=tmp_path)
    assert code == 0, said
    assert "accuracy on their own labels 100.00 %" in said
    found = pd.read_csv(tmp_path / "predictions.csv")
    assert list(found.columns) == ["example", "prediction", "p(bye)", "p(go)", "p(hi)", "target"]
    np.testing.assert_allclose(found[["p(bye)", "p(go)", "p(hi)"]].sum(axis=1), 1, rtol=1e-6)
    assert list(found["prediction"]) == list(found["target"]) == ["hi", "hi", "bye", "go"]
