"""The pictures of test tasks, drawn for methods that know the answer."""

import re

import numpy as np
import pytest
import torch
from conftest import experiment_of

from metarun.evaluation import episodes, evaluate
from metarun.results import drawings, examples

IMAGES = ("task=omniglot", "task.dataset=procedural", "task.image_size=16", "task.queries=4", "model.filters=4")


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Return a function that draws for an experiment, and returns its figures by name."""

    def draw(*overrides):
        experiment, figures = experiment_of(*overrides), {}
        monkeypatch.setattr(drawings, "save_figure", lambda figure, path: figures.update({path.name: figure}))
        replica = experiment.replicas[0]
        theta = replica.algorithm.init(torch.Generator().manual_seed(0))
        examples.write_examples(experiment, 0, theta, tmp_path)
        return experiment, theta, figures

    return draw


def line(axis, label):
    return next(one for one in axis.lines if one.get_label() == label).get_xydata()


def test_curves_pass_through_the_points_of_a_learner_that_knows_the_form(drawn):
    _, _, figures = drawn("algo=oracle", "task=sinusoid", "task.shots=[2,6]")
    assert list(figures) == ["curves.png"]
    for axis in figures["curves.png"].axes:
        x, y = line(axis, "after adaptation").T
        assert [one.get_label() for one in axis.lines] == ["after adaptation"]
        for points in axis.collections:
            own_x, own_y = points.get_offsets().T
            np.testing.assert_allclose(np.interp(own_x, x, y), own_y, atol=0.03)
            assert len(own_x) in (*range(2, 7), 100)


def test_an_episode_shows_the_answers_that_are_scored(drawn):
    experiment, theta, figures = drawn("algo=protonet", *IMAGES)
    assert list(figures) == ["episode.png", "embedding.png"]
    scores = evaluate(experiment, experiment.replicas[0], theta, episodes(experiment, "test", 1)).scores["accuracy"]
    wrong, total = map(int, re.search(r"(\d+) of (\d+) shown", figures["episode.png"].axes[0].get_title()).groups())
    assert total == 20
    assert wrong == len(figures["episode.png"].axes[0].texts)
    assert 1 - wrong / total == pytest.approx(scores[0, -1].item())


def test_the_embedding_has_a_point_for_every_example(drawn):
    _, _, figures = drawn("algo=protonet", *IMAGES, "task.shots=[1,3]")
    offsets = [len(points.get_offsets()) for points in figures["embedding.png"].axes[0].collections]
    assert offsets[0::2][:5] == [4] * 5
    assert len(set(offsets[1::2])) == 1


def test_paths_of_the_optimal_policy_end_at_the_goal(drawn):
    _, _, figures = drawn("algo=optimal", "task=navigation", "task.horizon=20")
    assert list(figures) == ["paths.png"]
    for axis in figures["paths.png"].axes:
        *paths, start, goal = (one.get_xydata() for one in axis.lines)
        np.testing.assert_allclose(start, [[0, 0]])
        for path in paths:
            there = path[~np.isnan(path).any(1)]
            np.testing.assert_allclose(there[0], 0)
            # The last position that is seen is one step before the end, at most a step away.
            assert np.abs(there[-1] - goal[0]).max() < 0.11


def test_a_picture_that_cannot_be_drawn_costs_no_results(drawn, monkeypatch, caplog):
    def embedding(*arguments):
        raise ValueError("there is nothing to draw")

    monkeypatch.setattr(examples, "embedding", embedding)
    _, _, figures = drawn("algo=protonet", *IMAGES)
    assert list(figures) == ["episode.png"]
    assert "embedding cannot be shown: ValueError: there is nothing to draw" in caplog.text
