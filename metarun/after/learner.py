"""A learner to be used: a few examples of something new in, predictions out."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from metarun.after.load import Learned, learned, require_dtype
from metarun.after.rows import Array, Rows, array_of, labels_of
from metarun.contracts import Loss, Request, Spec, Task, Tree, UserTask
from metarun.engine.batch import adapted
from metarun.engine.process import rounding_of
from metarun.errors import UserError, require
from metarun.nn.padding import weighing
from metarun.nn.transforms import over_tasks
from metarun.random import drawing, fold
from metarun.targets.scoring import loss_of

if TYPE_CHECKING:
    from metarun.after.policy import AdaptedPolicy


ONE_AT_A_TIME = RLock()
"""Threads compute one after the other: while a model is called, it holds the weights of one task."""


@contextmanager
def as_in_run(learned: Learned) -> Iterator[None]:
    """Inside, tasks are computed as in a test of the run, and nothing is learned."""
    require_dtype(learned.theta)
    with ONE_AT_A_TIME, torch.no_grad(), rounding_of(learned.config):
        yield


@contextmanager
def as_in_test(learned: Learned, seed: Tensor, data: Tree) -> Iterator[None]:
    """Inside, one task is computed as in a test of the run; random numbers come from its seed."""
    with as_in_run(learned), drawing(seed, training=False), weighing(data.get("weight")):
        yield


def seed_of(seed: int, device: str) -> Tensor:
    """Return the seed of a task from a user's number."""
    return fold(torch.tensor(seed, device=device), 0) & (2**62 - 1)


def support_curve(learned: Learned, support: Tree, seed: Tensor, loss: Loss, steps: int) -> tuple[Any, list[Tensor]]:
    """Return the state of one task after adaptation, and its support loss before and after each step.

    The loss is NaN before adaptation where there is no prediction without a support set.
    """
    algorithm, theta, values = learned.algorithm, learned.theta, list[Tensor]()
    state, nothing = None, torch.tensor(math.nan, device=learned.device)
    with as_in_test(learned, seed, {}):
        for step, state in enumerate(islice(algorithm.adapt(theta, support, loss), max(steps, 1) + 1)):
            if state is None:
                values.append(nothing)
                continue
            # The curve must not change the random numbers that adaptation and prediction draw.
            with as_in_test(learned, seed, support):
                values.append(loss(partial(algorithm.predict, theta, state), support)[0])
            if step >= steps:
                break
    return state, values


def user_task(learned: Learned, x: Any, y: Any, ways: int | None = None) -> UserTask:
    """Return a user's examples of one task; ``ways`` is the number of columns of classes, None for that of ``y``.

    Raises:
        ValueError: the examples are not what the family takes.
        UserError: the family has no converter.
    """
    own: Callable[[Any, Any], UserTask] | None = getattr(learned.converter, "task", None)
    return Rows(learned, x, y, ways) if own is None else own(x, y)


def probabilities(learned: Learned, task: UserTask, output: Tensor) -> Array:
    """Return the probabilities of a task's classes ``[examples, classes]``.

    Raises:
        UserError: there are none.
    """
    own = getattr(task, "probabilities", None)
    if own is None:
        raise UserError(f"task={learned.names['task']} has no classes, so there are no probabilities.")
    return np.asarray(own(output))


def to_device(data: Tree, device: str) -> dict[str, Any]:
    """Return data on a device."""
    return {name: leaf.to(device) for name, leaf in data.items()}


class Adapted:
    """A learner that has adapted to the examples of one task.

    Attributes:
        task: the examples, and the way from what the learner says to answers.
        classes_: the labels ``[classes]``, in the order of the columns of ``predict_proba``; None where there are none.
        curve: the support loss before adaptation and after each step ``[steps + 1]``; NaN before adaptation where
            nothing can be predicted without examples.
    """

    def __init__(self, learned: Learned, task: UserTask, steps: int, seed: Tensor) -> None:
        self._learned, self.task, self._seed = learned, task, seed
        support = to_device(task.support, learned.device)
        self._state, values = support_curve(learned, support, seed, loss_of(learned.family), steps)
        self.curve: Array = torch.stack(values).cpu().numpy()
        classes = getattr(task, "classes", None)
        self.classes_: Array | None = None if classes is None else array_of(classes)

    def _made(self, request: Request, seed: Tensor) -> Tensor:
        learned, data = self._learned, to_device(request.data, self._learned.device)
        with as_in_test(learned, seed, {}):
            return request.make(partial(learned.algorithm.predict, learned.theta, self._state), data).cpu()

    def outputs(self, x: Any) -> Tensor:
        """Return what answers to inputs are made of: logits, or numbers ``[examples, outputs]``.

        For texts, spans and boxes it is what the task's ``Request.make`` finds.

        Raises:
            ValueError: the inputs are not what the family takes.
        """
        return self._made(self.task.ask(x), self._seed)

    def predict(self, x: Any) -> Any:
        """Return an answer for each input: a label, a number in the units and the shape of ``adapt``'s y, a text, ….

        Some methods look at all inputs of a call together (column ``transductive`` of ``result.csv``).

        Raises:
            ValueError: the inputs are not what the family takes.
            UserError: the learner answers nothing, but draws (see ``sample``).
        """
        request = self.task.ask(x)
        return request.answers(self._made(request, self._seed))

    def predict_proba(self, x: Any) -> Array:
        """Return the probability of each of ``classes_`` for each input ``[examples, classes]``.

        Raises:
            UserError: the targets are no classes.
        """
        return probabilities(self._learned, self.task, self.outputs(x))

    def sample(self, x: Any, seed: int = 0, **options: Any) -> Any:
        """Return answers that are drawn at random: pictures, or texts.

        Args:
            x: how many; or the inputs or the beginnings of texts, one answer for each.
            seed: of the random numbers.
            options: ``temperature`` for texts, ``steps`` for pictures.

        Raises:
            ValueError: ``x`` or an option is nothing that the family takes.
            UserError: the learner draws nothing, but answers (see ``predict``).
        """
        own = getattr(self.task, "draw", None)
        if own is None:
            raise UserError(f"task={self._learned.names['task']} has answers that are not drawn; call predict.")
        request: Request = own(x, **options)
        return request.answers(self._made(request, seed_of(seed, self._learned.device)))


def stacked(parts: Sequence[Tree]) -> dict[str, Tensor]:
    """Return data of several tasks together ``[tasks, examples, ...]``, with zeros and weights where sizes differ.

    A leaf that only some tasks have (``weight``, ``ways``) is 1 in the others.
    """
    sizes = [len(part["x"]) for part in parts]
    named = {name: part[name] for part in parts for name in part}
    if len(set(sizes)) > 1:
        named.setdefault("weight", torch.ones(1))
    together = {}
    for name, like in named.items():
        leaves = [
            part[name] if name in part else like.new_ones(size, *like.shape[1:])
            for part, size in zip(parts, sizes, strict=True)
        ]
        together[name] = torch.stack(
            [pad(leaf, (*[0, 0] * (leaf.ndim - 1), 0, max(sizes) - len(leaf))) for leaf in leaves]
        )
    return together


class AdaptedTasks:
    """A learner that adapts to many tasks at once.

    Each prediction adapts to all tasks again, in one batch together with its queries, and keeps nothing in between.

    Attributes:
        tasks: the examples of each task.
        classes_: the labels of each task, as in ``Adapted``; None where there are none.
    """

    def __init__(self, learned: Learned, xs: Sequence[Any], ys: Sequence[Any], steps: int, seeds: Tensor) -> None:
        require(len(xs) == len(ys) > 0, f"there must be as many x as y, at least one, not {len(xs)} and {len(ys)}")
        self._learned, self._steps, self._seeds = learned, steps, seeds
        ways = None
        if learned.spec.offers("labels"):
            ways = max(len(set(labels_of(y))) for y in ys)
        self.tasks = [user_task(learned, x, y, ways) for x, y in zip(xs, ys, strict=True)]
        self._support = to_device(stacked([task.support for task in self.tasks]), learned.device)
        found = [getattr(task, "classes", None) for task in self.tasks]
        self.classes_ = [array_of(classes) for classes in found if classes is not None] or None

    @cached_property
    def curve(self) -> Array:
        """The support loss of each task before adaptation and after each step ``[tasks, steps + 1]``."""
        learned, loss = self._learned, loss_of(self._learned.family)

        def of_task(task: Task) -> Tensor:
            assert task.seed is not None
            return torch.stack(support_curve(learned, task.support, task.seed, loss, self._steps)[1])

        with as_in_run(learned):
            found: Tensor = over_tasks(of_task, Task(self._support, self._support, self._seeds), training=False)
        return np.asarray(found.cpu().numpy())

    def _made(self, xs: Sequence[Any]) -> tuple[list[Request], list[Tensor]]:
        learned, loss = self._learned, loss_of(self._learned.family)
        require(len(xs) == len(self.tasks), f"there must be inputs for each of {len(self.tasks)} tasks")
        requests = [task.ask(x) for task, x in zip(self.tasks, xs, strict=True)]

        def of_task(task: Task) -> Tensor:
            state = adapted(learned.algorithm, learned.theta, task.support, loss, self._steps)
            with weighing(task.query.get("weight")):
                return requests[0].make(partial(learned.algorithm.predict, learned.theta, state), task.query)

        queries = to_device(stacked([request.data for request in requests]), learned.device)
        with as_in_run(learned):
            found = over_tasks(of_task, Task(self._support, queries, self._seeds), training=False).cpu()
        sizes = [len(request.data["x"]) for request in requests]
        return requests, [output[:size] for output, size in zip(found, sizes, strict=True)]

    def outputs(self, xs: Sequence[Any]) -> list[Tensor]:
        """Return, for each task, what ``Adapted.outputs`` returns.

        Raises:
            ValueError: the inputs are not what the family takes, or not as many as there are tasks.
        """
        return self._made(xs)[1]

    def predict(self, xs: Sequence[Any]) -> list[Any]:
        """Return, for each task, what ``Adapted.predict`` returns."""
        return [request.answers(found) for request, found in zip(*self._made(xs), strict=True)]

    def predict_proba(self, xs: Sequence[Any]) -> list[Array]:
        """Return, for each task, what ``Adapted.predict_proba`` returns.

        Raises:
            UserError: the targets are no classes.
        """
        return [probabilities(self._learned, task, one) for task, one in zip(self.tasks, self.outputs(xs), strict=True)]


@dataclass(frozen=True)
class Learner:
    """A trained learner, as ``metarun.load`` returns it."""

    learned: Learned
    """The parts that it consists of."""

    def __repr__(self) -> str:
        names = self.learned.names
        return f"<{names['algo']} trained on {self.learned.dataset}, step {self.learned.step}>"

    @property
    def spec(self) -> Spec:
        """What the learner knows of the tasks that it was trained on."""
        return self.learned.spec

    @property
    def steps(self) -> int:
        """The number of adaptation steps of the run's tests, which ``adapt`` takes too unless it is told otherwise."""
        return int(self.learned.config.eval.adapt_steps)

    def _steps(self, steps: int | None) -> int:
        algorithm, names = self.learned.algorithm, self.learned.names
        wanted = self.steps if steps is None else steps
        require(wanted >= 0, f"steps must be at least 0, not {wanted}")
        most = algorithm.max_steps
        require(
            most is None or wanted <= most,
            f"algo={names['algo']} has learned {most} steps of adaptation and cannot take {wanted}; give steps={most}, "
            "or train more with algo.inner_steps",
        )
        return wanted

    def adapt(self, x: Any, y: Any = None, steps: int | None = None, seed: int = 0) -> Adapted:
        """Adapt to the examples of one task.

        Args:
            x: inputs, as the family's converter takes them: arrays, tensors, tables or lists of numbers
                ``[examples, *shape]``; for sentences a list of texts, for pictures a list of paths; docs/learner.md
                has all kinds.
            y: a label of any hashable kind for each example, or numbers ``[examples]`` or ``[examples, outputs]``, or
                what docs/learner.md says of other kinds; None where examples have no target besides themselves.
            steps: number of adaptation steps; None: as in the run's tests.
            seed: for methods that draw random numbers while they adapt and predict.

        Raises:
            ValueError: the examples are not what the learner takes.
            UserError: the learner acts instead of predicting, or its inputs have no converter.
        """
        if self.spec.offers("policy"):
            raise UserError(f"algo={self.learned.names['algo']} acts; adapt it with adapt_to(environment).")
        task = user_task(self.learned, x, y)
        return Adapted(self.learned, task, self._steps(steps), seed_of(seed, self.learned.device))

    def adapt_tasks(
        self, xs: Sequence[Any], ys: Sequence[Any], steps: int | None = None, seed: int = 0
    ) -> AdaptedTasks:
        """Adapt to many tasks at once, which may differ in their numbers of examples and classes.

        Args:
            xs: the inputs of each task, as for ``adapt``.
            ys: the targets of each task.
            steps: number of adaptation steps; None: as in the run's tests.
            seed: for methods that draw random numbers; each task draws from another seed made of it.

        Raises:
            ValueError: the examples are not what the learner takes.
            UserError: the learner acts instead of predicting, or its inputs have no converter.
        """
        if self.spec.offers("policy"):
            raise UserError(f"algo={self.learned.names['algo']} acts; adapt it with adapt_to(environment).")
        seeds = fold(seed_of(seed, self.learned.device), torch.arange(len(xs), device=self.learned.device)) & (
            2**62 - 1
        )
        return AdaptedTasks(self.learned, xs, ys, self._steps(steps), seeds)

    def adapt_to(self, environment: Any, steps: int | None = None, seed: int = 0) -> "AdaptedPolicy":
        """Adapt a policy to an environment, by playing episodes in it.

        Args:
            environment: the parameters of a task of the learner's own family by name, such as
                ``{"goal": [0.3, -0.2]}``, whose episodes the family simulates; or a function without arguments that
                makes an environment with the methods ``reset(seed=...)`` and ``step(action)`` of gymnasium, of which
                as many are made as there are parallel episodes.
            steps: number of adaptation steps; None: as in the run's tests.
            seed: for actions, and for the environment.

        Raises:
            ValueError: the environment is not what the policy was trained for.
            UserError: the learner predicts instead of acting.
        """
        from metarun.after.policy import adapted_policy

        return adapted_policy(self.learned, environment, self._steps(steps), seed)

    def export(self, path: str | Path, shots: int | None = None, queries: int | None = None, **sizes: int) -> Path:
        """Write adaptation and prediction as a program that torch can load without metarun; see `metarun.after.export`.

        Args:
            path: a file, usually named ``*.pt2``.
            shots: number of support examples, per class for classes; None: as in the run's tests.
            queries: number of examples to be predicted together; None: as many as in the run's tests.
            sizes: ``ways`` and ``steps``, if they differ from those of the run's tests.

        Returns:
            The path.

        Raises:
            UserError: the method cannot be exported, or the exported program does not agree with the learner.
        """
        from metarun.after.export import export

        return export(self.learned, Path(path), shots=shots, queries=queries, **sizes)


def load(
    path: str | Path,
    device: str = "auto",
    trust: bool = False,
    config_dir: str | Path | None = None,
    replica: int = 0,
) -> Learner:
    """Return the learner of a finished run; none of its data is needed.

    Args:
        path: the directory of the run, or a copy of its ``checkpoints/best.pt``.
        device: auto (CUDA if there is a GPU), cpu, cuda or cuda:N.
        trust: whether the checkpoint may name code that your installation does not: say it for your own runs.
        config_dir: the directory of your own configuration, if the run was started with ``--config-dir``.
        replica: which of the runs that were trained together.

    Raises:
        UserError: the checkpoint is missing, damaged or not trusted, or does not fit what is installed.
    """
    return Learner(learned(Path(path), device, trust, config_dir, replica))
