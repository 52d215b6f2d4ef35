"""A policy that adapts to an environment by playing episodes in it, and then acts."""

import copy
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metarun.after.learner import as_in_test, seed_of
from metarun.after.load import Learned
from metarun.contracts import Family, Loss, Moments, Seen, Tree
from metarun.errors import UserError, require
from metarun.inner import at_step
from metarun.random import fold, stream
from metarun.targets.actions import RETURN, Actions
from metarun.targets.scoring import loss_of
from metarun.tasks.control import ControlFamily, Outcome, act, split_output
from metarun.tasks.gymnasium import Host, Outside

Array = NDArray[Any]


class Dialect:
    """How environments of a family show what is seen, and take actions.

    Those of gymnasium have spaces: observations are flattened as these say, and a policy's numbers from −1 to 1 span
    the bounds of an action. All others show arrays, and take an array of numbers, or the index of an action.
    """

    def __init__(self, family: ControlFamily) -> None:
        host = getattr(family.environment, "host", None)
        self.host: Host | None = host if isinstance(host, Host) else None
        self.continuous = family.environment.continuous

    def seen(self, observation: Any) -> Array:
        """Return an observation as numbers ``[observation]``."""
        if self.host is not None:
            observation = self.host.flatten(self.host.copies[0].observation_space, observation)
        return np.asarray(observation, dtype=np.float64).reshape(-1)

    def taken(self, action: Array) -> Any:
        """Return a policy's action (one-hot if discrete) as the environment takes it."""
        if self.host is not None:
            return self.host.native(self.host.copies[0].action_space, action)
        return action.astype(np.float32) if self.continuous else int(action.argmax())


class OwnEnvironments:
    """Copies of a user's environment, one per parallel episode, as `metarun.tasks.control` sees an environment.

    A state is an observation ``[episodes, numbers]``. Observations and actions have the form that they have in the
    family's own environments (see ``Dialect``). Where a trial has several episodes, the environment is reset after
    each of them, which is over when the environment says so, or after as many steps as in training.
    """

    def __init__(self, make: Callable[[], Any], dialect: "Dialect", inputs: Moments, seed: int) -> None:
        self.make, self.dialect, self.inputs, self.seed = make, dialect, inputs, seed
        self.continuous = dialect.continuous
        self.copies: list[Any] = []
        self.left: list[int] = []
        """Episodes of each copy's trial that are not over."""
        self.steps: list[int] = []
        """Steps of the current episode."""
        self.seen: Array = np.empty(0)

    def _flat(self, observation: Any) -> Array:
        flat = self.dialect.seen(observation)
        require(
            flat.shape == (self.inputs.observation,),
            f"the policy sees {self.inputs.observation} numbers, and this environment shows {flat.size}",
        )
        return flat

    def _start(self, index: int) -> Array:
        start = self.copies[index].reset(seed=self.seed)
        self.seed, self.steps[index] = self.seed + 1, 0
        return self._flat(start[0] if isinstance(start, tuple) else start)

    def _begun(self, like: Array) -> tuple[Array]:
        while len(self.copies) < len(like):
            self.copies.append(self.make())
        self.left, self.steps = [self.inputs.episodes] * len(like), [0] * len(like)
        self.seen = np.stack([self._start(i) for i in range(len(like))])
        return (self.seen.copy(),)

    def _stepped(self, actions: Array) -> tuple[Array, Array, Array, Array]:
        rewards, again = np.zeros(len(actions)), np.zeros(len(actions), dtype=bool)
        for i, action in enumerate(actions):
            if not self.left[i]:
                continue
            seen, reward, ended, cut, *_ = self.copies[i].step(self.dialect.taken(action))
            self.seen[i], rewards[i] = self._flat(seen), float(reward)
            self.steps[i] += 1
            if ended or cut or self.steps[i] == self.inputs.horizon:
                self.left[i] -= 1
                again[i] = self.left[i] > 0
                if again[i]:
                    self.seen[i] = self._start(i)
        return self.seen.copy(), rewards, again, ~np.array(self.left, dtype=bool)

    def initial(self, data: Tree) -> Tensor:
        """Begin all episodes."""
        (seen,) = Outside.apply(self._begun, data["noise"])  # type: ignore[no-untyped-call]
        return cast(Tensor, seen)

    def observe(self, state: Tensor) -> Tensor:
        """Return the observation."""
        return state

    def step(self, data: Tree, time: int, state: Tensor, action: Tensor) -> Outcome:
        """Take one step in each episode."""
        seen, reward, again, over = Outside.apply(self._stepped, action)  # type: ignore[no-untyped-call]
        return Outcome(seen, reward, reward, again.to(reward.dtype), over)


class AdaptedPolicy:
    """A policy that has adapted to an environment; ``act`` continues one trial until ``reset``.

    Attributes:
        curve: the mean return of the episodes that the policy plays before adaptation and after each step
            ``[steps + 1]``.
    """

    def __init__(self, learned: Learned, family: ControlFamily, support: Tree, steps: int, seed: Tensor) -> None:
        self._learned, self._family, self._seed = learned, family, seed
        self._actions = cast(Actions, learned.spec.target)
        self._dialect = Dialect(cast(ControlFamily, learned.family))
        self._state, values = return_curve(learned, support, seed, loss_of(cast(Family, family)), steps)
        self.curve: Array = torch.stack(values).cpu().numpy()
        self.reset()

    def policy(self, seen: Seen) -> Any:
        """Return the policy's outputs for what it sees; see `metarun.contracts.Seen`."""
        return self._learned.algorithm.predict(self._learned.theta, self._state, seen)

    def reset(self, seed: int = 0) -> None:
        """Begin a new trial: the policy forgets what happened, but not what it has adapted to."""
        self._draws = fold(seed_of(seed, self._learned.device), 1)
        self._time, self._carry = 0, None
        self._before = torch.zeros(1, 1, self._actions.count, device=self._learned.device)

    def act(self, observation: Any, reward: float = 0.0, done: bool = False, mean: bool = False) -> Any:
        """Return an action as the environment takes it: the index of a discrete one, or an array of numbers.

        Args:
            observation: what the environment shows ``[observation]``.
            reward: the reward of the previous action, for policies with a memory.
            done: whether the observation begins a new episode of the same trial, for the same policies.
            mean: whether to take the most likely action instead of a random one.

        Raises:
            ValueError: the observation has another size.
        """
        like, (size,) = self._before, self._learned.spec.inputs.shape
        seen = torch.as_tensor(self._dialect.seen(observation), dtype=like.dtype, device=like.device)
        require(seen.shape == (size,), f"the policy sees {size} numbers, not {len(seen)}")
        draws = fold(self._draws, self._time)
        moment = Seen(
            seen.view(1, 1, -1),
            self._before,
            like.new_full((1, 1, 1), reward),
            like.new_full((1, 1, 1), float(done)),
            (fold(draws, 0) & (2**62 - 1)).view(1, 1),
            self._carry,
        )
        with as_in_test(self._learned, self._seed, {}):
            output, self._carry = split_output(self.policy(moment))
            noise = self._family.tape(fold(draws, 1).view(1))["noise"][:, 0]
            action = act(output[0], torch.zeros_like(noise) if mean else noise, self._actions.continuous)
        self._before, self._time = action[None], self._time + 1
        return self._dialect.taken(action[0].cpu().numpy())


def return_curve(learned: Learned, support: Tree, seed: Tensor, loss: Loss, steps: int) -> tuple[Any, list[Tensor]]:
    """Return the state of a policy after adaptation, and the mean return of the episodes that each state plays."""
    algorithm, theta, values, state = learned.algorithm, learned.theta, list[Tensor](), None
    with as_in_test(learned, seed, {}):
        for step, state in enumerate(algorithm.adapt(theta, support, loss)):
            value = torch.tensor(math.nan)
            if state is not None:
                with as_in_test(learned, seed, {}):
                    value = loss(partial(algorithm.predict, theta, state), at_step(support, step))[1][RETURN.name]
            values.append(value.cpu())
            if step >= steps and state is not None:
                break
    return state, values


def parameters_in(family: ControlFamily, given: Mapping[str, Any], device: str) -> dict[str, Tensor]:
    """Return the parameters of a task as leaves ``[1, ...]``.

    Raises:
        ValueError: names or shapes differ from those of the family's tasks.
    """
    host = getattr(family.environment, "host", None)
    if isinstance(host, Host) and given.keys() == set(host.parameters):
        given = {"parameters": [given[name] for name in host.parameters]}
    example = cast(Family, family).sample("test", 1, stream(0, "test"))
    known = {name: leaf[0, 0] for name, leaf in example.support.items() if name != "tape"}
    wanted = ", ".join(f"{name} {list(leaf.shape)}" for name, leaf in known.items())
    require(given.keys() == known.keys(), f"a task of {family.dataset} has the parameters {wanted}, not {list(given)}")
    found = {name: torch.as_tensor(given[name], device=device).to(leaf) for name, leaf in known.items()}
    shapes = all(found[name].shape == leaf.shape for name, leaf in known.items())
    require(shapes, f"the parameters of a task of {family.dataset} have the shapes {wanted}")
    return {name: leaf[None] for name, leaf in found.items()}


def adapted_policy(learned: Learned, environment: Any, steps: int, seed: int) -> AdaptedPolicy:
    """Adapt a policy to an environment; see ``Learner.adapt_to``.

    Raises:
        ValueError: the environment is not what the policy was trained for.
        UserError: the learner predicts instead of acting.
    """
    family, spec, own = learned.family, learned.spec, seed_of(seed, learned.device)
    if not isinstance(family, ControlFamily) or not isinstance(spec.inputs, Moments):
        raise UserError(f"algo={learned.names['algo']} predicts; adapt it to examples with adapt(x, y).")
    episodes = torch.arange(spec.sizes.shots, device=learned.device)
    tape = fold(own, episodes) & (2**62 - 1)
    if isinstance(environment, Mapping):
        given = parameters_in(family, environment, learned.device)
        support = {name: leaf.expand(len(tape), *leaf.shape[1:]) for name, leaf in given.items()}
        return AdaptedPolicy(learned, family, {**support, "tape": tape}, steps, own)
    require(
        callable(environment),
        "environment must be a mapping of a task's parameters, or a function that makes an environment",
    )
    elsewhere = copy.copy(family)
    elsewhere.environment = OwnEnvironments(environment, Dialect(family), spec.inputs, seed)
    return AdaptedPolicy(learned, elsewhere, {"tape": tape}, steps, own)
