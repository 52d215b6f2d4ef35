"""What a task family must keep to: every break of its promises gets a sentence, and none a number."""

import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from conftest import composed, experiment_of
from omegaconf import OmegaConf
from scenarios import TinyImages, classification_loss, regression_loss
from torch.nn.functional import one_hot

from metarun import loop
from metarun.assemble import Replica, build_model
from metarun.checks.diagnosis import blame, step_size_remedy
from metarun.checks.family import check_family, check_tasks
from metarun.config import build
from metarun.contracts import Facts, Moments, Numbers, Sizes, Spec, Task, Tokens
from metarun.errors import UserError
from metarun.evaluation import episodes
from metarun.nn.transforms import stacked
from metarun.random import stream
from metarun.run import run
from metarun.state import start
from metarun.targets.actions import RETURN, Actions
from metarun.targets.classes import ACCURACY, Classes
from metarun.tasks.sinusoid import Sinusoid
from metarun.tree import tree_map

QUICK = ("train.steps=2", "train.meta_batch=2", "train.eval_every=1", "train.val_episodes=4", "eval.episodes=4")


PLANE = Numbers((2,))


class Points:
    """Five classes of points around means that differ from task to task; ``spoil`` changes what is sampled."""

    dataset = "points"

    def __init__(
        self,
        shots=1,
        queries=1,
        spoil=None,
        better="higher",
        inputs=PLANE,
        train_ways=None,
        training_classes=None,
        groups=None,
    ):
        metric = ACCURACY._replace(higher_is_better=better == "higher")
        sizes = Sizes(shots, queries, 5, train_ways, training_classes)
        self.spec = Spec(inputs, Classes(5), sizes, (metric,), Facts(groups=groups))
        self.spoil = spoil or (lambda tasks, split: tasks)

    def sample(self, split, count, generator):
        means = torch.randn(count, 5, 2, generator=generator)

        def part(examples):
            x = means.repeat(1, examples, 1) + 0.1 * torch.randn(count, 5 * examples, 2, generator=generator)
            return {"x": x, "y": one_hot(torch.arange(5).repeat(examples), 5).float().expand(count, -1, -1)}

        return self.spoil(Task(part(self.spec.sizes.shots), part(self.spec.sizes.queries)), split)

    def loss(self, predict, data):
        return classification_loss(predict, data)


def with_labels(tasks):
    return Task(*({"x": part["x"], "y": part["y"].argmax(-1)} for part in tasks[:2]))


class Plain(Points):
    def __init__(self):
        super().__init__(shots=2, queries=3)


class IntegerLabels(Points):
    """One shot, one query: five labels broadcast against five rows of logits, and an accuracy comes out."""

    def __init__(self):
        super().__init__(spoil=lambda tasks, split: with_labels(tasks))


def runs(target, path, *overrides):
    config, names = composed(*QUICK, *overrides)
    config.task = OmegaConf.create({"_target_": target})
    return run(config, names | {"task": "mine"}, path)


def test_batches_that_differ_in_their_leaves_are_refused():
    """A weight that only some batches have would be lost where batches are put together."""
    x = torch.ones(1, 2, 3)
    bare, weighted = (Task({"x": x, **more}, {"x": x}) for more in ({}, {"weight": x[..., 0]}))
    for tasks in ((bare, weighted), (weighted, bare)):
        with pytest.raises(UserError, match="some batches of tasks have the leaf weight and others have not"):
            tree_map(lambda *leaves: torch.cat(leaves), *tasks)
        with pytest.raises(UserError, match="some batches of tasks have the leaf weight"):
            stacked(list(tasks))


def test_integer_labels_at_one_shot_and_one_query_are_refused_instead_of_scored(tmp_path):
    with pytest.raises(UserError, match=r'train support\["y"\] has integer labels .*one_hot\(labels, 5\)'):
        runs("test_family_check.IntegerLabels", tmp_path)
    assert pd.read_csv(tmp_path / "result.csv")["status"].tolist() == ["failed"]


def changed(part, **leaves):
    def spoil(tasks, split):
        data = getattr(tasks, part)
        return tasks._replace(**{part: data | {name: change(data[name]) for name, change in leaves.items()}})

    return spoil


def nan_at(leaf):
    leaf = leaf.clone()
    leaf[1, 2, 1] = math.nan
    return leaf


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (changed("query", y=lambda y: y.argmax(-1)), r'test query\["y"\] has integer labels'),
        (changed("support", y=lambda y: y.argmax(-1)[..., None]), r'test support\["y"\] has integer labels'),
        (changed("support", y=lambda y: y.long()), r'test support\["y"\] has dtype torch.int64.*\.to\(torch.float32\)'),
        (changed("support", y=lambda y: y * 2), r"not one-hot"),
        (changed("support", y=lambda y: y[..., [0, 0, 2, 3, 4]]), r"not one-hot"),
        (changed("support", y=lambda y: y[..., :4]), r"must hold one-hot classes \[tasks, examples, 5\]"),
        (changed("support", y=lambda y: y[:, [0, 0, 1, 2, 3]]), r'test support\["y"\] lacks a class'),
        (changed("support", x=lambda x: x.double()), r'test support\["x"\] has dtype torch.float64'),
        (changed("support", x=lambda x: (255 * x).to(torch.uint8)), r'test support\["x"\] has dtype torch.uint8'),
        (changed("support", x=lambda x: x[..., 0]), r'test support\["x"\] has the shape .*spec.inputs.shape is \(2,\)'),
        (changed("query", x=lambda x: x[:, :4]), r"test query has 4 examples per task, and 5 ways with 1 each make 5"),
        (changed("query", y=lambda y: y[:, :4]), r'test query\["y"\] has shape .*where x has 5 examples'),
        (changed("query", x=lambda x: x[:3]), r'test query\["x"\] .* first axis must be the 6 tasks'),
        (changed("query", x=list), r'test query\["x"\] must be one tensor'),
        (changed("query", x=nan_at), r'test tasks hold NaN in query\["x"\] \(task 1, example 2, column 1.*empty cells'),
        (changed("query", x=lambda x: x / 0), r'infinity in query\["x"\]'),
        (lambda tasks, split: tuple(tasks), "metarun.contracts.Task"),
        (lambda tasks, split: Task({"y": tasks.support["y"]}, tasks.query), r'lacks the leaf "x"'),
    ],
)
def test_classification_tasks_that_are_not_what_the_spec_says_are_named(spoil, words):
    family = Points(spoil=spoil)
    with pytest.raises(UserError, match=words):
        check_tasks(family.sample("test", 6, stream(0, "test")), family.spec, "test", 6, "cpu")


def test_what_keeps_its_promises_passes():
    training = Points(train_ways=7)
    seven = Task(*({"x": torch.randn(3, 7, 2), "y": torch.eye(7).expand(3, -1, -1)} for _ in range(2)))
    check_tasks(seven, training.spec, "train", 3, "cpu")
    images = TinyImages()
    check_tasks(images.sample("train", 3, stream(0, "train")), images.spec, "train", 3, "cpu")
    tokens = Tokens(2, 9, 5, 3, torch.ones(9))
    ids = Points(inputs=tokens, spoil=lambda tasks, split: Task(*({**p, "x": p["x"].abs().long()} for p in tasks[:2])))
    check_tasks(ids.sample("test", 3, stream(0, "test")), ids.spec, "test", 3, "cpu")


def regression(**leaves):
    family = Sinusoid(shots=5, queries=7)
    tasks = family.sample("val", 3, stream(0, "val"))
    return changed("query", **leaves)(tasks, "val"), family.spec


def test_a_regression_target_without_its_axis_is_refused():
    """``[n]`` against outputs ``[n, 1]`` would be a mean over n² pairs."""
    with pytest.raises(UserError, match=r'val query\["y"\] has shape \[tasks, examples\].*y\[\.\.\., None\]'):
        check_tasks(*regression(y=lambda y: y[..., 0]), "val", 3, "cpu")
    with pytest.raises(UserError, match=r"must hold targets \[tasks, examples, 1\].*give each example 1 numbers"):
        check_tasks(*regression(y=lambda y: y.repeat(1, 1, 2)), "val", 3, "cpu")


def test_classes_groups_and_token_ids_outside_their_range_are_refused():
    def with_leaf(**leaf):
        return lambda tasks, split: Task(*({**part, **leaf} for part in tasks[:2]))

    for family, words in (
        (Points(spoil=with_leaf(**{"class": torch.full((2, 5), 9)}), training_classes=9), "from 0 to 8, not 9 to 9"),
        (Points(spoil=with_leaf(**{"class": torch.zeros(2, 5, 1).long()})), "a whole number for each example"),
        (Points(spoil=with_leaf(group=torch.full((2, 5), 2)), groups=("a", "b")), "from 0 to 1, not 2 to 2"),
        (Points(groups=("a", "b")), 'lacks the leaf "group"'),
        (Points(spoil=with_leaf(x=torch.full((2, 5, 2), 9)), inputs=Tokens(2, 9, 5, 3, torch.ones(9))), "from 0 to 8"),
    ):
        with pytest.raises(UserError, match=words):
            check_tasks(family.sample("train", 2, stream(0, "train")), family.spec, "train", 2, "cpu")


def test_control_tasks_hold_as_many_episodes_as_the_spec_says():
    spec = Spec(Moments(2, "mine", 3), Actions(2, continuous=True), Sizes(4, 5), (RETURN,))

    def tasks(goal, noise):
        return Task(*({"goal": torch.ones(2, goal, 2), "noise": torch.ones(2, noise, 3, 2)} for _ in range(2)))

    with pytest.raises(UserError, match=r'test query\["goal"\] has the shape \[2, 4, 2\].*\[tasks, 5, \.\.\.\]'):
        check_tasks(tasks(4, 4), spec, "test", 2, "cpu")
    with pytest.raises(UserError, match=r'train support\["noise"\]'):
        check_tasks(tasks(1, 4), spec, "train", 2, "cpu")
    check_tasks(tasks(9, 9), spec, "train", 2, "cpu")


@pytest.fixture(scope="module")
def experiment():
    return experiment_of(*QUICK, "task=omniglot", "task.dataset=procedural", "task.image_size=16", "model=mlp")


def of_family(experiment, family, algo="maml"):
    config, _ = composed(*QUICK, f"algo={algo}", "task=omniglot", "task.dataset=procedural", "model=mlp")
    model = build_model(config, family)
    algorithm = build(config, "algo", model=model, spec=family.spec)
    replicas = [Replica(config, {}, model, algorithm)]
    return replace(experiment, config=config, family=family, replicas=replicas, algorithm=algorithm)


def check(experiment):
    check_family(experiment, episodes(experiment, "test", 4))


class GlobalDraws(Points):
    def sample(self, split, count, generator):
        return super().sample(split, count, torch.default_generator)


class Always(Points):
    def sample(self, split, count, generator):
        return super().sample(split, count, torch.Generator().manual_seed(0))


class Expanded(Points):
    def sample(self, split, count, generator):
        one = super().sample(split, 1, generator)
        return Task(*({name: leaf.expand(count, *leaf.shape[1:]) for name, leaf in part.items()} for part in one[:2]))


class Leaking(Points):
    def sample(self, split, count, generator):
        tasks = super().sample(split, count, generator)
        return tasks._replace(query={name: leaf.flip(1) for name, leaf in tasks.support.items()})


class WithoutMean(Points):
    def loss(self, predict, data):
        return -(data["y"] * predict(data["x"]).log_softmax(-1)).sum(-1), classification_loss(predict, data)[1]


@pytest.mark.parametrize(
    ("family", "words"),
    [
        (GlobalDraws, "for an equal generator"),
        (Always, "the same test task again and again"),
        (Expanded, "the same test task again and again"),
        (Leaking, "every query example of a test task is also in its support set"),
        (WithoutMean, r"the loss of a task must be a single number.*not \[5\]"),
        (lambda: Points(better="lower"), "differ in whether a higher accuracy is better"),
    ],
)
def test_families_whose_numbers_would_mean_nothing_are_refused(experiment, family, words):
    with pytest.raises(UserError, match=words):
        check(of_family(experiment, family()))


def test_a_family_of_ones_own_runs_and_need_not_name_the_ways_of_training(experiment, tmp_path):
    assert Plain().spec.sizes.train_ways is None
    check(of_family(experiment, Plain(), "protonet"))
    assert 0 <= runs("test_family_check.Plain", tmp_path) <= 1


class WithoutAxis(torch.nn.Module):
    """Outputs ``[n]``, which broadcast against targets ``[n, 1]`` to n² errors."""

    def __init__(self, spec):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def forward(self, x):
        return self.layer(x)[..., 0]


def test_outputs_that_would_broadcast_against_targets_are_refused(tmp_path):
    config, names = composed(*QUICK)
    config.model = OmegaConf.create({"_target_": "test_family_check.WithoutAxis"})
    with pytest.raises(UserError, match=r"outputs of shape \[100\] for the 100 examples.*\[100, 1\]"):
        run(config, names, tmp_path)


def test_a_later_block_of_test_tasks_is_checked_too(experiment):
    family = Points()
    one = of_family(experiment, family)
    second = stream(one.config.eval.seed, "test", 1).initial_seed()
    plain = family.sample

    def sample(split, count, generator):
        tasks = plain(split, count, generator)
        return changed("query", x=nan_at)(tasks, split) if generator.initial_seed() == second else tasks

    family.sample = sample
    blocks = episodes(one, "test", 100)
    next(blocks)
    with pytest.raises(UserError, match="the test tasks hold NaN"):
        next(blocks)


def blamed(experiment, weights=math.nan):
    training = start(loop.MetaStep(experiment))
    training.step = 3
    training.window = [torch.tensor([[1.0, 1.0]]), torch.tensor([[math.nan, 1.0]]), torch.tensor([[math.nan, 1.0]])]
    return blame(experiment, training)


class Overflowing(Sinusoid):
    def loss(self, predict, data):
        return regression_loss(lambda x: 1e30 * predict(x) + 1e30, data)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("algo=cnp",), "lower train.lr or eval.adapt_steps, or lower train.clip"),
        (("algo=scratch",), "lower algo.step_sizes or eval.adapt_steps"),
        (("algo=maml", "train.clip=9"), "lower train.lr or algo.inner_lr or eval.adapt_steps, or set train.clip=1"),
        (
            ("task=navigation", "train.optimizer=trpo"),
            "lower train.trust_region.kl or algo.inner_lr or eval.adapt_steps",
        ),
    ],
)
def test_what_is_to_be_lowered_are_keys_that_the_run_has(overrides, words):
    assert step_size_remedy(experiment_of(*overrides), testing=True) == words


def test_a_loss_that_is_not_finite_says_what_is_to_blame():
    experiment = experiment_of(*QUICK)
    assert "the step size is to blame; lower train.lr or algo.inner_lr" in blamed(experiment)
    assert "the step size is to blame; lower train.lr, or lower train.clip" in blamed(experiment_of(*QUICK, "algo=cnp"))
    overflowing = replace(experiment, family=Overflowing())
    assert "no step size is to blame; check the model, the loss, and the scale" in blamed(overflowing)
    plain = experiment.family.sample
    second = stream(0, "train", 1).initial_seed()

    def poisoned(split, count, generator):
        tasks = plain(split, count, generator)
        if generator.initial_seed() == second:
            tasks.query["y"][1, 3] = math.nan
        return tasks

    experiment.family.sample = poisoned
    assert 'the data of training step 2 hold NaN in query["y"] (task 1, example 3, column 0' in blamed(experiment)
