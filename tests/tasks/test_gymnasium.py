"""Environments of gymnasium against plain loops over the same environments."""

import sys

import numpy as np
import pytest
import torch
from conftest import composed
from scenarios import generator

from metarun.algos.agnostic.maml import maml
from metarun.engine.batch import evaluate, meta_gradient
from metarun.errors import UserError
from metarun.models.policy import Policy
from metarun.run import run
from metarun.targets.scoring import loss_of
from metarun.tasks import control
from metarun.tasks.gymnasium import Gymnasium
from metarun.tree import leaves

gymnasium = pytest.importorskip("gymnasium")
pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")


def plain_return(name, parameters, start, actions):
    """Rewards of one episode, by gymnasium alone."""
    environment = gymnasium.make(name, max_episode_steps=len(actions))
    for parameter, value in parameters.items():
        setattr(environment.unwrapped, parameter, value)
    environment.reset(seed=start)
    total = 0.0
    for action in actions:
        _, reward, ended, cut, _ = environment.step(action)
        total += float(reward)
        if ended or cut:
            break
    return total


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("name", "ranges", "native"),
    [
        ("Pendulum-v1", [["g", 5, 15]], lambda action: np.clip(action, -1, 1).astype(np.float32) * 2),
        ("CartPole-v1", [["length", 0.2, 1], ["force_mag", 5, 15]], lambda action: int(action.argmax())),
    ],
)
def test_tasks_side_by_side_score_as_plain_loops(name, ranges, native):
    """Each task has its own parameters, each episode its own start, and what follows an end does not count."""
    family = Gymnasium(name, ranges, horizon=30, shots=2, queries=3)
    tasks = family.sample("test", 4, generator())
    torch.manual_seed(0)
    policy = Policy(family.spec, (8,))
    played = []

    def one_task(data):
        trajectory = control.rollout(family.environment, policy, data)
        return trajectory.action, trajectory.reward * trajectory.counts

    actions, rewards = torch.func.vmap(one_task)(tasks.query)
    for task in range(4):
        parameters = dict(zip([row[0] for row in ranges], tasks.query["parameters"][task, 0].tolist(), strict=True))
        for episode in range(3):
            moves = [native(action) for action in actions[task, :, episode].numpy()]
            played.append(plain_return(name, parameters, tasks.query["start"][task, episode].item(), moves))
    torch.testing.assert_close(rewards.sum(1).flatten(), torch.tensor(played), atol=1e-4, rtol=1e-5)


@pytest.mark.usefixtures("float64")
def test_meta_gradient_of_many_tasks_is_the_mean_of_single_ones():
    family = Gymnasium(horizon=6, shots=3, queries=3)
    torch.manual_seed(0)
    policy = Policy(family.spec, (8,), "tanh")
    algorithm = maml(policy, 0.1)
    theta, tasks = algorithm.init(generator()), family.sample("train", 3, generator())
    together = meta_gradient(algorithm, theta, tasks, loss_of(family))
    singles = [
        meta_gradient(
            algorithm,
            theta,
            type(tasks)(*({name: leaf[i : i + 1] for name, leaf in part.items()} for part in tasks[:2])),
            loss_of(family),
        )
        for i in range(3)
    ]
    for whole, *parts in zip(leaves(together.grads), *(leaves(single.grads) for single in singles), strict=True):
        torch.testing.assert_close(whole, sum(parts) / 3)


def test_a_cheetah_is_paid_for_its_direction_or_its_velocity():
    pytest.importorskip("mujoco")
    family = Gymnasium("HalfCheetah-v5", (), [["direction", -1, 1]], horizon=5, shots=2, queries=2)
    data = {name: leaf[0] for name, leaf in family.sample("test", 1, generator()).query.items()}

    def rewards(family, value):
        changed = data | {"parameters": torch.full_like(data["parameters"], value)}
        noise_alone = control.rollout(family.environment, lambda seen: torch.zeros(*seen.action.shape[:2], 12), changed)
        return noise_alone.reward

    forwards, backwards, still = (rewards(family, value) for value in (1.0, -1.0, 0.0))
    speed = (forwards - backwards) / 2
    assert speed.abs().min() > 1e-4
    torch.testing.assert_close(forwards + backwards, 2 * still)
    aimed = Gymnasium("HalfCheetah-v5", [["velocity", 0, 2]], (), horizon=5, shots=2, queries=2)
    torch.testing.assert_close(rewards(aimed, 0.7) - still, -(speed - 0.7).abs())


def test_first_order_training_through_the_command(tmp_path):
    small = ("task=gymnasium", "task.horizon=5", "task.shots=2", "task.queries=2", "train.steps=2")
    run(*composed("algo=fomaml", *small, "train.val_episodes=2", "eval.episodes=3", "eval.adapt_steps=1"), tmp_path)
    assert "Pendulum-v1:g=[5.0, 15.0]:horizon=5" in (tmp_path / "result.csv").read_text()


def test_scores_do_not_depend_on_how_many_tasks_run_together():
    family = Gymnasium(horizon=8, shots=2, queries=2)
    policy = Policy(family.spec, (4,))
    algorithm = maml(policy, 0.1)
    theta, tasks = algorithm.init(generator()), family.sample("test", 3, generator())
    first = type(tasks)(*({name: leaf[:1] for name, leaf in part.items()} for part in tasks[:2]))
    whole, alone = (evaluate(algorithm, theta, part, loss_of(family), 1).scores["return"] for part in (tasks, first))
    torch.testing.assert_close(whole[:1], alone)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"environment": "Nowhere-v0"}, "gymnasium cannot make Nowhere-v0: .*"),
        ({"ranges": [["gravity", 1, 2]]}, "Pendulum-v1 has no attribute 'gravity' to make tasks from"),
        ({"ranges": [["velocity", 1, 2]]}, "Pendulum-v1 has no attribute 'velocity' .* does not report a speed"),
        ({"ranges": []}, "ranges or choices must name what tasks differ in"),
        ({"ranges": [["g", 15, 5]]}, "ranges must give the lowest and the highest value of g, not .*"),
        ({"ranges": [["g"]]}, "ranges must be lists of a name and numbers, not .*"),
        ({"choices": [["g", 1]]}, "ranges and choices must not name the same parameter"),
        ({"options": {"colour": 1}}, "gymnasium cannot make Pendulum-v1: .*colour.*"),
    ],
)
def test_what_cannot_be_a_task_is_refused(arguments, sentence):
    with pytest.raises((UserError, ValueError), match=sentence):
        Gymnasium(**arguments)


def test_without_gymnasium_the_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(UserError, match=r"pip install 'metarun\[gymnasium\]'"):
        Gymnasium()
