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
from metarun.models.supernet import supernet
from metarun.models.text import TextEmbedding
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
    return family, supernet(family.spec)


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
        support, query = (
            fewer(chosen(part, i), n, random) for part, n in zip(batch[:2], (shots, queries), strict=True)
        )
        tasks.append((support, query))
    alone = [
        Task(*(tree_map(lambda leaf: leaf[None], part) for part in task), batch.seed[i : i + 1])
        for i, task in enumerate(tasks)
    ]
    return alone, Task(*(padded(list(parts), random) for parts in zip(*tasks, strict=True)), batch.seed)


def close(found, expected, tolerance):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


LOOSE = {}


@pytest.mark.parametrize("case", list(fitting()))
def test_padding_changes_nothing(case):
    """Loss, scores, every leaf of the gradient and of what is carried, and all of an evaluation."""
    name, of, keys = CASES[case]
    torch.manual_seed(0)
    family, model = of()
    algorithm = algorithm_of(name, family, model, **keys)
    theta, loss, tolerance = algorithm.init(generator()), loss_of(family), LOOSE.get(case, 1e-12)
    sizes = [(7, 6), (5, 4)] if of is sinusoid else [(2, 4), (1, 2)]
    if learned(theta):
        alone, batch = uneven(family, "train", sizes)
        expected = [meta_gradient(algorithm, theta, task, loss) for task in alone]
        found = meta_gradient(algorithm, theta, batch, loss)
        mean = [torch.stack(parts).mean(0) for parts in zip(*(list(leaves(e.grads)) for e in expected), strict=True)]
        assert all(g.isfinite().all() for g in mean)
        close(list(leaves(found.grads)), mean, tolerance)
        close(found.loss, torch.stack([e.loss for e in expected]).mean(), tolerance)
        for metric, value in found.scores.items():
            close(value, torch.stack([e.scores[metric] for e in expected]).mean(), tolerance)
        carried = [
            torch.stack(parts).mean(0) for parts in zip(*(list(leaves(e.carried)) for e in expected), strict=True)
        ]
        close(list(leaves(found.carried)), carried, tolerance)
    alone, batch = uneven(family, "test", sizes)
    found = evaluate(algorithm, theta, batch, loss, 2, with_own_scores=True)
    expected = [evaluate(algorithm, theta, task, loss, 2, with_own_scores=True) for task in alone]
    close(found.losses, torch.cat([e.losses for e in expected]), tolerance)
    for metric, value in found.scores.items():
        close(value, torch.cat([e.scores[metric] for e in expected]), tolerance)
    assert found.losses.isfinite().all()
