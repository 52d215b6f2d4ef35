"""``torchrun``: tasks shared by processes give the step, and the files, of a single process."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import environment, metarun, rows
from conftest import experiment_of

from metarun.engine import processes
from metarun.engine.meta_step import MetaStep
from metarun.errors import UserError
from metarun.loop import training_tasks
from metarun.system import torchrun
from metarun.tree import leaves

RUN = (
    *("train.meta_batch=4", "train.steps=20", "train.eval_every=10", "train.log_every=5", "train.val_episodes=4"),
    *("eval.episodes=4", "eval.adapt_steps=1", "hydra.run.dir=run"),
)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "metarun"]


def of_process(monkeypatch, number):
    for name, value in (("RANK", number), ("LOCAL_RANK", number), ("WORLD_SIZE", 2), ("TORCHELASTIC_RUN_ID", "none")):
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("algo", ["maml", "reptile"])
def test_the_mean_over_processes_is_the_mean_over_tasks(monkeypatch, float64, algo):
    experiment = experiment_of(f"algo={algo}", "train.meta_batch=6")
    step = MetaStep(experiment)
    given = {"train_state": step.initial_train_state(), "tasks": training_tasks(experiment, [0], 6, 0), "rates": {}}
    expected = step.gradient(given)
    parts = []
    for number in (0, 1):
        of_process(monkeypatch, number)
        parts.append(step.gradient(processes.own_part(given)))
    flat = [torch.cat([leaf.flatten() for leaf in leaves(part)]) for part in parts]
    monkeypatch.setattr(processes, "gathered", lambda vector: flat)
    found = processes.mean_over_processes(parts[0])
    for mean, whole in zip(leaves(found), leaves(expected), strict=True):
        torch.testing.assert_close(mean, whole, rtol=1e-12, atol=1e-12)


def test_tasks_that_cannot_be_shared_equally_are_refused(monkeypatch):
    of_process(monkeypatch, 0)
    assert processes.share(24) == 12
    with pytest.raises(UserError, match=r"set train\.meta_batch=24 or 26"):
        processes.share(25)
    with pytest.raises(UserError, match=r"set train\.meta_batch=2,"):
        processes.share(1)


def test_a_process_other_than_the_first_writes_nothing_that_is_kept(monkeypatch):
    monkeypatch.setattr(torchrun.signal, "signal", lambda number, handler: None)
    monkeypatch.setenv("TQDM_DISABLE", "0")
    of_process(monkeypatch, 1)
    with torchrun.following([], ["tracker=wandb"]) as further:
        folder = Path(further[0].split("'")[1])
        assert folder.is_dir()
        assert further[-1] == "tracker=null"
    assert not folder.exists()
    of_process(monkeypatch, 0)
    with torchrun.following([], []) as further:
        assert further == []


def test_a_sweep_under_torchrun_is_refused(tmp_path, monkeypatch):
    of_process(monkeypatch, 0)
    refused = metarun("-m", "seed=0,1", cwd=tmp_path)
    assert refused.returncode == 1
    assert "torchrun is for single runs" in refused.stderr


def under_torchrun(*arguments, cwd):
    return subprocess.run(
        [*TORCHRUN, *arguments], cwd=cwd, env=environment(), capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("more", [("engine=eager",), ("engine=replay", "algo=reptile")])
def test_two_processes_score_as_one(tmp_path, more):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one = metarun(*RUN, *more, cwd=tmp_path / "one")
    two = under_torchrun(*RUN, *more, cwd=tmp_path / "two")
    assert (one.returncode, two.returncode) == (0, 0), two.stderr
    names = [sorted(p.name for p in (tmp_path / way / "run").rglob("*")) for way in ("one", "two")]
    assert names[0] == names[1]
    alone, shared = (rows(tmp_path / way / "run" / "result.csv")[0] for way in ("one", "two"))
    assert shared["engine"] == alone["engine"] == more[0].removeprefix("engine=")
    for name in ("score", "score_before", "val_score"):
        assert float(shared[name]) == pytest.approx(float(alone[name]), rel=1e-4)


@pytest.mark.slow
def test_two_processes_stop_together_and_go_on_together(tmp_path):
    long = [*RUN, "engine=eager", "train.steps=150"]
    assert metarun(*long, "hydra.run.dir=one", cwd=tmp_path).returncode == 0
    with subprocess.Popen(
        [*TORCHRUN, *long], cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as running:
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / "checkpoints" / "last.pt").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        running.send_signal(signal.SIGTERM)
        said, _ = running.communicate(timeout=120)
    assert "metarun resume='run'" in said
    assert rows(tmp_path / "run" / "result.csv")[0]["status"] == "interrupted"
    again = under_torchrun("resume=run", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    alone, shared = (rows(tmp_path / name / "result.csv")[0] for name in ("one", "run"))
    assert (shared["status"], shared["meta_steps"]) == ("completed", "150")
    assert float(shared["score"]) == pytest.approx(float(alone["score"]), rel=1e-3)
