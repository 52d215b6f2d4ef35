"""What a loaded learner takes, gives and refuses, next to independent computations."""

import copy
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import date

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from commands import rows
from conftest import experiment_of
from learners import leave_a_checkpoint, with_algorithm
from torch import nn

import metarun
from metarun.after.later_test import later_test
from metarun.after.learner import Learner
from metarun.after.policy import Dialect, OwnEnvironments
from metarun.data.portable import plain, portable
from metarun.system import sealed
from metarun.targets.classes import Classes
from metarun.tasks.bandit import Bandit
from metarun.tasks.control import rollout, total_return

WALK = ("task=navigation", "task.horizon=6", "task.shots=4", "task.queries=2", "model.widths=[8]", "eval.adapt_steps=2")


@pytest.fixture(scope="module")
def waves(tmp_path_factory):
    """A directory of learners of sine waves by algorithm, and the parameters of the first."""
    root = tmp_path_factory.mktemp("waves")
    experiment = experiment_of("algo=maml", "task=sinusoid", "eval.adapt_steps=3", "algo.inner_lr=0.05")
    theta = leave_a_checkpoint(experiment, root / "maml")
    for algo in ("mamlpp", "shared_params"):
        leave_a_checkpoint(with_algorithm(experiment, algo), root / algo)
    return root, theta


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    """A directory of learners of sentences by algorithm."""
    root = tmp_path_factory.mktemp("sentences")
    sizes = ("task.dataset=toy", "task.buckets=64", "task.ways=3", "task.train_ways=3", "model.width=8")
    experiment = experiment_of("algo=protonet", "task=text", *sizes)
    leave_a_checkpoint(experiment, root / "protonet")
    leave_a_checkpoint(with_algorithm(experiment, "maml"), root / "maml")
    return root


@pytest.fixture(scope="module")
def walker(tmp_path_factory):
    directory = tmp_path_factory.mktemp("walker")
    leave_a_checkpoint(experiment_of("algo=maml", *WALK), directory)
    return metarun.load(directory)


def test_threads_share_a_learner_without_sharing_weights(waves):
    learner, x = metarun.load(waves[0] / "maml"), np.linspace(-4, 4, 9)
    adapted = [learner.adapt(x, scale * x) for scale in (1.0, -3.0)]
    expected = [one.predict(x) for one in adapted]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda i: adapted[i % 2].predict(x), range(100)))
    assert all(np.array_equal(one, expected[i % 2]) for i, one in enumerate(found))


def test_products_are_rounded_as_in_the_run_and_afterwards_as_before(waves):
    """Torch's own default rounds convolutions on a GPU, with which predictions would not be those of the run's test."""
    learner, seen = metarun.load(waves[0] / "maml"), set()
    predict = learner.learned.algorithm.predict

    def spied(*arguments):
        seen.add((torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()))
        return predict(*arguments)

    spying = replace(learner.learned, algorithm=learner.learned.algorithm._replace(predict=spied))
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    assert before[0]
    Learner(spying).adapt([0.0, 1.0], [1.0, 0.0]).predict([0.5])
    Learner(spying).adapt_tasks([[0.0, 1.0]], [[1.0, 0.0]]).predict([[0.5]])
    assert seen == {(False, "highest")}
    assert before == (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision())


def test_a_learner_that_needs_its_data_is_not_made_from_others(tmp_path):
    """Families with their own loss are built again, and what they find by then may have changed."""
    experiment = experiment_of("algo=maml", *WALK)
    leave_a_checkpoint(experiment, tmp_path)
    content = sealed.load(tmp_path / "checkpoints" / "best.pt")
    sealed.save(tmp_path / "other.pt", content | {"dataset": "walks of other people"})
    with pytest.raises(metarun.UserError, match=r"trained on, walks of other people, and .* now are navigation"):
        metarun.load(tmp_path / "other.pt")


def test_a_learner_of_another_precision_than_torchs_default_is_refused_in_words(waves, request):
    learner = metarun.load(waves[0] / "maml")
    request.getfixturevalue("float64")
    for use in (lambda: metarun.load(waves[0] / "maml"), lambda: learner.adapt([0.0, 1.0], [1.0, 0.0])):
        with pytest.raises(metarun.UserError, match=r"trained in torch.float32, and torch's default is torch.float64"):
            use()


def test_adaptation_is_gradient_descent_as_plain_autograd_does_it(waves):
    root, theta = waves
    learner = metarun.load(root / "maml")
    x, y = np.linspace(-4, 4, 9), 2 * np.sin(np.linspace(-4, 4, 9))
    adapted = learner.adapt(x, y, steps=2)
    layers = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    for own, given in zip(layers.parameters(), theta["weights"].values(), strict=True):
        own.data = given.clone()
    inputs, targets = (torch.tensor(v, dtype=torch.float32)[:, None] for v in (x, y))
    curve = []
    for step in range(3):
        loss = (layers(inputs) - targets).square().mean()
        curve.append(loss.item())
        if step < 2:
            gradients = torch.autograd.grad(loss, list(layers.parameters()))
            for own, slope in zip(layers.parameters(), gradients, strict=True):
                own.data -= 0.05 * slope
    np.testing.assert_allclose(adapted.curve, curve, rtol=1e-5)
    found = adapted.predict([0.5, -1.0])
    np.testing.assert_allclose(found, layers(torch.tensor([[0.5], [-1.0]])).detach().numpy()[:, 0], rtol=1e-5)
    assert found.shape == (2,)
    assert adapted.classes_ is None
    assert len(learner.adapt(x, y).curve) == 4  # the run's own number of steps


def test_arrays_tensors_tables_and_lists_are_the_same_examples(waves):
    learner = metarun.load(waves[0] / "shared_params")
    x, y = np.linspace(-4, 4, 9), np.cos(np.linspace(-4, 4, 9))
    expected = learner.adapt(x, y).predict(x)
    given = [
        (torch.tensor(x)[:, None], torch.tensor(y)),
        (pd.DataFrame({"x": x}), pd.Series(y)),
        (x.tolist(), y.tolist()),
    ]
    for inputs, targets in given:
        np.testing.assert_allclose(learner.adapt(inputs, targets).predict(inputs), expected, rtol=1e-6)
    column = learner.adapt(x, y[:, None])
    assert column.predict(x).shape == (9, 1)
    assert math.isnan(column.curve[0])  # nothing can be predicted without examples
    assert column.curve[1] < np.square(y).mean()


def test_many_tasks_at_once_equal_one_at_a_time(waves, sentences):
    learner = metarun.load(waves[0] / "maml")
    x = np.linspace(-4, 4, 9)
    xs, ys = [x, x[:4], x[2:]], [np.sin(x), np.cos(x[:4]), x[2:]]
    together, queries = learner.adapt_tasks(xs, ys), [x[:2], x, x[3:]]
    for i, found in enumerate(together.predict(queries)):
        alone = learner.adapt(xs[i], ys[i])
        np.testing.assert_allclose(found, alone.predict(queries[i]), atol=1e-5)
        np.testing.assert_allclose(together.curve[i], alone.curve, rtol=1e-5)
    # Tasks that differ in their number of classes, for a method with and one without a head of a fixed width.
    for algo in ("maml", "protonet"):
        learner = metarun.load(sentences / algo)
        xs = [["good day", "hello there", "bye now"], ["play it", "stop it", "good bye", "hello"]]
        ys = [["hi", "hi", "bye"], ["go", "halt", "bye", "go"]]
        together = learner.adapt_tasks(xs, ys)
        for i, chances in enumerate(together.predict_proba([["hello"], ["stop", "play", "bye"]])):
            alone = learner.adapt(xs[i], ys[i])
            asked = [["hello"], ["stop", "play", "bye"]][i]
            np.testing.assert_allclose(chances, alone.predict_proba(asked), atol=1e-5)
            assert list(together.classes_[i]) == list(alone.classes_)


def test_labels_of_any_kind_come_back(sentences):
    learner = metarun.load(sentences / "protonet")
    texts = ["good day to you", "hello hello", "see you later", "bye bye", "play a song"]
    for labels, classes in (
        (["hi", "hi", "bye", "bye", "play"], ["bye", "hi", "play"]),
        ([3, 3, -1, -1, 7], [-1, 3, 7]),
        (np.array([2.5, 2.5, 0.5, 0.5, 1.5]), [0.5, 1.5, 2.5]),
        ([("a", 1), ("a", 1), None, None, "b"], [("a", 1), None, "b"]),
        (pd.Series(list("ccaab")), ["a", "b", "c"]),
    ):
        adapted = learner.adapt(texts, labels)
        assert list(adapted.classes_) == classes
        chances, found = adapted.predict_proba(texts), adapted.predict(texts)
        np.testing.assert_allclose(chances.sum(1), 1, rtol=1e-6)
        assert [classes[i] for i in chances.argmax(1)] == list(found)
        assert list(found) == list(labels)
    # More classes than in training: prototypes need no head.
    assert len(learner.adapt(texts, range(5)).classes_) == 5


@portable
@dataclass(frozen=True)
class Health(Classes):
    """Classes that mean the same in every task."""

    names: tuple[str, ...] = ("healthy", "ill", "unclear")


def test_classes_with_a_fixed_meaning_keep_their_columns(sentences, tmp_path):
    content = sealed.load(sentences / "protonet" / "checkpoints" / "best.pt")
    content["family"]["spec"]["from"]["target"] = plain(Health(3))
    sealed.save(tmp_path / "best.pt", content)
    learner = metarun.load(tmp_path / "best.pt")
    adapted = learner.adapt(["feeling well", "feeling sick", "who knows"], ["unclear", "ill", "healthy"])
    assert list(adapted.classes_) == ["healthy", "ill", "unclear"]
    assert list(adapted.predict(["feeling sick", "feeling well"])) == ["ill", "unclear"]
    together = learner.adapt_tasks([["well", "sick"], ["well", "sick"]], [["healthy", "ill"], ["ill", "unclear"]])
    assert [list(one) for one in together.predict([["sick"], ["well", "sick"]])] == [["ill"], ["ill", "unclear"]]
    with pytest.raises(ValueError, match="the classes are healthy, ill, unclear, and y has dead"):
        learner.adapt(["one", "two"], ["ill", "dead"])


def test_a_head_of_a_fixed_width_takes_fewer_classes_and_refuses_more(sentences):
    learner = metarun.load(sentences / "maml")
    texts = ["good day to you", "see you later", "play a song", "stop"]
    adapted = learner.adapt(texts[:2], ["hi", "bye"])
    chances = adapted.predict_proba(texts)
    assert chances.shape == (4, 2)
    np.testing.assert_allclose(chances.sum(1), 1, rtol=1e-6)
    assert set(adapted.predict(texts)) <= {"hi", "bye"}
    with pytest.raises(ValueError, match=r"head for 3 classes.*y has 4.*task\.ways=4.*protonet"):
        learner.adapt(texts, "abcd")


def test_what_a_learner_cannot_take_is_refused_in_words(waves, sentences, walker, tmp_path):
    maml, words = metarun.load(waves[0] / "maml"), metarun.load(sentences / "protonet")
    with pytest.raises(metarun.UserError, match="no probabilities"):
        maml.adapt([0, 1], [0, 1]).predict_proba([0])
    for x, y, sentence in (
        ([0, 1, 2], [0, 1], "3 examples and y has 2"),
        ([[0, 1]], [0], r"x must have shape \[examples, 1\]"),
        ([0, 1], ["a", "b"], "y must hold numbers"),
        ([0, math.inf], [0, 1], "finite"),
        ([], [], "at least one|must"),
    ):
        with pytest.raises(ValueError, match=sentence):
            maml.adapt(x, y)
    with pytest.raises(ValueError, match="sentences"):
        words.adapt([1, 2], ["a", "b"])
    with pytest.raises(ValueError, match="at least two classes"):
        words.adapt(["one", "two"], ["a", "a"])
    with pytest.raises(ValueError, match="one label per example"):
        words.adapt(["one", "two"], [[1, 0], [0, 1]])
    with pytest.raises(ValueError, match=r"learned \d+ steps"):
        metarun.load(waves[0] / "mamlpp").adapt([0, 1], [0, 1], steps=100)
    with pytest.raises(metarun.UserError, match="adapt_to"):
        walker.adapt([0], [0])
    with pytest.raises(metarun.UserError, match=r"adapt\(x, y\)"):
        maml.adapt_to({})
    with pytest.raises(metarun.UserError, match="There is no checkpoint"):
        metarun.load(tmp_path)
    with pytest.raises(metarun.UserError, match="holds 1 replicas"):
        metarun.load(waves[0] / "maml", replica=1)


def tampered(run, tmp_path, change):
    """A copy of a run's best.pt in which the configuration has been changed."""
    content = sealed.load(run / "checkpoints" / "best.pt")
    config = yaml.safe_load(content["config"])
    change(content, config)
    sealed.save(tmp_path / "best.pt", content | {"config": yaml.safe_dump(config)})
    return tmp_path / "best.pt"


@pytest.mark.parametrize(
    "change",
    [
        lambda content, config: config["algo"].update(_target_="evil.run"),
        lambda content, config: config["task"].update(_target_="evil.run"),
        lambda content, config: config["model"].update(widths={"_target_": "evil.run"}),
        lambda content, config: config["model"].update(widths=[{"_target_": "evil.run"}]),
        lambda content, config: config["algo"].update(inner_lr="${oc.env:HOME}"),
        lambda content, config: config["algo"].update(inner_lr=date(2020, 1, 1)),
        lambda content, config: content["names"].update(algo="../evil"),
        lambda content, config: content["family"].update(spec={"made by": "evil.Spec", "from": {}}),
        lambda content, config: config["train"].update(evil=1),
        lambda content, config: config.pop("eval"),
        lambda content, config: content.pop("family"),
        lambda content, config: content.update(theta={"weights": {}}),
    ],
)
def test_a_checkpoint_of_somebody_else_runs_no_code(waves, tmp_path, monkeypatch, change):
    (tmp_path / "evil.py").write_text("import pathlib; pathlib.Path('executed').touch()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(metarun.UserError):
        metarun.load(tampered(waves[0] / "maml", tmp_path, change))
    assert not (tmp_path / "executed").exists()


def test_with_trust_a_checkpoint_may_name_code(waves, tmp_path, monkeypatch):
    # A name of its own, since the module stays imported.
    (tmp_path / "trusted.py").write_text(
        "from metarun.algos.agnostic.maml import maml\n"
        "def slower(model, inner_lr: float):\n"
        "    return maml(model, inner_lr / 1000)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    def change(content, config):
        config["algo"] = {"_target_": "trusted.slower", "inner_lr": 0.1}

    file = tampered(waves[0] / "maml", tmp_path, change)
    with pytest.raises(metarun.UserError, match=r"algo\._target_=trusted\.slower.*trust=true"):
        metarun.load(file)
    before, after = metarun.load(file, trust=True).adapt([0, 1], [1, 0], steps=1).curve
    assert after == pytest.approx(before, rel=0.01)


def test_values_of_the_checkpoint_win_over_the_installed_presets(waves, tmp_path):
    file = tampered(waves[0] / "maml", tmp_path, lambda content, config: config["algo"].update(inner_lr=0.02))
    assert metarun.load(file).learned.config.algo.inner_lr == 0.02


class OwnWalk:
    """The walk of `metarun.tasks.navigation`, written as an environment of gymnasium is."""

    goal = np.array([0.3, -0.2], dtype=np.float32)

    def reset(self, seed):
        self.place = np.zeros(2, dtype=np.float32)
        return self.place, {}

    def step(self, action):
        self.place = self.place + np.float32(0.1) * action.clip(-1, 1)
        away = self.place - self.goal
        return self.place, -np.linalg.norm(away), bool((abs(away) < 0.01).all()), False, {}


def test_a_policy_adapts_to_an_environment_and_acts(walker):
    named, own = walker.adapt_to({"goal": OwnWalk.goal}, seed=5), walker.adapt_to(OwnWalk, seed=5)
    # The same walk, once simulated by the family and once by somebody's own class.
    np.testing.assert_allclose(named.curve, own.curve, rtol=1e-5)
    assert named.curve.shape == (3,)
    actions = [named.act([0.0, 0.1 * i]) for i in range(3)]
    named.reset()
    np.testing.assert_array_equal(actions, [named.act([0.0, 0.1 * i]) for i in range(3)])
    named.reset(seed=1)
    assert (actions[0] != named.act([0.0, 0.0])).any()
    np.testing.assert_allclose(named.act([0.0, 0.0], mean=True), own.act([0.0, 0.0], mean=True), atol=1e-5)
    with pytest.raises(ValueError, match=r"goal \[2\]"):
        walker.adapt_to({"aim": [0, 0]})
    with pytest.raises(ValueError, match="sees 2 numbers"):
        named.act([1.0])


def test_a_policy_acts_in_an_environment_of_gymnasium_within_its_bounds(tmp_path):
    gymnasium = pytest.importorskip("gymnasium")
    sizes = ("task.horizon=4", "task.shots=2", "task.queries=2", "model.widths=[8]", "eval.adapt_steps=1")
    leave_a_checkpoint(experiment_of("algo=maml", "task=gymnasium", *sizes), tmp_path)
    learner = metarun.load(tmp_path)
    heavier = learner.adapt_to({"g": 15.0})
    own = learner.adapt_to(lambda: gymnasium.make("Pendulum-v1", g=15.0))
    # Four steps of a pendulum with one and the same policy, from other starts: both returns are of its order.
    assert heavier.curve.shape == own.curve.shape == (2,)
    assert (heavier.curve < 0).all()
    assert (own.curve < 0).all()
    pendulum = gymnasium.make("Pendulum-v1", g=15.0)
    action = own.act(pendulum.reset(seed=0)[0])
    assert pendulum.action_space.contains(action)
    # The policy's numbers from −1 to 1 span torques from −2 to 2.
    assert learner.learned.family.environment.host.native(pendulum.action_space, np.array([0.5])) == 1.0


def test_a_policy_with_a_memory_keeps_it_until_it_is_reset(tmp_path):
    sizes = ("task=bandit", "task.arms=3", "task.pulls=20", "task.shots=2", "task.queries=2")
    experiment = experiment_of("algo=rl2", *sizes, "model=gru_policy", "model.width=8")
    leave_a_checkpoint(with_algorithm(experiment, "thompson"), tmp_path)
    thompson = metarun.load(tmp_path).adapt_to({"payout": [0.1, 0.2, 0.9]})
    # Posterior sampling soon pulls the one arm that pays.
    pulled, reward = [], 0.0
    for _ in range(20):
        pulled.append(thompson.act([1.0], reward))
        reward = float(pulled[-1] == 2)
    assert pulled[10:].count(2) >= 7
    assert copy.copy(set(pulled)) <= {0, 1, 2}


class OwnArms:
    """Three arms of which the last pays; a pull is an episode, and many are a trial."""

    def reset(self, seed):
        return np.ones(1), {}

    def step(self, arm):
        return np.ones(1), float(arm == 2), True, False, {}


def test_a_trial_in_an_environment_of_ones_own_has_as_many_episodes_as_in_training():
    family = Bandit(arms=3, pulls=5, shots=2, queries=2)
    tape = family.tape(torch.arange(2))

    def last_arm(seen):
        return torch.tensor([0.0, 0.0, 99.0]).expand_as(seen.action)

    own = OwnEnvironments(OwnArms, Dialect(family), family.spec.inputs, seed=0)
    played = rollout(own, last_arm, tape)
    same = rollout(family.environment, last_arm, {**tape, "payout": torch.tensor([[0.0, 0.0, 1.0]] * 2)})
    assert total_return(played) == total_return(same) == 5
    torch.testing.assert_close(played.seen.done, same.seen.done)
    # After the last pull the trial is over.
    assert own.left == [0, 0]


FAMILY = """
from dataclasses import dataclass
import torch
from metarun.contracts import Numbers, Sizes, Spec, Task
from metarun.data.portable import portable
from metarun.targets.real import MSE, Real


@portable
@dataclass(frozen=True)
class Scaled:
    factor: float

    def inputs(self, x):
        return self.factor * torch.as_tensor(x, dtype=torch.float32).reshape(-1, 1)


class Lines:
    def __init__(self, steepest: float = 2.0, converter=None, device: str = "cpu") -> None:
        self.converter = converter or Scaled(1 / steepest)
        self.steepest, self.dataset = steepest, f"lines:{steepest:g}:{self.converter.factor:g}"
        self.spec = Spec(Numbers((1,)), Real(outputs=1), Sizes(5, 5), metrics=(MSE,))

    def sample(self, split, count, generator):
        x = torch.randn(count, 10, 1, generator=generator)
        y = self.steepest * (2 * torch.rand(count, 1, 1, generator=generator) - 1) * x
        return Task({"x": x[:, :5], "y": y[:, :5]}, {"x": x[:, 5:], "y": y[:, 5:]})


def doubled(model):
    from metarun.algos.agnostic.maml import maml
    return maml(model, inner_lr=0.02)
"""


def test_families_and_algorithms_of_ones_own_are_loaded_with_their_configuration(
    tmp_path, monkeypatch, without_pictures
):
    monkeypatch.setattr("metarun.after.later_test.write_adaptation", lambda *arguments: None)
    (tmp_path / "my_lines.py").write_text(FAMILY)
    for group, name, text in (
        ("task", "lines", "_target_: my_lines.Lines\nsteepest: 3.0\n"),
        ("algo", "mine", "_target_: my_lines.doubled\n"),
    ):
        (tmp_path / "conf" / group).mkdir(parents=True)
        (tmp_path / "conf" / group / f"{name}.yaml").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    run = metarun.train(
        *("task=lines", "algo=mine", "train.steps=1", "train.val_episodes=2", "eval.episodes=2", "engine=eager"),
        directory=tmp_path / "run",
        config_dir=tmp_path / "conf",
    )
    x = np.linspace(-1, 1, 5)
    before, *_, after = run.learner.adapt(x, 2 * x).curve
    assert after < before
    assert run.learner.learned.converter.factor == 1 / 3
    # Data of another scale are converted as those of training were.
    out = later_test(tmp_path / "run", ["task.steepest=4"], config_dir=tmp_path / "conf")
    assert rows(out / "result.csv")[0]["dataset"] == f"lines:4:{1 / 3:g}"
    with pytest.raises(metarun.UserError, match=r"There is no (algo=mine|task=lines).*config_dir"):
        metarun.load(tmp_path / "run")
