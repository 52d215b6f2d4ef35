"""Reinforcement learning as a loss: roll the policy out, then differentiate a surrogate of its return.

The randomness of a rollout is data: a tape of random numbers. One policy and one tape therefore give one rollout, and
everything that adapts a regressor adapts a policy too. Query episodes carry their tape, so that all algorithms are
scored on the same episodes. Each support episode carries a seed, from which every adaptation step draws a new tape
(`metarun.inner.at_step`), as the papers collect new episodes for every step. The k-th tape of a task is the same for
all algorithms. With ``fresh_tapes=false`` all steps of a task share the first tape, and ten steps can overfit its luck.

No gradient flows through actions, which are samples. The surrogate weights the likelihood ratio of the current policy
π and the policy π₀ that played the episodes by the advantage A,

    L = − mean over steps of π(a|s) / π₀(a|s) · A

Where episodes have just been played, π₀ is π as a constant. This is the LVC estimator of Rothfuss et al. 2019, "ProMP"
(https://arxiv.org/abs/1810.06784, §5). Its value carries no information, its gradient is the policy gradient, and its
second derivative keeps the score-function terms ∇log π ∇log πᵀ A that differentiating log π · A would lose. Where
episodes are kept (``kept``; a trust region compares many policies on the same ones), π₀ is the policy that played them.

The advantage A is the discounted return to go, or a generalised estimate of it, less a baseline that is linear in
features of state and time, fitted to the same episodes of the same task (Duan et al. 2016,
https://arxiv.org/abs/1604.06778), then normalised over the task's steps where that helps. The score is the
undiscounted return.

With ``hindsight``, which no paper has, the query episodes of training tasks are credited with expected rewards, where
the environment knows them. The expected meta-gradient is the same, with less noise. The data set's name then says so.
Adaptation uses only the rewards that were paid.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from metarun.contracts import Predict, Scores, Seen, Spec, Split, Task, Tree
from metarun.errors import require
from metarun.nn.ops import one_hot
from metarun.random import fold, uniform
from metarun.targets.actions import RETURN

RIDGE = 1e-5
"""Strength of the baseline's ridge regression, for features of order one."""


class Environment(Protocol):
    """Parallel episodes as pure tensors: ``data`` and states have leaves ``[episodes, ...]``.

    ``data["noise"]`` is the tape for actions ``[episodes, steps, actions]``: standard normal numbers where
    actions are continuous, Gumbel ones where they are discrete.
    """

    continuous: bool

    def initial(self, data: Tree) -> Any:
        """Return the first state."""

    def observe(self, state: Any) -> Tensor:
        """Return what the policy sees of a state ``[episodes, observation]``."""

    def step(self, data: Tree, time: int, state: Any, action: Tensor) -> "Outcome":
        """Return the outcome of ``action [episodes, actions]`` (one-hot if discrete) at step ``time`` of the trial."""


class Learning(NamedTuple):
    """How the surrogate weights actions; scores do not depend on it."""

    discount: float = 0.99
    """Discount factor per step, above 0 and at most 1."""
    trace: float = 1.0
    """λ of generalised advantage estimation (Schulman et al. 2016, https://arxiv.org/abs/1506.02438), from 0 to 1: how
    far an action is credited with the rewards themselves instead of the baseline's expectations."""
    entropy: float = 0.0
    """Weight of a nat of entropy relative to an advantage of 1, at least 0; for discrete actions only."""
    normalise: bool = True
    """Whether advantages are scaled to variance 1 within a task. Without scaling, tasks in which actions matter little,
    and whose advantages are mostly noise, count for little."""


class Outcome(NamedTuple):
    """The outcome of one step of each episode."""

    state: Any
    reward: Tensor
    """``[episodes]``."""
    expected: Tensor
    """Expectation of the reward given state and action, where the environment knows it."""
    done: Tensor
    """Whether a new episode of the trial begins, as a number ``[episodes]``."""
    over: Tensor
    """Whether the trial is over ``[episodes]``; later steps do not count."""


class Rollout(NamedTuple):
    """Parallel episodes, leaves ``[steps, episodes, ...]``."""

    seen: Seen
    action: Tensor
    reward: Tensor
    credit: Tensor
    """What advantages are computed from: the reward, or its expectation in hindsight."""
    counts: Tensor
    """1 until the trial is over, then 0."""


def split_output(predicted: Any) -> tuple[Tensor, Any]:
    """Split what a policy returns into its outputs and its carry, which is None for a policy without memory."""
    return predicted if isinstance(predicted, tuple) else (predicted, None)


def act(output: Tensor, noise: Tensor, continuous: bool) -> Tensor:
    """Sample the distribution ``output [..., outputs]`` with ``noise [..., actions]``; one-hot if discrete."""
    if continuous:
        mean, log_std = output.chunk(2, -1)
        return mean + log_std.exp() * noise
    # The argmax of logits with Gumbel noise is a draw from their softmax.
    return one_hot((output + noise).argmax(-1), output.shape[-1], output)


def log_probability(output: Tensor, action: Tensor, continuous: bool) -> Tensor:
    """Return log p(``action [..., actions]``) under ``output [..., outputs]``, up to a constant: ``[...]``."""
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
    """Return the discounted sum of rewards from each step on, ``[steps, episodes]``."""
    total, backwards = torch.zeros_like(reward[0]), []
    for now in reward.flip(0):
        total = now + discount * total
        backwards.append(total)
    return torch.stack(backwards[::-1])


def baseline_features(seen: Seen) -> Tensor:
    """Return the baseline's features: observation and its square, time up to its third power, reward so far, 1."""
    steps = len(seen.reward)
    time = torch.linspace(0, 1, steps, dtype=seen.reward.dtype, device=seen.reward.device)[:, None, None]
    time = time.expand_as(seen.reward)
    so_far = seen.reward.cumsum(0) / steps
    observation = seen.observation
    powers = [torch.ones_like(time), time, time**2, time**3]
    return torch.cat([observation, observation.square(), *powers, so_far, so_far * time], -1)


@torch.no_grad()
def advantages(trajectory: Rollout, learning: Learning) -> Tensor:
    """Return advantages ``[steps, episodes]``, 0 where the trial is over."""
    counts, reward = trajectory.counts, trajectory.credit * trajectory.counts
    returns = returns_to_go(reward, learning.discount)
    # Only the steps that count enter the regression: the others have rows of zeros.
    features = (baseline_features(trajectory.seen) * counts[..., None]).flatten(0, 1)
    gram = features.T @ features / len(features)
    identity = torch.eye(features.shape[1], dtype=gram.dtype, device=gram.device)
    # The plain ``solve`` would wait for the GPU to report whether the matrix is regular; the ridge makes it so.
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


def played(environment: Environment, predict: Predict, data: Tree, learning: Learning) -> tuple[Tree, Tensor]:
    """Roll out a policy and keep what a surrogate needs of its episodes.

    Returns:
        Tensors by name: what was ``seen`` (a tree of the leaves of `metarun.contracts.Seen`), ``action``, ``advantage``
        and ``counts`` of every step ``[steps, episodes, ...]``, and the mean undiscounted ``score``; and the policy's
        outputs ``[steps, episodes, outputs]``, with their graph.
    """
    trajectory = rollout(environment, predict, data)
    output, _ = split_output(predict(trajectory.seen))
    kept = {
        "seen": dict(zip(Seen._fields[:5], trajectory.seen[:5], strict=True)),
        "action": trajectory.action,
        "advantage": advantages(trajectory, learning),
        "counts": trajectory.counts,
        "score": total_return(trajectory),
    }
    return kept, output


def surrogate(kept: Tree, output: Tensor, old: Tensor, continuous: bool, entropy: float) -> Tensor:
    """Return the surrogate loss of a policy on episodes that another policy played.

    Args:
        kept: what ``played`` returned.
        output: output of the policy on what was seen.
        old: output of the policy that played the episodes, without a graph.
        continuous: whether actions are continuous.
        entropy: weight of a nat of entropy.
    """
    new, before = (log_probability(o, kept["action"], continuous) for o in (output, old))
    weighted = (new - before).exp() * kept["advantage"]
    if entropy > 0:
        logs = log_softmax(output, -1)
        weighted = weighted - entropy * (logs.exp() * logs).sum(-1) * kept["counts"]
    loss: Tensor = -weighted.sum() / kept["counts"].sum()
    return loss


def divergence(output: Tensor, old: Tensor, continuous: bool) -> Tensor:
    """Return the Kullback-Leibler divergence KL(old ‖ new) of ``output [..., outputs]`` from ``old``: ``[...]``.

    Closed forms for normal distributions with independent dimensions, and for categorical ones.
    """
    if continuous:
        mean, log_std = output.chunk(2, -1)
        old_mean, old_log_std = old.chunk(2, -1)
        spread = (2 * (old_log_std - log_std)).exp()
        away = ((old_mean - mean) / log_std.exp()).square()
        return (log_std - old_log_std + 0.5 * (spread + away - 1)).sum(-1)
    before = log_softmax(old, -1)
    return (before.exp() * (before - log_softmax(output, -1))).sum(-1)


class ControlFamily:
    """The base class of families with an environment of pure tensors.

    A subclass samples the parameters of its environment and says which random numbers an episode needs.
    """

    spec: Spec
    dataset: str
    environment: Environment

    def __init__(
        self,
        learning: Learning,
        queries: int,
        train_queries: int | None,
        fresh_tapes: bool,
        hindsight: bool,
        device: str,
    ) -> None:
        self.learning, self.device = learning, device
        self.train_queries = train_queries or queries
        self.fresh_tapes, self.hindsight = fresh_tapes, hindsight

    def named(self, dataset: str) -> str:
        """Return the data set's name, including what makes its scores differ from the papers'."""
        return dataset + (":hindsight" if self.hindsight else "") + ("" if self.fresh_tapes else ":one_tape")

    def tape(self, seed: Tensor) -> Tree:
        """Return the random numbers of the episode of every ``seed [...]``, leaves ``[..., *]``, with ``noise``."""
        raise NotImplementedError

    def tasks(self, split: Split, parameters: Tree, generator: torch.Generator) -> Task:
        """Make tasks of ``parameters [tasks, 1, ...]`` with episodes, leaves ``[tasks, episodes, ...]``.

        Support episodes have a seed (``tape``), query episodes their random numbers.
        """
        count = len(next(iter(parameters.values())))

        def part(episodes: int) -> tuple[Tree, Tensor]:
            leaves = {name: leaf.expand(-1, episodes, *leaf.shape[2:]) for name, leaf in parameters.items()}
            return leaves, torch.randint(2**62, (count, episodes), generator=generator)

        support, seed = part(self.spec.sizes.shots)
        query, query_seed = part(self.train_queries if split == "train" else self.spec.sizes.queries)
        # Drawn here instead of where it is used, so that test episodes are the same on every device.
        query = {**query, **self.tape(query_seed)}
        if split == "train" and self.hindsight:
            query["hindsight"] = torch.ones_like(query["noise"][:, :, 0, 0])

        def put(data: Tree) -> Tree:
            return {name: leaf.to(self.device) for name, leaf in data.items()}

        return Task(put({**support, "tape": seed}), put(query))

    def with_tape(self, data: Tree) -> Tree:
        """Return ``data`` of one task with the tape of its adaptation step; unchanged if it holds a tape already."""
        if "tape" not in data:
            return data
        step = data.get("step", 0) if self.fresh_tapes else 0
        parameters = {name: leaf for name, leaf in data.items() if name not in ("tape", "step")}
        return {**parameters, **self.tape(fold(data["tape"], step))}

    def loss(self, predict: Predict, data: Tree) -> tuple[Tensor, Scores]:
        """Return the surrogate loss and the mean undiscounted return of a policy on the data of one task.

        The policy plays the episodes, unless ``data`` keeps some (``kept``, by adaptation step).
        """
        continuous = self.environment.continuous
        if "kept" in data:
            kept = data["kept"][str(data.get("step", 0))]
            output, old = self.outputs(predict, kept), kept["output"]
        else:
            kept, output = played(self.environment, predict, self.with_tape(data), self.learning)
            old = output.detach()
        return surrogate(kept, output, old, continuous, self.learning.entropy), {RETURN.name: kept["score"]}

    def keep(self, predict: Predict, data: Tree) -> Tree:
        """Play episodes with a policy, to be put into data as ``kept``: what ``played`` returns, and ``output``."""
        kept, output = played(self.environment, predict, self.with_tape(data), self.learning)
        return {**kept, "output": output.detach()}

    def outputs(self, predict: Predict, kept: Tree) -> Tensor:
        """Return a policy's outputs on what was seen in the episodes ``kept``: ``[steps, episodes, outputs]``."""
        output: Tensor = split_output(predict(Seen(**kept["seen"])))[0]
        return output

    def divergence(self, predict: Predict, kept: Tree) -> Tensor:
        """Return a policy's mean divergence from the one that played ``kept``, over the steps that count."""
        apart = divergence(self.outputs(predict, kept), kept["output"], self.environment.continuous)
        mean: Tensor = (apart * kept["counts"]).sum() / kept["counts"].sum()
        return mean


def total_return(trajectory: Rollout) -> Tensor:
    """Return the undiscounted return of a trial, averaged over trials."""
    return (trajectory.reward * trajectory.counts).sum(0).mean()


def gumbel(seed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return standard Gumbel numbers for every integer of ``seed [...]``: ``[..., *shape]``."""
    return -(-uniform(seed, shape).log()).log()


def check(shots: int, queries: int, train_queries: int | None, learning: Learning, **others: tuple[int, int]) -> None:
    """Check the arguments that control families share.

    Args:
        shots: at least 2.
        queries: at least 2.
        train_queries: at least 2, or None.
        learning: settings with all values in their ranges.
        others: pairs of a value and its least allowed value, by name.

    Raises:
        ValueError: a value is out of range.
    """
    for name, episodes in {"shots": shots, "queries": queries, "train_queries": train_queries}.items():
        require(episodes is None or episodes >= 2, f"{name} must be at least 2, not {episodes}")
    for name, (value, least) in others.items():
        require(value >= least, f"{name} must be at least {least}, not {value}")
    require(0 < learning.discount <= 1, f"discount must be above 0 and at most 1, not {learning.discount}")
    require(0 <= learning.trace <= 1, f"trace must be from 0 to 1, not {learning.trace}")
    require(learning.entropy >= 0, f"entropy must be at least 0, not {learning.entropy}")
