"""Every configuration file composes, builds what it names and runs."""

from importlib.resources import files

import pytest
from conftest import composed, experiment_of
from omegaconf import OmegaConf

from metarun.errors import UserError
from metarun.run import run

CONF = files("metarun.conf")
QUICK = ("train.steps=2", "train.eval_every=1", "train.val_episodes=2", "eval.episodes=3", "eval.adapt_steps=2")
CONTROL = ("task.shots=2", "task.queries=2")
SERVE_ALL = ("maml", "fomaml", "mamlpp", "reptile", "metasgd", "anil", "boil", "scratch")
TWENTY = ("sinusoid", "omniglot", "text", "navigation", "bandit")
"""Tasks on which every algorithm that fits takes twenty meta-steps; on others two."""
SMALL = {
    "omniglot": ("task.dataset=procedural", "task.image_size=16", "train.meta_batch=2"),
    "text": ("task.dataset=toy", "task.buckets=64", "train.meta_batch=2"),
    "text_crosslingual": ("task.dataset=toy", "task.buckets=64"),
    "navigation": ("task.horizon=5", *CONTROL),
    "bandit": ("task.pulls=4", *CONTROL),
    "gymnasium": ("task.horizon=5", *CONTROL),
    "halfcheetah_direction": ("task.horizon=5", *CONTROL),
    "halfcheetah_velocity": ("task.horizon=5", *CONTROL),
    "mdp": ("task.states=3", "task.actions=2", "task.episodes=2", "task.horizon=3", *CONTROL),
}


def names(group):
    return sorted(p.name.removesuffix(".yaml") for p in (CONF / group).iterdir() if p.name.endswith(".yaml"))


@pytest.mark.parametrize("task", names("task"))
@pytest.mark.parametrize("algo", names("algo"))
def test_every_pair_runs_or_is_refused_with_what_fits(algo, task, tmp_path):
    more = ("train.steps=20", "train.eval_every=20") if task in TWENTY else ()
    config, chosen = composed(f"algo={algo}", f"task={task}", *QUICK, *SMALL.get(task, ()), *more)
    try:
        run(config, chosen, tmp_path)
    except UserError as refused:
        said = str(refused)
        assert algo not in SERVE_ALL, said
        reasons = (
            "algorithms that fit it: ",
            "is a policy for ",
            "is a policy, and",
            "needs a model with",
            "is not known for",
            "learns from examples",
            "needs numbers",
        )
        assert any(reason in said for reason in reasons), said
        assert "fit it:" not in said or algo not in said.rpartition("fit it:")[2]
        assert f"{algo}_{task}" not in names("preset")
    else:
        assert (tmp_path / "result.csv").exists()


@pytest.mark.parametrize("model", names("model"))
def test_every_model_runs_where_it_fits(model, tmp_path):
    ran = []
    for task in ("omniglot", "text", "bandit"):
        try:
            run(*composed(f"task={task}", f"model={model}", *QUICK, *SMALL[task]), tmp_path / task)
            ran.append(task)
        except UserError as refused:
            assert "choose " in str(refused)  # noqa: PT017
    assert len(ran) == 1


@pytest.mark.parametrize(("downsample", "norm"), [("stride", "group"), ("max_pool", "batch"), ("max_pool", "none")])
def test_conv4_variants_run(downsample, norm, tmp_path):
    overrides = ("task=omniglot", "model.filters=4", f"model.downsample={downsample}", f"model.norm={norm}")
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


@pytest.mark.parametrize("preset", names("preset/by_model"))
def test_what_a_preset_sets_of_a_model_is_set_of_that_model_alone(preset):
    algo, task, model = preset.split("_", 2)
    overrides = (f"algo={algo}", f"task={task}", "task.dataset=procedural")
    own = OmegaConf.load(CONF / "preset" / "by_model" / f"{preset}.yaml").model
    built = experiment_of(*overrides, f"model={model}").config.model
    assert {key: built[key] for key in own} == own
    assert not set(own) & set(experiment_of(*overrides, "model=mlp").config.model)
