"""Learners that fit or write a part of the model for each task: optimality, closed forms and symmetries."""

from importlib.resources import files

import pytest
import reference
import torch
import torch.nn.functional as F
from learners import keys_of
from omegaconf import OmegaConf
from scenarios import IMAGE_SPEC, TinyImages, generator
from torch import nn
from torch.func import vmap

from metarun.algos.baselines.baselinepp import baselinepp, official_scale
from metarun.algos.baselines.multitask import multitask
from metarun.algos.baselines.oracle import oracle
from metarun.algos.dependent.metaoptnet import metaoptnet, support_vectors
from metarun.algos.dependent.shared_model import shared_model
from metarun.assemble import algorithm_names
from metarun.config import construct
from metarun.engine.batch import evaluate, meta_gradient
from metarun.errors import UserError
from metarun.models.conv4 import Conv4
from metarun.models.mlp import MLP
from metarun.nn import ops
from metarun.targets.scoring import loss_of
from metarun.tasks.sinusoid import Sinusoid
from metarun.tree import learned, size, tree_map

pytestmark = pytest.mark.usefixtures("float64")


def images(model_of=lambda spec: MLP(spec, (8,))):
    torch.manual_seed(0)
    family = TinyImages()
    return family, model_of(family.spec), family.sample("train", 3, generator(1))


def test_distances_of_many_rows_are_those_of_their_differences(monkeypatch):
    """Far from zero, where the short formula would lose what the differences keep, with both derivatives."""
    a, b = (1000 + torch.randn(n, 5, generator=generator(n)).requires_grad_() for n in (7, 4))
    expected = ops.squared_distances(a, b)
    monkeypatch.setattr(ops, "MOST_DIFFERENCES", 0)
    torch.testing.assert_close(ops.squared_distances(a, b), expected, rtol=1e-10, atol=1e-10)
    assert torch.autograd.gradcheck(ops.squared_distances, (a, b))
    assert torch.autograd.gradgradcheck(ops.squared_distances, (a, b))


def machine(n, ways, reach):
    torch.manual_seed(n)
    z = torch.randn(n, 30) * 0.7
    return z @ z.T + torch.eye(n), torch.eye(ways)[torch.randperm(n) % ways], reach


@pytest.mark.parametrize(("n", "ways", "reach"), [(5, 5, 0.1), (25, 5, 0.1), (25, 5, 3.0), (40, 20, 0.1), (12, 2, 1.0)])
@pytest.mark.parametrize("like_images", [False, True])
def test_support_vectors_satisfy_the_optimality_conditions(n, ways, reach, like_images):
    """Feasible; and where a dual variable is off its bound, no feasible direction lowers the objective.

    Features of images are long, not negative and much alike, which makes the problem ill-conditioned.
    """
    gram, y, reach = machine(n, ways, reach)
    if like_images:
        z = 2 * (1 + 0.5 * torch.randn(n, 32)).clamp(min=0)
        gram = z @ z.T + torch.eye(n)
    steps = OmegaConf.load(files("metarun.conf") / "algo" / "metaoptnet.yaml").solver_steps
    alpha = support_vectors(gram, y, reach, steps)
    assert alpha.sum(1).abs().max() < 1e-10
    assert (alpha - reach * y).max() < 1e-10
    gradient = gram @ alpha - y
    beta = y - alpha / reach
    # Moving weight from a free class to another must not pay: free ones have the largest gradient of their row.
    slack = (gradient.amax(1, keepdim=True) - gradient) * beta
    assert slack.abs().max() < 1e-10
    assert beta.min() > -1e-10


def test_support_vectors_differentiate_to_finite_differences():
    gram, y, reach = machine(6, 3, 0.5)
    weights = torch.randn(6, 3)

    def value(g):
        return (support_vectors((g + g.T) / 2, y, reach, 200) * weights).sum()

    assert torch.autograd.gradcheck(value, gram.clone().requires_grad_(), eps=1e-6, atol=1e-6)


def test_a_support_vector_machine_of_two_classes_is_the_binary_one():
    """Two examples, one a class: the binary machine's margin problem has a closed form."""
    gram = torch.tensor([[2.0, 0.5], [0.5, 3.0]])
    alpha = support_vectors(gram, torch.eye(2), 10.0, 200)
    # min ½ tr(αᵀGα) − α_11 − α_22 with rows (a, −a), (−b, b): a² G11 + b² G22 − 2ab G12 − a − b.
    a, b = torch.linalg.solve(torch.tensor([[4.0, -1.0], [-1.0, 6.0]]), torch.ones(2))
    torch.testing.assert_close(alpha, torch.stack([torch.stack([a, -a]), torch.stack([-b, b])]))


def test_a_ridge_head_solves_the_normal_equations():
    family, model, tasks = images()
    algorithm = metaoptnet(model, family.spec, "ridge", strength=2.0, scale=3.0)
    theta = algorithm.init(generator())
    support = {name: value[0] for name, value in tasks.support.items()}
    z, q = (F.relu(model.trunk[1](x.flatten(1))) for x in (support["x"], tasks.query["x"][0]))
    w = torch.linalg.inv(z.T @ z + 2.0 * torch.eye(z.shape[1])) @ z.T @ support["y"]
    torch.testing.assert_close(algorithm.predict(theta, support, tasks.query["x"][0]), 3.0 * q @ w)


def test_multitask_gradient_takes_the_heads_as_they_are():
    family, model, tasks = images()
    algorithm = multitask(model, 0.3, 4)
    theta = algorithm.init(generator())
    trunk = {name: w.clone().requires_grad_() for name, w in theta["weights"].items()}
    total = 0
    for sx, sy, qx, qy in reference.split(tasks):
        z, y = reference.mlp_features(trunk, torch.cat([sx, qx])), torch.cat([sy, qy]).argmax(1)
        weight, bias = (torch.zeros(shape, requires_grad=True) for shape in ((3, 8), (3,)))
        rate = 0.3 / (1 + (z.detach() ** 2).sum(1).mean())
        for _ in range(4):
            loss = F.cross_entropy(F.linear(z.detach(), weight, bias), y)
            found = torch.autograd.grad(loss, [weight, bias])
            weight, bias = (
                (p - rate * g).detach().requires_grad_() for p, g in zip((weight, bias), found, strict=True)
            )
        total = total + F.cross_entropy(F.linear(z, weight.detach(), bias.detach()), y) / 3
    expected = torch.autograd.grad(total, list(trunk.values()))
    found = meta_gradient(algorithm, theta, tasks, loss_of(family)).grads["weights"]
    for ours, theirs in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


class OfficialClassifier(nn.Module):
    """Chen et al.'s: torch's weight norm by rows, unit features, a constant factor."""

    def __init__(self, weight, factor):
        super().__init__()
        self.linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.linear.weight.data = weight.clone()
        self.linear = nn.utils.parametrizations.weight_norm(self.linear, dim=0)
        self.factor = factor

    def forward(self, z):
        return self.factor * self.linear(F.normalize(z, eps=1e-6))


def test_baselinepp_fits_the_official_classifier_by_plain_gradient_descent_from_random_weights():
    family, model, tasks = images()
    algorithm = baselinepp(model, family.spec, step_sizes=(0.7,))
    theta = algorithm.init(generator())
    sx, sy, qx, _ = next(reference.split(tasks))
    z, q = (F.relu(model.trunk[1](x.flatten(1))).detach() for x in (sx, qx))
    start = theta["carried"]["start"]
    torch.testing.assert_close(start["length"], start["weight"].norm(dim=1))
    classifier = OfficialClassifier(start["weight"], 2.0)
    optimizer = torch.optim.SGD(classifier.parameters(), 0.7)
    states = algorithm.adapt(theta, {"x": sx, "y": sy}, loss_of(family))
    for _ in range(3):
        torch.testing.assert_close(algorithm.predict(theta, next(states), qx), classifier(q).detach())
        optimizer.zero_grad()
        F.cross_entropy(classifier(z), sy.argmax(1)).backward()
        optimizer.step()


def test_baselinepp_answers_by_chance_before_its_first_step():
    family, model, _ = images()
    algorithm = baselinepp(model, family.spec)
    scored = evaluate(
        algorithm, algorithm.init(generator()), family.sample("test", 400, generator(2)), loss_of(family), 0
    )
    mean, error = scored.scores["accuracy"][..., 0].mean(), scored.scores["accuracy"][..., 0].std() / 20
    assert abs(mean - 1 / 3) < 3 * error


def test_baselinepp_trains_the_official_classifier_of_all_classes():
    """τ is 2 with twelve training classes, 10 with more than two hundred."""
    family, model, tasks = images()
    algorithm = baselinepp(model, family.spec)
    theta = algorithm.init(generator())
    classifier = OfficialClassifier(theta["joint_head"]["weight"], 2.0)
    x, labels = (torch.cat([tasks.support[name], tasks.query[name]], 1).flatten(0, 1) for name in ("x", "class"))
    z = F.relu(model.trunk[1](x.flatten(1)))
    F.cross_entropy(classifier(z), labels).backward()
    found = meta_gradient(algorithm, theta, tasks, loss_of(family)).grads
    parametrization = classifier.linear.parametrizations.weight
    torch.testing.assert_close(found["joint_head"]["length"], parametrization.original0.grad[:, 0])
    torch.testing.assert_close(found["joint_head"]["weight"], parametrization.original1.grad)
    torch.testing.assert_close(found["weights"]["1.weight"], model.trunk[1].weight.grad)
    assert [official_scale(classes) for classes in (5, 200, 201)] == [2.0, 2.0, 10.0]


def test_oracle_finds_sine_waves_and_does_not_pretend_with_one_point():
    family = Sinusoid(shots=3)
    algorithm = oracle(family.spec)
    theta = algorithm.init(generator())
    scored = evaluate(algorithm, theta, family.sample("test", 20, generator()), loss_of(family), 1)
    assert scored.scores["mse"].max() < 1e-20
    one = Sinusoid(shots=1)
    assert evaluate(algorithm, theta, one.sample("test", 20, generator()), loss_of(one), 1).scores["mse"].mean() > 0.1


def stirred(theta):
    """Weights that were zero at the start take part."""
    return tree_map(lambda leaf: leaf + 0.1 * torch.randn(leaf.shape, generator=generator(5)), theta)


def test_shared_model_writes_the_configured_model_and_nothing_else():
    family, model, tasks = images(lambda spec: Conv4(spec, filters=4))
    algorithm = shared_model(model, family.spec)
    theta = algorithm.init(generator())
    support = {name: value[0] for name, value in tasks.support.items()}
    assert algorithm.any_ways
    for some in (theta, stirred(theta)):
        _, weights = algorithm.adapt(some, support, loss_of(family))
        assert {n: w.shape for n, w in weights.items()} == {n: p.shape for n, p in model.named_parameters()}
        x = tasks.query["x"][0]
        expected = torch.func.functional_call(model, weights, (x,))
        torch.testing.assert_close(algorithm.predict(some, weights, x), expected)
    changed = weights["trunk.3.weight"] - stirred(theta)["weights"]["trunk.3.weight"]
    assert 0 < torch.linalg.matrix_rank(changed.flatten(1)) <= 8


def test_shared_model_relabels_its_answers_with_the_task():
    family, model, tasks = images()
    algorithm = shared_model(model, family.spec)
    theta = stirred(algorithm.init(generator()))
    support = {name: value[0] for name, value in tasks.support.items()}
    x = tasks.query["x"][0]
    answers = []
    for y in (support["y"], support["y"][:, [2, 0, 1]]):
        _, weights = algorithm.adapt(theta, {**support, "y": y}, loss_of(family))
        answers.append(algorithm.predict(theta, weights, x))
    torch.testing.assert_close(answers[0][:, [2, 0, 1]], answers[1])


def with_frozen(part, name):
    """An algorithm on a model with a frozen part, and tasks; None where it does not fit these in any case."""
    family, model, tasks = images()
    for parameter, value in model.named_parameters():
        value.requires_grad_(not parameter.startswith(part))
    return construct("algo", keys_of("algo", name), model=model, spec=IMAGE_SPEC), family, tasks


def fits_images(name):
    try:
        return IMAGE_SPEC.offers(with_frozen("nothing", name)[0].needs)
    except UserError:
        return False


@pytest.mark.parametrize(
    ("name", "part"),
    [
        *((name, "trunk") for name in algorithm_names() if name != "boil"),
        ("boil", "trunk.1.weight"),
        ("transfer", "head"),
    ],
)
def test_a_frozen_part_of_the_model_is_neither_in_the_way_nor_learned(name, part):
    """Such as the layers of a pretrained network."""
    if not fits_images(name):
        return
    algorithm, family, tasks = with_frozen(part, name)
    theta = algorithm.init(generator())
    assert not theta.get("weights", {}).keys() & {"trunk.1.weight" if part == "trunk" else f"{part}.weight", part}
    if size(learned(theta)):
        assert meta_gradient(algorithm, theta, tasks, loss_of(family)).loss.isfinite()
    assert evaluate(algorithm, theta, tasks, loss_of(family), 1).losses.isfinite().all()


@pytest.mark.parametrize(
    ("name", "part", "words"), [("boil", "trunk", "the body of MLP"), ("anil", "head", "the head of")]
)
def test_an_inner_loop_over_a_frozen_part_is_refused(name, part, words):
    with pytest.raises(UserError, match=f"{words} .*is frozen, so there is nothing to adapt"):
        with_frozen(part, name)


SOLVED = {
    "shared_params": {"strength": 1e-4},
    "metaoptnet": {"head": "ridge", "strength": 1e-4},
    "dkt": {"kernel": "linear", "noise": 1e-3},
}


@pytest.mark.parametrize("name", SOLVED)
def test_systems_are_solved_in_full_precision_whatever_the_rest_is_computed_in(name):
    """With ``train.precision=bfloat16``, in which features are known to three digits and small penalties are lost."""
    torch.set_default_dtype(torch.float32)
    family, model, tasks = images()
    algorithm = construct("algo", keys_of("algo", name) | SOLVED[name], model=model, spec=family.spec)
    theta, support = algorithm.init(generator()), {key: tasks.support[key] for key in ("x", "y")}

    def answers():
        return vmap(lambda shown, x: algorithm.predict(theta, shown, x))(support, tasks.query["x"])

    expected = answers()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        found = answers()
    assert (found - expected).norm() < 0.05 * expected.norm()
