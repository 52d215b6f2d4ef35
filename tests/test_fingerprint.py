"""Two runs are paired where their test tasks are the same numbers, and nowhere else."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import composed, experiment_of
from omegaconf import OmegaConf
from results.test_compare import make_run

from metarun.checks.fingerprint import Fingerprint
from metarun.evaluation import episodes
from metarun.results.compare import compare
from metarun.results.comparison.reading import read_runs
from metarun.run import run
from metarun.tasks.navigation import Navigation
from metarun.tasks.sinusoid import Sinusoid

QUICK = ("train.steps=2", "train.meta_batch=2", "train.eval_every=1", "train.val_episodes=2", "eval.episodes=3")
SMALL = {
    "sinusoid": ("task.queries=20",),
    "omniglot": ("task.dataset=procedural", "task.image_size=16", "model=mlp"),
    "text": ("task.dataset=toy", "task.buckets=64"),
    "bandit": ("task.pulls=4", "task.shots=2", "task.queries=2"),
}


def hash_of(*overrides, family=None):
    experiment = experiment_of(*QUICK, *overrides)
    fingerprint = Fingerprint(family or experiment.family)
    list(fingerprint.over(episodes(experiment, "test", experiment.config.eval.episodes)))
    return fingerprint.text()


TRAINING = {
    "sinusoid": ("algo=reptile", "task.train_shots=3", "task.train_queries=4"),
    "omniglot": ("algo=protonet", "task.train_ways=7", "task.train_queries=2", "task.train_shots=2"),
    "text": ("algo=protonet", "task.train_ways=6", "task.train_queries=2", "train.precision=bfloat16"),
    "bandit": ("algo=rl2", "task.train_queries=3", "task.discount=0.5", "task.trace=0.5", "task.entropy=0.1"),
}
TESTING = {
    "sinusoid": ("task.amplitude=[0.1,5.1]", "task.queries=21", "eval.seed=9", "eval.episodes=4"),
    "omniglot": ("task.rotations=none", "task.ways=6", "task.shots=2", "eval.seed=9"),
    "text": ("task.grams=[2,5]", "task.shots=2"),
    "bandit": ("task.arms=6", "task.pulls=5", "eval.seed=9"),
}


@pytest.mark.parametrize("task", SMALL)
def test_equal_tasks_under_other_training_have_one_hash_and_other_tasks_another(task):
    reference = hash_of(f"task={task}", *SMALL[task])
    assert hash_of(f"task={task}", *SMALL[task], *TRAINING[task], "seed=3", "train.steps=7") == reference
    found = [hash_of(f"task={task}", *SMALL[task], other) for other in TESTING[task]]
    assert len({reference, *found}) == 1 + len(found)


class SplitSeed(Sinusoid):
    """A family whose data change by keys that sound as if they were of training or of the source alone."""

    def __init__(self, split_seed: int = 0, dataset_x: int = 0, **keys):
        super().__init__(shots=3, queries=5, **keys)
        self.shift = split_seed + dataset_x

    def sample(self, split, count, generator):
        tasks = super().sample(split, count, generator)
        for part in (tasks.support, tasks.query):
            part["y"] = part["y"] + self.shift
        return tasks


def ran(path, algo, **keys):
    config, names = composed(*QUICK, f"algo={algo}")
    config.task = OmegaConf.create({"_target_": "test_fingerprint.SplitSeed", **keys})
    run(config, names, path)
    return pd.read_csv(path / "result.csv", dtype={"episodes_hash": str}).iloc[0]


@pytest.mark.usefixtures("without_pictures")
def test_runs_of_a_family_whose_data_change_by_a_key_are_never_paired(tmp_path):
    rows = [ran(tmp_path / "maml", "maml"), ran(tmp_path / "cnp", "cnp", split_seed=1)]
    assert rows[0].dataset == rows[1].dataset
    assert rows[0].episodes_hash != rows[1].episodes_hash
    assert "not paired: the runs lack common test episodes" in compare([tmp_path], tmp_path)
    assert ran(tmp_path / "c", "maml", dataset_x=1).episodes_hash == rows[1].episodes_hash
    ran(tmp_path / "cnp again", "cnp")
    assert "paired on 3 episodes" in compare([tmp_path / "maml", tmp_path / "cnp again"], tmp_path)


class Hill(Navigation):
    """Other rewards for the same goals and tapes, which no tensor of the data shows."""

    def loss(self, predict, data):
        loss, scores = super().loss(predict, data)
        return loss, {name: score - 1 for name, score in scores.items()}


def test_what_a_score_means_is_part_of_the_hash():
    small = {"horizon": 4, "shots": 2, "queries": 2}
    given = ("task=navigation", "task.horizon=4", "task.shots=2", "task.queries=2")
    assert hash_of(*given, family=Navigation(**small)) == hash_of(*given)
    assert hash_of(*given, family=Hill(**small)) != hash_of(*given)


def test_the_last_bit_of_one_number_changes_the_hash():
    experiment = experiment_of(*QUICK)
    blocks = list(episodes(experiment, "test", 3))
    hashes = []
    for step in (0, 1):
        leaf = blocks[0].query["y"]
        leaf[2, 7] = torch.nextafter(leaf[2, 7], leaf[2, 7] + step)
        fingerprint = Fingerprint(experiment.family)
        list(fingerprint.over(blocks))
        hashes.append(fingerprint.text())
    assert hashes[0] != hashes[1]


def test_results_without_a_hash_are_never_paired_and_those_of_one_algorithm_never_averaged_over_other_tasks(tmp_path):
    scores = np.linspace(0.1, 0.9, 20)
    make_run(tmp_path, "a", "maml", "agnostic", 0, scores, episodes_hash=None)
    make_run(tmp_path, "b", "protonet", "dependent", 0, scores, episodes_hash=None)
    assert read_runs([tmp_path]).rows["episodes_hash"].tolist() == ["", ""]
    assert "not paired" in compare([tmp_path], tmp_path)
    make_run(tmp_path, "a", "maml", "agnostic", 0, scores, episodes_hash="00000000000a")
    make_run(tmp_path, "c", "maml", "agnostic", 1, scores / 2, episodes_hash="00000000000c")
    compare([tmp_path], tmp_path)
    table = pd.read_csv(tmp_path / "comparison.csv")
    mine = table[table["algo"] == "maml"]
    assert mine["variant"].tolist() == ["episodes=00000000000a", "episodes=00000000000c"]
    assert mine["score"].tolist() == pytest.approx([0.5, 0.25])
