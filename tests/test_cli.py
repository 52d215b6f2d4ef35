"""The command as a user meets it: every error is one sentence with a remedy, and a non-zero exit code."""

import os
import subprocess
import sys
from pathlib import Path
from shutil import copytree

import pytest
import torch
from commands import QUICK, metarun, process

from metarun.system import sealed


def test_a_run_leaves_its_files_and_says_where(finished):
    left = {path.relative_to(finished).as_posix() for path in finished.rglob("*") if path.is_file()}
    assert left == {
        *(f".hydra/{name}.yaml" for name in ("config", "hydra", "overrides")),
        *("metrics.csv", "episodes.csv", "result.csv", "training.png", "adaptation.png", "curves.png", "run.log"),
        *("checkpoints/last.pt", "checkpoints/previous.pt", "checkpoints/best.pt"),
    }
    log = (finished / "run.log").read_text()
    assert "mse before adaptation" in log
    assert "files: run" in log


BAD_INPUT = [
    (["train.step=3"], ["train.step", "did you mean train.steps?"]),
    (["algo.inner_lrr=3"], ["algo.inner_lrr", "did you mean algo.inner_lr?"]),
    (["nonsense=3"], ["nonsense"]),
    (["train.steps=many"], ["train.steps", "many", "Integer"]),
    (["train.optimizer=adamm"], ["train.optimizer", "adamw"]),
    (["algo=mamll"], ["algo=mamll", "choose one of", "reptile"]),
    (["task=omniglott"], ["task=omniglott", "sinusoid"]),
    (["experiment=none_such"], ["experiment=none_such"]),
    (["train.meta_batch=0"], ["train.meta_batch must be at least 1, not 0"]),
    (["train.lr=-1"], ["train.lr", "above 0"]),
    (["seed=-1"], ["seed must be at least 0"]),
    (["engine.keep_memory=2"], ["engine.keep_memory must be true or false, not 2"]),
    (["algo.inner_lr=0"], ["inner_lr must be above 0"]),
    (["algo.inner_lr=fast"], ["algo.inner_lr must be a number, not 'fast'"]),
    (["algo.first_order=2"], ["algo.first_order must be true or false"]),
    (["model.widths=40"], ["model.widths must be a list"]),
    (["model.activation=step"], ["model.activation must be one of relu, tanh"]),
    (["task.shots=0"], ["shots must be at least 1"]),
    (
        ["algo=protonet"],
        ["algo=protonet needs examples of classes", "algorithms that fit it: adaptive", "shared_params"],
    ),
    (["model=conv4"], ["conv4 needs images", "model=mlp"]),
    (["device=gpu"], ["device must be auto, cpu, cuda or cuda:N"]),
    (["device=cuda:99"], ["device=cuda:99 does not exist", "device=cpu"]),
    (["algo._target_=nowhere.nothing"], ["nowhere.nothing cannot be imported"]),
    (["task=omniglot", "task.dataset=omniglot", "data_dir=empty"], ["empty/omniglot", "task.download=true"]),
    (["task=omniglot", "task.dataset=procedural", "task.ways=900"], ["ways must be at most"]),
    (
        ["task=omniglot", "task.dataset=procedural", "algo=maml", "task.train_ways=9"],
        ["set task.train_ways=5"],
    ),
    (
        ["task=text", "task.dataset=clinc150", "data_dir=empty"],
        ["empty/clinc150/data_full.json", "task.dataset=toy"],
    ),
    (["task=text", "task.dataset=toy", "task.split=06"], ["task.split must be one of auto, 01"]),
    (["task=text", "task.dataset=toy", "task.grams=[5,3]"], ["grams must be a rising pair"]),
    (["task=text", "task.dataset=toy", "task.grams=[1.5,3]"], ["a list of 2 values, each a whole number"]),
    (["task=text", "task.dataset=toy", "task.split=02"], ["the toy language has one split"]),
    (["task=text", "task.dataset=toy", "task.buckets=1e9"], ["task.buckets must be a whole number"]),
    (["task=text", "task.dataset=toy", "task.buckets=1000000000"], ["buckets must be from 2 to 1048576"]),
    (
        ["algo=protonet", "task=text_crosslingual", "task.dataset=toy", "task.train_ways=90"],
        ["train_ways must be at most"],
    ),
    (["task=text_crosslingual", "task.dataset=nusax", "data_dir=empty"], ["empty/nusax_senti"]),
    (["task=text", "task.dataset=toy", "model=mlp"], ["mlp needs numbers", "model=text_embedding"]),
    (["task=bandit", "task.arms=1"], ["arms must be at least 2, not 1"]),
    (["task=navigation", "task.discount=0"], ["discount must be above 0"]),
    (["task=navigation", "model=mlp"], ["mlp needs numbers", "model=policy"]),
    (["algo=thompson", "task=mdp"], ["thompson is a policy for task=bandit"]),
    (["algo=protonet", "task=bandit"], ["for a policy choose an algorithm that acts, such as maml"]),
    (["algo=transfer", "task=bandit"], ["algorithms that fit it:", "maml", "rl2"]),
    (
        ["algo=rl2", "task=bandit", "model=policy"],
        ["needs a policy with a memory", "model=fast_weights_policy"],
    ),
    (["algo=transfer", "task=navigation"], ["algo=transfer needs a loss over examples", "maml"]),
    (["resume=nowhere"], ["nothing to resume in nowhere"]),
    (["hydra.run.dir=a_file/run"], ["cannot be written", "hydra.run.dir"]),
    (["train.steps=[1"], ["train.steps"]),
    (["train.schedule=linear", "train.final=2"], ["train.final must be at most 1"]),
    (["algo=null"], ["Config group override must be a string"]),
]


def words_of(value):
    return " ".join(value) if value and isinstance(value, list) and "=" in value[0] else ""


def says_one_sentence(done, words):
    said = done.stdout + done.stderr
    assert done.returncode == 1, said
    assert "Traceback" not in said
    lines = [line for line in said.splitlines() if line.startswith("metarun: ")]
    assert len(lines) == 1, said
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize(("arguments", "words"), BAD_INPUT, ids=words_of)
def test_bad_input_gets_one_sentence(tmp_path, arguments, words):
    (tmp_path / "a_file").write_text("in the way")
    says_one_sentence(metarun(*arguments, cwd=tmp_path), words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train.step=3"], ["did you mean train.steps?"]),
        (["train.lr=-1"], ["train.lr must be a finite number above 0"]),
        (["algo.inner_lr=0"], ["inner_lr must be above 0"]),
        (["hydra.run.dir=a_file/run"], ["cannot be written", "hydra.run.dir"]),
    ],
    ids=["composing", "before torch", "building", "writing"],
)
def test_bad_input_ends_a_process_in_the_same_way(tmp_path, arguments, words):
    (tmp_path / "a_file").write_text("in the way")
    says_one_sentence(process(*arguments, cwd=tmp_path), words)


def test_full_error_shows_the_traceback(tmp_path):
    done = process("train.lr=-1", cwd=tmp_path, env={"HYDRA_FULL_ERROR": "1"})
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_a_broken_checkpoint_and_one_of_another_configuration_are_refused(finished, tmp_path):
    run = copytree(finished, tmp_path / "run")
    refused = metarun(f"resume={run}", "algo.inner_lr=0.5", cwd=tmp_path)
    assert refused.returncode == 1
    assert "algo.inner_lr=0.5 would change the run" in refused.stderr
    before = (run / "result.csv").read_bytes()
    path = run / "checkpoints" / "last.pt"
    whole = path.read_bytes()
    path.with_name("previous.pt").unlink()
    for broken in (whole[: len(whole) // 2], b"", b"not a checkpoint"):
        path.write_bytes(broken)
        done = metarun(f"resume={run}", cwd=tmp_path)
        assert done.returncode == 1
        assert "is broken" in done.stdout + done.stderr
        assert "Traceback" not in done.stdout + done.stderr
    assert (run / "result.csv").read_bytes() == before
    # The refused attempts have changed nothing: with its checkpoint back the run resumes.
    path.write_bytes(whole)
    assert metarun(f"resume={run}", "device=cpu", cwd=tmp_path).returncode == 0
    overrides, config = run / ".hydra" / "overrides.yaml", run / ".hydra" / "config.yaml"
    overrides.write_text(overrides.read_text() + "- train.lr=0.5\n")
    of_the_result = config.read_text()
    for with_result in (True, False):
        assert config.read_text() == of_the_result
        if not with_result:
            (run / "result.csv").unlink()
        other = metarun(f"resume={run}", cwd=tmp_path)
        assert other.returncode == 1
        assert "belongs to another configuration" in other.stdout + other.stderr


def test_a_new_run_keeps_out_of_the_directory_of_another(finished, tmp_path):
    run = copytree(finished, tmp_path / "run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    done = metarun("algo=reptile", "hydra.run.dir=run", cwd=tmp_path)
    assert done.returncode == 1
    assert "holds a run already" in done.stderr
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


class Malicious:
    def __reduce__(self):
        return (os.system, ("touch executed",))


def test_a_checkpoint_cannot_run_code(finished, tmp_path):
    run = copytree(finished, tmp_path / "run")
    for write in (torch.save, lambda content, path: sealed.save(path, content)):
        for name in ("last.pt", "previous.pt"):
            write({"format": 3, "theta": Malicious()}, run / "checkpoints" / name)
        done = metarun(f"resume={run}", cwd=tmp_path)
        assert done.returncode == 1
        assert "is broken" in done.stdout + done.stderr
        assert not (tmp_path / "executed").exists()


def test_one_failed_job_does_not_lose_the_others(tmp_path):
    done = metarun("-m", "algo.inner_lr=0,0.01", *QUICK, "hydra.sweep.dir=sweep", cwd=tmp_path)
    assert done.returncode == 1
    assert "inner_lr must be above 0" in done.stdout + done.stderr
    assert [path.parent.name for path in (tmp_path / "sweep").rglob("episodes.csv")] == ["1_maml_sinusoid"]
    refused = (tmp_path / "sweep" / "0_maml_sinusoid" / "result.csv").read_text()
    assert "failed" in refused
    assert "inner_lr must be above 0" in refused


def test_help_names_every_member_and_key_and_does_not_wait_for_torch(tmp_path):
    done = metarun("--help", cwd=tmp_path)
    assert done.returncode == 0
    conf = Path(__file__).parents[1] / "conf"
    for group in ("algo", "task", "model", "experiment"):
        for path in (conf / group).glob("*.yaml"):
            line = next(line for line in done.stdout.splitlines() if line.startswith(f"  {path.stem} "))
            assert len(line.split()) > 2, f"{path} has no description"
    assert "train.meta_batch" in done.stdout
    code = "import sys, metarun.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_completion_offers_members(tmp_path):
    done = metarun("-sc", "query=bash", cwd=tmp_path, env={"COMP_LINE": "metarun algo=", "COMP_POINT": "13"})
    assert {"algo=maml", "algo=protonet"} <= set(done.stdout.split())
