"""Gymnasium's environments (https://gymnasium.farama.org) as task families: a task is a setting of parameters.

A parameter is an attribute of the environment (the ``g`` of Pendulum-v1, the ``length`` of CartPole-v1). For walking
bodies it may also be a ``direction`` (±1) or a target ``velocity``, as in the half-cheetah tasks of Finn, Abbeel,
Levine 2017 (https://arxiv.org/abs/1703.03400, §5.3):

    direction    reward = direction · speed − cost of control
    velocity     reward = −|speed − velocity| − cost of control

The environments live outside torch, one for each episode of each task of a batch. A rollout calls them through
``torch.autograd.Function``, whose vmap rule passes all tasks at once, so every algorithm works here unchanged. The
environments are stepped in a Python loop.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metarun.contracts import Moments, Sizes, Spec, Split, Task, Tree
from metarun.errors import UserError, require
from metarun.random import fold, normal
from metarun.targets.actions import RETURN, Actions
from metarun.tasks import control

GOALS = ("direction", "velocity")


def goal_reward(parameters: Mapping[str, float], info: Mapping[str, Any], reward: float) -> float:
    """Return the reward of a step under a task's goal, or the environment's own where there is no goal."""
    if "direction" in parameters:
        return float(parameters["direction"] * info["x_velocity"] + info["reward_ctrl"])
    if "velocity" in parameters:
        return float(-abs(info["x_velocity"] - parameters["velocity"]) + info["reward_ctrl"])
    return reward


class Host:
    """As many copies of an environment as there are parallel episodes.

    Args:
        name: the environment's name in gymnasium's registry.
        horizon: number of steps after which an episode ends.
        options: arguments of the environment's constructor.
        parameters: names of the tasks' parameters.

    Raises:
        UserError: gymnasium is not installed, or has no such environment, or the environment lacks a parameter.
    """

    def __init__(self, name: str, horizon: int, options: Mapping[str, Any], parameters: Sequence[str]) -> None:
        try:
            self.gymnasium = import_module("gymnasium")
        except ImportError:
            raise UserError(
                "task=gymnasium needs gymnasium; install it with: pip install 'metarun[gymnasium]'"
            ) from None
        self.name, self.horizon, self.options, self.parameters = name, horizon, dict(options), tuple(parameters)
        self.copies: list[Any] = []
        self.running: list[bool] = []
        self.tasks: list[dict[str, float]] = []
        self.seen = np.empty(0)
        first = self._copy(0)
        for parameter in self.parameters:
            goal = parameter in GOALS and self._reports_speed(first)
            require(
                goal or hasattr(first.unwrapped, parameter),
                f"{name} has no attribute {parameter!r} to make tasks from"
                + (" and does not report a speed" if parameter in GOALS else ""),
            )
        flatten = import_module("gymnasium.spaces.utils")
        self.flatten = flatten.flatten
        self.inputs = int(flatten.flatdim(first.observation_space))
        space = first.action_space
        self.continuous = isinstance(space, self.gymnasium.spaces.Box)
        require(
            isinstance(space, self.gymnasium.spaces.Box | self.gymnasium.spaces.Discrete),
            f"the actions of {name} are neither numbers nor a choice ({space})",
        )
        self.actions = math.prod(space.shape) if self.continuous else int(space.n)

    def _copy(self, index: int) -> Any:
        while len(self.copies) <= index:
            try:
                made = self.gymnasium.make(self.name, max_episode_steps=self.horizon, **self.options)
            except (self.gymnasium.error.Error, ImportError, TypeError) as error:
                raise UserError(f"gymnasium cannot make {self.name}: {error}") from error
            self.copies.append(made)
        return self.copies[index]

    def _reports_speed(self, copy: Any) -> bool:
        copy.reset(seed=0)
        info = copy.step(copy.action_space.sample())[-1]
        return "x_velocity" in info and "reward_ctrl" in info

    def reset(self, seeds: np.ndarray, parameters: np.ndarray) -> tuple[np.ndarray]:
        """Begin ``len(seeds)`` episodes with ``parameters [episodes, names]``; return only observations."""
        self.tasks = [dict(zip(self.parameters, row, strict=True)) for row in parameters.tolist()]
        self.running = [True] * len(seeds)
        self.seen = np.empty((len(seeds), self.inputs))
        for i, (seed, task) in enumerate(zip(seeds.tolist(), self.tasks, strict=True)):
            copy = self._copy(i)
            for name, value in task.items():
                if hasattr(copy.unwrapped, name):
                    setattr(copy.unwrapped, name, value)
            self.seen[i] = self.flatten(copy.observation_space, copy.reset(seed=seed)[0])
        return (self.seen.copy(),)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Take a step in each episode that is not over: return observations, rewards, and whether it is over now."""
        rewards = np.zeros(len(actions))
        for i, action in enumerate(actions):
            if not self.running[i]:
                continue
            copy = self.copies[i]
            seen, reward, ended, cut, info = copy.step(self.native(copy.action_space, action))
            self.seen[i] = self.flatten(copy.observation_space, seen)
            rewards[i] = goal_reward(self.tasks[i], info, float(reward))
            self.running[i] = not (ended or cut)
        return self.seen.copy(), rewards, ~np.array(self.running)

    def native(self, space: Any, action: np.ndarray) -> Any:
        """Return a policy's action as the environment expects it; numbers from −1 to 1 span its bounds."""
        if not self.continuous:
            return space.start + int(action.argmax())
        if not np.isfinite([space.low, space.high]).all():
            return action.reshape(space.shape).astype(space.dtype)
        share = (action.clip(-1, 1).reshape(space.shape) + 1) / 2
        return (space.low + share * (space.high - space.low)).astype(space.dtype)


class Outside(torch.autograd.Function):
    """A function of arrays, called with tensors; under vmap it is called once, with the episodes of all tasks.

    Its results have the dtype of the last tensor, or are booleans; no gradient flows through it.
    """

    @staticmethod
    def forward(function: Callable[..., tuple[np.ndarray, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
        """Apply ``function`` to the tensors ``[episodes, ...]``."""
        like = tensors[-1]
        results = function(*(x.cpu().numpy() for x in tensors))
        return tuple(torch.as_tensor(y, dtype=None if y.dtype == bool else like.dtype).to(like.device) for y in results)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
        """No result has a gradient."""
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], function: Any, *tensors: Tensor) -> tuple[tuple[Tensor, ...], Any]:
        """Apply ``function`` to tensors ``[tasks · episodes, ...]``."""
        tasks = [
            x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            for x, dim in zip(tensors, in_dims[1:], strict=True)
        ]
        results = Outside.apply(function, *(x.flatten(0, 1) for x in tasks))  # type: ignore[no-untyped-call]
        return tuple(y.unflatten(0, (info.batch_size, -1)) for y in results), (0,) * len(results)


class Hosted:
    """The environment as `metarun.tasks.control` sees it; a state is an observation ``[episodes, numbers]``.

    The true state lives in the host, so rollouts run one after the other.
    """

    def __init__(self, host: Host) -> None:
        self.host, self.continuous = host, host.continuous

    def initial(self, data: Tree) -> Tensor:
        """Begin all episodes."""
        seen: Tensor
        (seen,) = Outside.apply(self.host.reset, data["start"], data["parameters"])  # type: ignore[no-untyped-call]
        return seen

    def observe(self, state: Tensor) -> Tensor:
        """Return the observation."""
        return state

    def step(self, data: Tree, time: int, state: Tensor, action: Tensor) -> control.Outcome:
        """Take one step in every episode."""
        seen, reward, over = Outside.apply(self.host.step, action)  # type: ignore[no-untyped-call]
        return control.Outcome(seen, reward, reward, torch.zeros_like(reward), over)


def named(parameters: Sequence[Sequence[str | float]], key: str) -> dict[str, tuple[float, ...]]:
    """Return lists of a name and numbers as a mapping from name to numbers."""
    found = {}
    for parameter in parameters:
        name, values = parameter[:1], parameter[1:]
        fits = bool(values) and isinstance(name[0], str) and all(isinstance(value, int | float) for value in values)
        require(fits, f"{key} must be lists of a name and numbers, not {list(parameter)}")
        found[str(name[0])] = tuple(map(float, values))
    return found


class Gymnasium(control.ControlFamily):
    """Tasks that differ in parameters of one environment, scored by the return of an episode.

    Args:
        environment: the environment's name in gymnasium's registry.
        ranges: parameters drawn uniformly, each as its name, lowest and highest value.
        choices: parameters drawn from a list, each as its name and the values.
        options: arguments of the environment's constructor.
        horizon: largest number of steps of an episode, at least 1.
        shots: number of episodes per adaptation step, at least 2.
        queries: number of episodes that score a task, at least 2.
        train_queries: number of query episodes of a training task; null: ``queries``.
        discount: discount factor of rewards, above 0 and at most 1; for advantages, never for scores.
        trace: λ of generalised advantage estimation, from 0 to 1.
        fresh_tapes: whether every adaptation step collects new episodes; otherwise all steps share the first tape.
        device: where policies run; environments run on the CPU.
        data_dir: not used; every family receives it.

    Raises:
        UserError: gymnasium or the environment is missing.
    """

    def __init__(
        self,
        environment: str = "Pendulum-v1",
        ranges: Sequence[Sequence[str | float]] = (("g", 5, 15),),
        choices: Sequence[Sequence[str | float]] = (),
        options: Mapping[str, Any] | None = None,
        horizon: int = 100,
        shots: int = 10,
        queries: int = 5,
        train_queries: int | None = None,
        discount: float = 0.99,
        trace: float = 0.97,
        fresh_tapes: bool = True,
        device: str = "cpu",
        data_dir: str = "data",
    ) -> None:
        learning = control.Learning(discount, trace)
        control.check(shots, queries, train_queries, learning, horizon=(horizon, 1))
        # A simulator does not know its expected reward, so there is no hindsight.
        super().__init__(learning, queries, train_queries, fresh_tapes, False, device)
        self.ranges, self.choices = named(ranges, "ranges"), named(choices, "choices")
        require(len(self.ranges) + len(self.choices) > 0, "ranges or choices must name what tasks differ in")
        require(not self.ranges.keys() & self.choices.keys(), "ranges and choices must not name the same parameter")
        for name, values in self.ranges.items():
            rising = len(values) == 2 and values[0] <= values[1]
            require(rising, f"ranges must give the lowest and the highest value of {name}, not {list(values)}")
        parameters = [*self.ranges, *self.choices]
        require(not set(GOALS) <= set(parameters), "a task has either a direction or a velocity, not both")
        host = Host(environment, horizon, options or {}, parameters)
        self.environment = Hosted(host)
        self.horizon, self.actions = horizon, host.actions
        settings = [f"{name}={list(values)}" for name, values in sorted({**self.ranges, **self.choices}.items())]
        settings += [f"{name}={value}" for name, value in sorted((options or {}).items())]
        self.dataset = self.named(":".join([environment, *settings, f"horizon={horizon}"]))
        self.spec = Spec(
            Moments(host.inputs, environment, horizon),
            Actions(host.actions, host.continuous),
            Sizes(shots, queries),
            metrics=(RETURN,),
        )

    def sample(self, split: Split, count: int, generator: torch.Generator) -> Task:
        """Draw ``count`` settings of the parameters with episodes; leaves ``[count, episodes, ...]``."""
        columns = [low + (high - low) * torch.rand(count, generator=generator) for low, high in self.ranges.values()]
        for values in self.choices.values():
            columns.append(torch.tensor(values)[torch.randint(len(values), (count,), generator=generator)])
        parameters = torch.stack(columns, -1)[:, None].to(torch.get_default_dtype())

        return self.tasks(split, {"parameters": parameters}, generator)

    def tape(self, seed: Tensor) -> Tree:
        """Draw ``noise [..., horizon, actions]`` for actions, and the seed ``start`` of each environment."""
        draw = normal if self.environment.continuous else control.gumbel
        return {
            "noise": draw(fold(seed, 0), (self.horizon, self.actions)),
            "start": fold(seed, 1) & (2**31 - 1),
        }
