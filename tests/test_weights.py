"""Padding: examples of weight 0 change nothing, and tasks of different sizes fit into one batch."""

from functools import cache
from importlib.resources import files

import pytest
import torch
from learners import keys_of
from scenarios import IMAGE_SPEC, TinyImages, class_spec, generator, sampled
from torch.func import vmap

from metarun.algos.agnostic.maml import maml
from metarun.algos.baselines.multitask import multitask
from metarun.algos.dependent.matching import matching
from metarun.algos.dependent.metaoptnet import metaoptnet
from metarun.algos.dependent.protonet import protonet
from metarun.algos.dependent.relation import relation
from metarun.algos.dependent.shared_model import shared_model
from metarun.algos.dependent.shared_params import shared_params
from metarun.checks.family import check_tasks
from metarun.checks.transduction import is_transductive
from metarun.config import construct
from metarun.contracts import Task
from metarun.engine.batch import evaluate, meta_gradient
from metarun.errors import UserError
from metarun.models.conv4 import Conv4
from metarun.models.mlp import MLP
from metarun.models.supernet import SupernetConv
from metarun.models.tagger import Tagger
from metarun.models.text import TextEmbedding
from metarun.nn.functional import forward_of, parameters_of
from metarun.nn.padding import weighing
from metarun.nn.transforms import plainly
from metarun.targets.scoring import loss_of
from metarun.tasks.entities import entities
from metarun.tasks.omniglot import Omniglot
from metarun.tasks.sinusoid import Sinusoid
from metarun.tasks.text import text, text_crosslingual
from metarun.tree import learned, leaves, tree_map

pytestmark = pytest.mark.usefixtures("float64")

ALGORITHMS = sorted(p.name.removesuffix(".yaml") for p in (files("metarun.conf") / "algo").iterdir() if "." in p.name)


@cache
def sinusoid():
    family = Sinusoid(shots=7, queries=6)
    return family, MLP(family.spec, (8, 8), "tanh")


@cache
def images():
    """With batch normalisation."""
    family = TinyImages()
    return family, Conv4(family.spec, filters=4)


@cache
def sentences():
    family = text(ways=3, shots=2, queries=2, dataset="toy", buckets=32)
    return family, TextEmbedding(family.spec, width=8)


@cache
def maps():
    family = TinyImages()
    return family, Conv4(family.spec, filters=4, halvings=2, readout="flatten")


@cache
def mixtures():
    family = TinyImages()
    return family, SupernetConv(family.spec, filters=4)


def algorithm_of(name, family, model, **keys):
    return construct("algo", {**keys_of("algo", name), **keys}, model=model, spec=family.spec)


CASES = {f"{name}-{of.__name__}": (name, of, {}) for name in ALGORITHMS for of in (sinusoid, images, sentences)} | {
    "metanas-mixtures": ("metanas", mixtures, {"inner_steps": 2}),
    "relation-maps": ("relation", maps, {}),
    "matching-full-context": ("matching", images, {"full_context": True, "reads": 2}),
    "matching-euclidean": ("matching", sentences, {"distance": "euclidean"}),
    "metaoptnet-ridge": ("metaoptnet", images, {"head": "ridge"}),
    "mamlpp-running-statistics": ("mamlpp", images, {"batch_norm": "per_step_running", "inner_steps": 2}),
    "imaml-proximal": ("imaml", sinusoid, {"inner": "proximal", "hessian_damping": 0, "damping": 0}),
    "protonet-cosine": ("protonet", images, {"distance": "cosine"}),
    "anp-self-attention": ("anp", sinusoid, {"self_attention": 1}),
    "anp-mean": ("anp", sinusoid, {"deterministic": "mean"}),
    "reptile-small-batches": ("reptile", sinusoid, {"inner_batch": 2}),
    "reptile-odd-batches": ("reptile", sinusoid, {"inner_batch": 5}),
    "reptile-images": ("reptile", images, {"inner_batch": 4, "inner_optimizer": "sgd"}),
}


def fitting():
    """Those of them whose algorithm serves the family with the model."""
    torch.set_default_dtype(torch.float64)
    for case, (name, of, keys) in CASES.items():
        try:
            algorithm = algorithm_of(name, *of(), **keys)
        except UserError:
            continue
        if of()[0].spec.offers(algorithm.needs):
            yield case
    torch.set_default_dtype(torch.float32)


def chosen(data, index):
    return {name: leaf[index] for name, leaf in data.items()}


def fewer(data, keep, random):
    """One part of one task with at most ``keep`` examples of each class, or of all where there are no classes."""
    y = data["y"]
    groups = y.argmax(-1) if y.shape[-1] > 1 else torch.zeros(len(y))
    order = torch.randperm(len(y), generator=random)
    found = [i for group in groups.unique() for i in order[groups[order] == group][:keep].tolist()]
    return chosen(data, sorted(found))


def padded(parts, random):
    """Tasks of different sizes as a batch, padded at random places with garbage."""
    size = max(len(part["y"]) for part in parts) + 2

    def one(part):
        n = len(part["y"])
        places = torch.randperm(size, generator=random)[:n].sort().values
        found = {}
        for name, leaf in part.items():
            shape = (size, *leaf.shape[1:])
            if leaf.is_floating_point():
                found[name] = 3 * torch.randn(shape, generator=random) if name == "x" else torch.zeros(shape)
            else:
                found[name] = torch.randint(int(leaf.max()) + 1, shape, generator=random)
            found[name][places] = leaf
        return {**found, "weight": torch.zeros(size).index_fill(0, places, 1.0)}

    together = [one(part) for part in parts]
    return {name: torch.stack([part[name] for part in together]) for name in together[0]}


def uneven(family, split, sizes):
    """The same tasks one by one without padding, and as one padded batch."""
    random = generator(5)
    batch = sampled(family, split, len(sizes), generator(1))
    tasks = []
    for i, (shots, queries) in enumerate(sizes):
        support, query = (chosen(part, i) for part in batch[:2])
        tasks.append((fewer(support, shots, random), fewer(query, queries, random)))
    alone = [
        Task(*(tree_map(lambda leaf: leaf[None], part) for part in task), batch.seed[i : i + 1])
        for i, task in enumerate(tasks)
    ]
    return alone, Task(*(padded(list(parts), random) for parts in zip(*tasks, strict=True)), batch.seed)


def close(found, expected):
    """Equal to 1e-12 of the largest number of a tensor, or of 1."""
    for one, other in zip(map(torch.detach, found), map(torch.detach, expected), strict=True):
        assert other.isfinite().all()
        largest = max(float(other.abs().max()), 1.0) if other.numel() else 1.0
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12 * largest)


def mean_of(trees):
    """Leaf by leaf."""
    return [torch.stack(parts).mean(0) for parts in zip(*(list(leaves(tree)) for tree in trees), strict=True)]


@pytest.mark.parametrize("case", list(fitting()))
def test_padding_changes_nothing(case):
    """Loss, scores, every leaf of the gradient and of what is carried, and all of an evaluation."""
    name, of, keys = CASES[case]
    torch.manual_seed(0)
    family, model = of()
    algorithm = algorithm_of(name, family, model, **keys)
    theta, loss = algorithm.init(generator()), loss_of(family)
    sizes = [(7, 6), (5, 4)] if of is sinusoid else [(2, 4), (1, 2)]
    if learned(theta):
        alone, batch = uneven(family, "train", sizes)
        expected = [meta_gradient(algorithm, theta, task, loss) for task in alone]
        found = meta_gradient(algorithm, theta, batch, loss)
        close(leaves(found.grads), mean_of([e.grads for e in expected]))
        close(leaves(found.carried), mean_of([e.carried for e in expected]))
        close([found.loss], [torch.stack([e.loss for e in expected]).mean()])
        close(leaves(found.scores), mean_of([e.scores for e in expected]))
    alone, batch = uneven(family, "test", sizes)
    found = evaluate(algorithm, theta, batch, loss, 2, with_own_scores=True)
    expected = [evaluate(algorithm, theta, task, loss, 2, with_own_scores=True) for task in alone]
    close([found.losses], [torch.cat([e.losses for e in expected])])
    for metric, value in found.scores.items():
        close([value], [torch.cat([e.scores[metric] for e in expected])])


@pytest.mark.parametrize("shape", [(3,), (3, 4, 2)])
def test_batch_normalisation_leaves_padding_out(shape):
    """By torch's own of the rows that count; under ``plainly`` too, where torch's own would count all."""
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm1d(3) if len(shape) == 1 else torch.nn.BatchNorm2d(3)
    weight = torch.tensor([0.0, 1, 1, 0, 1, 1])
    x, real = torch.randn(6, *shape), weight > 0
    expected = torch.nn.functional.batch_norm(x[real], None, None, norm.weight, norm.bias, True, eps=norm.eps)
    with weighing(weight):
        found = forward_of(norm)(parameters_of(norm), x)
        with plainly():
            found_plainly = forward_of(norm)(parameters_of(norm), x)
    close([found[real], found_plainly[real]], [expected, expected])


def test_a_model_may_make_several_rows_of_each_example_and_no_other_number():
    class Pieces(torch.nn.Module):
        def __init__(self, rows):
            super().__init__()
            self.rows, self.norm = rows, torch.nn.BatchNorm1d(2)

        def forward(self, x):
            return self.norm(x.reshape(self.rows, 2))

    x, weight = torch.randn(3, 4, generator=generator()), torch.tensor([1.0, 0, 1])
    expected = forward_of(Pieces(4))({}, x[weight > 0])
    with weighing(weight):
        close([forward_of(Pieces(6))({}, x)[[0, 1, 4, 5]]], [expected])
        with pytest.raises(UserError, match=r"a batch of 5 rows, .* given 3 examples"):
            forward_of(torch.nn.BatchNorm1d(2))({}, torch.randn(5, 2))


def test_new_queries_need_no_weight_where_the_support_set_has_one():
    torch.manual_seed(0)
    family, model = images()
    algorithm = algorithm_of("protonet", family, model)
    theta, (alone, batch) = algorithm.init(generator()), uneven(family, "test", [(2, 4), (1, 2)])
    for i, task in enumerate(alone):
        x = task.query["x"][0]
        given = [chosen(part, j) for part, j in ((task.support, 0), (batch.support, i))]
        close(*([algorithm.predict(theta, support, x)] for support in given))


@pytest.mark.parametrize("name", ["maml", "protonet", "relation"])
def test_the_gradient_of_padded_tasks_is_that_of_plain_autograd(name):
    torch.manual_seed(0)
    family, model = maps()
    algorithm = algorithm_of(name, family, model)
    theta, (_, batch) = algorithm.init(generator()), uneven(family, "train", [(2, 4), (1, 2)])
    found = meta_gradient(algorithm, theta, batch, loss_of(family))
    with plainly():
        expected = meta_gradient(algorithm, theta, batch, loss_of(family))
    close(leaves(found.grads), leaves(expected.grads))


def characters(**keys):
    return Omniglot(dataset="procedural", image_size=16, queries=2, **{"ways": 3, **keys})


FAMILIES = {
    "sinusoid": lambda **keys: Sinusoid(queries=4, **keys),
    "omniglot": characters,
    "text": lambda **keys: text(ways=3, queries=2, dataset="toy", buckets=32, **keys),
    "text_crosslingual": lambda **keys: text_crosslingual(ways=3, queries=2, dataset="toy", buckets=32, **keys),
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_range_takes_examples_away_from_the_tasks_with_the_most(name, split):
    """Every number equally often; what is left is what it was, and what is padding is blank."""
    whole, some = (FAMILIES[name](shots=shots) for shots in (4, (2, 4)))
    most, tasks = (family.sample(split, 600, generator(3)) for family in (whole, some))
    torch.testing.assert_close({**tasks.query, "weight": None}, {**most.query, "weight": None}, rtol=0, atol=0)
    assert (tasks.query["weight"] == 1).all()
    real, y = tasks.support["weight"] > 0, tasks.support["y"]
    for leaf in ("x", "y"):
        assert torch.equal(tasks.support[leaf][real], most.support[leaf][real])
        assert not tasks.support[leaf][~real].any()
    classes = name != "sinusoid"
    counts = y.sum(1) if classes else real.sum(1, keepdim=True)
    assert (counts == counts[:, :1]).all()
    for shots in (2, 3, 4):
        # Of a binomial distribution with 600 trials: within four standard deviations.
        assert abs(int((counts[:, 0] == shots).sum()) - 200) < 4 * (600 * 2 / 9) ** 0.5
    check_tasks(tasks, some.spec, split, 600, "cpu")
    assert some.spec == whole.spec
    assert some.dataset != whole.dataset
    assert "shots=2-4" in some.dataset


@pytest.mark.parametrize("name", ["sinusoid", "omniglot", "text"])
def test_a_range_of_one_number_gives_the_very_tasks_of_the_number(name):
    number = FAMILIES[name](shots=3, train_shots=2)
    for family in (FAMILIES[name](shots=(3, 3), train_shots=(2, 2)), FAMILIES[name](shots=3, train_shots=(2, 2))):
        assert (family.spec, family.dataset) == (number.spec, number.dataset)
        for split in ("train", "test"):
            found, expected = (one.sample(split, 3, generator(3)) for one in (family, number))
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_classes_of_a_task_differ_in_size_if_asked():
    family = characters(shots=1, train_shots=(1, 5), uneven=True)
    assert family.dataset == characters(shots=1).dataset
    assert "weight" not in family.sample("test", 2, generator()).support
    tasks = family.sample("train", 500, generator(3))
    torch.testing.assert_close(tasks, family.sample("train", 500, generator(3)), rtol=0, atol=0)
    counts = tasks.support["y"].sum(1)
    frequency = torch.stack([(counts == shots).double().mean() for shots in range(1, 6)])
    assert ((frequency - 0.2).abs() < 4 * (0.2 * 0.8 / 1500) ** 0.5).all()
    # Independent draws: three of them are equal once in 25 times.
    equal = (counts == counts[:, :1]).all(1).double().mean()
    assert abs(equal - 0.04) < 4 * (0.04 * 0.96 / 500) ** 0.5
    check_tasks(tasks, family.spec, "train", 500, "cpu")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"shots": (3, 2)}, r"shots must be a rising range \[least, most\] from 1 on, not \[3, 2\]"),
        ({"shots": (0, 2)}, "shots must be a rising range"),
        ({"train_shots": (0, 2)}, "train_shots must be a rising range"),
        ({"train_shots": 0}, "train_shots must be at least 1, not 0"),
        ({"shots": 2, "uneven": True}, "uneven=true draws the shots of each class from a range; set shots"),
        (
            {"shots": (1, 19)},
            r"ways must be at most 0, the train classes of .* with shots \+ queries = 19 \+ 2 drawings",
        ),
    ],
)
def test_wrong_ranges_are_refused(keys, words):
    with pytest.raises(ValueError, match=words):
        characters(**keys)


def spoiled(part, **leaves):
    def spoil(tasks):
        data = getattr(tasks, part)
        return tasks._replace(**{part: data | {name: change(data[name]) for name, change in leaves.items()}})

    return spoil


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda t: t._replace(query={n: v for n, v in t.query.items() if n != "weight"}), "the other has none"),
        (
            spoiled("support", weight=lambda w: w[:, 1:]),
            r'test support\["weight"\] must hold a number for each example',
        ),
        (spoiled("query", weight=lambda w: w.bool()), r"has torch.bool .* make it with real.to\(torch.float64\)"),
        (spoiled("support", weight=lambda w: w / 2), "must be 1 for an example and 0 for padding"),
        (spoiled("query", weight=lambda w: w * 0, y=lambda y: y * 0), "leaves a task without any example"),
        (spoiled("support", weight=lambda w: w * 0 + 1), "is not one-hot"),
        (spoiled("query", weight=lambda w: w * (torch.arange(6) > 0)), "has targets where the weight is 0"),
        (spoiled("support", y=lambda y: y * (y[..., :1] == 0)), "is not one-hot"),
    ],
)
def test_weights_that_are_not_what_the_contract_says_are_named(spoil, words):
    family = characters(shots=(1, 3))
    with pytest.raises(UserError, match=words):
        check_tasks(spoil(family.sample("test", 6, generator())), family.spec, "test", 6, "cpu")


def test_padded_tasks_may_be_smaller_than_the_spec_says_and_no_larger():
    family = characters(shots=(1, 3))
    tasks = characters(shots=(1, 5)).sample("test", 60, generator())
    with pytest.raises(UserError, match="test support has 15 examples per task, and 3 ways with 3 each make 9"):
        check_tasks(tasks, family.spec, "test", 60, "cpu")
    uneven_tasks = characters(shots=(1, 5), uneven=True).sample("test", 600, generator())
    few = uneven_tasks.support["weight"].sum(1) <= 9
    small = tree_map(lambda leaf: leaf[few], uneven_tasks)
    with pytest.raises(UserError, match="must hold each class at most 3 times"):
        check_tasks(small, family.spec, "test", int(few.sum()), "cpu")


def test_padding_is_no_query_that_others_could_see():
    """Batch statistics make queries see each other; without them none does, whatever padding holds."""
    for norm, transductive in (("batch", True), ("none", False)):
        torch.manual_seed(0)
        family = TinyImages()
        model = Conv4(family.spec, filters=4, norm=norm)
        algorithm = algorithm_of("protonet", family, model)
        _, batch = uneven(family, "test", [(2, 4), (1, 2)])
        assert is_transductive(algorithm, algorithm.init(generator()), family, batch, 1) == transductive


def with_fewer_ways(task, ways):
    """One task without its classes from the ``ways``-th on: cut away, and as a larger task with padding."""

    def cut(data):
        kept = data["y"].argmax(-1) < ways
        return {**{name: leaf[kept] for name, leaf in data.items()}, "y": data["y"][kept, :ways]}

    def blank(data):
        kept = data["y"].argmax(-1) < ways
        own = (torch.arange(data["y"].shape[1]) < ways).to(data["y"].dtype).expand_as(data["y"])
        return {**data, "y": data["y"] * kept[:, None], "weight": kept.to(data["y"].dtype), "ways": own}

    return tuple(Task(*(make(part) for part in task[:2]), task.seed) for make in (cut, blank))


CLASS_LEARNERS = {
    "maml": lambda model, spec: maml(model, 0.1),
    "protonet": lambda model, spec: protonet(model, spec),
    "matching": lambda model, spec: matching(model, spec),
    "relation": lambda model, spec: relation(model, spec),
    "multitask": lambda model, spec: multitask(model),
    "shared_params": shared_params,
    "shared_model": shared_model,
    "svm": metaoptnet,
    "ridge": lambda model, spec: metaoptnet(model, spec, head="ridge"),
}


@pytest.mark.parametrize("name", CLASS_LEARNERS)
def test_a_task_with_fewer_classes_is_the_task_of_those_classes(name):
    """Loss and accuracy of three ways of which one is absent, against the same weights and examples in two ways."""
    torch.manual_seed(0)
    family, spec = TinyImages(), class_spec((1, 16, 16), 2, 2, 4)
    three, two = Conv4(IMAGE_SPEC, filters=4), Conv4(spec, filters=4)
    two.load_state_dict({n: w[:2] if n.startswith("head.") else w for n, w in three.state_dict().items()})
    batch = sampled(family, "train", 1, generator(1))
    task = Task(*({key: leaf[0] for key, leaf in part.items()} for part in batch[:2]), batch.seed[0])
    small, large = (tree_map(lambda leaf: leaf[None], one) for one in with_fewer_ways(task, 2))
    learners = CLASS_LEARNERS[name](two, spec), CLASS_LEARNERS[name](three, IMAGE_SPEC)
    expected, found = (
        meta_gradient(learner, learner.init(generator()), tasks, loss_of(family))
        for learner, tasks in zip(learners, (small, large), strict=True)
    )
    close([found.loss, found.scores["accuracy"]], [expected.loss, expected.scores["accuracy"]])


def test_maps_are_not_normalised_over_classes_that_a_task_lacks():
    """As above, where relation networks compare maps by a network with batch normalisation."""
    torch.manual_seed(0)
    family, spec = TinyImages(), class_spec((1, 16, 16), 2, 2, 4)
    three, two = (Conv4(of, filters=4, halvings=2, readout="flatten") for of in (IMAGE_SPEC, spec))
    two.load_state_dict({n: w[:2] if n.startswith("head.") else w for n, w in three.state_dict().items()})
    batch = sampled(family, "train", 1, generator(1))
    task = Task(*({key: leaf[0] for key, leaf in part.items()} for part in batch[:2]), batch.seed[0])
    small, large = (tree_map(lambda leaf: leaf[None], one) for one in with_fewer_ways(task, 2))
    learners = relation(two, spec), relation(three, IMAGE_SPEC)
    expected, found = (
        meta_gradient(learner, learner.init(generator()), tasks, loss_of(family))
        for learner, tasks in zip(learners, (small, large), strict=True)
    )
    close([found.loss, *leaves(found.grads)], [expected.loss, *leaves(expected.grads)])


@cache
def tagged_sentences():
    return entities(dataset="toy", shots=2, queries=2, longest=6, buckets=32)


@pytest.mark.parametrize("name", ["metaoptnet", "relation", "shared_params"])
def test_words_may_say_which_tags_the_task_has(name):
    """Where all are the task's own, it changes nothing; there are as many of these rows as sentences, not as words."""
    family = tagged_sentences()
    torch.manual_seed(0)
    algorithm = algorithm_of(name, family, Tagger(family.spec, 4, 6, 1))
    theta, tasks = algorithm.init(generator()), sampled(family, "train", 2, generator(1))
    own = torch.ones(2, 2, family.spec.target.outputs)
    said = tasks._replace(support={**tasks.support, "ways": own}, query={**tasks.query, "ways": own})
    expected, found = (meta_gradient(algorithm, theta, one, loss_of(family)) for one in (tasks, said))
    close([found.loss, *leaves(found.grads)], [expected.loss, *leaves(expected.grads)])


def test_ways_are_drawn_for_each_task_and_absent_classes_have_no_chance():
    family = characters(ways=(2, 5), shots=2)
    assert "ways=2-5" in family.dataset
    tasks = family.sample("test", 600, generator(3))
    number = tasks.support["ways"][:, 0].sum(1)
    frequency = torch.stack([(number == ways).double().mean() for ways in range(2, 6)])
    assert ((frequency - 0.25).abs() < 4 * (0.25 * 0.75 / 600) ** 0.5).all()
    counts = tasks.support["y"].sum(1)
    assert torch.equal(counts, 2 * tasks.support["ways"][:, 0])
    check_tasks(tasks, family.spec, "test", 600, "cpu")
    output = torch.zeros(*tasks.query["y"].shape)
    loss = vmap(family.spec.target.loss)(output, tasks.query)
    torch.testing.assert_close(loss, number.log())
