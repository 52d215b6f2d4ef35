"""Padding: examples of weight 0 change nothing, and tasks of different sizes fit into one batch."""

from functools import cache
from importlib.resources import files

import pytest
import torch
from omegaconf import OmegaConf
from scenarios import TinyImages, generator, sampled

from metarun.config import build
from metarun.contracts import Task
from metarun.engine.batch import evaluate, meta_gradient
from metarun.errors import UserError
from metarun.models.conv4 import Conv4
from metarun.models.mlp import MLP
from metarun.models.supernet import SupernetConv
from metarun.models.text import TextEmbedding
from metarun.nn.functional import forward_of, parameters_of
from metarun.nn.padding import weighing
from metarun.nn.transforms import plainly
from metarun.targets.scoring import loss_of
from metarun.tasks.sinusoid import Sinusoid
from metarun.tasks.text import text
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
    config = OmegaConf.create({"algo": OmegaConf.create((files("metarun.conf") / "algo" / f"{name}.yaml").read_text())})
    config.algo.pop("defaults", None)
    config.algo.update(keys)
    return build(config, "algo", model=model, spec=family.spec)


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
