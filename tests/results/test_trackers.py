"""Trackers show what ``metrics.csv`` says, and can stop no run. Those marked slow need accelerate and the trackers."""

import json

import pytest
from commands import QUICK, metarun, rows

from metarun.results import trackers
from metarun.results.trackers import OF_TRAINING

RUN = (*QUICK, "engine=eager", "hydra.run.dir=run")


class Tracker:
    """A tracker that fails in one of its methods."""

    def __init__(self, failing):
        self.failing, self.said = failing, []

    def __getattr__(self, name):
        def method(*arguments, **named):
            self.said.append((name, arguments, named))
            if name == self.failing:
                raise ConnectionError("no network")

        return method


def begin_with(monkeypatch, made):
    monkeypatch.setattr(trackers, "find_spec", lambda name: object())

    def begun(name, directory, identity):
        if isinstance(made[name], Exception):
            raise made[name]
        return made[name], identity

    monkeypatch.setattr(trackers, "begun", begun)


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("failing", ["begin", "store_init_configuration", "log", "finish"])
def test_a_tracker_that_fails_is_left_out_and_stops_nothing(tmp_path, monkeypatch, failing):
    good, bad = Tracker(None), ConnectionError("no network") if failing == "begin" else Tracker(failing)
    begin_with(monkeypatch, {"wandb": bad, "mlflow": good})
    done = metarun(*RUN, "tracker=[wandb,mlflow]", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tracker=wandb failed, and the run goes on without it (ConnectionError: no network)") == 1
    assert [name for name, _, _ in good.said] == ["store_init_configuration", "log", "log", "log", "finish"]


@pytest.mark.usefixtures("without_pictures")
def test_a_tracker_is_told_what_the_tables_say(tmp_path, monkeypatch):
    good = Tracker(None)
    begin_with(monkeypatch, {"mlflow": good})
    assert metarun(*RUN, "tracker=mlflow", "replicas.count=2", cwd=tmp_path).returncode == 0
    metrics = rows(tmp_path / "run" / "metrics.csv")
    expected = {
        (int(row["step"]), f"replica_{row['replica']}/{name}"): float(row[name])
        for row in metrics
        for name in OF_TRAINING
    }
    logged = [(named["step"], values) for name, (values, *_), named in good.said[1:-1]]
    assert {(step, k): v for step, values in logged[:-1] for k, v in values.items()} == expected
    step, last = logged[-1]
    result = rows(tmp_path / "run" / "result.csv")
    assert step == 4
    assert [last[f"replica_{i}/test/score"] for i in (0, 1)] == [float(row["score"]) for row in result]
    (_, (settings,), _) = good.said[0]
    assert (settings["algo.inner_lr"], settings["train.optimizer"]) == (0.01, "adam")


@pytest.mark.parametrize(
    ("given", "installed", "words"),
    [
        (
            "tracker=[wandb,tensorbord]",
            True,
            "mlflow, as in tracker=[wandb], not 'tensorbord'",
        ),
        ("tracker={a: 1}", True, "some of tensorboard, wandb, mlflow"),
        ("tracker=wandb", False, "which is missing: pip install 'metarun[wandb]'."),
    ],
    ids=["unknown", "mapping", "missing"],
)
def test_a_bad_name_and_a_missing_package_get_a_sentence(tmp_path, monkeypatch, given, installed, words):
    monkeypatch.setattr(trackers, "find_spec", lambda name: object() if installed else None)
    refused = metarun(*RUN, given, cwd=tmp_path)
    assert refused.returncode == 1
    assert words in refused.stdout
    assert "Traceback" not in refused.stdout + refused.stderr


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_tensorboard_wandb_and_mlflow_show_a_run_that_is_resumed(tmp_path, monkeypatch):
    for package in ("accelerate", "tensorboard", "wandb", "mlflow"):
        pytest.importorskip(package)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path / "mlruns"))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    done = metarun(*RUN, "tracker=[tensorboard,wandb,mlflow]", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "goes on without it" not in done.stdout
    again = metarun("resume=run", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "goes on without it" not in again.stdout
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    written = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    written.Reload()
    expected = [(int(row["step"]), float(row["val_score"])) for row in rows(tmp_path / "run" / "metrics.csv")]
    shown = [(event.step, event.value) for event in written.Scalars("val_score")]
    assert [step for step, _ in shown] == [step for step, _ in expected]
    assert [value for _, value in shown] == pytest.approx([value for _, value in expected])
    import mlflow

    number = json.loads((tmp_path / "run" / "trackers.json").read_text())["mlflow"]
    history = mlflow.MlflowClient().get_metric_history(number, "val_score")
    assert [(one.step, one.value) for one in history] == expected
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*"))) == 2
