"""Sweeps that resume: a killed sweep ends as the undisturbed one, and says of every job what has become of it."""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from commands import metarun, started, without_timing
from conftest import leave_pictures_out
from hydra.errors import HydraException

from metarun.command import sweep
from metarun.config import config_hash
from metarun.errors import UserError
from metarun.results import status
from metarun.results.status import job_in, jobs_in, jobs_of_sweep, mark, table
from metarun.results.tables import write_metrics, write_results
from metarun.system import lock

JOBS = (
    "algo.inner_lr=0.01,0,0.02,0.03",
    "train.steps=60",
    "train.eval_every=10",
    "train.val_episodes=4",
    "eval.episodes=6",
    "eval.adapt_steps=1",
    "engine=eager",
    "hydra.sweep.dir=sweep",
)
ONE_BY_ONE = "hydra.launcher.n_jobs=1"
STATES = {"0.01": "completed", "0": "failed", "0.02": "completed", "0.03": "completed"}


def states(directory: Path) -> dict[str, str]:
    return {job.name.removeprefix("algo.inner_lr="): job.state for job in jobs_of_sweep(directory)}


def numbers(directory: Path):
    """What each completed job has measured."""
    jobs = [job.directory for job in jobs_of_sweep(directory) if job.state == "completed"]
    return [(job.name, without_timing(job), (job / "episodes.csv").read_text()) for job in jobs]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    root = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        leave_pictures_out(patch)
        done = metarun("-m", *JOBS, cwd=root)
    assert done.returncode == 1
    return root / "sweep", done.stdout


def test_a_sweep_ends_with_a_table_and_an_exit_code(undisturbed):
    directory, said = undisturbed
    assert states(directory) == STATES
    end = said[said.index("job ") :]
    assert end.startswith(table(jobs_of_sweep(directory)))
    assert "algo.inner_lr=0: algo: inner_lr must be above 0, not 0." in end
    assert "3 completed, 1 failed." in end
    assert "Continue with: metarun -m resume='sweep'" in end


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A sweep that was killed in its third job."""
    root = tmp_path_factory.mktemp("killed")
    process = started("-m", *JOBS, ONE_BY_ONE, cwd=root)
    deadline = time.monotonic() + 120
    while not (root / "sweep" / "2_maml_sinusoid" / "checkpoints" / "last.pt").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate()
    return root / "sweep"


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("again", [["-m", "resume=sweep"], ["-m", *JOBS]], ids=["resume", "same command"])
def test_a_killed_sweep_goes_on_where_it_was(undisturbed, killed, tmp_path, again):
    directory = shutil.copytree(killed, tmp_path / "sweep")
    assert states(directory) == STATES | {"0.02": "cut off", "0.03": "not begun"}
    first = directory / "0_maml_sinusoid" / "result.csv"
    before = first.stat().st_mtime_ns
    done = metarun(*again, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert first.stat().st_mtime_ns == before
    assert "0_maml_sinusoid has completed already" in done.stdout
    assert states(directory) == STATES
    assert numbers(directory) == numbers(undisturbed[0])
    assert not list(directory.rglob(lock.FILE))


def test_an_interrupted_sweep_says_how_to_go_on(tmp_path):
    process = started("-m", *JOBS, "train.steps=100000", ONE_BY_ONE, cwd=tmp_path)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert states(tmp_path / "sweep") == {"0.01": "interrupted", **dict.fromkeys(["0", "0.02", "0.03"], "not begun")}
    assert "1 interrupted, 3 not begun." in said
    assert "metarun -m resume='sweep'" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-m", *JOBS, "seed=1"], ["holds another sweep", "metarun -m resume='sweep'"]),
        (["-m", "resume=sweep", "seed=1"], ["seed=1 would change the sweep in sweep"]),
        (["resume=sweep"], ["sweep holds a sweep", "metarun -m resume='sweep'"]),
        (["-m", "resume=sweep/0_maml_sinusoid"], ["There is no sweep to resume in sweep/0_maml_sinusoid"]),
        (["-m", "resume=nowhere"], ["There is no sweep to resume in nowhere"]),
        (["hydra.run.dir=sweep"], ["sweep holds a sweep"]),
        (["-m", "seed=0,1", "hydra.sweep.dir=sweep/0_maml_sinusoid"], ["holds a run already"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_what_is_not_this_sweep_is_refused(undisturbed, arguments, words):
    directory, _ = undisturbed
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    refused = metarun(*arguments, cwd=directory.parent)
    assert refused.returncode == 1
    assert all(word in refused.stderr for word in words), refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before


def test_a_sweep_over_a_pattern_has_a_plan_and_a_table(tmp_path):
    done = metarun("-m", "algo=glob(scr*)", "train.lr=-1", "hydra.sweep.dir=sweep", cwd=tmp_path)
    assert done.returncode == 1
    assert "1 failed." in done.stdout
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text())["jobs"] == [["algo=scratch", "train.lr=-1"]]


@pytest.mark.parametrize("error", [HydraException("No loader"), RuntimeError("No loader")])
def test_a_sweep_that_cannot_be_owned_does_not_run(tmp_path, monkeypatch, error):
    """Hydra would make a warning of the error, and nobody would say how the jobs have ended."""

    def fail(*arguments):
        raise error

    monkeypatch.setattr("metarun.command.directories.jobs_of", fail)
    refused = metarun("-m", "seed=0,1", "hydra.sweep.dir=sweep", cwd=tmp_path)
    assert refused.returncode == 1
    assert "No loader" in refused.stderr
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_whose_defaults_have_changed_does_not_write_them_next_to_old_results(undisturbed, tmp_path):
    directory = shutil.copytree(undisturbed[0], tmp_path / "sweep")
    result = directory / "2_maml_sinusoid" / "result.csv"
    (done,) = status.rows_of(result)
    result.write_text(result.read_text().replace(done["config_hash"], "0123456789ab"))
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    refused = metarun("-m", *JOBS, cwd=tmp_path)
    assert refused.returncode == 1
    assert "The run in sweep/2_maml_sinusoid belongs to another configuration: a default has changed" in refused.stderr
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before


def test_only_a_completed_run_of_the_same_configuration_counts_as_done(tmp_path):
    from conftest import composed

    config, _ = composed("replicas.count=2")
    apart = [config_hash(composed(f"seed={seed}")[0]) for seed in (0, 1)]
    row = {"status": "completed", "val_score": 0.5, "higher_is_better": False}
    rows = [row | {"config_hash": one} for one in apart]
    write_results(tmp_path, rows, [])
    assert sweep.finished(config, tmp_path) == 0.5
    # A replica that diverged is no reason to train the others again.
    write_results(tmp_path, [rows[0], rows[1] | {"status": "failed", "val_score": None}], [])
    assert sweep.finished(config, tmp_path) == 0.5
    for other in (rows[:1], rows[::-1], [one | {"status": "interrupted"} for one in rows], []):
        write_results(tmp_path, other, [])
        assert sweep.finished(config, tmp_path) is None
    assert sweep.finished(composed("replicas.count=2", "train.lr=0.5")[0], tmp_path) is None


def test_a_plan_that_cannot_be_read_is_refused(tmp_path):
    for text in ("", "[]", "{}", '{"overrides": 1, "hydra": [], "config_dirs": [], "jobs": []}', '"' * 9):
        (tmp_path / status.PLAN).write_text(text)
        with pytest.raises(UserError, match=r"sweep\.json cannot be read"):
            sweep.read_plan(tmp_path)


def a_run(directory: Path, higher_is_better=True, **columns):
    hydra = directory / ".hydra"
    hydra.mkdir(parents=True)
    (hydra / "overrides.yaml").write_text("- seed=0\n")
    (hydra / "config.yaml").write_text("train:\n  steps: 100\n")
    row = {"status": "running", "metric": "accuracy", "higher_is_better": higher_is_better}
    write_results(directory, [row | columns], [])
    rows = [
        {"step": step, "val_score": score, "seconds": step / 2} for step, score in ((10, 0.4), (20, 0.6), (30, 0.5))
    ]
    write_metrics(directory, [rows])


def test_status_shows_progress_the_best_so_far_and_the_time_left(tmp_path, monkeypatch, capsys):
    a_run(tmp_path / "up")
    a_run(tmp_path / "down", higher_is_better=False)
    (tmp_path / "up" / lock.FILE).write_text(json.dumps(vars(lock.this_process())))
    up, down = job_in(tmp_path / "up", "up"), job_in(tmp_path / "down", "down")
    assert (up.state, up.step, up.steps, up.best) == ("running", 30, 100, 0.6)
    # Thirty steps took fifteen seconds, seventy are left.
    assert up.seconds_left == pytest.approx(35)
    assert (down.state, down.best) == ("cut off", 0.4)
    monkeypatch.setattr(sys, "argv", ["metarun-status", str(tmp_path)])
    status.main()
    said = capsys.readouterr().out
    assert any(line.split() == ["up", "running", "30/100", "accuracy", "0.6", "35", "s"] for line in said.splitlines())
    assert "1 cut off, 1 running." in said


@pytest.mark.parametrize(
    "damage", [b"", b"\x00\xff" * 200, b'"' * 300_000, b"a: &a [*a]", b"[" * 5000, b"step\n1e999\n"]
)
def test_status_reads_damaged_files_without_a_traceback(tmp_path, damage):
    a_run(tmp_path / "run")
    for name in ("result.csv", "metrics.csv", ".hydra/config.yaml", ".hydra/overrides.yaml", status.PLAN, lock.FILE):
        (tmp_path / "run" / name).write_bytes(damage)
        os.utime(tmp_path / "run" / name, (0, 0))
        assert "1 " in table(jobs_in(tmp_path)) or name == status.PLAN


def test_what_data_say_never_reaches_the_terminal_as_commands(tmp_path):
    a_run(tmp_path / "run", status="failed", reason="\x1b]0;title\x07 \u202egnp", metric="\x1b[2J")
    said = table(jobs_in(tmp_path))
    assert "\x1b" not in said
    assert "\u202e" not in said
    assert r"\x1b]0;title\x07 \u202egnp" in said


def test_a_failure_is_noted_and_a_completed_result_is_left_alone(tmp_path):
    mark(tmp_path, [{"run": "a", "seed": 3}], "failed", "It was refused.")
    (row,) = status.rows_of(tmp_path / "result.csv")
    assert (row["run"], row["seed"], row["status"], row["reason"]) == ("a", "3", "failed", "It was refused.")
    write_results(tmp_path, [row | {"status": "completed"}], [])
    mark(tmp_path, [], "failed", "Too late.")
    assert status.rows_of(tmp_path / "result.csv")[0]["status"] == "completed"
