"""Environments score what theory says; returns, baselines and posteriors equal closed forms."""

import math
from functools import partial
from itertools import islice

import pytest
import torch
from scenarios import generator

from metarun.algos.agnostic.anil import anil
from metarun.algos.agnostic.maml import maml
from metarun.algos.agnostic.mamlpp import mamlpp
from metarun.algos.agnostic.metasgd import metasgd
from metarun.algos.agnostic.reptile import reptile
from metarun.algos.baselines.optimal import optimal
from metarun.algos.baselines.psrl import psrl
from metarun.algos.baselines.random_policy import random_policy
from metarun.algos.baselines.scratch import scratch
from metarun.algos.baselines.thompson import probability_of_being_best, thompson
from metarun.algos.baselines.ucb1 import ucb1
from metarun.algos.dependent.adaptive import adaptive
from metarun.contracts import Seen
from metarun.engine.batch import evaluate
from metarun.engine.recording import Recording
from metarun.inner import at_step, support_gradient
from metarun.models.policy import FastWeightsPolicy, GRUPolicy, Policy
from metarun.nn.functional import forward_of
from metarun.nn.planning import action_values
from metarun.nn.transforms import task_of
from metarun.random import LARGEST_SUM, gamma, uniform
from metarun.targets.scoring import loss_of
from metarun.tasks import control
from metarun.tasks.bandit import Bandit
from metarun.tasks.mdp import MDP
from metarun.tasks.navigation import Navigation


def mean_score(algorithm, family, tasks=1000, seed=0):
    """Mean return and the half-width of its 99.9 % interval."""
    blocks = [family.sample("test", 200, generator(100 * seed + i)) for i in range(tasks // 200)]
    theta = algorithm.init(generator())
    scores = torch.cat(
        [evaluate(algorithm, theta, block, loss_of(family), 0).scores["return"][:, -1] for block in blocks]
    )
    return scores.mean().item(), 3.3 * scores.std().item() / tasks**0.5


def test_navigation_pays_minus_the_distance_and_ends_at_the_goal():
    family = Navigation(shots=2, queries=2)

    def still(seen):
        return torch.cat([torch.zeros(*seen.action.shape), torch.full(seen.action.shape, -30.0)], -1)

    tasks = family.sample("test", 500, generator())
    data = {name: leaf.flatten(0, 1) for name, leaf in tasks.query.items()}
    stood = control.rollout(family.environment, still, data)
    torch.testing.assert_close(stood.reward.sum(0), -100 * data["goal"].norm(dim=-1))
    # Mean distance of a uniform point from the middle of a square of edge 1: (√2 + asinh 1) / 6.
    expected = -100 * (math.sqrt(2) + math.asinh(1)) / 6
    assert stood.reward.sum(0).mean().item() == pytest.approx(expected, rel=0.05)
    # Going straight takes as many steps as the longer side, each paid by the distance left; then it is over.
    walked = control.rollout(family.environment, family.spec.inputs.optimal(data), data)
    steps = (data["goal"].abs().amax(-1) / 0.1).ceil()
    assert (walked.counts.sum(0) - steps).abs().max() <= 1
    assert -2.0 < control.total_return(walked) < -0.5


def test_actions_beyond_the_largest_move_are_cut():
    family = Navigation(horizon=2, shots=2, queries=2)
    data = {"goal": torch.full((2, 2), 9.0), "noise": torch.zeros(2, 2, 2)}
    far = control.rollout(family.environment, lambda seen: torch.full((*seen.action.shape[:2], 4), 5.0), data)
    torch.testing.assert_close(far.seen.observation[1], torch.full((2, 2), 0.1))
    torch.testing.assert_close(far.action, torch.full((2, 2, 2), 5.0))


@pytest.mark.parametrize("goals", ["square", "circle"])
def test_goals_lie_where_they_should_and_episodes_of_a_task_share_one(goals):
    goal = Navigation(goals, shots=2, queries=3).sample("train", 300, generator()).query["goal"]
    assert (goal == goal[:, :1]).all()
    if goals == "square":
        assert goal.abs().max() <= 0.5
        assert goal.amin((0, 1)).max() < -0.4
    else:
        torch.testing.assert_close(goal.norm(dim=-1), torch.ones(300, 3))
        assert goal[..., 1].min() >= 0


def test_random_and_optimal_play_of_bandits():
    family = Bandit(arms=5, pulls=10, shots=2, queries=4)
    score, margin = mean_score(random_policy(family.spec), family)
    assert abs(score - 5) < margin
    # The largest of n uniform numbers is n / (n + 1) on average.
    score, margin = mean_score(optimal(family.spec), family)
    assert abs(score - 10 * 5 / 6) < margin


@pytest.mark.parametrize(("pulls", "arms", "paper"), [(10, 5, (5.7, 6.7)), (100, 10, (76.7, 82.4))])
def test_classic_policies_reach_the_table_of_the_rl2_paper(pulls, arms, paper):
    family = Bandit(arms=arms, pulls=pulls, shots=2, queries=2)
    for algorithm, expected in zip((thompson(family.spec), ucb1(family.spec)), paper, strict=True):
        score, margin = mean_score(algorithm, family, 400)
        assert abs(score - expected) < margin + 0.02 * expected


def test_exploration_from_greedy_to_the_textbook_reaches_an_independent_simulation():
    family = Bandit(arms=5, pulls=100, shots=2, queries=2)
    scores = {}
    for exploration, simulated in ((0.0, 76.5), (0.05, 78.8), (1.0, 65.7)):
        score, margin = mean_score(ucb1(family.spec, exploration), family, 400)
        assert abs(score - simulated) < margin + 0.01 * simulated
        scores[exploration] = score
    # On the same bandits: the textbook explores too much for a hundred pulls.
    assert scores[0.05] - scores[1.0] > 8


def test_probability_of_being_best_equals_sampling_from_the_posterior():
    wins, losses = torch.tensor([3.0, 0.0, 10.0, 60.0]), torch.tensor([1.0, 0.0, 7.0, 40.0])
    drawn = torch.distributions.Beta(1 + wins, 1 + losses)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        counts = torch.bincount(drawn.sample((200_000,)).argmax(1), minlength=4) / 200_000
    torch.testing.assert_close(probability_of_being_best(wins, losses), counts, atol=0.004, rtol=0)
    two = probability_of_being_best(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0]))
    # ∫ 2x · x dx = 2/3.
    torch.testing.assert_close(two, torch.tensor([2 / 3, 1 / 3]), atol=1e-4, rtol=0)


def test_policies_with_a_memory_act_the_same_step_by_step_and_all_at_once():
    family = MDP(states=3, actions=2, episodes=2, horizon=3, shots=2, queries=2)
    bandit = Bandit(arms=3, pulls=7, shots=2, queries=2)
    cases = [(family, psrl(family.spec).predict), (bandit, thompson(bandit.spec).predict)]
    cases += [(bandit, ucb1(bandit.spec).predict)]
    models = {family: FastWeightsPolicy(family.spec, 4, 3), bandit: GRUPolicy(bandit.spec, 5)}
    cases += [(task, lambda theta, state, seen, model=model: model(seen)) for task, model in models.items()]
    for environment, predict in cases:
        data = {name: leaf[0] for name, leaf in environment.sample("test", 1, generator()).query.items()}
        outputs = []

        def spy(seen):
            out, carry = predict({}, {}, seen)  # noqa: B023
            outputs.append(out)  # noqa: B023
            return out, carry

        seen = control.rollout(environment.environment, spy, data).seen
        whole, _ = predict({}, {}, seen)
        torch.testing.assert_close(torch.cat(outputs), whole, atol=1e-5, rtol=1e-5)


def test_tables_are_distributions_and_random_play_earns_the_mean_reward():
    family = MDP(shots=2, queries=2)
    tasks = family.sample("test", 3, generator())
    torch.testing.assert_close(tasks.query["transitions"].sum(-1), torch.ones(3, 2, 10, 5))
    # Rewards have mean 1: 10 episodes of 10 steps earn 100.
    score, margin = mean_score(random_policy(family.spec), family)
    assert abs(score - 100) < margin
    data = {name: leaf[0] for name, leaf in tasks.query.items()}
    trial = control.rollout(family.environment, lambda seen: torch.zeros_like(seen.action), data)
    assert (trial.seen.observation[::10, :, 0] == 1).all()
    assert (trial.seen.done[10::10] == 1).all()
    assert trial.seen.done.sum() == 2 * 9
    torch.testing.assert_close(trial.seen.reward[1:, :, 0], trial.reward[:-1])
    # Advantages are of what was paid.
    torch.testing.assert_close(trial.credit, trial.reward)


def test_hindsight_is_off_and_where_it_is_on_the_data_set_says_so():
    for family in (MDP(shots=2, queries=2), Bandit(shots=2, queries=2)):
        assert not family.hindsight
        assert "hindsight" not in family.sample("train", 1, generator()).query
        assert "hindsight" not in family.dataset
    family = MDP(shots=2, queries=2, hindsight=True)
    assert family.dataset.endswith(":hindsight")
    assert "hindsight" not in family.sample("test", 1, generator()).query
    tasks = family.sample("train", 1, generator())
    assert "hindsight" not in tasks.support
    known = {name: leaf[0] for name, leaf in tasks.query.items()}
    trial = control.rollout(family.environment, lambda seen: torch.zeros_like(seen.action), known)
    torch.testing.assert_close(trial.reward - trial.credit, known["reward_noise"].T)


@pytest.mark.parametrize(
    "family", [partial(Navigation, horizon=5), partial(Bandit, pulls=5), partial(MDP, episodes=2, horizon=3)]
)
def test_every_step_of_adaptation_plays_new_episodes_and_the_same_ones_when_played_again(family):
    """One policy at three steps, alone, under vmap and in a recording; with one tape all steps are alike."""
    fresh = family(shots=3, queries=2)
    support = fresh.sample("test", 4, generator()).support
    one = {name: leaf[1] for name, leaf in support.items()}

    def actions(family, data):
        # A policy that says nothing leaves the action to its noise.
        outputs = fresh.spec.target.outputs
        data = family.with_tape(data)
        return control.rollout(family.environment, lambda seen: torch.zeros(*seen.action.shape[:2], outputs), data)

    rolled = [actions(fresh, at_step(one, step)) for step in (0, 1, 2, 1)]
    for first, second in ((0, 1), (1, 2), (0, 2)):
        assert not torch.equal(rolled[first].action, rolled[second].action)
        assert not torch.equal(rolled[first].reward, rolled[second].reward)
    torch.testing.assert_close(rolled[1], rolled[3], rtol=0, atol=0)

    def step_one(given):
        return {"reward": torch.func.vmap(lambda data: actions(fresh, at_step(data, 1)).reward)(given)}

    torch.testing.assert_close(step_one(support)["reward"][1], rolled[1].reward)
    other = {name: leaf.flip(0) for name, leaf in support.items()}
    recording = Recording(step_one, other).replayed(other)
    torch.testing.assert_close(recording(support)["reward"], step_one(support)["reward"], rtol=0, atol=0)
    shared = family(shots=3, queries=2, fresh_tapes=False)
    assert shared.dataset == fresh.dataset + ":one_tape"
    torch.testing.assert_close(actions(shared, at_step(one, 2)), rolled[0], rtol=0, atol=0)


def test_all_gradient_learners_adapt_on_the_same_tape_at_the_same_step():
    """Whatever adapts, its k-th step sees the k-th tape."""
    family = Bandit(arms=3, pulls=4, shots=3, queries=2)
    model = Policy(family.spec, (4,))
    task = task_of(family.sample("test", 1, generator()), 0)
    learners = [
        maml(model, 0.1),
        reptile(model, 0.1, inner_batch=3),
        scratch(model),
    ]
    learners += [mamlpp(model, inner_steps=3), anil(model), metasgd(model)]
    learners += [adaptive(model)]
    for algorithm in learners:
        seen = []

        def spy(predict, data):
            seen.append((data["step"], family.with_tape(data)["noise"]))  # noqa: B023
            return loss_of(family)(predict, data)

        states = algorithm.adapt(algorithm.init(generator()), task.support, spy)
        assert len(list(islice(states, 4))) == 4
        assert [step for step, _ in seen] == [0, 1, 2]
        for step, noise in seen:
            expected = family.with_tape({**task.support, "step": step})["noise"]
            torch.testing.assert_close(noise, expected, rtol=0, atol=0)


def test_adaptation_learns_nothing_that_was_not_paid():
    """Two bandits whose pulls pay alike give the same gradient, however their hidden chances differ."""
    family = Bandit(arms=2, pulls=5, shots=4, queries=4)
    model = Policy(family.spec, (8,))
    weights = {name: p.detach() for name, p in model.named_parameters()}
    support = family.with_tape({n: leaf[0] for n, leaf in family.sample("test", 1, generator()).support.items()})
    luck = {"luck": torch.where(support["luck"] < 0.5, 0.05, 0.95)}
    gradients = [
        support_gradient(
            forward_of(model), weights, support | luck | {"payout": torch.tensor(p).expand(4, 2)}, loss_of(family)
        )
        for p in ([0.9, 0.1], [0.1, 0.9], [0.5, 0.5])
    ]
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name])
        assert torch.equal(gradient, gradients[2][name])
    assert gradients[0]["head.linear.bias"].abs().max() > 0


@pytest.mark.parametrize(("prior_mean", "simulated"), [(0.0, 137.3), (1.0, 134.0)])
def test_posterior_sampling_reaches_an_independent_simulation(prior_mean, simulated):
    """A plain loop of numpy over 6,000 tables gets these, ± 0.6 each; the RL² paper has 138.1."""
    family = MDP(shots=2, queries=2)
    score, margin = mean_score(psrl(family.spec, prior_mean), family, 400)
    assert margin < 4
    assert abs(score - simulated) < margin + 0.6


def test_backward_induction_equals_enumerating_every_policy():
    transitions = torch.rand(2, 2, 2, generator=generator())
    transitions /= transitions.sum(-1, keepdim=True)
    rewards = torch.randn(2, 2, generator=generator(1))

    def best(state, steps):
        if steps == 0:
            return 0.0
        return max(
            rewards[state, a].item() + sum(transitions[state, a, n].item() * best(n, steps - 1) for n in range(2))
            for a in range(2)
        )

    values = action_values(transitions, rewards, 4)
    assert values.shape == (4, 2, 2)
    for step in range(4):
        for state in range(2):
            assert values[step, state].max().item() == pytest.approx(best(state, 4 - step), rel=1e-5)


def test_numbers_from_seeds_are_uniform_and_gamma():
    seeds = torch.randint(2**62, (500,), generator=generator())
    u = uniform(seeds, (400,))
    assert u.min() > 0
    assert u.max() < 1
    assert u.mean().item() == pytest.approx(0.5, abs=0.002)
    assert (u**2).mean().item() == pytest.approx(1 / 3, abs=0.002)
    assert torch.corrcoef(u[:, :20].T).fill_diagonal_(0).abs().max() < 0.2
    assert not torch.equal(u[0], u[1])
    for shape in (1, 3, LARGEST_SUM, LARGEST_SUM + 1, 40):
        drawn = gamma(torch.tensor(float(shape)), u.view(-1, LARGEST_SUM))
        assert drawn.mean().item() == pytest.approx(shape, rel=0.03)
        assert drawn.var().item() == pytest.approx(shape, rel=0.06)


def test_returns_to_go_and_advantages():
    reward = torch.tensor([[1.0, 0.0], [2.0, 5.0], [4.0, 0.0]])
    torch.testing.assert_close(control.returns_to_go(reward, 0.5), torch.tensor([[3.0, 2.5], [4.0, 5.0], [4.0, 0.0]]))
    observation = torch.randn(30, 8, 2, generator=generator())
    zeros, ones = torch.zeros(30, 8, 1), torch.ones(30, 8)
    seen = Seen(observation, zeros, zeros, zeros, zeros[..., 0].long())
    counts = ones.clone()
    counts[20:, :4] = 0
    # A reward that is linear in the observation leaves nothing to an undiscounted single step.
    linear = 3 * observation[..., 0] + 1
    trajectory = control.Rollout(seen, zeros, linear, linear, counts)
    assert control.advantages(trajectory, control.Learning(1e-9, normalise=False)).abs().max() < 1e-3
    noisy = trajectory._replace(credit=torch.randn(30, 8, generator=generator(1)))
    advantage = control.advantages(noisy, control.Learning(0.9))
    assert (advantage[counts == 0] == 0).all()
    kept = advantage[counts == 1]
    assert kept.mean().abs() < 1e-5
    assert kept.square().mean().item() == pytest.approx(1, abs=1e-4)


def test_generalised_advantages_lie_between_one_step_and_the_whole_return():
    """λ = 0 is the surprise of one step, λ = 1 the return less the baseline, and between them a geometric mean."""
    credit = torch.randn(12, 50, generator=generator())
    zeros, ones = torch.zeros(12, 50, 1), torch.ones(12, 50)
    seen = Seen(torch.randn(12, 50, 2, generator=generator(1)), zeros, zeros, zeros, zeros[..., 0].long())
    trajectory = control.Rollout(seen, zeros, credit, credit, ones)

    def estimate(trace):
        return control.advantages(trajectory, control.Learning(0.9, trace, normalise=False))

    values = control.returns_to_go(credit, 0.9) - estimate(1.0)
    following = torch.cat([values[1:], torch.zeros(1, 50)])
    surprise = credit + 0.9 * following - values
    torch.testing.assert_close(estimate(0.0), surprise, atol=1e-5, rtol=1e-4)
    by_hand = sum((0.9 * 0.5) ** k * surprise[3 + k] for k in range(9))
    torch.testing.assert_close(estimate(0.5)[3], by_hand, atol=1e-5, rtol=1e-4)


def test_test_tasks_do_not_depend_on_how_training_is_set_up():
    default, other = Bandit(), Bandit(train_queries=7, entropy=0.1, normalise=False)
    a, b = (family.sample("test", 3, generator()) for family in (default, other))
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert other.sample("train", 3, generator()).query["noise"].shape[1] == 7
