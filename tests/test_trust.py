"""Directories that somebody else has made: what is taken from them, what is refused, and that nothing in them runs."""

import json
import shutil
import sys
from contextlib import suppress

import pytest
from commands import metarun

from metarun.command.sweep import Plan
from metarun.command.trust import distrusted
from metarun.results import compare, status
from metarun.results.status import PLAN
from metarun.results.tables import RESULT_COLUMNS

PROGRAM = "import pathlib; pathlib.Path('executed').touch()\n"


@pytest.mark.parametrize(
    "text",
    [
        *("seed=3", "train.lr=0.1", "algo=maml", "task=text_crosslingual", "engine=eager", "eval=as_trained"),
        *("experiment=null", "algo.inner_lr=0.1,0.2", "algo=maml,reptile", "+task.steepest=3", "train.optimizer=trpo"),
        *("replicas.over={algo.inner_lr: [0.1, 0.03]}", "task.amplitude=[0.1,5.0]", "task.environment=Pendulum-v1"),
        *("data_dir='/data/with = sign'", "hydra/launcher=joblib", "hydra.launcher.n_jobs=4", "preset/by_model=null"),
        *("hydra.launcher.cluster=local", "hydra.launcher.slurm.partition=gpu-long", "hydra.launcher.cluster=null"),
        *("seed=range(0,5)", "algo=glob(ma*)", "algo=glob([m*,r*],exclude=maml)"),
    ],
)
def test_plain_values_for_keys_that_exist_are_taken(text):
    assert distrusted(text) is None


@pytest.mark.parametrize(
    "text",
    [
        *("algo._target_=os.system", "+algo.x={_target_: os.system}", "algo={_target_: os.system}", "_target_=a"),
        *("hydra.searchpath=[file://evil]", "+hydra.searchpath=[file://evil]", "hydra.sweep.subdir=../../home"),
        *("data_dir=${oc.env:HOME}", "task.dataset='${oc.env:HOME}'", "algo.x=${oc.decode:a}"),
        *("hydra.callbacks.evil={_target_: os.system}", "+hydra.callbacks.evil.a=1", "hydra.job.env_set.PATH=."),
        *("hydra.launcher.setup=[touch executed]", "hydra.launcher.python=./evil", "+hydra.launcher.n_jobs=4"),
        *("hydra.launcher.slurm.partition='gpu --wrap=evil'", "+hydra.launcher.slurm.wrap=evil"),
        *("algo=glob(../evil*)", "algo=glob(*,exclude=../evil)"),
        *("hydra/launcher=../evil", "algo=../evil", "algo='../evil'", "task=maml,../evil", "preset/by_model=../../x"),
        *("task@hydra.callbacks=evil", "+experiment@hydra=evil", "~hydra.callbacks", "~train", "+other=1"),
        *("task.environment=evil:Env-v0", "train.lr=[", "--config-dir=evil", "++hydra.mode=RUN", "+train.x=1"),
    ],
)
def test_what_could_run_code_or_read_secrets_is_refused(text):
    assert distrusted(text)


def overridden(run):
    """Another target among the overrides."""
    path = run / ".hydra" / "overrides.yaml"
    path.write_text(path.read_text() + "- algo._target_=evil.run\n")


def configured_elsewhere(run):
    """A configuration directory whose algorithm is something else."""
    (run / "conf" / "algo").mkdir(parents=True)
    (run / "conf" / "algo" / "maml.yaml").write_text("_target_: evil.run\n")
    source = f"[{{path: {run / 'conf'}, schema: file, provider: command-line}}]"
    (run / ".hydra" / "hydra.yaml").write_text(f"hydra:\n  runtime:\n    config_sources: {source}\n")


def tagged(run):
    """YAML that constructs objects."""
    (run / ".hydra" / "overrides.yaml").write_text("- !!python/object/apply:os.system ['touch executed']\n")


def linked(run):
    """A log that leads to a file of the user's."""
    (run / "run.log").unlink()
    (run / "run.log").symlink_to(run.parent / ".profile")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (overridden, "algo._target_=evil.run, which names code to be run"),
        (configured_elsewhere, "name it again with --config-dir, or say trust=true"),
        (tagged, "are not those of a run"),
        (linked, "is a link to a place outside"),
    ],
)
def test_a_directory_that_tries_to_run_code_is_refused_in_words(finished, tmp_path, monkeypatch, make, words):
    run = shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "evil.py").write_text(PROGRAM)
    make(run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    refused = metarun("resume=run", cwd=tmp_path)
    assert refused.returncode == 1
    assert words in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # where evil.py is
    for command in (compare, status):
        monkeypatch.setattr(sys, "argv", [command.__name__, "run"])
        with suppress(SystemExit):
            command.main()
    assert {path: path.read_bytes() for path in before} == before
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / ".profile").exists()


def test_with_trust_a_directory_may_name_its_target(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "evil.py").write_text(PROGRAM)
    overridden(run)
    # Of a result it is known that it belongs to another configuration.
    (run / "result.csv").unlink()
    metarun("resume=run", "trust=true", cwd=tmp_path)
    assert (tmp_path / "executed").exists()


def test_a_sweep_that_tries_to_run_code_is_refused(tmp_path):
    (tmp_path / "evil.py").write_text(PROGRAM)
    (tmp_path / "sweep").mkdir()
    for plan in (
        Plan(["seed=0,1", "algo._target_=evil.run"], [], [], [["seed=0"]]),
        Plan(["seed=0,1"], ["hydra.callbacks.evil={_target_: evil.run}"], [], [["seed=0"]]),
        Plan(["seed=0,1"], [], ["evil"], [["seed=0"]]),
    ):
        (tmp_path / "sweep" / PLAN).write_text(json.dumps(vars(plan)))
        refused = metarun("-m", "resume=sweep", cwd=tmp_path)
        assert refused.returncode == 1
        assert "is not trusted (SECURITY.md)" in refused.stderr
    assert not (tmp_path / "executed").exists()


def test_compare_shows_what_data_say_without_obeying_it(finished, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    header, row = (run / "result.csv").read_text().splitlines()
    cells = dict(zip(header.split(","), row.split(","), strict=True))
    assert tuple(cells) == RESULT_COLUMNS
    cells |= {"dataset": "\x1b]0;title\x07sinusoid\u202e", "algo": "\x1b[2Jmaml$\\x$"}
    (run / "result.csv").write_text(f"{header}\n{','.join(cells.values())}\n")
    monkeypatch.setenv("A_SECRET", "shown")
    (run / ".hydra" / "overrides.yaml").write_text("- task.dataset=${oc.env:A_SECRET}\n")
    shutil.copytree(finished, tmp_path / "other")
    monkeypatch.setattr(sys, "argv", ["metarun-compare", str(tmp_path)])
    compare.main()
    said = capsys.readouterr().out
    assert r"\x1b]0;title\x07sinusoid\u202e" in said
    assert "\x1b" not in said
    assert "\u202e" not in said
    assert "shown" not in said
