"""Every configuration file composes, builds what it names and runs."""

from importlib.resources import files

import pytest
from conftest import composed, experiment_of

from metarun.errors import UserError
from metarun.run import run

CONF = files("metarun.conf")
QUICK = ("train.steps=2", "train.eval_every=1", "train.val_episodes=2", "eval.episodes=3", "eval.adapt_steps=2")
SMALL = {"omniglot": ("task.dataset=procedural", "model.filters=4", "task.image_size=16")}


def names(group):
    return sorted(p.name.removesuffix(".yaml") for p in (CONF / group).iterdir() if p.name.endswith(".yaml"))


def task_kind(task):
    return experiment_of("algo=scratch", f"task={task}", *SMALL.get(task, ())).family.spec.kind


def algorithm_kinds(algo):
    """From a task that every algorithm so far serves."""
    return experiment_of(f"algo={algo}", "task=omniglot", *SMALL["omniglot"]).algorithm.kinds


@pytest.mark.parametrize("task", names("task"))
@pytest.mark.parametrize("algo", names("algo"))
def test_every_pair_runs_or_is_refused_with_what_fits(algo, task, tmp_path):
    config, chosen = composed(f"algo={algo}", f"task={task}", *QUICK, *SMALL.get(task, ()))
    if task_kind(task) not in algorithm_kinds(algo):
        with pytest.raises(UserError, match="algorithms that fit it: ") as refused:
            run(config, chosen, tmp_path)
        assert algo not in str(refused.value).rpartition(":")[2]
        assert f"{algo}_{task}" not in names("preset")
    else:
        run(config, chosen, tmp_path)
        assert (tmp_path / "result.csv").exists()


@pytest.mark.parametrize("model", names("model"))
def test_every_model_runs(model, tmp_path):
    small = SMALL["omniglot"] if model.startswith("conv4") else ("task.dataset=procedural", "task.image_size=16")
    run(*composed("task=omniglot", f"model={model}", *QUICK, *small), tmp_path)


@pytest.mark.parametrize(("downsample", "norm"), [("stride", "group"), ("max_pool", "batch"), ("max_pool", "none")])
def test_conv4_variants_run(downsample, norm, tmp_path):
    overrides = ("task=omniglot", f"model.downsample={downsample}", f"model.norm={norm}")
    run(*composed(*overrides, *QUICK, *SMALL["omniglot"]), tmp_path)


@pytest.mark.parametrize("experiment", names("experiment"))
def test_every_experiment_builds(experiment):
    _, chosen = composed(f"experiment={experiment}")
    if chosen["task"] == "omniglot":
        _, chosen = composed(f"experiment={experiment}", "task.dataset=procedural", "task.split=auto")
    assert experiment.startswith(chosen["algo"])
    header = (CONF / "experiment" / f"{experiment}.yaml").read_text()
    assert "Expected" in header


def test_an_experiment_wins_over_the_preset_and_the_command_line_over_both():
    config, chosen = composed("experiment=maml_sinusoid", "train.steps=7")
    assert (chosen["algo"], chosen["task"]) == ("maml", "sinusoid")
    assert config.task.shots == 5
    assert config.train.steps == 7
    assert experiment_of("algo=protonet", "task=omniglot", "task.dataset=procedural").config.task.train_ways == 60
