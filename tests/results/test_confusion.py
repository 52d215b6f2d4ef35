"""Which classes are taken for which: counts over episodes whose classes differ, and where the answers come from."""

import csv

import numpy as np
import torch
from conftest import experiment_of

from metarun import evaluation
from metarun.checks.fingerprint import Fingerprint
from metarun.evaluation import episodes, evaluate
from metarun.results.confusion import MOST_SHOWN, confused, described_confusion, plot_confused, shown_classes
from metarun.results.of_run import write_confusion
from metarun.targets.classes import chosen_classes


def drawn(episodes, ways, queries, classes, seed=0):
    """Answers of episodes with different classes, every query's class and a random one of the episode's."""
    rng = np.random.default_rng(seed)
    own = np.array([rng.choice(classes, ways, replace=False) for _ in range(episodes)])
    true = own.repeat(queries, 1)
    return np.stack([true, np.take_along_axis(own, rng.integers(0, ways, true.shape), 1)], -1)


def test_counts_and_shares_are_those_of_a_loop():
    answers = drawn(40, 3, 4, 9)
    answers[0, -2:] = -1  # padding
    found = confused(answers, [f"c{i}" for i in range(9)])
    count, could = {}, {}
    for episode in answers.tolist():
        real = [(a, b) for a, b in episode if a >= 0]
        for a, b in real:
            count[a, b] = count.get((a, b), 0) + 1
            for other in {one for one, _ in real}:
                could[a, other] = could.get((a, other), 0) + 1
    pairs = list(zip(found.true.tolist(), found.chosen.tolist(), strict=True))
    assert dict(zip(pairs, found.queries.tolist(), strict=True)) == count
    assert found.of.tolist() == [could[pair] for pair in pairs]
    wrong = [pair[0] != pair[1] for pair in pairs]
    assert wrong == sorted(wrong, reverse=True)
    assert found.queries[wrong].tolist() == sorted(found.queries[wrong].tolist(), reverse=True)
    first = pairs[0]
    assert described_confusion(found)[0] == (
        f"c{first[0]} taken for c{first[1]}   {100 * count[first] / could[first]:.1f} % of {could[first]} queries"
    )


def test_of_hundreds_of_classes_a_picture_shows_the_most_confused(tmp_path):
    answers = drawn(50, 20, 2, 400)
    answers[..., 1] = answers[..., 0]
    answers[:5, :2], answers[:5, 2:4] = [7, 300], 300
    found = confused(answers, [f"a rather long name of class number {i:03}" for i in range(400)])
    assert (found.true[0], found.chosen[0], found.queries[0]) == (7, 300, 10)
    assert {7, 300} <= set(shown_classes(found))
    assert len(shown_classes(found)) == MOST_SHOWN
    plot_confused(tmp_path / "confusion.png", "a run", found)
    assert (tmp_path / "confusion.png").stat().st_size > 1000


def test_answers_are_classes_whatever_their_columns():
    identity = torch.tensor([8, 5, 8, 5, 0])
    y = torch.eye(2)[torch.tensor([1, 0, 1, 0, 0])] * torch.tensor([1.0, 1, 1, 1, 0])[:, None]
    output = torch.tensor([[0.0, 1], [0, 1], [1, 0], [torch.nan, -1], [0, 0]])
    data = {"y": y, "identity": identity, "weight": torch.tensor([1.0, 1, 1, 1, 0])}
    assert chosen_classes(output, data).tolist() == [[8, 8], [5, 8], [8, 5], [5, 5], [-1, -1]]


def test_the_answers_of_a_test_are_those_that_were_scored(tmp_path):
    sizes = ("task.dataset=toy", "task.buckets=64", "task.ways=3", "task.train_ways=3", "model.width=8")
    experiment = experiment_of("algo=protonet", "task=text", *sizes)
    tasks = list(episodes(experiment, "test", 6))
    theta = experiment.initial_thetas()[0]
    scored = evaluate(experiment, experiment.replicas[0], theta, tasks, testing=True)
    assert evaluate(experiment, experiment.replicas[0], theta, tasks).answers is None
    right = (scored.answers[..., 0] == scored.answers[..., 1]).double().mean(1)
    torch.testing.assert_close(right, scored.scores["accuracy"][:, -1].double())
    row = {"replica": 0, "algo": "protonet", "task": "text", "varied": "", "seed": 0}
    write_confusion(experiment, [(row, evaluation.Tested(scored, 0.0, 0.0, "", False, {}))], tmp_path)
    with (tmp_path / "confusion.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sum(int(one["queries"]) for one in rows) == scored.answers[..., 0].numel()
    assert {one["class"] for one in rows} <= set(experiment.family.class_names)
    assert (tmp_path / "confusion.png").exists()


def test_what_classes_are_called_does_not_change_the_hash_of_the_episodes():
    experiment = experiment_of("algo=protonet", "task=text", "task.dataset=toy", "task.buckets=64", "task.ways=3")
    block = next(episodes(experiment, "test", 2))
    named, without = Fingerprint(experiment.family), Fingerprint(experiment.family)
    named.add(block)
    block.query.pop("identity")
    without.add(block)
    assert named.text() == without.text()
