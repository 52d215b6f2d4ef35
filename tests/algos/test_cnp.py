"""Neural processes against their definitions."""

import logging
import math

import pandas as pd
import pytest
import torch
from conftest import composed
from scenarios import generator
from torch.distributions import Categorical, MixtureSameFamily, Normal, kl_divergence

from metarun.algos.dependent.anp import Asked, Attention, AttentiveProcess, Encoder, Latent, anp, divergence
from metarun.algos.dependent.cnp import Points, Process, cnp, drawn_context
from metarun.models.mlp import MLP
from metarun.random import drawing, fold, normal
from metarun.run import run
from metarun.targets.scoring import loss_of
from metarun.tasks.sinusoid import Sinusoid

pytestmark = pytest.mark.usefixtures("float64")

SEED = torch.tensor(123)
SMALL = {"width": 16, "heads": 4, "latents": 6, "samples": 3}
PROCESSES = {
    "cnp": lambda *of, **keys: cnp(*of, width=16, **keys),
    "anp": lambda *of, **keys: anp(*of, **SMALL, **keys),
    "anp_self_attention": lambda *of, **keys: anp(*of, **SMALL, self_attention=2, **keys),
    "anp_without_latents": lambda *of, **keys: anp(*of, **SMALL | {"latents": 0}, **keys),
    "np_of_both_paths": lambda *of, **keys: anp(*of, "mean", **SMALL, **keys),
    "np": lambda *of, **keys: anp(*of, "none", **SMALL, **keys),
}


def setting(name, **keys):
    family = Sinusoid(shots=6, queries=9)
    algorithm = PROCESSES[name](MLP(family.spec, (4,)), family.spec, **keys)
    theta = algorithm.init(generator())
    task = family.sample("test", 1, generator(1))
    support, query = ({name: leaf[0] for name, leaf in part.items()} for part in task[:2])
    return family, algorithm, theta, type(task)(support, query, SEED)


def adapted(algorithm, theta, support, seed=SEED):
    with drawing(seed, training=False):
        _, state = algorithm.adapt(theta, support, None)
    return state


def points(*parts):
    return Points(*(torch.cat([part[name] for part in parts]) for name in ("x", "y")))


def network(theta, latents=6, path="attention"):
    process = AttentiveProcess(1, 1, 16, 4, latents, path, 0)
    process.load_state_dict(theta["weights"])
    return process


@pytest.mark.parametrize("name", PROCESSES)
def test_the_order_of_the_support_does_not_matter_and_queries_do_not_see_each_other(name):
    _, algorithm, theta, task = setting(name)

    def predict(support, x):
        return algorithm.predict(theta, adapted(algorithm, theta, support), x)

    whole = predict(task.support, task.query["x"])
    order = torch.randperm(6, generator=generator())
    shuffled = {name: leaf[order] for name, leaf in task.support.items()}
    torch.testing.assert_close(predict(shuffled, task.query["x"]), whole)
    torch.testing.assert_close(predict(task.support, task.query["x"][3:4]), whole[3:4])
    other = {**task.support, "y": task.support["y"] + 1}
    assert (predict(other, task.query["x"]) - whole).abs().max() > 1e-6


def test_the_meta_loss_of_conditional_processes_is_the_likelihood_of_support_and_query():
    family, algorithm, theta, task = setting("cnp", least_context=None)
    loss, scores, _ = algorithm.meta_loss(theta, task, loss_of(family))
    process = Process(1, 1, 16)
    process.load_state_dict(theta["weights"])
    x, y = points(task.support, task.query)
    r = process.encoder(torch.cat([task.support["x"], task.support["y"]], -1)).mean(0)
    mean, spread = process.decoder(torch.cat([x, r.expand(15, -1)], -1)).chunk(2, -1)
    std = 0.1 + 0.9 * torch.nn.functional.softplus(spread)
    torch.testing.assert_close(loss, -Normal(mean, std).log_prob(y).mean())
    torch.testing.assert_close(scores["mse"], (mean[6:] - task.query["y"]).square().mean())


def test_the_meta_loss_of_attentive_processes_is_the_evidence_lower_bound_per_target():
    family, algorithm, theta, task = setting("anp", least_context=None)
    with drawing(SEED, training=True):
        loss, scores, _ = algorithm.meta_loss(theta, task, loss_of(family))
    process, targets = network(theta), points(task.support, task.query)

    def q(given):
        s = process.latent.encoder.layers(torch.cat(given, -1)).mean(0)
        hidden = torch.relu(process.latent.hidden(s))
        return Normal(process.latent.mean(hidden), 0.1 + 0.9 * torch.sigmoid(process.latent.spread(hidden)))

    prior, posterior = q(points(task.support)), q(targets)
    r = process.encoder.layers(torch.cat(points(task.support), -1))
    keys, queries = process.embed(task.support["x"]), process.embed(targets.x)
    read = process.cross_attention(queries, keys, r, torch.ones(6))

    def decoded(z):
        mean, spread = process.decoder(torch.cat([targets.x, read, z.expand(15, -1)], -1)).chunk(2, -1)
        return Normal(mean, 0.1 + 0.9 * torch.nn.functional.softplus(spread))

    z = posterior.mean + posterior.stddev * normal(fold(SEED, 2), (1, 6))[0]
    expected = decoded(z).log_prob(targets.y).sum() - kl_divergence(posterior, prior).sum()
    torch.testing.assert_close(loss, -expected / 15)
    by_context = decoded(prior.mean + prior.stddev * normal(fold(SEED, 1), (1, 6))[0]).mean
    torch.testing.assert_close(scores["mse"], (by_context[6:] - task.query["y"]).square().mean())


def test_the_divergence_of_latents_equals_torchs_own():
    def latent(seed):
        mean, std = torch.randn(2, 5, generator=generator(seed))
        return Latent(mean, std.exp())

    q, p = latent(0), latent(1)
    torch.testing.assert_close(divergence(q, p), kl_divergence(Normal(*q), Normal(*p)).sum())


def test_attention_equals_torchs_own():
    attention = Attention(16, 4)
    keys, queries, values = (torch.randn(n, 16, generator=generator(n)) for n in (5, 7, 6))
    values, weight = values[:5], torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])
    theirs = torch.nn.MultiheadAttention(16, 4, bias=False, batch_first=True)
    with torch.no_grad():
        projections = attention.query, attention.key, attention.value
        theirs.in_proj_weight.copy_(torch.cat([projection.weight for projection in projections]))
        theirs.out_proj.weight.copy_(attention.mix.weight)
        expected, _ = theirs(queries[None], keys[None], values[None], key_padding_mask=weight[None] == 0)
        torch.testing.assert_close(attention(queries, keys, values, weight), expected[0])


def test_attention_to_nothing_is_attention_to_a_further_point_of_value_zero():
    attention = Attention(16, 4, places=6)
    places, values = torch.randn(5, 6, generator=generator()), torch.randn(5, 16, generator=generator(1))
    weight = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])
    with torch.no_grad():
        attention.nothing.copy_(torch.tensor([3.0, -1.0, 0.0, 20.0]))
        found = attention(places, places, values, weight)
        q, k, v = (
            part(x).view(5, 4, 4)
            for part, x in zip((attention.query, attention.key, attention.value), (places, places, values), strict=True)
        )
        expected = torch.zeros(5, 4, 4)
        for head in range(4):
            for i in range(5):
                sizes = [math.exp(float(q[i, head] @ k[j, head]) / 2) * weight[j] for j in range(5)]
                total = sum(sizes) + math.exp(attention.nothing[head])
                expected[i, head] = sum(size / total * v[j, head] for j, size in enumerate(sizes))
        torch.testing.assert_close(found, attention.mix(expected.flatten(1)))


@pytest.mark.parametrize("path", ["attention", "mean", "none"])
def test_points_that_are_not_in_the_context_change_nothing(path):
    process = AttentiveProcess(2, 1, 16, 4, 6, path, 1)
    x, y, asked = (torch.randn(n, d, generator=generator(n + d)) for n, d in ((8, 2), (8, 1), (5, 2)))
    noise, weight = torch.randn(3, 6, generator=generator()), torch.tensor([1.0, 0, 1, 1, 0, 0, 1, 1])
    inside = weight == 1
    expected = process(Asked(Points(x[inside], y[inside]), torch.ones(5), asked, noise))
    found = process(Asked(Points(x, y), weight, asked, noise))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    conditional = Process(2, 1, 16)
    expected = conditional((Points(x[inside], y[inside]), torch.ones(5), asked))
    torch.testing.assert_close(conditional((Points(x, y), weight, asked)), expected, rtol=0, atol=1e-12)


def test_a_drawn_context_has_every_size_and_every_point_equally_often():
    def contexts(shots, least, count=3000):
        for seed in range(count):
            with drawing(torch.tensor(seed), training=True):
                yield drawn_context({"y": torch.zeros(shots, 1)}, least)

    drawn = torch.stack(list(contexts(6, 3)))
    sizes = torch.bincount(drawn.sum(1).long(), minlength=7)
    assert sizes[:3].sum() == 0
    assert (sizes[3:] - 750).abs().max() < 4 * math.sqrt(750)
    assert (drawn.mean(0) - 0.75).abs().max() < 4 * math.sqrt(0.25 / 3000)
    assert all(context.all() for context in [*contexts(6, None, 5), *contexts(2, 3, 5)])


@pytest.mark.parametrize("name", ["cnp", "anp"])
def test_in_meta_training_points_outside_of_the_context_are_targets_alone(name):
    """Their y changes their own likelihood and no other point's."""
    family, algorithm, theta, task = setting(name, least_context=3)
    with drawing(SEED, training=True):
        outside = drawn_context(task.support, 3) == 0
    assert outside.sum() >= 2
    # The posterior sees all targets: without weights it says nothing of them.
    theta = {"weights": {key: w * (not key.startswith("latent")) for key, w in theta["weights"].items()}}

    def loss(y):
        with drawing(SEED, training=True):
            return algorithm.meta_loss(theta, task._replace(support={**task.support, "y": y}), loss_of(family))[0]

    hessian = torch.autograd.functional.hessian(loss, task.support["y"])[:, 0, :, 0]
    others = ~torch.eye(6, dtype=torch.bool)
    assert hessian.diag().abs().min() > 1e-6
    assert hessian[others & outside[:, None] & outside].abs().max() < 1e-12
    assert hessian[others & ~outside[:, None] & ~outside].abs().min() > 1e-12


@pytest.mark.parametrize("name", PROCESSES)
def test_the_algorithms_own_score_is_the_mean_log_likelihood_of_the_query_points(name):
    _, algorithm, theta, task = setting(name)
    state = adapted(algorithm, theta, task.support)
    found = algorithm.scores(theta, state, task.query)["log-likelihood"]
    prediction = algorithm.predict(theta, state, task.query["x"])
    if name == "cnp":
        process = Process(1, 1, 16)
        process.load_state_dict(theta["weights"])
        mean, std = process((points(task.support), torch.ones(6), task.query["x"]))
        mixture = Normal(mean, std)
    else:
        path = {"np": "none", "np_of_both_paths": "mean"}.get(name, "attention")
        latents = theta["weights"].get("latent.mean.weight", torch.zeros(0, 1)).shape[0]
        process = AttentiveProcess(1, 1, 16, 4, latents, path, 2 * ("self" in name))
        process.load_state_dict(theta["weights"])
        noise = normal(fold(SEED, 1), (3, 6)) if latents else torch.zeros(1, 0)
        mean, std, _ = process(Asked(points(task.support), torch.ones(6), task.query["x"], noise))
        mixture = MixtureSameFamily(
            Categorical(torch.ones(9, 1, len(noise))), Normal(*(n.movedim(0, -1) for n in (mean, std)))
        )
    torch.testing.assert_close(found, mixture.log_prob(task.query["y"]).mean())
    torch.testing.assert_close(prediction, mixture.mean)


def test_latents_come_from_the_seed_of_the_task():
    _, algorithm, theta, task = setting("anp")

    def prediction(seed):
        return algorithm.predict(theta, adapted(algorithm, theta, task.support, seed), task.query["x"])

    torch.testing.assert_close(prediction(SEED), prediction(SEED), rtol=0, atol=0)
    assert (prediction(SEED) - prediction(SEED + 1)).abs().max() > 1e-6


def test_without_attention_and_latents_it_is_a_conditional_process():
    process, conditional = AttentiveProcess(1, 1, 16, 4, 0, "mean", 0), Process(1, 1, 16)
    weights = {name.replace("encoder.layers", "encoder"): w for name, w in process.state_dict().items()}
    conditional.load_state_dict(weights)
    given = Points(*torch.randn(2, 5, 1, generator=generator()))
    x, weight = torch.randn(7, 1, generator=generator(1)), torch.tensor([1.0, 1, 0, 1, 1])
    mean, std, _ = process(Asked(given, weight, x, torch.zeros(1, 0)))
    torch.testing.assert_close((mean[0], std[0]), conditional((given, weight, x)))


def test_self_attention_lets_points_of_the_context_see_each_other():
    encoder = Encoder(2, 16, 4, 1)
    given, weight = Points(*torch.randn(2, 5, 1, generator=generator())), torch.tensor([1.0, 1, 0, 1, 1])
    slope = torch.autograd.functional.jacobian(lambda y: encoder(Points(given.x, y), weight)[0], given.y)
    seen = slope.abs().sum((0, 2)) > 1e-9
    assert seen.tolist() == [True, True, False, True, True]


def lattice(size):
    axis = (torch.arange(size) + 0.5) * 2 / size - 1
    return torch.cartesian_prod(axis, axis)


def test_waves_of_places_are_what_both_networks_of_a_conditional_process_see():
    torch.manual_seed(0)
    process = Process(2, 1, 16, waves=2)
    given = Points(*torch.randn(2, 5, 2, generator=generator()))._replace(y=torch.randn(5, 1, generator=generator(1)))
    asked = torch.rand(7, 2, generator=generator(2))

    def seen(x):
        kept = [k for k in ((a, b) for a in range(-2, 3) for b in range(-2, 3)) if k > (0, 0)]
        angle = torch.stack([math.pi / 2 * (a * x[:, 0] + b * x[:, 1]) for a, b in kept], 1)
        return torch.cat([x, angle.sin(), angle.cos()], 1)

    r = process.encoder(torch.cat([seen(given.x), given.y], 1)).mean(0)
    mean, spread = process.decoder(torch.cat([seen(asked), r.expand(7, -1)], 1)).chunk(2, 1)
    found = process((given, torch.ones(5), asked))
    torch.testing.assert_close(found, (mean, 0.1 + 0.9 * torch.nn.functional.softplus(spread)))


@pytest.mark.parametrize("waves", [0, 5])
def test_attention_on_waves_is_to_nearby_points_before_anything_is_learned(waves):
    torch.manual_seed(0)
    process, x = AttentiveProcess(2, 1, 64, 8, 0, "attention", 0, waves), lattice(6)
    places = process.embed(process.place(x))
    attention = process.cross_attention
    keys, queries = (part(places).view(36, 8, 8).transpose(0, 1) for part in (attention.key, attention.query))
    share = (queries @ keys.transpose(1, 2) / 8**0.5).softmax(-1).mean(0)
    near = torch.cdist(x, x) < 0.5
    to_near = (share * near).sum(1).mean() / (near.sum(1) / 36.0).mean()
    assert (to_near > 3) == (waves > 0)
    assert to_near < 1.2 or waves > 0


@pytest.mark.parametrize("make", [Process, lambda *of: AttentiveProcess(2, 1, 32, 4, 0, "mean", 0, *of[3:])])
def test_values_matter_as_much_as_waves_of_places_before_anything_is_learned(make):
    torch.manual_seed(0)
    network, x = make(2, 1, 32, 5), lattice(6)
    encoder = network.encoder if make is Process else network.encoder.layers
    r = [encoder(torch.cat([network.place(x), torch.full((36, 1), y)], 1)) for y in (0.0, 1.0)]
    assert 0.3 < (r[1] - r[0]).norm() / r[0].norm() < 3


def test_an_attentive_process_on_waves_keeps_to_its_context():
    process = AttentiveProcess(2, 1, 16, 4, 6, "attention", 1, 2)
    x, y, asked = (torch.randn(n, d, generator=generator(n + d)) for n, d in ((8, 2), (8, 1), (5, 2)))
    noise, weight = torch.randn(3, 6, generator=generator()), torch.tensor([1.0, 0, 1, 1, 0, 0, 1, 1])
    inside = weight == 1
    expected = process(Asked(Points(x[inside], y[inside]), torch.ones(5), asked, noise))
    torch.testing.assert_close(process(Asked(Points(x, y), weight, asked, noise)), expected, rtol=0, atol=1e-12)
    # In training, targets are places too.
    targets, more = Points(x, y), torch.randn(6, generator=generator(1))
    assert process(Asked(Points(x, y), weight, asked, noise, targets, more, torch.ones(8))).kl > 0


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"waves": -1}, "the highest wave must not be negative"),
        ({"deterministic": "none", "latents": 0}, "without a deterministic path latents must be at least 1"),
        ({"width": 10, "heads": 4}, "width must be a positive multiple of heads=4, not 10"),
        ({"samples": 0}, "samples must be at least 1, not 0"),
        ({"least_context": 0}, "least_context must be at least 1, not 0"),
    ],
)
def test_what_cannot_be_is_refused(keys, sentence):
    family = Sinusoid()
    with pytest.raises(ValueError, match=sentence):
        anp(MLP(family.spec), family.spec, **keys)


def test_a_run_reports_the_log_likelihood(tmp_path, caplog):
    config, names = composed(
        *("algo=cnp", "task=sinusoid", "algo.width=4", "train.steps=2", "train.eval_every=2", "train.val_episodes=3"),
        *("eval.episodes=4", "engine=eager"),
    )
    with caplog.at_level(logging.INFO):
        run(config, names, tmp_path)
    row = pd.read_csv(tmp_path / "result.csv").iloc[0]
    episodes = pd.read_csv(tmp_path / "episodes.csv")
    assert row["metrics"] == "mse;log-likelihood"
    assert row["log-likelihood"] == pytest.approx(episodes["log-likelihood"].mean())
    assert row["log-likelihood_ci95"] == pytest.approx(1.96 * episodes["log-likelihood"].std() / 2)
    assert any("log-likelihood after the support set" in line for line in caplog.messages)
