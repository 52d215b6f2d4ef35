"""Reinforcement learning as a loss: roll the policy out, then differentiate a surrogate of its return.

The randomness of a rollout is data: a tape drawn with the task. So one policy and one task give one rollout,
and everything that adapts a regressor adapts a policy too.

No gradient flows through actions, which are samples. The surrogate is the LVC estimator of Rothfuss et al.
2019, "ProMP" (https://arxiv.org/abs/1810.06784, §5): with detached denominators

    L = − mean over steps of π(a|s) / ⊥π(a|s) · A

whose value tells nothing, whose gradient is the policy gradient, and whose second derivative keeps the
score-function terms ∇log π ∇log πᵀ A that differentiating log π · A would lose.

The advantage A is the discounted return to go, or a generalised estimate of it, less a baseline that is linear in
features of state and time, fitted to the same episodes of the same task (Duan et al. 2016,
https://arxiv.org/abs/1604.06778), then normalised over the task's steps where that helps. The score is the
undiscounted return.

Query episodes of training tasks have a leaf ``hindsight``: their advantages are made of expected rewards where the
environment knows them, which gives the same expected meta-gradient with less noise. Adaptation, at test time too, has
nothing but what was paid.

Where we deviate: the papers collect new episodes for every step of adaptation; here all steps of a task roll their
policy out along the same tape, so that ten steps can fit its luck.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from metarun.errors import require
from metarun.functional import one_hot
from metarun.types import Predict, Seen, Split, Task, Tree

RIDGE = 1e-5
"""Strength of the baseline's ridge regression, for features of order one."""


class Environment(Protocol):
    """Parallel episodes as pure tensors: ``data`` and states have leaves ``[episodes, ...]``.

    ``data["noise"]`` is the tape for actions ``[episodes, steps, actions]``: standard normal numbers where
    actions are continuous, Gumbel ones where they are discrete.
    """

    continuous: bool

    def initial(self, data: Tree) -> Any:
        """The first state."""

    def observe(self, state: Any) -> Tensor:
        """What the policy sees of a state ``[episodes, observation]``."""

    def step(self, data: Tree, time: int, state: Any, action: Tensor) -> "Outcome":
        """The outcome of ``action [episodes, actions]`` (one-hot if discrete) at step ``time`` of the trial."""


class Learning(NamedTuple):
    """How the surrogate weighs actions; scores do not depend on it."""

    discount: float = 0.99
    """Of rewards to come, per step, above 0 and at most 1."""
    trace: float = 1.0
    """λ of generalised advantage estimation (Schulman et al. 2016, https://arxiv.org/abs/1506.02438), from 0 to 1: how
    far an action is credited with rewards themselves, and not with what the baseline expects."""
    entropy: float = 0.0
    """How much a nat of entropy counts beside an advantage of 1, at least 0; discrete actions alone."""
    normalise: bool = True
    """Whether advantages are scaled to variance 1 within a task. Without it tasks where actions matter little, whose
    advantages are mostly noise, count for little."""


class Outcome(NamedTuple):
    """Of one step of each episode."""

    state: Any
    reward: Tensor
    """``[episodes]``."""
    expected: Tensor
    """Its expectation given state and action, where the environment knows it."""
    done: Tensor
    """Whether a new episode of the trial begins, as a number ``[episodes]``."""
    over: Tensor
    """Whether the trial is over for good ``[episodes]``; what follows does not count."""


class Rollout(NamedTuple):
    """Episodes side by side, leaves ``[steps, episodes, ...]``."""

    seen: Seen
    action: Tensor
    reward: Tensor
    credit: Tensor
    """What advantages are made of: the reward, or its expectation in hindsight."""
    counts: Tensor
    """1 until the trial is over, then 0."""


def split_output(predicted: Any) -> tuple[Tensor, Any]:
    """Outputs of a policy and its carry, None for one without memory."""
    return predicted if isinstance(predicted, tuple) else (predicted, None)


def act(output: Tensor, noise: Tensor, continuous: bool) -> Tensor:
    """A sample of the distribution ``output [..., outputs]`` by its ``noise [..., actions]``; one-hot if discrete."""
    if continuous:
        mean, log_std = output.chunk(2, -1)
        return mean + log_std.exp() * noise
    # Adding Gumbel noise to logits and taking the largest draws from their softmax.
    return one_hot((output + noise).argmax(-1), output.shape[-1], output)


def log_probability(output: Tensor, action: Tensor, continuous: bool) -> Tensor:
    """Of ``action [..., actions]`` under ``output [..., outputs]``, up to a constant: ``[...]``."""
    if continuous:
        mean, log_std = output.chunk(2, -1)
        return -(0.5 * ((action - mean) / log_std.exp()).square() + log_std).sum(-1)
    return (log_softmax(output, -1) * action).sum(-1)


@torch.no_grad()
def rollout(environment: Environment, predict: Predict, data: Tree) -> Rollout:
    """Follow the policy through every episode of the task, and stop at the tape's end."""
    noise = data["noise"]
    episodes, steps, actions = noise.shape
    state, carry = environment.initial(data), None
    counts, zeros = noise.new_ones(episodes), noise.new_zeros(episodes)
    hindsight = data.get("hindsight", zeros)
    seeds = data["seed"] if "seed" in data else torch.zeros_like(noise[..., 0], dtype=torch.int64)
    previous = (noise.new_zeros(episodes, actions), zeros, zeros)
    rows = []
    for time in range(steps):
        action, reward, done = previous
        now = (environment.observe(state), action, reward[:, None], done[:, None], seeds[:, time])
        seen = Seen(*(leaf[None] for leaf in now))._replace(carry=carry)
        output, carry = split_output(predict(seen))
        action = act(output[0], noise[:, time], environment.continuous)
        state, reward, expected, done, over = environment.step(data, time, state, action)
        rows.append((*now, action, reward, torch.lerp(reward, expected, hindsight), counts))
        previous = (action, reward, done)
        counts = counts * (1 - over.to(counts.dtype))
    columns = [torch.stack(column) for column in zip(*rows, strict=True)]
    return Rollout(Seen(*columns[:5]), *columns[5:])


def returns_to_go(reward: Tensor, discount: float) -> Tensor:
    """Discounted sum of rewards from each step on, ``[steps, episodes]``."""
    total, backwards = torch.zeros_like(reward[0]), []
    for now in reward.flip(0):
        total = now + discount * total
        backwards.append(total)
    return torch.stack(backwards[::-1])


def baseline_features(seen: Seen) -> Tensor:
    """What the baseline is linear in: observation and its square, time to the third power, reward so far, 1."""
    steps = len(seen.reward)
    time = torch.linspace(0, 1, steps, dtype=seen.reward.dtype, device=seen.reward.device)[:, None, None]
    time = time.expand_as(seen.reward)
    so_far = seen.reward.cumsum(0) / steps
    observation = seen.observation
    powers = [torch.ones_like(time), time, time**2, time**3]
    return torch.cat([observation, observation.square(), *powers, so_far, so_far * time], -1)


@torch.no_grad()
def advantages(trajectory: Rollout, learning: Learning) -> Tensor:
    """Advantages ``[steps, episodes]``, 0 where the trial is over."""
    counts, reward = trajectory.counts, trajectory.credit * trajectory.counts
    returns = returns_to_go(reward, learning.discount)
    # Regress on the steps that count alone: the others have rows of zeros.
    features = (baseline_features(trajectory.seen) * counts[..., None]).flatten(0, 1)
    gram = features.T @ features / len(features)
    identity = torch.eye(features.shape[1], dtype=gram.dtype, device=gram.device)
    # The plain ``solve`` would wait for a GPU to say that the matrix was regular, which the ridge makes it.
    fitted: Tensor = torch.linalg.solve_ex(gram + RIDGE * identity, features.T @ returns.flatten() / len(features))[0]
    values = (features @ fitted).view_as(returns)
    surprise = reward + learning.discount * torch.cat([values[1:], torch.zeros_like(values[:1])]) - values
    advantage = returns_to_go(surprise, learning.discount * learning.trace) * counts
    if not learning.normalise:
        return advantage
    total = counts.sum()
    centred: Tensor = (advantage - advantage.sum() / total) * counts
    spread = (centred.square().sum() / total).sqrt()
    return centred / (spread + 1e-8)


def policy_gradient_loss(
    environment: Environment, predict: Predict, data: Tree, learning: Learning
) -> tuple[Tensor, Tensor]:
    """Surrogate loss and mean undiscounted return of a policy on one task.

    Args:
        environment: the task's.
        predict: the policy.
        data: parameters of the environment and its tape, ``[episodes, ...]``.
        learning: how the surrogate weighs actions.
    """
    trajectory = rollout(environment, predict, data)
    output, _ = split_output(predict(trajectory.seen))
    logp = log_probability(output, trajectory.action, environment.continuous)
    weighted = (logp - logp.detach()).exp() * advantages(trajectory, learning)
    if learning.entropy > 0:
        logs = log_softmax(output, -1)
        weighted = weighted - learning.entropy * (logs.exp() * logs).sum(-1) * trajectory.counts
    loss = -weighted.sum() / trajectory.counts.sum()
    return loss, total_return(trajectory)


def sampled(part: Callable[[int], Tree], split: Split, shots: int, queries: int, train_queries: int) -> Task:
    """Tasks made of two draws of ``part(episodes)``, leaves ``[tasks, episodes, ...]``; for training with hindsight."""
    support = part(shots)
    if split != "train":
        return Task(support, part(queries))
    query = part(train_queries)
    return Task(support, {**query, "hindsight": torch.ones_like(query["noise"][:, :, 0, 0])})


def total_return(trajectory: Rollout) -> Tensor:
    """Undiscounted return of a trial, mean over trials."""
    return (trajectory.reward * trajectory.counts).sum(0).mean()


def gumbel(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard Gumbel numbers."""
    uniform = torch.rand(shape, generator=generator).clamp(1e-7, 1 - 1e-7)
    return -(-uniform.log()).log()


def check(shots: int, queries: int, train_queries: int | None, learning: Learning, **others: tuple[int, int]) -> None:
    """Refuse what no control family can work with.

    Args:
        shots: at least 2.
        queries: at least 2.
        train_queries: at least 2, or None.
        learning: with all values in their ranges.
        others: pairs of a value and the least that it may be, by name.

    Raises:
        ValueError: a value out of range.
    """
    for name, episodes in {"shots": shots, "queries": queries, "train_queries": train_queries}.items():
        require(episodes is None or episodes >= 2, f"{name} must be at least 2, not {episodes}")
    for name, (value, least) in others.items():
        require(value >= least, f"{name} must be at least {least}, not {value}")
    require(0 < learning.discount <= 1, f"discount must be above 0 and at most 1, not {learning.discount}")
    require(0 <= learning.trace <= 1, f"trace must be from 0 to 1, not {learning.trace}")
    require(learning.entropy >= 0, f"entropy must be at least 0, not {learning.entropy}")
