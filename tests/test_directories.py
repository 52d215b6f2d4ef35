"""One owner per directory: who holds a lock, when a lock is stale, and what a second process is told."""

import json
import os
import subprocess
import sys
import time

import pytest
from commands import LONG, QUICK, metarun, started

from metarun.errors import UserError
from metarun.system import lock


@pytest.fixture(autouse=True)
def nothing_is_held():
    yield
    lock.release_all()


def written(directory, **changes):
    """A lock file of this process with some fields changed."""
    (directory / lock.FILE).write_text(json.dumps({**vars(lock.this_process()), **changes}))


def test_a_lock_is_given_up_and_can_be_taken_again(tmp_path):
    lock.acquire(tmp_path)
    lock.acquire(tmp_path)
    assert lock.owner_of(tmp_path).pid == os.getpid()
    lock.release(tmp_path)
    assert lock.owner_of(tmp_path) is None
    assert not list(tmp_path.iterdir())


def test_a_live_process_keeps_its_directory(tmp_path):
    alive = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    written(tmp_path, pid=alive.pid, started=lock.started_at(alive.pid))
    with pytest.raises(UserError, match=f"process {alive.pid} on"):
        lock.acquire(tmp_path)
    alive.communicate(b"\n")
    lock.acquire(tmp_path)


@pytest.mark.parametrize("changes", [{"pid": 2**22 + 1}, {"started": "another time"}, {"pid": "text"}])
def test_a_stale_lock_is_taken_over(tmp_path, changes):
    written(tmp_path, **changes)
    an_hour_ago = time.time() - 3600
    os.utime(tmp_path / lock.FILE, (an_hour_ago, an_hour_ago))
    assert lock.owner_of(tmp_path) is None
    lock.acquire(tmp_path)
    assert lock.owner_of(tmp_path) == lock.this_process()
    assert [path.name for path in tmp_path.iterdir()] == [lock.FILE]


def test_a_lock_of_another_host_holds_until_it_is_deleted(tmp_path):
    written(tmp_path, host="elsewhere")
    with pytest.raises(UserError, match=r"on elsewhere.*delete .*\.metarun\.lock"):
        lock.acquire(tmp_path)


def test_of_many_processes_that_find_a_stale_lock_one_gets_the_directory(tmp_path):
    code = (
        "import sys, pathlib; from metarun.system import lock; from metarun.errors import UserError\n"
        "for directory in map(pathlib.Path, sys.argv[1:]):\n"
        "    input()\n"
        "    try: lock.acquire(directory); print('owner', flush=True)\n"
        "    except UserError: print('refused', flush=True)\n"
        "input()"
    )
    rounds = [tmp_path / str(number) for number in range(5)]
    for directory in rounds:
        directory.mkdir()
        written(directory, pid=2**22 + 1)
    command = [sys.executable, "-c", code, *map(str, rounds)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    rivals = [subprocess.Popen(command, **pipes) for _ in range(6)]
    for _ in rounds:
        for rival in rivals:
            rival.stdin.write("\n")
            rival.stdin.flush()
        said = [rival.stdout.readline().strip() for rival in rivals]
        assert sorted(said) == ["owner", *["refused"] * 5]
    for rival in rivals:
        rival.communicate("\n")


def test_a_second_run_and_a_resume_of_a_live_run_get_a_sentence_and_lose_nothing(tmp_path):
    process = started(*LONG, "hydra.run.dir=run", cwd=tmp_path)
    try:
        for arguments in ([*QUICK, "hydra.run.dir=run"], ["resume=run"]):
            refused = metarun(*arguments, cwd=tmp_path)
            assert refused.returncode == 1
            assert f"run belongs to a process that is running (process {process.pid} on" in refused.stderr
            assert len(refused.stderr.splitlines()) == 1
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()
    # The lock of the killed run is stale, and a new run still keeps out of its directory.
    assert "holds a run already" in metarun(*QUICK, "hydra.run.dir=run", cwd=tmp_path).stderr
    assert not (tmp_path / "run" / lock.FILE).exists()


def test_a_second_sweep_and_a_resume_of_a_job_get_a_sentence(tmp_path):
    process = started("-m", *LONG, "seed=0,1", "hydra.sweep.dir=sweep", "hydra.launcher.n_jobs=1", cwd=tmp_path)
    try:
        second = metarun("-m", *LONG, "seed=0,1", "hydra.sweep.dir=sweep", cwd=tmp_path)
        of_a_job = metarun("resume=sweep/0_maml_sinusoid", cwd=tmp_path)
        for refused, directory in ((second, "sweep"), (of_a_job, "sweep/0_maml_sinusoid")):
            assert refused.returncode == 1
            assert f"{directory} belongs to a process that is running (process {process.pid}" in refused.stderr
    finally:
        process.kill()
        process.communicate()


def test_jobs_that_would_share_a_folder_are_refused_before_the_first_starts(tmp_path):
    shared = ("hydra.sweep.subdir=${hydra:runtime.choices.algo}", "hydra.sweep.dir=sweep")
    refused = metarun("-m", *QUICK, "algo=maml,reptile", "seed=0,1", *shared, cwd=tmp_path)
    assert refused.returncode == 1
    assert "2 jobs of the sweep would share the folder 'maml'" in refused.stderr
    assert "seed=1" in refused.stderr
    assert not (tmp_path / "sweep").exists()
