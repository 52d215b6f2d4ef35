"""What must hold whatever the data: closed forms and equalities between methods."""

from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from scenarios import (
    Quadratic,
    TinyImages,
    centres,
    generator,
    linear_loss,
    quadratic_loss,
)

from metarun.algos.agnostic.imaml import imaml
from metarun.algos.agnostic.maml import maml
from metarun.algos.agnostic.metasgd import metasgd
from metarun.algos.agnostic.reptile import reptile
from metarun.algos.baselines.scratch import scratch
from metarun.algos.baselines.transfer import transfer
from metarun.algos.dependent.matching import matching
from metarun.algos.dependent.protonet import protonet
from metarun.algos.dependent.relation import CompareMaps, relation
from metarun.algos.dependent.shared_params import ridge, shared_params
from metarun.contracts import Task
from metarun.engine.batch import evaluate, meta_gradient
from metarun.models.conv4 import Conv4
from metarun.models.mlp import MLP
from metarun.nn.ops import class_means
from metarun.targets.scoring import loss_of
from metarun.tasks.sinusoid import Sinusoid

pytestmark = pytest.mark.usefixtures("float64")


def gradient(algorithm, model, tasks, loss):
    return meta_gradient(algorithm, algorithm.init(generator()), tasks, loss)


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_quadratic_meta_gradients_have_their_closed_form(steps):
    """w_K − c = (1 − α)^K (w − c), so each method's gradient is a known multiple of w − mean c."""
    alpha, tasks = 0.3, centres()
    model = Quadratic()
    offset = model.w.detach() - tasks.support["c"].mean(0)
    second = gradient(maml(model, alpha, steps), model, tasks, quadratic_loss)
    first = gradient(maml(model, alpha, steps, True), model, tasks, quadratic_loss)
    torch.testing.assert_close(second.grads["weights"]["w"], (1 - alpha) ** (2 * steps) * offset)
    torch.testing.assert_close(first.grads["weights"]["w"], (1 - alpha) ** steps * offset)
    if steps > 0:
        moved = gradient(reptile(model, alpha, steps, 3, "sgd"), model, tasks, quadratic_loss)
        torch.testing.assert_close(moved.grads["weights"]["w"], (1 - (1 - alpha) ** steps) * offset)


def test_first_order_is_exact_where_the_hessian_is_zero():
    model, tasks = Quadratic(), centres()
    both = [gradient(maml(model, 0.3, 3, first), model, tasks, linear_loss) for first in (0, 1)]
    torch.testing.assert_close(both[0].grads, both[1].grads)


def test_metasgd_with_one_size_for_all_is_maml():
    model, tasks = Quadratic(), centres()
    algorithm = metasgd(model, (0.3, 0.3), 3)
    ours = gradient(algorithm, model, tasks, quadratic_loss)
    theirs = gradient(maml(model, 0.3, 3), model, tasks, quadratic_loss)
    torch.testing.assert_close(ours.grads["weights"], theirs.grads["weights"])


def test_imaml_by_its_equations_has_the_closed_form_of_a_quadratic_and_stands_still_where_it_is_held():
    """φ = (c + λθ)/(1 + λ), and the meta-gradient of ½‖φ − c‖² is (λ/(1 + λ))² (θ − c)."""
    model, tasks = Quadratic(), centres()
    offset = model.w.detach() - tasks.support["c"].mean(0)
    ours = gradient(imaml(model, 0.3, 200, 1.5, 3, 0.0, "proximal", 0.0), model, tasks, quadratic_loss)
    torch.testing.assert_close(ours.grads["weights"]["w"], (1.5 / 2.5) ** 2 * offset)
    held = imaml(model, 1e-6, 200, 1e6, 3, 0.0, "proximal", 0.0)
    theta = held.init(generator())
    *_, state = islice(held.adapt(theta, one(tasks.support), quadratic_loss), 200)
    torch.testing.assert_close(state["w"], theta["weights"]["w"], atol=1e-5, rtol=0)


def test_imaml_as_its_official_code_has_the_closed_form_of_a_quadratic():
    """φ − c = ((1 − αλ)(1 − α)^K + αλ)(θ − c) after K plain steps and one of λ, over 1 + damping + 1/(λ + 10)."""
    model, tasks = Quadratic(), centres()
    offset = model.w.detach() - tasks.support["c"].mean(0)
    ours = gradient(imaml(model, 0.1, 4, 1.5), model, tasks, quadratic_loss)
    left = 0.85 * 0.9**4 + 0.15
    torch.testing.assert_close(ours.grads["weights"]["w"], left / (2 + 1 / 11.5) * offset)


def test_zero_steps_is_joint_training():
    """MAML without inner steps, and transfer on query and support alike, take the plain gradient."""
    family = Sinusoid(shots=6, train_queries=6)
    model = MLP(family.spec, (8,))
    tasks = family.sample("train", 3, generator())
    ours = gradient(maml(model, inner_steps=0), model, tasks, loss_of(family)).grads["weights"]
    x, y = (tasks.query[name].flatten(0, 1) for name in ("x", "y"))
    plain = torch.autograd.grad((model(x) - y).square().mean(), list(model.parameters()))
    torch.testing.assert_close(list(ours.values()), list(plain))
    joint = gradient(transfer(model, family.spec), model, tasks, loss_of(family)).grads["weights"]
    x, y = (torch.cat([tasks.support[n], tasks.query[n]], 1).flatten(0, 1) for n in ("x", "y"))
    plain = torch.autograd.grad((model(x) - y).square().mean(), list(model.parameters()))
    torch.testing.assert_close(list(joint.values()), list(plain))


def test_reptile_with_one_full_batch_step_is_averaged_sgd():
    family = Sinusoid(shots=6)
    model = MLP(family.spec, (8,))
    tasks = family.sample("train", 3, generator())
    ours = gradient(reptile(model, 0.1, 1, 6, "sgd"), model, tasks, loss_of(family)).grads["weights"]
    x, y = (tasks.support[name].flatten(0, 1) for name in ("x", "y"))
    plain = torch.autograd.grad((model(x) - y).square().mean(), list(model.parameters()))
    torch.testing.assert_close(list(ours.values()), [0.1 * g for g in plain])


def test_reptile_keeps_the_second_moments_of_its_inner_adam():
    """Two meta-steps over one task, θ standing still, equal one long run of torch's Adam moments."""
    family = Sinusoid(shots=6)
    model = MLP(family.spec, (8,))
    algorithm = reptile(model, 1e-12, 3, 6)
    theta = algorithm.init(generator())
    tasks = family.sample("train", 1, generator())
    for _ in range(2):
        theta = {**theta, "carried": meta_gradient(algorithm, theta, tasks, loss_of(family)).carried}
    x, y = tasks.support["x"][0], tasks.support["y"][0]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-12, betas=(0.0, 0.999))
    for _ in range(6):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    assert theta["carried"]["step"] == 6
    for name, parameter in model.named_parameters():
        expected = optimizer.state[parameter]["exp_avg_sq"]
        torch.testing.assert_close(theta["carried"]["second_moment"][name], expected)


def image_setting():
    family = TinyImages()
    model = MLP(family.spec, (16,))
    return family, model, family.sample("train", 1, generator(3))


def one(part):
    return {name: value[0] for name, value in part.items()}


def test_protonet_equals_its_linear_form():
    """Equation 8: −‖z − c‖² and 2 cᵀz − cᵀc differ by a constant of the query."""
    family, model, tasks = image_setting()
    algorithm = protonet(model, family.spec)
    theta = algorithm.init(generator())
    support, query = one(tasks.support), one(tasks.query)
    _, state = algorithm.adapt(theta, support, loss_of(family))
    logits = algorithm.predict(theta, state, query["x"])
    c = class_means(model.trunk(support["x"]), support["y"])
    linear = 2 * model.trunk(query["x"]) @ c.T - c.square().sum(1)
    torch.testing.assert_close(logits.softmax(1), linear.softmax(1))


@pytest.mark.parametrize("factory", [protonet, shared_params, matching, relation])
def test_class_order_does_not_matter(factory):
    family, model, tasks = image_setting()
    algorithm = factory(model, family.spec)
    theta = algorithm.init(generator())
    support, query = one(tasks.support), one(tasks.query)
    order = torch.tensor([2, 0, 1])
    logits = []
    for y in (support["y"], support["y"][:, order]):
        *_, state = algorithm.adapt(theta, {**support, "y": y}, loss_of(family))
        logits.append(algorithm.predict(theta, state, query["x"]))
    torch.testing.assert_close(logits[0][:, order], logits[1])


@pytest.mark.parametrize(("n", "d"), [(4, 9), (9, 4), (6, 6)])
def test_ridge_equals_least_squares_on_the_augmented_system(n, d):
    """min ‖Zw − y‖² + λ‖w‖² is least squares with √λ I below Z and zeros below y."""
    z, y = torch.randn(n, d, generator=generator()), torch.randn(n, 2, generator=generator(1))
    augmented = torch.cat([z, 0.7**0.5 * torch.eye(d)])
    expected = torch.linalg.lstsq(augmented, torch.cat([y, torch.zeros(d, 2)])).solution
    torch.testing.assert_close(ridge(z, y, torch.tensor(0.7)), expected)


def test_scratch_adapts_by_the_chosen_step_size():
    model, tasks = Quadratic(), centres(2)
    algorithm = scratch(model, [0.5, 0.25])
    theta = algorithm.candidates(algorithm.init(generator()))[1]
    _, losses, *_ = evaluate(algorithm, theta, tasks, quadratic_loss, 3)
    expected = losses[:, :1] * 0.75 ** (2 * torch.arange(4))
    torch.testing.assert_close(losses, expected)


def test_maml_steps_after_the_first_have_their_own_size():
    """On ½‖w − c‖² a step of size α leaves (1 − α) of the error."""
    model = Quadratic()
    algorithm = maml(model, inner_lr=0.5, later_lr=0.1)
    theta = algorithm.init(generator())
    tasks = centres()
    _, losses, *_ = evaluate(algorithm, theta, tasks, quadratic_loss, 3)
    left = torch.tensor([1.0, 0.5, 0.5 * 0.9, 0.5 * 0.9 * 0.9])
    torch.testing.assert_close(losses, losses[:, :1] * left**2)


def test_matching_with_one_shot_is_a_softmax_over_prototypes_and_sums_attention_with_more():
    family, model, tasks = image_setting()
    support, query = one(tasks.support), one(tasks.query)
    algorithm = matching(model, family.spec, "euclidean")
    theta = algorithm.init(generator())
    single = {
        name: torch.stack([leaf[support["y"].argmax(1) == k][0] for k in range(3)]) for name, leaf in support.items()
    }
    *_, state = protonet(model, family.spec).adapt(theta, single, loss_of(family))
    logits = protonet(model, family.spec).predict(theta, state, query["x"])
    torch.testing.assert_close(algorithm.predict(theta, single, query["x"]).exp(), logits.softmax(1), atol=2e-6, rtol=0)
    cosine = matching(model, family.spec)
    z, q = model.trunk(support["x"]), model.trunk(query["x"])
    near = F.cosine_similarity(q[:, None], z[None], dim=-1).softmax(1)
    chances = torch.stack([near[:, support["y"].argmax(1) == k].sum(1) for k in range(3)], 1)
    torch.testing.assert_close(cosine.predict(theta, support, query["x"]).exp(), chances, atol=2e-6, rtol=0)


def test_relation_compares_each_query_with_each_class():
    family, model, tasks = image_setting()
    support, query = one(tasks.support), one(tasks.query)
    algorithm = relation(model, family.spec, 5)
    theta = algorithm.init(generator())
    task = Task(support, query)
    w, z, q = theta["relation"], model.trunk(support["x"]), model.trunk(query["x"])
    expected = torch.empty(len(q), 3)
    for i, features in enumerate(q):
        for k in range(3):
            pair = torch.cat([z[support["y"].argmax(1) == k].sum(0), features])
            hidden = (w["layers.0.weight"] @ pair + w["layers.0.bias"]).relu()
            expected[i, k] = (w["layers.2.weight"] @ hidden + w["layers.2.bias"]).sigmoid()
    chances = algorithm.predict(theta, support, query["x"]).softmax(1)
    torch.testing.assert_close(chances, expected / expected.sum(1, keepdim=True))
    loss, scores, _ = algorithm.meta_loss(theta, task, loss_of(family))
    torch.testing.assert_close(loss, F.mse_loss(expected, query["y"]))
    torch.testing.assert_close(scores["accuracy"], (expected.argmax(1) == query["y"].argmax(1)).double().mean())


def test_relation_of_maps_convolves_both_maps_joined():
    """Every pair joined along the channels, by torch's own convolution and batch normalisation."""
    torch.manual_seed(0)
    shape = (4, 5, 5)
    compare, classes, queries = CompareMaps(shape, 6), torch.randn(3, 100), torch.randn(7, 100)
    pairs = torch.stack([torch.cat([c.view(shape), q.view(shape)]) for q in queries for c in classes])
    w = dict(compare.named_parameters())
    x = F.conv2d(pairs, torch.cat([w["of_class.weight"], w["of_query.weight"]], 1), padding=1)
    for norm in ("0", "4"):
        if norm == "4":
            x = F.conv2d(x, w["blocks.3.weight"], padding=1)
        x = F.batch_norm(x, None, None, w[f"blocks.{norm}.weight"], w[f"blocks.{norm}.bias"], training=True)
        x = F.max_pool2d(x.relu(), 2, ceil_mode=True)
    hidden = F.linear(x.flatten(1), w["layers.0.weight"], w["layers.0.bias"]).relu()
    expected = F.linear(hidden, w["layers.2.weight"], w["layers.2.bias"]).sigmoid().view(7, 3)
    torch.testing.assert_close(compare((classes, queries)).sigmoid(), expected)


@pytest.mark.parametrize("shift", [-800.0, 40.0])
def test_relation_chooses_among_classes_whose_relations_round_to_0_or_1(shift):
    family, model, tasks = image_setting()
    support, x = one(tasks.support), one(tasks.query)["x"]
    algorithm = relation(model, family.spec, 5)
    theta = algorithm.init(generator())
    chosen = algorithm.predict(theta, support, x).argmax(1)
    theta["relation"]["layers.2.bias"] += shift
    torch.testing.assert_close(algorithm.predict(theta, support, x).argmax(1), chosen)


def test_relation_takes_features_for_maps_where_the_model_has_them():
    spec = TinyImages().spec
    assert Conv4(spec, 4).maps is None
    model = Conv4(spec, 4, readout="flatten", halvings=2)
    assert model.maps == (4, 4, 4)
    theta = relation(model, spec).init(generator())
    assert theta["relation"]["of_class.weight"].shape == (64, 4, 3, 3)
