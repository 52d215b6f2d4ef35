"""Generation by two players: the slope of each, and what they share with generation by a flow."""

import pytest
import torch
from scenarios import generator, sampled
from torch.func import functional_call

from metarun.algos.agnostic.maml import maml
from metarun.algos.agnostic.reptile import reptile
from metarun.algos.baselines.scratch import scratch
from metarun.algos.baselines.transfer import transfer
from metarun.data.descriptors import kernel_distance
from metarun.engine.batch import evaluate, meta_gradient
from metarun.models.gan import GANSmall
from metarun.nn.functional import forward_of, parameters_of
from metarun.random import drawing, fold, fresh_seed, normal, uniform
from metarun.targets.adversarial import Latent
from metarun.targets.scoring import loss_of
from metarun.tasks.generate import Generate
from metarun.tasks.generate_adversarial import GenerateAdversarially
from metarun.tree import tree_map

SEED = torch.tensor(7)


@pytest.fixture(scope="module")
def tiny():
    return GenerateAdversarially("procedural", shots=3, queries=4, latents=5, generated=6, image_size=16)


def model_of(family):
    torch.manual_seed(0)
    return GANSmall(family.spec, width=2).double()


def wide(tasks):
    """The same tasks in float64."""
    return tree_map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, tasks)


def slopes(model, weights, x, seed):
    """The slope of each player's own loss, by plain autograd, with the noise of the first loss of a task."""
    weights = {name: w.detach().clone().requires_grad_() for name, w in weights.items()}
    seeds = [fold(fold(seed, 1), i) for i in range(len(x))]
    z = torch.stack([normal(fold(own, 0), (5,)) for own in seeds])
    share = torch.stack([uniform(fold(own, 1), (1,)) for own in seeds])[:, :, None, None]

    def play(given):
        return functional_call(model, weights, (given,))

    made = play(Latent(z))
    between = (share * x + (1 - share) * made).detach().requires_grad_()
    slope = torch.autograd.grad(play(between).sum(), between, create_graph=True)[0]
    penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
    of_critic = play(made.detach()).mean() - play(x).mean() + 10 * penalty
    critic = {name: w for name, w in weights.items() if name.startswith("critic")}
    maker = {name: w for name, w in weights.items() if name.startswith("generator")}
    found = dict(zip(critic, torch.autograd.grad(of_critic, list(critic.values()), retain_graph=True), strict=True))
    found |= dict(zip(maker, torch.autograd.grad(-play(made).mean(), list(maker.values())), strict=True))
    return {name: found[name] for name in weights}


def test_one_loss_has_the_slopes_of_both_players(tiny, float64):
    model = model_of(tiny)
    theta = parameters_of(model)
    x = wide(sampled(tiny, "train", 1, generator(1))).support["x"][0]

    def loss(weights):
        with drawing(SEED, training=True):
            return loss_of(tiny)(lambda given: forward_of(model)(weights, given), {"x": x})[0]

    found = torch.func.grad(loss)(theta)
    expected = slopes(model, theta, x, SEED)
    assert min(slope.abs().max() for slope in expected.values()) > 1e-6
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_reptile_moves_both_players_against_their_own_slopes(tiny, float64):
    model = model_of(tiny)
    algorithm = reptile(model, inner_lr=0.02, inner_steps=1, inner_optimizer="sgd")
    theta = algorithm.init(generator())
    tasks = wide(sampled(tiny, "train", 2, generator(1)))
    found = meta_gradient(algorithm, theta, tasks, loss_of(tiny)).grads["weights"]
    own = [slopes(model, theta["weights"], x, s) for x, s in zip(tasks.support["x"], tasks.seed, strict=True)]
    for name in found:
        torch.testing.assert_close(found[name], 0.01 * (own[0][name] + own[1][name]), rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("make", [reptile, scratch])
def test_padding_changes_nothing(tiny, make, float64):
    algorithm = make(model_of(tiny))
    theta = algorithm.init(generator())
    task = wide(sampled(tiny, "test", 1, generator(2)))
    x = task.support["x"]
    support = {"x": torch.cat([x[:, :1] * 0, x, x[:, :1] * 0], 1), "weight": torch.tensor([[0.0, 1, 1, 1, 0]])}
    query = {name: torch.cat([leaf[:, :1], leaf], 1) for name, leaf in task.query.items()}
    query["weight"] = torch.tensor([[0.0, 1, 1, 1, 1]])
    plain = evaluate(algorithm, theta, task, loss_of(tiny), 2)
    again = evaluate(algorithm, theta, task._replace(support=support, query=query), loss_of(tiny), 2)
    torch.testing.assert_close((again.losses, again.scores), (plain.losses, plain.scores))


def test_methods_that_differentiate_through_adaptation_do_not_fit(tiny):
    model = GANSmall(tiny.spec, width=2)
    assert not tiny.spec.offers(maml(model).needs)
    fitting = maml(model, first_order=True), reptile(model), scratch(model), transfer(model, tiny.spec)
    assert all(tiny.spec.offers(algorithm.needs) for algorithm in fitting)
    # Whatever has a loss has a slope.
    flow = Generate("procedural", shots=3, queries=4, generated=6, image_size=16)
    assert all(flow.spec.offers(algorithm.needs) for algorithm in fitting)


def test_episodes_and_pooled_metrics_are_those_of_generation_by_a_flow(tiny):
    flow = Generate("procedural", shots=3, queries=4, generated=6, image_size=16)
    ours, theirs = (sampled(family, "test", 2, generator(3)) for family in (tiny, flow))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert tiny.dataset != flow.dataset
    task, model = tree_map(lambda leaf: leaf[0], ours), GANSmall(tiny.spec, width=2)
    with torch.no_grad():
        made = tiny.made(model, task, 6)
        assert tiny.pooled.counts(model, task).isfinite().all()
    assert made.shape == (6, 1, 16, 16)
    assert made.abs().max() <= 1
    torch.testing.assert_close(tiny.made(model, task, 6), made, rtol=0, atol=0)


def test_a_learner_draws_what_its_generator_makes_of_noise(tiny):
    """Its converter is inherited from generation by a flow, whose sampler would judge pictures instead."""
    model = GANSmall(tiny.spec, width=2)
    request = tiny.converter.task(torch.zeros(2, 1, 16, 16), None).draw(3)
    with torch.no_grad(), drawing(torch.tensor(5), training=False):
        made = request.make(model, request.data)
    with torch.no_grad(), drawing(torch.tensor(5), training=False):
        noise = normal(fold(fresh_seed(), 0), (3, tiny.players.latents))
        torch.testing.assert_close(made, model.generator(noise), rtol=0, atol=0)
    assert [picture.shape for picture in request.answers(made)] == [(16, 16)] * 3


def test_rows_of_weight_zero_have_no_part_in_the_kernel_distance():
    a, b = torch.randn(2, 5, 3, generator=generator())
    weight = torch.tensor([1.0, 0, 1, 1, 0])
    torch.testing.assert_close(kernel_distance(a, b, weight), kernel_distance(a[[0, 2, 3]], b[[0, 2, 3]]))
    assert kernel_distance(a[:1], b[:1]).isfinite()


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"latents": 0}, "latents must be at least 1"),
        ({"penalty": -1.0}, "penalty must not be negative"),
        ({"train_queries": 1}, "train_queries must be at least 2"),
    ],
)
def test_wrong_keys_are_refused(keys, sentence):
    with pytest.raises(ValueError, match=sentence):
        GenerateAdversarially("procedural", image_size=16, **keys)


def test_the_model_refuses_what_it_cannot_make(tiny):
    odd = GenerateAdversarially("procedural", shots=3, queries=4, generated=6, image_size=18)
    with pytest.raises(ValueError, match="multiple of 4"):
        GANSmall(odd.spec)
    with pytest.raises(ValueError, match="choose another model"):
        GANSmall(Generate("procedural", shots=3, queries=4, generated=6, image_size=16).spec)
