"""Every algorithm's learner, loaded in a fresh process that cannot build a family with data: the scores of the run."""

import subprocess
import sys
from pathlib import Path

import pytest
from commands import environment
from conftest import experiment_of
from learners import leave_a_checkpoint, with_algorithm

from metarun.assemble import algorithm_names
from metarun.evaluation import episodes, evaluate
from metarun.system import sealed

EPISODES = 3
TASKS = {
    "sinusoid": ("task.shots=5", "task.queries=7"),
    "text": (
        "task.dataset=toy",
        "task.buckets=64",
        "task.ways=3",
        "task.train_ways=3",
        "task.queries=4",
        "model.width=8",
    ),
    "bandit": ("task.arms=3", "task.pulls=6", "task.shots=4", "task.queries=5", "model=gru_policy", "model.width=8"),
    "mdp": ("task.states=3", "task.actions=2", "task.episodes=2", "task.horizon=3"),
}
"""A tiny task of each kind."""
OF_TASK = {
    "sinusoid": (
        *("adaptive", "anil", "anp", "boil", "cnp", "dkt", "fomaml", "imaml", "maml", "mamlpp", "metasgd", "multitask"),
        *("np", "oracle", "reference", "reptile", "scratch", "shared_params", "snail"),
    ),
    "text": (
        *("baselinepp", "centroid", "incontext", "linear_probe", "mann", "matching", "meta_baseline", "metaoptnet"),
        *("protomaml", "protonet", "relation", "shared_model", "transfer"),
    ),
    "bandit": ("greedy", "optimal", "random", "rl2", "thompson", "ucb1"),
    "mdp": ("psrl",),
}
SUPERNETS = ("metanas",)


def test_no_algorithm_is_left_out():
    assert sorted([*SUPERNETS, *(name for names in OF_TASK.values() for name in names)]) == algorithm_names()


def leave_a_run(experiment, directory: Path) -> None:
    """Leave in ``directory`` a checkpoint, test tasks and their scores."""
    theta = leave_a_checkpoint(experiment, directory)
    tasks = next(episodes(experiment, "test", EPISODES))
    scored = evaluate(experiment, experiment.replicas[0], theta, [tasks], testing=True)
    score = scored.scores[experiment.family.spec.metrics[0].name][:, -1]
    sealed.save(directory / "expected.pt", {**tasks._asdict(), "score": score})


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("learners")
    for task, settings in TASKS.items():
        experiment = experiment_of(f"task={task}", *settings, f"algo={OF_TASK[task][0]}", "eval.adapt_steps=2")
        for algo in OF_TASK[task] + (SUPERNETS if task == "sinusoid" else ()):
            model = "supernet_mlp" if algo in SUPERNETS else None
            leave_a_run(with_algorithm(experiment, algo, model), root / algo)
    return root


CHILD = """
import sys
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path
import torch
torch.set_num_threads(1)
import metarun
from omegaconf import OmegaConf
from metarun.after import load
from metarun.after.learner import AdaptedTasks
from metarun.after.policy import AdaptedPolicy
from metarun.contracts import Task
from metarun.nn.transforms import task_of
from metarun.system import sealed
from metarun.targets.scoring import loss_of
from metarun.tasks.sinusoid import Sinusoid
from metarun.tasks.text import Text

def no_data(self, *args, **kwargs):
    raise SystemExit("a family was built")

Sinusoid.__init__ = Text.__init__ = no_data

compose = cache(load.composed)

def composed(overrides, config_dir=None):
    # Composing takes longer than all the rest, so each task is composed once; what differs are the algorithm's keys.
    algo, task, model = (one.partition("=")[2] for one in overrides)
    config, names = compose((f"task={task}", f"model={model}"))
    own = OmegaConf.create((files("metarun.conf") / "algo" / f"{algo}.yaml").read_text())
    own.pop("defaults", None)
    config = config.copy()
    OmegaConf.set_struct(config, False)
    config.algo = own
    return config, {**names, "algo": algo}

load.composed = composed

class AsItIs:
    def inputs(self, x):
        return x

for directory in sorted(Path(sys.argv[1]).iterdir()):
    expected = sealed.load(directory / "expected.pt")
    learner = metarun.load(directory)
    tasks = Task(*(expected[name] for name in ("support", "query", "seed")))
    if learner.spec.offers("policy"):
        found = []
        for one in map(lambda i: task_of(tasks, i), range(len(tasks.seed))):
            policy = AdaptedPolicy(learner.learned, learner.learned.family, one.support, learner.steps, one.seed)
            found.append(loss_of(learner.learned.family)(policy.policy, one.query)[1]["return"])
    else:
        parts = replace(learner.learned, converter=AsItIs())
        y, classes = tasks.support["y"], learner.spec.offers("classes")
        adapted = AdaptedTasks(parts, tasks.support["x"], y.argmax(-1) if classes else y, learner.steps, tasks.seed)
        answers = [torch.from_numpy(one) for one in adapted.predict(tasks.query["x"])]
        if classes:
            found = [(a == y.argmax(-1)).float().mean() for a, y in zip(answers, tasks.query["y"])]
        else:
            found = [(a - y).square().mean() for a, y in zip(answers, tasks.query["y"])]
    apart = (torch.stack(found) - expected["score"]).abs().max().item()
    print(directory.name, apart, learner.learned.converter is not None, flush=True)
"""


def test_learners_give_the_scores_of_their_runs_in_a_fresh_process_without_data(runs, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(runs)], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = {name: float(apart) for name, apart, _ in map(str.split, done.stdout.splitlines())}
    assert sorted(found) == algorithm_names()
    assert max(found.values()) <= 1e-6, found
