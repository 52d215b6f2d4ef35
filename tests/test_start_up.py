"""What a command does before its first step: each thing once, and not more than is needed."""

import gc
import os
import subprocess
import sys

import hydra
import pytest
from commands import environment, process, put_back
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import OmegaConf

from metarun import launch
from metarun.command.once import composing_once
from metarun.config import register_schema
from metarun.system.files import write_csv
from metarun.system.importing import importing

RUN = ("algo=maml", "task=sinusoid", "train.steps=1", "hydra.run.dir=run", "hydra.sweep.dir=sweep")


@pytest.fixture
def composed(monkeypatch, tmp_path):
    """Return a function that gives all that the jobs of a command see, and how often Hydra has composed for it."""
    times = []
    real = ConfigLoaderImpl._load_configuration_impl

    def counted(*arguments, **further):
        times.append(1)
        return real(*arguments, **further)

    monkeypatch.setattr(ConfigLoaderImpl, "_load_configuration_impl", counted)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    # The jobs are seen in this process alone.
    monkeypatch.setattr("metarun.launch.processes.cores", lambda: 1)
    launch.register()
    monkeypatch.chdir(tmp_path)

    def compose(*arguments, once):
        seen = []

        def job(config):
            seen.append([OmegaConf.to_yaml(config), OmegaConf.to_yaml(HydraConfig.instance().cfg)])

        times.clear()
        monkeypatch.setattr(sys, "argv", ["metarun", *arguments])
        with put_back():
            register_schema()
            entry = hydra.main(version_base="1.3", config_path="pkg://metarun.conf", config_name="config")(job)
            if not once:
                entry()
            else:
                with composing_once(multirun="-m" in arguments):
                    entry()
        return seen, len(times)

    return compose


@pytest.mark.parametrize(
    ("arguments", "jobs", "fewer"),
    [
        (RUN, 1, 1),
        (("-m", *RUN, "seed=0,1"), 2, 1 + 2),
        # The mode is another than the command's, so what was composed for it cannot be used.
        ((*RUN, "hydra.mode=MULTIRUN", "seed=0,1"), 2, 2),
        # Equal jobs share no configuration, which knows the number of its job.
        (("-m", *RUN, "seed=0,0"), 2, 1 + 3),
    ],
)
def test_composing_once_gives_what_hydra_composes_twice(composed, arguments, jobs, fewer):
    expected, times = composed(*arguments, once=False)
    found, fewer_times = composed(*arguments, once=True)
    assert len(found) == jobs
    assert found == expected
    assert times - fewer_times == fewer


def test_a_sweep_over_tasks_may_set_a_key_that_the_default_task_lacks(composed):
    jobs, _ = composed(
        "-m", "algo=protonet", "task=grocery,cells", "task.image_size=48", "hydra.sweep.dir=s", once=True
    )
    tasks = [OmegaConf.create(config).task for config, _ in jobs]
    assert [(task.get("test_path"), task.image_size) for task in tasks] == [(None, 48), ("chula_cells", 48)]
    with pytest.raises(HydraException, match="image_size"):
        composed("-m", "task=grocery,sinusoid", "task.image_size=48", "hydra.sweep.dir=t", once=True)


def test_sweeps_without_m_are_refused_as_ever(composed):
    with pytest.raises(HydraException, match="add --multirun"):
        composed(*RUN, "seed=0,1", once=True)


def test_collection_of_garbage_goes_on_after_imports():
    assert gc.isenabled()
    with importing():
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    try:
        with importing():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
    ids=["none", "count", "policy"],
)
def test_threads_hardly_spin_unless_the_user_says_so_and_before_torch_reads_it(given, expected):
    """Two runs of navigation at once on two cores take ten times as long with the default of libgomp."""
    unset = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    asks = "import metarun, os, sys; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", asks], env={**unset, **given}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [expected, "False"]


def test_lines_with_signs_that_the_output_does_not_know_are_written_all_the_same(tmp_path):
    """``±`` stands in every line with a score, and the line would be lost or end the command in a traceback."""
    run = ("algo=random", "task=bandit", "train.steps=0", "train.val_episodes=2", "eval.episodes=2")
    done = process(*run, "engine=eager", "hydra.run.dir=run", cwd=tmp_path, env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert r"\xb1" in done.stdout
    asks = "import sys; sys.argv[1:] = ['run']; from metarun.__main__ import compare; compare()"
    said = subprocess.run(
        [sys.executable, "-c", asks],
        cwd=tmp_path,
        env=environment(PYTHONIOENCODING="ascii"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 0, said.stderr
    assert r"\xb1" in said.stdout
    # Files are in UTF-8 whatever the output is.
    assert "±" in (tmp_path / "run" / "comparison.md").read_text(encoding="utf-8")


def test_names_of_files_that_are_no_text_can_be_written(tmp_path):
    write_csv(tmp_path / "table.csv", ["name"], [{"name": os.fsdecode(b"a\xff, b")}])
    assert (tmp_path / "table.csv").read_bytes() == b'name\n"a\\udcff, b"\n'
