"""Neural processes against their definition."""

import pytest
import torch
from scenarios import generator

from metarun.algos.dependent.cnp import Process, cnp
from metarun.models.mlp import MLP
from metarun.tasks.sinusoid import Sinusoid

pytestmark = pytest.mark.usefixtures("float64")


def setting(attention):
    family = Sinusoid(shots=6, queries=9)
    algorithm = cnp(MLP(family.spec, (4,)), family.spec, attention, 16, 4)
    theta = algorithm.init(MLP(family.spec, (4,)), generator())
    task = family.sample("test", 1, generator(1))
    support, query = ({name: leaf[0] for name, leaf in part.items()} for part in task[:2])
    return family, algorithm, theta, type(task)(support, query)


@pytest.mark.parametrize("attention", [False, True])
def test_the_order_of_the_support_does_not_matter_and_queries_do_not_see_each_other(attention):
    _, algorithm, theta, task = setting(attention)
    whole = algorithm.predict(theta, task.support, task.query["x"])
    order = torch.randperm(6, generator=generator())
    shuffled = {name: leaf[order] for name, leaf in task.support.items()}
    torch.testing.assert_close(algorithm.predict(theta, shuffled, task.query["x"]), whole)
    torch.testing.assert_close(algorithm.predict(theta, task.support, task.query["x"][3:4]), whole[3:4])
    other = {**task.support, "y": task.support["y"] + 1}
    assert (algorithm.predict(theta, other, task.query["x"]) - whole).abs().max() > 1e-6


@pytest.mark.parametrize("attention", [False, True])
def test_the_meta_loss_is_the_likelihood_of_support_and_query(attention):
    family, algorithm, theta, task = setting(attention)
    loss, score = algorithm.meta_loss(theta, task, family.loss)
    process = Process(1, 1, 16, 4 if attention else 0)
    process.load_state_dict(theta["weights"])
    x, y = (torch.cat([part[name] for part in task]) for name in ("x", "y"))
    mean, std = process((task.support["x"], task.support["y"], x))
    assert std.min() > 0.1
    torch.testing.assert_close(loss, -torch.distributions.Normal(mean, std).log_prob(y).mean())
    torch.testing.assert_close(score, (mean[6:] - task.query["y"]).square().mean())


def test_attention_equals_torchs_own():
    process = Process(2, 1, 16, 4)
    x, query, r = (torch.randn(n, d, generator=generator(n)) for n, d in ((5, 2), (7, 2), (5, 16)))
    theirs = torch.nn.MultiheadAttention(16, 4, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.eye(16).repeat(3, 1))
        theirs.in_proj_bias.zero_()
        theirs.out_proj.weight.copy_(process.mix.weight)
        theirs.out_proj.bias.copy_(process.mix.bias)
        expected, _ = theirs(process.embed(query)[None], process.embed(x)[None], r[None])
        torch.testing.assert_close(process.attend(x, query, r), expected[0])
