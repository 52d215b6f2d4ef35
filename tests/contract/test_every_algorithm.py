"""What every algorithm under conf/algo promises, on a tiny task of each kind that it serves."""

from functools import cache

import pytest
import torch
from learners import keys_of
from scenarios import TinyImages, generator, sampled

from metarun.assemble import algorithm_names
from metarun.config import construct
from metarun.contracts import Task
from metarun.engine.batch import adapted, evaluate, meta_gradient
from metarun.errors import UserError
from metarun.models.conv4 import Conv4
from metarun.models.decoder import TransformerDecoder
from metarun.models.gan import GANSmall
from metarun.models.mlp import MLP
from metarun.models.policy import FastWeightsPolicy, GRUPolicy, Policy
from metarun.models.reader import Reader
from metarun.models.resnet_fpn import ResNetFPN
from metarun.models.tagger import Tagger
from metarun.models.text import TextEmbedding
from metarun.models.unet import UNetSmall
from metarun.random import drawing
from metarun.targets.scoring import loss_of
from metarun.tasks.bandit import Bandit
from metarun.tasks.entities import entities
from metarun.tasks.generate import Generate
from metarun.tasks.generate_adversarial import GenerateAdversarially
from metarun.tasks.generation import Generation
from metarun.tasks.mdp import MDP
from metarun.tasks.navigation import Navigation
from metarun.tasks.questions import questions
from metarun.tasks.sinusoid import Sinusoid
from metarun.tasks.sprites import SpriteDetection
from metarun.tasks.text import text
from metarun.tree import learned, leaves, like, tree_map

pytestmark = pytest.mark.usefixtures("float64")


def sinusoid():
    family = Sinusoid(shots=5, queries=7)
    return family, MLP(family.spec, (16, 16))


def images():
    family = TinyImages()
    return family, Conv4(family.spec, filters=4)


@cache
def toy_text():
    return text(ways=3, shots=2, queries=4, dataset="toy", buckets=64)


def sentences():
    return toy_text(), TextEmbedding(toy_text().spec, width=8)


@cache
def toy_questions():
    return questions(shots=2, queries=3, dataset="toy", question=6, passage=24, longest=4, buckets=4)


def passages():
    return toy_questions(), Reader(toy_questions().spec, width=6, layers=1, reach=1)


@cache
def toy_tags():
    return entities(dataset="toy", shots=3, queries=3, longest=10, buckets=32)


def tags():
    return toy_tags(), Tagger(toy_tags().spec, 4, 8, 1)


def walks():
    family = Navigation(horizon=6, shots=4, queries=5)
    return family, Policy(family.spec, (8,), "tanh")


def pulls():
    family = Bandit(arms=3, pulls=6, shots=4, queries=5)
    return family, GRUPolicy(family.spec, width=8)


def tables():
    family = MDP(states=3, actions=2, episodes=2, horizon=3, shots=4, queries=5)
    return family, FastWeightsPolicy(family.spec, width=8, slots=4)


@cache
def sprites():
    keys = {
        "sprites": "shapes",
        "backgrounds": "noise",
        "image_size": 32,
        "objects": 2,
        "distractors": 0,
        "most_found": 4,
    }
    family = SpriteDetection(ways=2, shots=1, queries=1, **keys)
    return family, ResNetFPN(family.spec, (4,), 4)


@cache
def toy_services():
    return Generation(shots=3, queries=3, dataset="toy", merges=60, length=6, prompt=4, draft="none")


def turns():
    return toy_services(), TransformerDecoder(toy_services().spec, 8, 1, 2, dropout=0.0)


@cache
def few_pictures():
    return Generate("procedural", shots=2, queries=2, draws=1, test_draws=1, generated=2, image_size=16)


def velocities():
    return few_pictures(), UNetSmall(few_pictures().spec, width=8)


@cache
def judged_pictures():
    return GenerateAdversarially("procedural", shots=2, queries=2, latents=3, generated=2, image_size=16)


def players():
    return judged_pictures(), GANSmall(judged_pictures().spec, width=2)


TINY = (sinusoid, images, sentences, tags, passages, walks, pulls, tables, sprites, turns, velocities, players)


@cache
def built(name, tiny):
    """The algorithm ``name`` on a tiny family, and the family; None where it does not fit."""
    torch.manual_seed(0)
    family, model = tiny()
    # Without a model or a number of test steps, which are chosen here.
    keys = keys_of("algo", name)
    try:
        algorithm = construct("algo", keys, model=model, spec=family.spec)
    except UserError:
        # A reference policy names its environment, a method its kind of model.
        return None
    return (algorithm, family) if family.spec.offers(algorithm.needs) else None


FEW = {
    **dict.fromkeys((velocities, turns), ("adaptive", "maml", "reference", "reptile", "transfer")),
    players: ("fomaml", "reptile", "transfer"),
}
"""Families that are tried with a few algorithms, since the others do the same there and take long."""


def pairs():
    """Every algorithm with each tiny family that it fits, and whether it learns anything there."""
    torch.set_default_dtype(torch.float64)
    try:
        for name in algorithm_names():
            for tiny in TINY:
                if name not in FEW.get(tiny, (name,)):
                    continue
                if found := built(name, tiny):
                    learns = bool(learned(found[0].init(generator())))
                    yield pytest.param((name, tiny), id=f"{name}-{tiny.__name__}"), learns
    finally:
        torch.set_default_dtype(torch.float32)


PAIRS = list(pairs())
WITH_CLASSES = [pair for pair, _ in PAIRS if pair.values[0][1] in (images, sentences)]


@pytest.fixture(params=[pair for pair, _ in PAIRS])
def case(request):
    return built(*request.param)


@pytest.fixture(params=[pair for pair, learns in PAIRS if learns])
def learner(request):
    return built(*request.param)


def only_task(tasks, i):
    return Task(*(tree_map(lambda x: x[i : i + 1], part) for part in tasks[:2]), tasks.seed[i : i + 1])


def test_a_batch_is_the_mean_of_its_tasks(learner):
    """The engine's map equals a Python loop, so no task sees another; twice the same, with inputs left alone."""
    algorithm, family = learner
    theta = algorithm.init(generator())
    tasks = sampled(family, "train", 2, generator(1))
    before = tree_map(torch.clone, theta), [tree_map(torch.clone, part) for part in tasks[:2]]
    together, again = (meta_gradient(algorithm, theta, tasks, loss_of(family)) for _ in range(2))
    assert together.loss.isfinite()
    assert all(g.isfinite().all() for g in leaves(together.grads))
    assert any(g.abs().max() > 0 for g in leaves(together.grads))
    torch.testing.assert_close(together, again, rtol=0, atol=0)
    torch.testing.assert_close(before, (theta, list(tasks[:2])), rtol=0, atol=0)
    alone = [meta_gradient(algorithm, theta, only_task(tasks, i), loss_of(family)) for i in range(2)]
    for i, leaf in enumerate(leaves(together.grads)):
        torch.testing.assert_close(leaf, torch.stack([list(leaves(a.grads))[i] for a in alone]).mean(0))
    torch.testing.assert_close(together.loss, torch.stack([a.loss for a in alone]).mean())


def test_evaluation_sees_queries_only_to_score_them(case):
    """Other query targets change losses but not a single prediction, hence not the adapted state."""
    algorithm, family = case
    theta = algorithm.init(generator())
    task = sampled(family, "test", 1, generator(2))
    steps, losses, *_ = evaluate(algorithm, theta, task, loss_of(family), 2)
    assert steps in ([0, 1, 2], [1], [0])
    assert losses.shape == (1, len(steps))
    if not family.spec.offers("rows"):
        return  # its data are no targets
    predictions = []

    def spy(predict, data):
        if "spied" in data:
            predictions.append(predict(data["x"]))
        return loss_of(family)(predict, data)

    def states(query_targets):
        predictions.clear()
        support = {n: v[0] for n, v in task.support.items()}
        query = {**{n: v[0] for n, v in task.query.items()}, "y": query_targets, "spied": torch.tensor(1)}
        with drawing(task.seed[0], training=False):
            for _, state in zip(range(3), algorithm.adapt(theta, support, loss_of(family)), strict=False):
                if state is not None:
                    spy(lambda x: algorithm.predict(theta, state, x), query)  # noqa: B023
        return [p.clone() for p in predictions]

    torch.testing.assert_close(states(task.query["y"][0]), states(-task.query["y"][0]), rtol=0, atol=0)


@pytest.mark.parametrize("pair", WITH_CLASSES)
def test_algorithms_say_whether_they_answer_in_any_number_of_classes(pair):
    """Whether a learner that was made for three classes can be shown four."""
    algorithm, family = built(*pair)
    task = sampled(family, "test", 1, generator(2))
    support = {"x": task.support["x"][0], "y": torch.eye(4)[torch.arange(task.support["y"].shape[1]) % 4]}
    try:
        with drawing(task.seed[0], training=False):
            state = adapted(algorithm, algorithm.init(generator()), support, loss_of(family), 1)
            answers = algorithm.predict(algorithm.init(generator()), state, task.query["x"][0]).shape[-1] == 4
    except (RuntimeError, ValueError):
        answers = False
    assert answers == algorithm.open_ways


def improves(algorithm, family, theta, tasks, rate):
    """Whether sixty Adam steps lower the meta-loss by a tenth, or raise the return of policies by a fiftieth.

    What has come twice as far earlier, or five times as far where returns are noisy, needs no more steps.
    """
    theta = tree_map(lambda x: x.detach().clone(), theta)
    variables = list(leaves(learned(theta)))
    optimizer = torch.optim.Adam(variables, rate)

    policies = family.spec.offers("policy")

    def gain(first, now):
        """In units of what is asked."""
        if policies:
            return (now.scores["return"] - first.scores["return"]) / (0.02 * first.scores["return"].abs())
        return (first.loss - now.loss) / (0.1 * first.loss)

    first = None
    for _ in range(60):
        result = meta_gradient(algorithm, theta, tasks, loss_of(family))
        first = first or result
        if gain(first, result) > (5 if policies else 2):
            return True
        theta = {**theta, "carried": result.carried} if result.carried else theta
        for variable, gradient in zip(variables, leaves(result.grads), strict=True):
            variable.grad = gradient.clone()
        optimizer.step()
    return gain(first, result) > 1


ATTENTION = ("1707.03141", "2112.10510")
"""The papers of SNAIL and of in-context learning."""


def test_training_improves(learner):
    """On tasks that one model can solve, with one of two step sizes: transformers want the smaller."""
    algorithm, family = learner
    if family is toy_tags() and algorithm.paper.endswith("1606.04080"):
        pytest.skip("attention by cosines cannot weigh the few words of an entity above all other words")
    if isinstance(family, TinyImages):
        family = TinyImages(fixed_labels=True)
    if isinstance(family, Bandit):
        # The return of five trials of six pulls is mostly luck.
        family = Bandit(arms=3, pulls=6, shots=4, queries=100)
    theta = algorithm.init(generator())
    # Tasks whose labels or tables contradict each other have no common solution: then one task must do.
    alike = isinstance(family, Sinusoid | TinyImages | Navigation)
    tasks = sampled(family, "train", 8 if alike else 1, generator(1))
    if family in (toy_tags(), few_pictures()) and algorithm.paper.endswith("1803.02999"):
        # Reptile trains on support examples alone, and three sentences or two pictures say too little of others.
        tasks = tasks._replace(query=tasks.support)
    # The one that most need comes first: policies learn in half the steps with a larger one.
    rates = (0.03, 0.003) if family.spec.offers("policy") else (0.01, 0.003)
    if algorithm.paper.endswith(ATTENTION):
        rates = rates[::-1]
    assert any(improves(algorithm, family, theta, tasks, rate) for rate in rates)


def test_trees_keep_their_order(case):
    algorithm, _ = case
    theta = algorithm.init(generator())
    torch.testing.assert_close(like(theta, leaves(theta)), theta, rtol=0, atol=0)
