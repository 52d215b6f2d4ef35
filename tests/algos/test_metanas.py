"""MetaNAS against plain autograd, and what it reads off."""

import pandas as pd
import pytest
import reference
import torch
from conftest import composed
from scenarios import class_spec, generator

from metarun.algos.agnostic.maml import maml
from metarun.algos.agnostic.metanas import metanas
from metarun.contracts import Task
from metarun.engine.batch import meta_gradient
from metarun.models.supernet import SupernetConv, SupernetMLP
from metarun.run import run
from metarun.targets.scoring import loss_of
from metarun.tasks.teachers import Teachers
from metarun.tree import leaves, tree_map

pytestmark = pytest.mark.usefixtures("float64")


def setting(operations=("relu", "tanh", "sine"), **named):
    torch.manual_seed(0)
    family = Teachers(shots=6)
    model = SupernetMLP(family.spec, (5, 4), operations)
    algorithm = metanas(model, family.spec, 0.1, 0.7, 2, 0.1, **named)
    theta = algorithm.init(generator())
    theta["architecture"] = {name: torch.randn_like(a) for name, a in theta["architecture"].items()}
    return family, model, algorithm, theta, family.sample("train", 3, generator(1))


def test_with_one_operation_it_is_maml():
    family, model, algorithm, theta, tasks = setting(("tanh",))
    plain = maml(model, 0.1, 2)
    expected = meta_gradient(plain, plain.init(generator()), tasks, loss_of(family)).grads["weights"]
    found = meta_gradient(algorithm, theta, tasks, loss_of(family)).grads
    for name, gradient in found["weights"].items():
        torch.testing.assert_close(gradient, expected[name])


@pytest.mark.parametrize(("warm_up", "meta_step"), [(0, 0.0), (5, 4.0), (5, 5.0)])
@pytest.mark.parametrize(("first_order", "harden_steps"), [(False, None), (True, None), (False, 1)])
def test_meta_gradient(first_order, harden_steps, warm_up, meta_step):
    """Temperatures 1, √0.1 or 0.1, and 0.1 around two steps; in warm-up all operations weigh alike."""
    family, _, algorithm, theta, tasks = setting(warm_up=warm_up, first_order=first_order, harden_steps=harden_steps)
    theta["carried"]["meta_step"] = torch.tensor(meta_step)
    variables = tree_map(lambda leaf: leaf.clone().requires_grad_(), {n: theta[n] for n in ("weights", "architecture")})
    begun = 1.0 if meta_step >= warm_up else 0.0

    def output(w, a, x, temperature):
        for i in (0, 1):
            h = [x @ w[f"trunk.{i}.paths.{o}.weight"].T + w[f"trunk.{i}.paths.{o}.bias"] for o in range(3)]
            share = (begun * a[f"trunk.{i}.architecture"] / temperature).exp()
            share = share / share.sum()
            x = share[0] * h[0].clamp(min=0) + share[1] * h[1].tanh() + share[2] * h[2].sin()
        return x @ w["head.weight"].T + w["head.bias"]

    total = 0
    for sx, sy, qx, qy in reference.split(tasks):
        w, a = dict(variables["weights"]), dict(variables["architecture"])
        for temperature in (1.0, 0.1 if harden_steps else 0.1**0.5):
            loss = ((output(w, a, sx, temperature) - sy) ** 2).mean()
            found = torch.autograd.grad(loss, [*w.values(), *a.values()], create_graph=True)
            found = iter([g.detach() for g in found] if first_order else found)
            w = {name: value - 0.1 * next(found) for name, value in w.items()}
            a = {name: value - 0.7 * next(found) for name, value in a.items()}
        total = total + ((output(w, a, qx, 0.1) - qy) ** 2).mean() / 3
    expected = torch.autograd.grad(total, list(leaves(variables)))
    result = meta_gradient(algorithm, theta, tasks, loss_of(family))
    for ours, theirs in zip(leaves(result.grads), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert result.carried["meta_step"] == meta_step + 1


def test_a_test_task_ends_with_one_operation_in_each_layer():
    """The model of the operations of largest weight alone gives the same answers."""
    family, _, algorithm, theta, tasks = setting()
    support = {name: value[0] for name, value in tasks.support.items()}
    *_, state = (state for _, state in zip(range(3), algorithm.adapt(theta, support, loss_of(family)), strict=False))
    weights = algorithm.report.measure(theta, Task(support, {}), loss_of(family), 2)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2))
    x = tasks.query["x"][0]
    h = x
    for i, chosen in enumerate(weights.argmax(-1).tolist()):
        path = f"trunk.{i}.paths.{chosen}"
        operation = (torch.relu, torch.tanh, torch.sin)[chosen]
        h = operation(h @ state.weights[f"{path}.weight"].T + state.weights[f"{path}.bias"])
    expected = h @ state.weights["head.weight"].T + state.weights["head.bias"]
    torch.testing.assert_close(algorithm.predict(theta, state, x), expected)


def test_a_mixture_of_convolutions_is_the_weighted_sum_of_its_paths():
    spec = class_spec((1, 28, 28), 5, 1, 1, 5, 5)
    model, x = SupernetConv(spec, 4, ("conv3", "conv5", "separable", "pool")), torch.randn(3, 1, 28, 28)
    block = model.trunk[0]
    torch.nn.init.normal_(block.architecture)
    weights = block.architecture.exp() / block.architecture.exp().sum()
    parts = [path(x) for path in block.paths]
    assert {part.shape for part in parts} == {(3, 4, 14, 14)}
    torch.testing.assert_close(block(x), sum(w * part for w, part in zip(weights, parts, strict=True)))
    assert model(x).shape == (3, 5)


def test_architectures_are_written_for_each_task_with_its_kind(tmp_path):
    torch.set_default_dtype(torch.float32)
    quick = ("train.steps=2", "train.val_episodes=2", "eval.episodes=7", "eval.adapt_steps=5")
    run(*composed("algo=metanas", "task=teachers", "model=supernet_mlp", "model.widths=[4,3]", *quick), tmp_path)
    table = pd.read_csv(tmp_path / "architectures.csv")
    assert list(table.columns) == ["episode", "group", "layer", "operation", "weight", "replica"]
    assert len(table) == 7 * 2 * 3
    torch.testing.assert_close(
        torch.tensor(table.groupby(["episode", "layer"]).weight.sum().to_numpy()), torch.ones(14, dtype=torch.float64)
    )
    assert set(table.group) <= {"sine", "tanh", "relu"}
    assert (tmp_path / "architectures.png").stat().st_size > 5000
