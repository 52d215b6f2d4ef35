"""Methods that live on good features: against closed forms, plain autograd, and each other."""

import pytest
import torch
import torch.nn.functional as F
from scenarios import TinyImages, generator

from metarun.algos.agnostic.protomaml import protomaml
from metarun.algos.baselines.linear_probe import linear_probe, logistic
from metarun.algos.dependent.meta_baseline import meta_baseline
from metarun.algos.dependent.protonet import protonet
from metarun.contracts import Numbers, Sizes, Spec
from metarun.engine.batch import evaluate, meta_gradient
from metarun.models.adapter import Adapter
from metarun.models.mlp import MLP
from metarun.nn.ops import unit_rows
from metarun.targets.classes import ACCURACY, Classes
from metarun.targets.scoring import loss_of

pytestmark = pytest.mark.usefixtures("float64")


def tiny(count=3):
    torch.manual_seed(0)
    family = TinyImages()
    return family, MLP(family.spec, (8,)), family.sample("train", count, generator(1))


def test_logistic_regression_is_stationary_and_leaves_padding_out():
    torch.manual_seed(0)
    z, y = 0.3 * torch.randn(9, 20), torch.eye(3)[torch.arange(9) % 3]
    w = logistic(z, y, torch.tensor(0.1), 500).requires_grad_()
    loss = F.cross_entropy(z @ w.T, y.argmax(1), reduction="sum") + 0.05 * w.square().sum()
    assert torch.autograd.grad(loss, w)[0].abs().max() < 1e-8
    real = torch.tensor([1.0] * 9 + [0.0] * 2)
    padded = torch.cat([z, torch.full((2, 20), 3.0)]), torch.cat([y, torch.zeros(2, 3)])
    torch.testing.assert_close(logistic(*padded, torch.tensor(0.1), 500, real), w.detach())
    four_ways = F.pad(y, (0, 1))
    torch.testing.assert_close(logistic(z, four_ways, torch.tensor(0.1), 500)[:3], w.detach())


def test_a_hundred_steps_of_logistic_regression_are_near_the_minimum_where_the_penalty_is_small():
    """On classes that can be told apart, whose weights then grow for long."""
    torch.manual_seed(0)
    y = torch.eye(5)[torch.arange(25) % 5]
    z = F.normalize(y @ torch.randn(5, 64) + torch.randn(25, 64))

    def loss(w):
        return F.cross_entropy(z @ w.T, y.argmax(1), reduction="sum") + 0.0005 * w.square().sum()

    found, minimum = (loss(logistic(z, y, torch.tensor(0.001), steps)) for steps in (100, 3000))
    assert found < 1.01 * minimum


def test_a_linear_probe_scales_features_and_tries_every_strength():
    family, _, tasks = tiny()
    algorithm = linear_probe(family.spec, [0.5, 0.1], 300)
    support, x = {name: leaf[0] for name, leaf in tasks.support.items()}, tasks.query["x"][0]
    for theta, strength in zip(algorithm.candidates(algorithm.init(generator())), (0.5, 0.1), strict=True):
        *_, state = algorithm.adapt(theta, support, None)
        rows, queries = (F.pad(F.normalize(part.flatten(1)), (0, 1), value=1.0) for part in (support["x"], x))
        w = state.clone().requires_grad_()
        loss = F.cross_entropy(rows @ w.T, support["y"].argmax(1), reduction="sum") + strength / 2 * w.square().sum()
        assert torch.autograd.grad(loss, w)[0].abs().max() < 1e-6
        torch.testing.assert_close(algorithm.predict(theta, state, x), queries @ w.T)


@pytest.mark.parametrize("first_order", [False, True])
def test_protomaml_is_a_plain_loop_from_prototypes(first_order):
    family, model, tasks = tiny()
    algorithm = protomaml(model, family.spec, 0.3, 2, first_order)
    theta = algorithm.init(generator())
    weights = {name: w.clone().requires_grad_() for name, w in theta["weights"].items()}

    def features(w, x):
        return F.linear(x.flatten(1), w["1.weight"], w["1.bias"]).relu()

    total = 0
    for i in range(3):
        sx, sy, qx, qy = (part[name][i] for part in tasks[:2] for name in ("x", "y"))
        z = features(weights, sx)
        centres = torch.stack([z[sy.argmax(1) == k].mean(0) for k in range(sy.shape[1])])
        own = {**weights, "head": 2 * centres, "bias": -(centres**2).sum(1)}
        for _ in range(2):
            # Copies, so that the head is a variable and not a function of the trunk.
            start = {n: w.detach().requires_grad_() if first_order else w.clone() for n, w in own.items()}
            loss = F.cross_entropy(F.linear(features(start, sx), start["head"], start["bias"]), sy.argmax(1))
            slopes = torch.autograd.grad(loss, list(start.values()), create_graph=not first_order)
            own = {n: w - 0.3 * g for (n, w), g in zip(own.items(), slopes, strict=True)}
        total = total + F.cross_entropy(F.linear(features(own, qx), own["head"], own["bias"]), qy.argmax(1)) / 3
    found = meta_gradient(algorithm, theta, tasks, loss_of(family))
    torch.testing.assert_close(found.loss, total.detach())
    for name, slope in zip(weights, torch.autograd.grad(total, list(weights.values())), strict=True):
        torch.testing.assert_close(found.grads["weights"][name], slope)


def test_protomaml_without_steps_is_a_prototypical_network():
    family, model, tasks = tiny()
    found = [
        meta_gradient(algorithm, algorithm.init(generator()), tasks, loss_of(family))
        for algorithm in (protomaml(model, family.spec, inner_steps=0), protonet(model, family.spec))
    ]
    torch.testing.assert_close(found[0].loss, found[1].loss)
    torch.testing.assert_close(dict(found[0].grads["weights"]), dict(found[1].grads["weights"]))


def test_meta_baseline_classifies_all_training_classes_and_then_plays_episodes():
    family, model, tasks = tiny()
    algorithm = meta_baseline(model, family.spec, pretrain_steps=1)
    theta = algorithm.init(generator())
    first = meta_gradient(algorithm, theta, tasks, loss_of(family))
    trunk = {name: w.clone().requires_grad_() for name, w in theta["weights"].items()}
    x, labels = (torch.cat([part[name].flatten(0, 1) for part in tasks[:2]]) for name in ("x", "class"))
    z = F.linear(x.flatten(1), trunk["1.weight"], trunk["1.bias"]).relu()
    expected = F.cross_entropy(F.linear(z, *theta["joint_head"].values()), labels)
    torch.testing.assert_close(first.loss, expected.detach())
    for name, slope in zip(trunk, torch.autograd.grad(expected, list(trunk.values())), strict=True):
        torch.testing.assert_close(first.grads["weights"][name], slope)
    assert first.carried["meta_step"] == 1

    later = meta_gradient(algorithm, {**theta, "carried": first.carried}, tasks, loss_of(family))
    prototypes = protonet(model, family.spec, "cosine")
    same = meta_gradient(prototypes, prototypes.init(generator()), tasks, loss_of(family))
    torch.testing.assert_close(later.loss, same.loss)
    torch.testing.assert_close(dict(later.grads["weights"]), dict(same.grads["weights"]))
    torch.testing.assert_close(later.grads["scale"], same.grads["scale"])
    assert later.grads["joint_head"]["weight"].abs().max() == 0
    accuracy = evaluate(algorithm, theta, tasks, loss_of(family), 1)
    assert accuracy[1].isfinite().all()


def test_an_adapter_begins_as_the_vectors_themselves():
    spec = Spec(Numbers((6,)), Classes(3), Sizes(1, 1, 3), (ACCURACY,))
    x = torch.randn(4, 6)
    torch.testing.assert_close(Adapter(spec, width=5, scale=3.0).trunk(x), 3.0 * unit_rows(x))
    with pytest.raises(ValueError, match=r"set task\.embed"):
        Adapter(Spec(Numbers((3, 8, 8)), Classes(3), Sizes(1, 1, 3), (ACCURACY,)))
