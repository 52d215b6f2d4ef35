"""Meta-gradients through policy gradients, and through models that are not plain layers, in float64."""

import pytest
import torch
from scenarios import generator
from torch.func import functional_call

from metarun.algos.agnostic.maml import maml
from metarun.engine.batch import meta_gradient
from metarun.models.policy import FastWeightsPolicy, GRUPolicy, Policy
from metarun.models.text import TextCNN, TextEmbedding, TextTransformer
from metarun.random import fold, normal
from metarun.targets.scoring import loss_of
from metarun.tasks.mdp import MDP
from metarun.tasks.navigation import Navigation
from metarun.tasks.text import text

pytestmark = pytest.mark.usefixtures("float64")

INNER_LR, DISCOUNT = 0.3, 0.99


def walk(weights, goal, noise):
    """Episodes of a written-out tanh policy: observations, actions and rewards that count, as lists."""
    episodes = []
    for tape in noise:
        position, steps = torch.zeros(2), []
        for epsilon in tape:
            with torch.no_grad():
                hidden = torch.tanh(weights["trunk.0.weight"] @ position + weights["trunk.0.bias"])
                mean = weights["head.linear.weight"] @ hidden + weights["head.linear.bias"]
                action = mean + weights["head.log_std"].exp() * epsilon
            observation, position = position, position + 0.1 * action.clip(-1, 1)
            away = position - goal
            steps.append((observation, action, -(away @ away).sqrt()))
            if (away.abs() < 0.01).all():
                break
        episodes.append(steps)
    return episodes


def weigh(episodes, horizon):
    """Advantages of all steps: returns less a ridge regression on the same steps, scaled to variance 1."""
    features, returns = [], []
    for steps in episodes:
        rewards = [reward for _, _, reward in steps]
        for t, (observation, _, _) in enumerate(steps):
            time, so_far = torch.tensor(t / (horizon - 1)), sum(rewards[:t], torch.zeros(())) / horizon
            row = [*observation, *observation**2, torch.ones(()), time, time**2, time**3, so_far, so_far * time]
            features.append(torch.stack(row))
            returns.append(sum(DISCOUNT ** (k - t) * rewards[k] for k in range(t, len(rewards))))
    x, g = torch.stack(features), torch.stack(returns)
    # Ridge as least squares with rows of √λ below, the strength counted per step of the tape.
    strength = (1e-5 * len(episodes) * horizon) ** 0.5
    rows = torch.cat([x, strength * torch.eye(x.shape[1])])
    residual = g - x @ torch.linalg.lstsq(rows, torch.cat([g, torch.zeros(x.shape[1])])).solution
    centred = residual - residual.mean()
    return centred / (centred.square().mean().sqrt() + 1e-8)


def log_probabilities(weights, episodes):
    """Of every action that counts, with the graph to ``weights``."""
    steps = [step for episode in episodes for step in episode]
    observation, action = (torch.stack([step[i] for step in steps]) for i in (0, 1))
    hidden = torch.tanh(observation @ weights["trunk.0.weight"].T + weights["trunk.0.bias"])
    mean = hidden @ weights["head.linear.weight"].T + weights["head.linear.bias"]
    return torch.distributions.Normal(mean, weights["head.log_std"].exp().expand_as(mean)).log_prob(action).sum(-1)


def flat(weights):
    return torch.cat([w.flatten() for w in weights.values()])


def unflat(vector, like):
    pieces = vector.split([w.numel() for w in like.values()])
    return {name: piece.view_as(w) for (name, w), piece in zip(like.items(), pieces, strict=True)}


def maml_gradient_by_matrices(weights, tasks, score_function_terms):
    """(I − αH) v for each task, one inner step, with H built from per-step scores and no surrogate at all.

    v is the policy gradient at the adapted weights, −mean A ∇log π. The derivative of the inner gradient, for
    fixed actions and advantages, is −mean A (∇log π ∇log πᵀ + ∇² log π); the first of the two terms is what
    differentiating −mean A log π would lose.
    """
    total, vector = 0, flat(weights)
    for goal, seed, query in zip(tasks.support["goal"][:, 0], tasks.support["tape"], tasks.query["noise"], strict=True):
        horizon = query.shape[1]
        support = normal(fold(seed, 0), (horizon, 2))
        episodes = walk(weights, goal, support)
        advantage = weigh(episodes, horizon)

        def logs(v, episodes=episodes):
            return log_probabilities(unflat(v, weights), episodes)

        scores = torch.autograd.functional.jacobian(logs, vector)
        hessian = torch.autograd.functional.hessian(lambda v: (advantage * logs(v)).sum(), vector)  # noqa: B023
        if score_function_terms:
            hessian = hessian + scores.T @ (advantage[:, None] * scores)
        adapted = unflat(vector + INNER_LR * scores.T @ advantage / len(advantage), weights)
        after = walk(adapted, goal, query)

        def later_logs(v, after=after):
            return log_probabilities(unflat(v, weights), after)

        later = torch.autograd.functional.jacobian(later_logs, flat(adapted))
        gain = weigh(after, horizon)
        v = -later.T @ gain / len(gain)
        total = total + v + INNER_LR * hessian.T @ v / len(advantage)
    return total / len(tasks.support["goal"])


@pytest.fixture
def navigation():
    torch.manual_seed(0)
    family = Navigation(horizon=12, shots=3, queries=4)
    model = Policy(family.spec, (5,), "tanh")
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    tasks = family.sample("train", 3, generator(1))
    grads = meta_gradient(maml(model, INNER_LR), {"weights": weights}, tasks, loss_of(family)).grads
    return weights, tasks, flat(grads["weights"])


def test_maml_on_navigation_equals_the_formula(navigation):
    weights, tasks, ours = navigation
    expected = maml_gradient_by_matrices(weights, tasks, score_function_terms=True)
    assert (ours - expected).abs().max() < 1e-8 * expected.abs().max()


def test_the_score_function_terms_are_there(navigation):
    weights, tasks, ours = navigation
    lost = maml_gradient_by_matrices(weights, tasks, score_function_terms=False)
    assert (ours - lost).abs().max() > 1e-3 * lost.abs().max()


def test_an_episode_that_reached_its_goal_counts_no_further():
    """The same formula where some episodes end early: the goal is three cells wide of the start."""
    torch.manual_seed(0)
    family = Navigation(horizon=12, shots=6, queries=6)
    model = Policy(family.spec, (5,), "tanh", initial_std=0.02)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    tasks = family.sample("train", 2, generator(1))
    ahead = torch.tanh(weights["trunk.0.bias"]) @ weights["head.linear.weight"].T + weights["head.linear.bias"]
    for part in tasks[:2]:
        part["goal"] = (0.3 * ahead).expand_as(part["goal"]).clone()
    noise = family.with_tape(dict(tasks.support))["noise"]
    episodes = walk(weights, tasks.support["goal"][0, 0], noise[0])
    assert any(len(steps) < 12 for steps in episodes)
    grads = meta_gradient(maml(model, INNER_LR), {"weights": weights}, tasks, loss_of(family)).grads
    expected = maml_gradient_by_matrices(weights, tasks, score_function_terms=True)
    assert (flat(grads["weights"]) - expected).abs().max() < 1e-8 * expected.abs().max()


def sentences(model):
    family = text(ways=3, shots=2, queries=2, dataset="toy", buckets=64)
    return family, model(family.spec, width=6)


def tables(model):
    family = MDP(states=3, actions=2, episodes=2, horizon=3, shots=4, queries=5)
    return family, model(family.spec, width=6)


def walks(model):
    family = Navigation(horizon=8, shots=3, queries=4)
    return family, model(family.spec, (5,), "tanh")


def walks_on_one_tape(model):
    family = Navigation(horizon=8, shots=3, queries=4, fresh_tapes=False)
    return family, model(family.spec, (5,), "tanh")


def own_tape(family, support, step):
    """Support data with the random numbers of one step of adaptation written out."""
    if "tape" not in support:
        return support
    tape = family.tape(fold(support["tape"], step if family.fresh_tapes else 0))
    return {name: leaf for name, leaf in support.items() if name != "tape"} | tape


@pytest.mark.parametrize(
    ("tasks_for", "model"),
    [
        (walks, Policy),
        (walks_on_one_tape, Policy),
        (sentences, TextEmbedding),
        (sentences, TextCNN),
        (sentences, TextTransformer),
        (tables, GRUPolicy),
        (tables, FastWeightsPolicy),
    ],
)
def test_every_model_is_right_in_second_order(tasks_for, model):
    """vmap over ``torch.func.grad`` equals a loop over tasks with plain ``autograd.grad``."""
    torch.manual_seed(0)
    family, model = tasks_for(model)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    tasks = family.sample("train", 3, generator(1))
    ours = meta_gradient(maml(model, 0.5, 2), {"weights": weights}, tasks, loss_of(family)).grads["weights"]
    leaves = {name: w.clone().requires_grad_() for name, w in weights.items()}
    total = 0
    for i in range(3):
        support, query = ({name: leaf[i] for name, leaf in part.items()} for part in tasks[:2])
        fast = leaves
        for step in range(2):
            loss, _ = loss_of(family)(lambda x: functional_call(model, fast, (x,)), own_tape(family, support, step))  # noqa: B023
            gradient = torch.autograd.grad(loss, list(fast.values()), create_graph=True, materialize_grads=True)
            fast = {name: w - 0.5 * g for (name, w), g in zip(fast.items(), gradient, strict=True)}
        total = total + loss_of(family)(lambda x: functional_call(model, fast, (x,)), query)[0] / 3  # noqa: B023
    expected = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    for (name, _), g in zip(leaves.items(), expected, strict=True):
        assert (ours[name] - g).abs().max() <= 1e-9 * g.abs().max().clamp(min=1e-3), name
