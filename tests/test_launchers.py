"""Launchers and sweepers: a failed job gives an exit code and a line of the table, wherever the jobs run.

Those marked slow need the extras joblib, submitit, ray and optuna. ``python -m benchmarks.launchers`` kills sweeps.
"""

import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import LONG, QUICK, environment, metarun, process, rows, started

from benchmarks.launchers import table_of
from benchmarks.survival import numbers
from metarun import launch
from metarun.assemble import choose_device
from metarun.errors import UserError
from metarun.launch import processes
from metarun.results.status import jobs_of_sweep
from metarun.system import lock

LAUNCHERS = {
    "joblib": ["hydra.launcher.n_jobs=2"],
    "submitit": ["hydra.launcher.cluster=local"],
    "ray": ["hydra.launcher.cpus=2"],
}
FAILING = ("-m", "algo.inner_lr=0.01,0,0.02", *QUICK, "engine=eager", "hydra.sweep.dir=sweep")


@pytest.mark.parametrize("member", ["launcher=joblib", "launcher=submitit", "launcher=ray", "sweeper=optuna"])
def test_a_missing_package_gets_the_line_that_installs_it(tmp_path, monkeypatch, member):
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    refused = metarun("-m", "seed=0,1", f"hydra/{member}", "hydra.sweep.dir=sweep", cwd=tmp_path)
    name = member.partition("=")[2]
    assert refused.returncode == 1
    assert refused.stderr == (
        f"metarun: hydra/{member} needs the package {name}, which is missing: pip install 'metarun[{name}]'.\n"
    )
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("number", ["-1", "0", "many", "2.5", "true"])
def test_a_number_of_jobs_that_cannot_be_is_refused_before_anything_is_written(tmp_path, number):
    refused = metarun("-m", "seed=0,1", f"hydra.launcher.n_jobs={number}", "hydra.sweep.dir=sweep", cwd=tmp_path)
    assert refused.returncode == 1
    assert refused.stderr.startswith("metarun: hydra.launcher.n_jobs must be a whole number from 1 on, or null")
    assert len(refused.stderr.splitlines()) == 1
    assert not (tmp_path / "sweep").exists()


def owned(directory: Path, owner: lock.Owner) -> None:
    directory.mkdir()
    (directory / lock.FILE).write_text(json.dumps(vars(owner)))


def test_a_job_of_a_sweep_waits_for_an_orphan_of_the_same_sweep(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "POLL_SECONDS", 0.02)
    with subprocess.Popen(["sleep", "0.5"]) as orphan:
        owned(tmp_path / "job", lock.Owner(platform.node(), orphan.pid, lock.started_at(orphan.pid)))
        with pytest.raises(UserError, match="belongs to a process"):
            lock.acquire(tmp_path / "job")
        lock.acquire(tmp_path / "job", wait=True)
        assert orphan.poll() is not None or lock.started_at(orphan.pid) is None
    lock.release(tmp_path / "job")


def test_a_job_that_slurm_has_queued_again_takes_over_its_own_folder_from_another_node(tmp_path, monkeypatch):
    owned(tmp_path / "job", lock.Owner("another-node", 1, "then", job="7", restarts=0))
    for job, restarts in (("8", "1"), ("7", "0"), ("", "")):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
        with pytest.raises(UserError, match="belongs to a process"):
            lock.acquire(tmp_path / "job", wait=True)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    lock.acquire(tmp_path / "job")
    lock.release(tmp_path / "job")


def test_jobs_of_a_sweep_take_turns_on_the_gpus(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [choose_device("auto", number) for number in range(4)] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    assert [choose_device(device, 1) for device in ("cpu", "cuda", "cuda:0")] == ["cpu", "cuda", "cuda:0"]
    assert choose_device("auto") == "cuda"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert choose_device("auto", 3) == "cuda"


def test_a_job_of_a_sweep_knows_its_number_and_a_single_run_has_none(tmp_path, monkeypatch):
    numbers = []
    monkeypatch.setattr("metarun.run.run", lambda *arguments: numbers.append(arguments[-1]) or 0.0)
    metarun("-m", "seed=0,1", "hydra.sweep.dir=sweep", cwd=tmp_path)
    metarun("hydra.run.dir=run", cwd=tmp_path)
    assert numbers == [0, 1, None]


@pytest.fixture(scope="module")
def by_basic(tmp_path_factory):
    root = tmp_path_factory.mktemp("basic")
    return metarun(*FAILING, cwd=root), numbers(root / "sweep")


def children(process):
    """The processes of a sweep that run jobs."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def test_a_job_whose_folder_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "1_maml_sinusoid").touch()
    done = process(
        "-m", *QUICK, "engine=eager", "seed=0,1", "hydra.sweep.dir=sweep", "hydra.launcher.n_jobs=2", cwd=tmp_path
    )
    assert done.returncode == 1
    assert "metarun: the folder of a job cannot be written (File exists: sweep/1_maml_sinusoid)" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert [job.state for job in jobs_of_sweep(tmp_path / "sweep")] == ["completed", "not begun"]


LONG_SWEEP = ("-m", *LONG, "seed=0,1,2", "hydra.sweep.dir=sweep", "hydra.launcher.n_jobs=2")


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="only Linux lists the children of a process")
def test_jobs_in_processes_stop_with_the_sweep_and_a_dead_one_is_replaced(tmp_path):
    """A process that is killed loses its own job alone; the end of a terminal, which all of them are told of, stops the
    others, which save and say so."""
    process = started(*LONG_SWEEP, cwd=tmp_path)
    folders = [tmp_path / "sweep" / f"{number}_maml_sinusoid" for number in range(3)]
    wait_for((folders[1] / "checkpoints" / "last.pt").exists)
    owner = json.loads((folders[0] / lock.FILE).read_text())["pid"]
    assert owner in children(process)
    os.kill(owner, signal.SIGKILL)
    wait_for((folders[2] / "checkpoints" / "last.pt").exists)
    for pid in (*children(process), process.pid):
        os.kill(pid, signal.SIGHUP)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGHUP, said
    assert [job.state for job in jobs_of_sweep(tmp_path / "sweep")] == ["cut off", "interrupted", "interrupted"]
    assert "A job's process has died: its exit code is -9" in said
    assert "metarun -m resume='sweep'" in said
    assert "Traceback" not in said


@pytest.mark.skipif(os.name != "posix", reason="the parent of a process is known under POSIX alone")
def test_jobs_in_processes_end_when_the_sweep_is_killed(tmp_path):
    process = started(*LONG_SWEEP, cwd=tmp_path)
    process.kill()
    process.communicate()
    wait_for(lambda: not list((tmp_path / "sweep").glob(f"*/{lock.FILE}")))
    states = {job.state for job in jobs_of_sweep(tmp_path / "sweep")}
    assert states <= {"interrupted", "cut off", "not begun"}
    assert "interrupted" in states


def test_the_number_of_jobs_at_a_time_follows_from_the_machine_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(processes, "cores", lambda: 8)
    monkeypatch.setattr(processes, "GPUS", (str(tmp_path / "gpu"),))
    for gigabytes, number in ((math.inf, 8), (13, 4), (1, 1)):
        monkeypatch.setattr(processes, "memory", lambda size=gigabytes: size * 2**30)
        assert processes.jobs_at_a_time("auto") == number
    monkeypatch.setattr(processes, "memory", lambda: math.inf)
    (tmp_path / "gpu").touch()
    assert (processes.jobs_at_a_time("auto"), processes.jobs_at_a_time("cpu")) == (1, 8)


def test_processes_give_the_table_the_exit_code_and_the_numbers_of_a_sweep(tmp_path, by_basic):
    check_launcher("processes", ["hydra.launcher.n_jobs=2"], tmp_path, by_basic)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_launcher_gives_the_table_and_the_exit_code_of_a_sweep(tmp_path, by_basic, name):
    pytest.importorskip(name)
    check_launcher(name, LAUNCHERS[name], tmp_path, by_basic)


def check_launcher(name, settings, tmp_path, by_basic):
    done = process(*FAILING, f"hydra/launcher={name}", *settings, cwd=tmp_path)
    expected, of_jobs = by_basic
    assert done.returncode == expected.returncode == 1, done.stderr
    assert table_of(done.stdout) == table_of(expected.stdout)
    assert "2 completed, 1 failed." in done.stdout
    assert numbers(tmp_path / "sweep") == of_jobs


@pytest.mark.slow
def test_ray_spreads_jobs_over_two_nodes(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    try:
        given = ["hydra/launcher=ray", f"hydra.launcher.address='{cluster.address}'"]
        done = process(*FAILING, *given, cwd=tmp_path)
    finally:
        cluster.shutdown()
    assert done.returncode == 1, done.stderr
    assert "Ray has 2 nodes" in done.stdout
    assert "2 completed, 1 failed." in done.stdout


@pytest.mark.slow
def test_a_job_that_is_preempted_is_queued_again_and_goes_on_from_where_it_was(tmp_path):
    pytest.importorskip("submitit")
    sweep = (
        *("-m", "seed=0", "train.steps=300", "train.eval_every=150", "train.log_every=5", "train.val_episodes=4"),
        *("eval.episodes=4", "engine=eager", "hydra.sweep.dir=sweep"),
    )
    assert metarun(*sweep, cwd=tmp_path).returncode == 0
    undisturbed = numbers((tmp_path / "sweep").rename(tmp_path / "undisturbed"))
    job = tmp_path / "sweep" / "0_maml_sinusoid"
    arguments = [*sweep, "hydra/launcher=submitit", "hydra.launcher.cluster=local"]
    command = [sys.executable, "-m", "metarun", *arguments]
    with subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True) as running:
        deadline = time.monotonic() + 120
        while not (job / "metrics.csv").exists():
            assert time.monotonic() < deadline
            assert running.poll() is None
            time.sleep(0.02)
        first = lock.owner_of(job)
        os.kill(first.pid, signal.SIGUSR2)
        said, _ = running.communicate(timeout=120)
    assert running.returncode == 0, said
    assert "1 completed." in said
    assert numbers(tmp_path / "sweep") == undisturbed
    logs = [path.read_text() for path in (tmp_path / "sweep" / ".submitit").rglob("*.err")]
    assert "this job is preempted" in "".join(logs)


SLURM = {
    "sbatch": "#!/bin/sh\necho Submitted batch job 12\n",
    "srun": "#!/bin/sh\n",
    "sacct": "#!/bin/sh\necho 'JobID|State|NodeList'\nfor i in 0 1 2; do echo \"12_$i|FAILED|node\"; done\n",
}
"""A queue that loses every job."""


@pytest.mark.slow
def test_what_slurm_is_told(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    for name, text in SLURM.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    keys = ("timeout_min=240", "gpus_per_node=1", "mem_gb=8", "slurm.partition=gpu", "+hydra.launcher.slurm.comment=c")
    given = [key if key.startswith("+") else f"hydra.launcher.{key}" for key in keys]
    done = metarun(*FAILING, "hydra/launcher=submitit", *given, cwd=tmp_path)
    (script,) = [path.read_text() for path in (tmp_path / "sweep" / ".submitit").glob("*/*_submission.sh")]
    told = ("--partition=gpu", "--comment=c", "--array=0-2%3", "--time=240", "--signal=USR2@90", "--mem=8GB")
    for option in (*told, "--gpus-per-node=1"):
        assert f"#SBATCH {option}\n" in script
    # The jobs are lost, which the sweep survives and says.
    assert done.returncode == 1, done.stderr
    assert done.stdout.count("A job's process has died") == 3
    assert "3 not begun." in done.stdout


STUDY = ("-m", *QUICK, "engine=eager", "hydra/sweeper=optuna", "hydra.sweep.dir=sweep")


def chosen(directory: Path) -> list[str]:
    return [job.name for job in jobs_of_sweep(directory)]


def trials(directory: Path):
    from metarun.launch.optuna import opened

    return opened(directory, "none").get_trials()


@pytest.mark.slow
def test_a_failed_trial_is_a_failed_trial_and_the_study_goes_on(tmp_path):
    optuna = pytest.importorskip("optuna")
    searched = ("algo.inner_lr=0.01,0,1e30,0.02", "hydra.sweeper.sampler=grid")
    done = metarun(*STUDY, *searched, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    found = trials(tmp_path / "sweep")
    states = [trial.state.name for trial in found]
    assert states == ["COMPLETE", "FAIL", "FAIL", "COMPLETE"]
    scores = [rows(tmp_path / "sweep" / f"{n}_maml_sinusoid" / "result.csv")[0]["val_score"] for n in (0, 3)]
    assert [trial.value for trial in found if trial.value is not None] == [float(score) for score in scores]
    study = optuna.load_study(
        study_name="metarun",
        storage=optuna.storages.JournalStorage(
            optuna.storages.journal.JournalFileBackend(str(tmp_path / "sweep" / "study.log"))
        ),
    )
    assert study.direction.name == "MINIMIZE"


@pytest.mark.slow
def test_the_direction_of_a_study_is_that_of_the_metric(tmp_path):
    pytest.importorskip("optuna")
    from conftest import composed

    from metarun.launch.optuna import higher_is_better

    assert not higher_is_better(composed("task=sinusoid")[0])
    assert higher_is_better(composed("task=bandit", "algo=rl2")[0])


@pytest.mark.slow
def test_a_study_goes_on_as_it_would_have_gone_on(tmp_path):
    pytest.importorskip("optuna")
    searched = ("algo.inner_lr=tag(log,interval(0.001,0.1))", "algo.inner_steps=int(interval(1,3))")
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    assert metarun(*STUDY, *searched, "hydra.sweeper.n_trials=4", cwd=tmp_path / "whole").returncode == 0
    assert metarun(*STUDY, *searched, "hydra.sweeper.n_trials=2", cwd=tmp_path / "parts").returncode == 0
    again = metarun(*STUDY, *searched, "hydra.sweeper.n_trials=4", cwd=tmp_path / "parts")
    assert again.returncode == 0, again.stderr
    assert chosen(tmp_path / "parts" / "sweep") == chosen(tmp_path / "whole" / "sweep")
    assert len({trial.params["algo.inner_lr"] for trial in trials(tmp_path / "whole" / "sweep")}) == 4
    assert all(trial.params["algo.inner_steps"] in (1, 2, 3) for trial in trials(tmp_path / "whole" / "sweep"))


@pytest.mark.slow
def test_a_trial_that_is_behind_the_others_is_pruned(tmp_path):
    pytest.importorskip("optuna")
    done = metarun(
        *STUDY, "train.lr=0.01,0.011,0.012,0.013,0.014,1e-9", "train.steps=20", "train.eval_every=5",
        "hydra.sweeper.sampler=grid", "hydra.sweeper.pruner=median", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "5 completed, 1 pruned." in done.stdout
    (last,) = [job for job in jobs_of_sweep(tmp_path / "sweep") if job.state == "pruned"]
    assert last.step < 20
    assert "median stopped the trial after step" in last.reason
    assert trials(tmp_path / "sweep")[5].state.name == "PRUNED"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["seed=0"], "needs a key to search over"),
        (["task=sinusoid,bandit"], "cannot search over task"),
        (["seed=0,1", "hydra.sweeper.sampler=best"], "sampler must be one of tpe, random, grid, not best"),
        (["algo.inner_lr=interval(0.1,1)", "hydra.sweeper.sampler=grid"], "write algo.inner_lr=A,B,C"),
    ],
    ids=["no key", "task", "sampler", "grid"],
)
def test_what_cannot_be_a_study_is_refused(tmp_path, given, words):
    pytest.importorskip("optuna")
    refused = metarun(*STUDY, *given, cwd=tmp_path)
    assert refused.returncode == 1
    assert words in refused.stderr
