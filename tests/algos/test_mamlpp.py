"""MAML++ against plain autograd, and each of its switches."""

from functools import partial

import pytest
import reference
import torch
import torch.nn.functional as F
from conftest import composed
from scenarios import TinyImages, generator
from torch import nn

from metarun.algos.agnostic.maml import maml
from metarun.algos.agnostic.mamlpp import mamlpp, step_weights
from metarun.engine.batch import evaluate, meta_gradient
from metarun.errors import UserError
from metarun.models.conv4 import Conv4
from metarun.models.mlp import MLP
from metarun.run import run
from metarun.targets.scoring import loss_of
from metarun.tasks.sinusoid import Sinusoid
from metarun.tree import leaves, tree_map

pytestmark = pytest.mark.usefixtures("float64")
OFF = {"learned_rates": False, "multi_step_epochs": 0, "batch_norm": "shared"}


def gradients(algorithm, model, family, meta_step=0.0):
    theta = algorithm.init(generator())
    theta["carried"]["meta_step"] = torch.tensor(meta_step)
    tasks = family.sample("train", 4, generator(1))
    return theta, tasks, meta_gradient(algorithm, theta, tasks, loss_of(family))


def images():
    torch.manual_seed(0)
    family = TinyImages()
    return family, Conv4(family.spec, filters=4)


def test_with_all_switches_off_it_is_maml():
    family, model = images()
    ours = gradients(mamlpp(model, 0.1, 2, first_order_epochs=0, **OFF), model, family)[2]
    tasks = family.sample("train", 4, generator(1))
    plain = maml(model, 0.1, 2)
    expected = meta_gradient(plain, plain.init(generator()), tasks, loss_of(family))
    torch.testing.assert_close(ours.grads, expected.grads, rtol=1e-10, atol=1e-13)


def test_first_order_until_its_epoch_and_second_order_from_there_on():
    family, model = images()
    algorithm = mamlpp(model, 0.1, 2, first_order_epochs=3, epoch=10, **OFF)
    for meta_step, first_order in ((29.0, True), (30.0, False)):
        theta, tasks, found = gradients(algorithm, model, family, meta_step)
        kind, features = reference.kind_of(family), reference.conv4_features
        expected = reference.maml_gradient(features, theta["weights"], tasks, kind, 0.1, 2, first_order)
        torch.testing.assert_close(found.grads["weights"], expected, rtol=1e-8, atol=1e-11)
        assert found.carried["meta_step"] == meta_step + 1


def test_no_second_order_is_first_order_for_ever():
    family, model = images()
    never, late = (mamlpp(model, 0.1, 2, first_order_epochs=epochs) for epochs in (None, 10**6))
    found = [gradients(algorithm, model, family)[2].grads for algorithm in (never, late)]
    torch.testing.assert_close(*found)


def test_weights_of_the_steps_are_annealed():
    """By hand for two steps over ten epochs, floors and the end included."""
    expected = {0: (0.5, 0.5), 1: (0.45, 0.55), 9: (0.05, 0.95), 10: (0.0, 1.0), 99: (0.0, 1.0)}
    for epoch, weights in expected.items():
        torch.testing.assert_close(step_weights(torch.tensor(float(epoch)), 2, 10), torch.tensor(weights))
    # 1/5 · (1 − 99/100) = 0.002 lies under the floor of 0.03/5.
    low = step_weights(torch.tensor(99.0), 5, 100)
    torch.testing.assert_close(low, torch.tensor([0.006] * 4 + [1 - 4 * 0.006]))


def written_out(theta, tasks, steps, meta_step, epochs, per_step):
    """Meta-loss with learned step sizes, multi-step loss and norms of each step, by plain autograd."""
    learned = {key: theta[key] for key in ("weights", "rates", "norms") if key in theta}
    variables = tree_map(lambda leaf: leaf.clone().requires_grad_(), learned)

    def output(fast, step, x):
        w = {**fast, **{name: values[step] for name, values in variables.get("norms", {}).items()}}
        return reference.output(reference.conv4_features, w, x)

    early = max(1 / steps - meta_step // 10 / (steps * epochs), 0.03 / steps)
    v = [early] * (steps - 1) + [1 - (steps - 1) * early]
    total = 0
    for sx, sy, qx, qy in reference.split(tasks):
        fast = dict(variables["weights"])
        for step in range(steps):
            support = F.cross_entropy(output(fast, step, sx), sy.argmax(1))
            found = torch.autograd.grad(support, list(fast.values()), create_graph=True)
            fast = {n: w - variables["rates"][n][step] * g for (n, w), g in zip(fast.items(), found, strict=True)}
            total = total + v[step] * F.cross_entropy(output(fast, step + 1, qx), qy.argmax(1))
    flat = list(leaves(variables))
    return torch.autograd.grad(total / len(tasks.support["x"]), flat, allow_unused=True)


@pytest.mark.parametrize("batch_norm", ["shared", "per_step", "per_step_running"])
def test_meta_gradient(batch_norm):
    family, model = images()
    algorithm = mamlpp(model, 0.1, 3, multi_step_epochs=4, first_order_epochs=0, batch_norm=batch_norm, epoch=10)
    theta, tasks, found = gradients(algorithm, model, family, 20.0)
    if batch_norm != "shared":
        assert theta["norms"]["trunk.1.weight"].shape == (4, 4)
    expected = written_out(theta, tasks, 3, 20, 4, batch_norm)
    for ours, theirs in zip(leaves(found.grads), expected, strict=True):
        theirs = torch.zeros_like(ours) if theirs is None else theirs
        assert (ours - theirs).abs().max() < 1e-9 * theirs.abs().max().clamp(min=1e-3)


def test_running_statistics_are_those_of_the_batches_seen_at_each_step():
    """One meta-step moves the averages by a tenth towards the tasks' mean; test then normalises with them alone."""
    family, model = images()
    algorithm = mamlpp(model, 0.1, 2, learned_rates=False, batch_norm="per_step_running")
    theta, tasks, found = gradients(algorithm, model, family)
    first = [F.conv2d(x, theta["weights"]["trunk.0.weight"], stride=2, padding=1) for x in tasks.support["x"]]
    mean = torch.stack([h.mean((0, 2, 3)) for h in first]).mean(0)
    variance = torch.stack([h.var((0, 2, 3), unbiased=False) for h in first]).mean(0)
    torch.testing.assert_close(found.carried["mean"]["trunk.1"][0], 0.1 * mean)
    torch.testing.assert_close(found.carried["variance"]["trunk.1"][0], 0.9 + 0.1 * variance)
    # Queries do not see each other: a query's answer is the same alone.
    state = list(algorithm.adapt(theta, {n: v[0] for n, v in tasks.support.items()}, loss_of(family)))[-1]
    x = tasks.query["x"][0]
    predict = partial(algorithm.predict, theta, state)
    torch.testing.assert_close(predict(x)[:1], predict(x[:1]))
    norms = algorithm.predict(theta, state, x)
    given = {**state.weights, **{name: values[2] for name, values in theta["norms"].items()}}
    h = x
    for i in (0, 3, 6, 9):
        h = F.conv2d(h, given[f"trunk.{i}.weight"], stride=2, padding=1)
        place = f"trunk.{i + 1}"
        statistics = [theta["carried"][part][place][2] for part in ("mean", "variance")]
        h = F.relu(F.batch_norm(h, *statistics, given[f"{place}.weight"], given[f"{place}.bias"], training=False))
    torch.testing.assert_close(norms, F.linear(h.mean((2, 3)), given["head.weight"], given["head.bias"]))


def test_no_more_steps_than_were_learned(tmp_path):
    torch.set_default_dtype(torch.float32)
    with pytest.raises(UserError, match=r"set eval\.adapt_steps=5"):
        run(*composed("algo=mamlpp", "eval.adapt_steps=6", "train.steps=1"), tmp_path)
    family = Sinusoid()
    algorithm = mamlpp(MLP(family.spec), inner_steps=2)
    assert algorithm.max_steps == 2
    assert mamlpp(MLP(family.spec), inner_steps=2, **OFF).max_steps is None
    theta = algorithm.init(generator())
    assert evaluate(algorithm, theta, family.sample("test", 2, generator()), loss_of(family), 2).adapt_steps == [
        0,
        1,
        2,
    ]


def test_models_without_batch_norm_have_none_of_each_step():
    family = Sinusoid()
    theta = mamlpp(MLP(family.spec)).init(generator())
    assert set(theta) == {"weights", "rates", "carried"}


NORMS = {
    "group": lambda: nn.GroupNorm(2, 4),
    "instance": lambda: nn.InstanceNorm2d(4, affine=True),
    "layer": lambda: nn.LayerNorm((4, 8, 8)),
    "root mean square": lambda: nn.RMSNorm((4, 8, 8)),
    "batch": lambda: nn.BatchNorm2d(4),
    "last axis": lambda: nn.LayerNorm(8),
}


@pytest.mark.parametrize("norm", NORMS)
def test_the_inner_loop_leaves_every_normalisation_alone_unless_it_is_shared(norm):
    """By the authors' rule: no parameter of a norm layer is in the dictionary that the inner loop updates."""
    family, _ = images()
    model = nn.Sequential(nn.Conv2d(1, 4, 3, 2, padding=1), NORMS[norm](), nn.Flatten(), nn.Linear(256, 3))
    tasks = family.sample("train", 1, generator(1))
    support = {name: leaf[0] for name, leaf in tasks.support.items()}
    of_norm = {f"1.{name}" for name, _ in model[1].named_parameters()}
    for batch_norm, adapted in (("per_step", False), ("shared", True)):
        algorithm = mamlpp(model, 0.1, 2, batch_norm=batch_norm)
        theta = algorithm.init(generator())
        *_, state = algorithm.adapt(theta, support, loss_of(family))
        assert (of_norm <= set(state.weights)) == (of_norm <= set(theta["rates"])) == adapted
        assert algorithm.adapted_parameters(theta) == sum(w.numel() for w in state.weights.values())
        # The meta-gradient has what the inner loop leaves alone.
        grads = meta_gradient(algorithm, theta, tasks, loss_of(family)).grads
        found = grads["weights"] if adapted else grads["norms" if norm == "batch" else "other_norms"]
        assert of_norm <= set(found)
        assert all(found[name].any() for name in of_norm)
