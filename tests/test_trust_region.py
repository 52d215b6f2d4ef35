"""The trust-region step against closed forms and plain autograd, in float64."""

from functools import partial

import pytest
import torch
from conftest import composed, experiment_of
from scenarios import generator

from metarun.algos.agnostic.maml import maml
from metarun.algos.dependent.rl2 import rl2
from metarun.engine.batch import adapted, meta_gradient
from metarun.engine.meta_step import MetaStep
from metarun.engine.trust_region import (
    TrustRegion,
    conjugate_gradients,
    fisher_product,
    line_search,
    mean_divergence,
    natural_step,
    trust_region_step,
    with_fewer_episodes,
    with_kept_episodes,
)
from metarun.errors import UserError
from metarun.inner import at_step
from metarun.loop import meta_train, training_tasks
from metarun.models.policy import GRUPolicy, Policy
from metarun.nn.transforms import task_of
from metarun.run import run
from metarun.targets.scoring import loss_of
from metarun.tasks.bandit import Bandit
from metarun.tasks.control import divergence
from metarun.tasks.navigation import Navigation
from metarun.tree import leaves, like

pytestmark = pytest.mark.usefixtures("float64")
SETTINGS = TrustRegion(kl=0.01, cg_steps=20, cg_episodes=None, damping=0.0, backtrack=0.8, backtracks=15)


def test_conjugate_gradients_solve_a_linear_system():
    root = torch.randn(6, 6, generator=generator())
    matrix, b = root @ root.T + torch.eye(6), torch.randn(6, generator=generator(1))
    torch.testing.assert_close(conjugate_gradients(lambda v: matrix @ v, b, 6), torch.linalg.solve(matrix, b))


def test_divergence_is_that_of_torchs_distributions():
    old, new = torch.randn(2, 5, 3, 6, generator=generator())
    for continuous in (True, False):
        if continuous:
            a, b = (torch.distributions.Normal(o[..., :3], o[..., 3:].exp()) for o in (old, new))
            expected = torch.distributions.kl_divergence(a, b).sum(-1)
        else:
            a, b = (torch.distributions.Categorical(logits=o) for o in (old, new))
            expected = torch.distributions.kl_divergence(a, b)
        torch.testing.assert_close(divergence(new, old, continuous), expected)


def test_the_natural_step_of_a_normal_policy_is_the_closed_form():
    """Mean W o and standard deviations e^l: the Fisher matrix is (E o oᵀ ⊗ diag e^−2l, 2 I), and the length follows."""
    observations = torch.randn(200, 3, generator=generator())
    log_std, gradient = torch.tensor([0.3, -0.5]), torch.randn(8, generator=generator(1))
    weights = torch.cat([torch.randn(6, generator=generator(2)), log_std])

    def outputs(vector):
        mean = observations @ vector[:6].view(2, 3).T
        return torch.cat([mean, vector[6:].expand_as(mean)], -1)

    old = outputs(weights)
    product = fisher_product(lambda w: divergence(outputs(w), old, True).mean(), weights, 0.0)
    second_moment = observations.T @ observations / len(observations)
    fisher = torch.block_diag(torch.kron(torch.diag((-2 * log_std).exp()), second_moment), 2 * torch.eye(2))
    torch.testing.assert_close(torch.stack([product(v) for v in torch.eye(8)]), fisher)
    direction = torch.linalg.solve(fisher, gradient)
    expected = -(2 * 0.01 / (gradient @ direction)).sqrt() * direction
    torch.testing.assert_close(natural_step(product, gradient, SETTINGS), expected)
    # To second order the step is as long as the trust region is wide.
    assert divergence(outputs(weights + 0.1 * expected), old, True).mean().item() == pytest.approx(1e-4, rel=0.02)


def test_the_line_search_takes_the_first_length_that_improves_within_the_bound():
    start, step = torch.zeros(1), torch.ones(1)
    tried = []

    def judge(weights, best=0.5):
        tried.append(weights.item())
        return (weights.item() - best) ** 2, 0.01 * weights.item() ** 2 / 0.7**2

    # 1 and 0.8 are too far apart from the old policy, 0.64 is not.
    assert line_search(start, step, judge, SETTINGS).item() == pytest.approx(0.64)
    assert tried == pytest.approx([0, 1, 0.8, 0.64])
    assert line_search(start, step, partial(judge, best=-1.0), SETTINGS).item() == 0
    assert line_search(start, step, lambda weights: (float("nan"), 0.0), SETTINGS).item() == 0


def walks():
    torch.manual_seed(0)
    family = Navigation(horizon=7, shots=4, queries=5)
    model = Policy(family.spec, (4,), "tanh")
    return family, model, maml(model, 0.3, inner_steps=2)


def pulls():
    torch.manual_seed(0)
    family = Bandit(arms=3, pulls=5, shots=2, queries=6, entropy=0.01)
    model = GRUPolicy(family.spec, width=4)
    return family, model, rl2(model)


def problem(case):
    family, _, algorithm = case()
    theta = algorithm.init(generator())
    shape, weights = theta, torch.cat([leaf.flatten() for leaf in leaves(theta)])
    sizes = [leaf.numel() for leaf in leaves(theta)]

    def theta_of(vector):
        parts = zip(vector.split(sizes), leaves(shape), strict=True)
        return like(shape, (part.view(leaf.shape) for part, leaf in parts))

    def vector_of(tree):
        return torch.cat([leaf.flatten() for leaf in leaves(tree)])

    tasks = family.sample("train", 3, generator(1))
    return family, algorithm, theta_of, vector_of, weights, tasks


@pytest.mark.parametrize("case", [walks, pulls])
def test_episodes_are_those_of_adaptation_and_give_its_gradient(case):
    """At the policy that played them, kept episodes give the loss's own first and second derivatives."""
    family, algorithm, theta_of, vector_of, weights, tasks = problem(case)
    theta = theta_of(weights)
    kept = with_kept_episodes(algorithm, family, theta, tasks)
    fresh, again = (meta_gradient(algorithm, theta, t, loss_of(family)) for t in (tasks, kept))
    torch.testing.assert_close(again.scores, fresh.scores)
    torch.testing.assert_close(vector_of(again.grads), vector_of(fresh.grads))
    assert vector_of(fresh.grads).abs().max() > 1e-3
    assert mean_divergence(algorithm, family, theta, kept).abs() < 1e-12


def test_fisher_products_are_those_of_the_hessian_by_a_plain_loop():
    """KL of torch's distributions after two inner steps of plain autograd, and its Hessian by torch."""
    family, algorithm, theta_of, _, weights, tasks = problem(walks)
    kept = with_kept_episodes(algorithm, family, theta_of(weights), tasks)

    def outputs(w, observation):
        hidden = torch.tanh(observation @ w["trunk.0.weight"].T + w["trunk.0.bias"])
        mean = hidden @ w["head.linear.weight"].T + w["head.linear.bias"]
        return torch.distributions.Normal(mean, w["head.log_std"].exp().expand_as(mean))

    def normal_of(output):
        mean, log_std = output.chunk(2, -1)
        return torch.distributions.Normal(mean, log_std.exp())

    def plain(vector):
        total = 0
        for index in range(3):
            task = task_of(kept, index)
            fast = theta_of(vector)["weights"]
            for step in ("0", "1"):
                episodes = task.support["kept"][step]
                new = outputs(fast, episodes["seen"]["observation"]).log_prob(episodes["action"]).sum(-1)
                old = normal_of(episodes["output"]).log_prob(episodes["action"]).sum(-1)
                loss = -((new - old).exp() * episodes["advantage"]).sum() / episodes["counts"].sum()
                slopes = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
                fast = {name: w - 0.3 * g for (name, w), g in zip(fast.items(), slopes, strict=True)}
            episodes = task.query["kept"]["0"]
            new = outputs(fast, episodes["seen"]["observation"])
            apart = torch.distributions.kl_divergence(normal_of(episodes["output"]), new).sum(-1)
            total = total + (apart * episodes["counts"]).sum() / episodes["counts"].sum() / 3
        return total

    product = fisher_product(
        lambda vector: mean_divergence(algorithm, family, theta_of(vector), kept), weights, damping=0.1
    )
    hessian = torch.autograd.functional.hessian(plain, weights.requires_grad_())
    assert torch.linalg.eigvalsh(hessian).min() > -1e-9
    for seed in range(3):
        v = torch.randn(len(weights), generator=generator(seed))
        expected = hessian @ v + 0.1 * v
        assert (product(v) - expected).abs().max() < 1e-9 * expected.abs().max()


@pytest.mark.parametrize("case", [walks, pulls])
@pytest.mark.parametrize("episodes", [None, 2])
def test_an_accepted_step_improves_the_surrogate_within_the_bound(case, episodes):
    family, algorithm, theta_of, vector_of, weights, tasks = problem(case)
    settings = SETTINGS._replace(cg_steps=10, cg_episodes=episodes, damping=1e-5)
    moved, result = trust_region_step(algorithm, family, theta_of, vector_of, settings, weights, tasks)
    kept = with_kept_episodes(algorithm, family, theta_of(weights), tasks)
    before = meta_gradient(algorithm, theta_of(weights), kept, loss_of(family))
    after = meta_gradient(algorithm, theta_of(moved), kept, loss_of(family))
    assert not torch.equal(moved, weights)
    assert after.loss < before.loss
    assert 1e-4 < mean_divergence(algorithm, family, theta_of(moved), kept) <= settings.kl
    torch.testing.assert_close(result, torch.stack([before.loss, before.scores["return"]]))


def test_fewer_episodes_are_the_first_ones():
    family, algorithm, theta_of, _, weights, tasks = problem(walks)
    theta = theta_of(weights)
    kept = with_fewer_episodes(algorithm, family, theta, with_kept_episodes(algorithm, family, theta, tasks), 2)
    # Divergences are from the policies that these episodes adapt to, so they begin at their minimum.
    assert mean_divergence(algorithm, family, theta, kept).abs() < 1e-12
    task = task_of(kept, 1)
    state = adapted(algorithm, theta, task_of(tasks, 1).support, loss_of(family), 0)
    data = {name: leaf[:2] for name, leaf in at_step(task_of(tasks, 1).support, 0).items() if name != "step"}
    played = family.keep(partial(algorithm.predict, theta, state), data)
    torch.testing.assert_close(task.support["kept"]["0"]["action"], played["action"])
    assert task.query["kept"]["0"]["counts"].shape == (7, 2)


TINY = (
    "train.optimizer=trpo",
    "task=navigation",
    "task.horizon=5",
    "task.shots=3",
    "task.queries=3",
    "train.clip=null",
)
SHORT = (
    *("train.meta_batch=3", "train.eval_every=2", "train.val_episodes=2", "eval.episodes=3", "eval.adapt_steps=1"),
    "train.trust_region.cg_steps=3",
)


def test_a_resumed_run_takes_the_same_steps(tmp_path):
    whole = meta_train(experiment_of(*TINY, *SHORT, "train.steps=4"), tmp_path / "whole", resume=False)
    experiment = experiment_of(*TINY, *SHORT, "train.steps=4")
    original, calls = MetaStep.whole, []

    def interrupted(self, given):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetaStep, "whole", interrupted)
        with pytest.raises(KeyboardInterrupt):
            meta_train(experiment, tmp_path / "stopped", resume=False)
    resumed = meta_train(experiment_of(*TINY, *SHORT, "train.steps=4"), tmp_path / "stopped", resume=True)
    assert resumed.engine == "eager"
    torch.testing.assert_close(resumed.train_state, whole.train_state, rtol=0, atol=0)
    assert len(resumed.rows[0]) == len(whole.rows[0])


def test_replicas_take_the_steps_of_separate_runs():
    both = experiment_of(*TINY, *SHORT, "replicas.count=2")
    meta_step = MetaStep(both)
    given = {"train_state": meta_step.initial_train_state(), "tasks": training_tasks(both, [0, 1], 3, 0), "rates": {}}
    together = meta_step.whole(given)["train_state"]["weights"]
    alone = experiment_of(*TINY, *SHORT, "seed=1")
    meta_step = MetaStep(alone)
    given = {"train_state": meta_step.initial_train_state(), "tasks": training_tasks(alone, [1], 3, 0), "rates": {}}
    torch.testing.assert_close(together[1:], meta_step.whole(given)["train_state"]["weights"])


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("task=sinusoid",), "task=sinusoid has none that it can bound; choose train.optimizer=adam"),
        (("algo=reptile",), "algo=reptile has its own meta-gradient; choose algo=maml"),
        (("algo=mamlpp",), "algo=mamlpp has its own meta-gradient; choose algo=maml"),
        (("engine=replay",), "no recording can follow; choose engine=auto or eager"),
        (("engine.task_map=threads",), "engine.task_map=auto"),
        (("replicas.over={train.lr: [0.1, 0.2]}",), r"does not depend on train\.lr"),
        (("train.weight_decay=0.1",), r"set train\.weight_decay=0"),
        (("train.task_chunk=1",), r"set train\.task_chunk=null"),
        (("train.trust_region.kl=0",), r"train\.trust_region\.kl must be a finite number above 0"),
        (("train.trust_region.backtrack=1.5",), r"train\.trust_region\.backtrack must be at most 1"),
    ],
)
def test_what_a_trust_region_cannot_serve_is_refused(overrides, sentence, tmp_path):
    sinusoid = "task=sinusoid" in overrides
    tiny = ("train.optimizer=trpo",) if sinusoid else TINY
    with pytest.raises(UserError, match=sentence):
        run(*composed(*tiny, *SHORT, "train.steps=2", *overrides), tmp_path)
