"""A learner to be used: a few examples of something new in, predictions out."""

import math
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import one_hot, pad

from metarun.after.load import Learned, learned
from metarun.contracts import Loss, Spec, Task, Tree
from metarun.engine.batch import adapted
from metarun.errors import UserError, require
from metarun.nn.padding import weighing
from metarun.nn.transforms import over_tasks
from metarun.random import drawing, fold
from metarun.targets.classes import own_classes
from metarun.targets.scoring import loss_of

if TYPE_CHECKING:
    from metarun.after.policy import AdaptedPolicy

Array = NDArray[Any]


def plain_list(y: Any) -> list[Any]:
    """Return an array, a tensor, a column of a table or a sequence as a list of Python's own values."""
    if isinstance(y, Tensor):
        return list(y.detach().cpu().tolist())
    return list(y.tolist() if hasattr(y, "tolist") else y)


def labels_of(y: Any) -> list[Hashable]:
    """Return one label per example.

    Raises:
        ValueError: there is no list of labels.
    """
    labels = plain_list(y)
    if labels and all(isinstance(label, list) and len(label) == 1 for label in labels):
        labels = [label[0] for label in labels]
    require(len(labels) > 0, "y must hold a label for each example, and is empty")
    require(
        all(isinstance(label, Hashable) for label in labels),
        "y must hold one label per example, of any hashable kind; name or number the classes instead of giving rows",
    )
    return labels


def classes_of(labels: Sequence[Hashable]) -> list[Hashable]:
    """Return the different labels, sorted where they can be, else in the order in which they appear."""
    found = list(dict.fromkeys(labels))
    try:
        return sorted(found)  # type: ignore[type-var]
    except TypeError:
        return found


def array_of(labels: Sequence[Hashable]) -> Array:
    """Return labels as an array, of objects unless they are all texts or all numbers."""
    for kinds in ((str,), (bool,), (int,), (int, float)):
        if all(type(label) in kinds for label in labels):
            return np.array(labels)
    found = np.empty(len(labels), dtype=object)
    found[:] = labels
    return found


class Targets:
    """Targets of one task as an algorithm receives them, and outputs as the user wants them."""

    def __init__(self, learned: Learned, y: Any, ways: int | None = None) -> None:
        """``ways`` is the number of columns that classes get, for tasks that are adapted to together."""
        spec, self.learned, self.classes, self.flat = learned.spec, learned, None, False
        if spec.offers("labels"):
            labels = labels_of(y)
            self.classes, positions = self._classes(labels)
            self.columns = self._columns(ways)
            index = torch.tensor(positions)
            self.y = one_hot(index, self.columns).to(torch.get_default_dtype())
        else:
            require(
                spec.offers("numbers") or hasattr(learned.converter, "targets"),
                f"task={learned.names['task']} has targets that are neither numbers nor classes, and no converter of "
                "them; give the family a converter with targets and answers",
            )
            self.y = self._numbers(y)

    def _classes(self, labels: Sequence[Hashable]) -> tuple[list[Hashable], list[int]]:
        """Return the classes by column, and each label's column; what means the same in every task has a fixed one."""
        names: tuple[str, ...] = getattr(self.learned.spec.target, "names", ())
        if not names:
            found = classes_of(labels)
            position = {label: column for column, label in enumerate(found)}
            return found, [position[label] for label in labels]
        own = getattr(self.learned.converter, "class_of", None)
        if own is not None:
            return list(names), own(labels)
        unknown = sorted({str(label) for label in labels} - set(names))
        require(not unknown, f"the classes are {', '.join(names)}, and y has {', '.join(unknown)}")
        given = {str(label): label for label in labels}
        return [given.get(name, name) for name in names], [names.index(str(label)) for label in labels]

    def _columns(self, ways: int | None) -> int:
        spec, found = self.learned.spec, len(self.classes or ())
        require(found >= 2, f"y must hold at least two classes, and has {found}; give examples of another")
        if self.learned.algorithm.open_ways:
            return max(ways or 0, found)
        most = spec.target.outputs
        require(
            found <= most,
            f"algo={self.learned.names['algo']} has a head for {most} classes, the number that it was trained with, "
            f"and y has {found}; give at most {most}, train with task.ways={found}, or choose an algorithm that makes "
            "its head from the examples, such as protonet",
        )
        return most

    def _numbers(self, y: Any) -> Tensor:
        own = getattr(self.learned.converter, "targets", None)
        if own is not None:
            found: Tensor = own(y)
            return found
        try:
            found = torch.as_tensor(np.asarray(plain_list(y), dtype=np.float64)).to(torch.get_default_dtype())
        except (TypeError, ValueError) as error:
            raise ValueError(f"y must hold numbers ({error})") from None
        outputs = self.learned.spec.target.outputs
        self.flat = found.ndim == 1
        found = found[:, None] if found.ndim == 1 else found
        require(found.shape[1:] == (outputs,), f"y must have shape [examples, {outputs}], not {list(found.shape)}")
        require(bool(found.isfinite().all()), "y must hold finite numbers alone")
        return found

    @property
    def ways(self) -> Tensor | None:
        """1 for each column that is a class of the task ``[columns]``; None if all are.

        A class that means the same in every task belongs to all of them, whether it has examples or not, unless the
        head is made from the examples.
        """
        known = bool(getattr(self.learned.spec.target, "names", ())) and not self.learned.algorithm.open_ways
        present = self.y.sum(0) > 0
        return None if self.classes is None or known or bool(present.all()) else present.to(self.y.dtype)

    def probabilities(self, output: Tensor) -> Array:
        """Return probabilities ``[examples, classes]``."""
        if self.classes is None:
            raise UserError(f"task={self.learned.names['task']} has numbers as targets, so there are no probabilities.")
        return np.asarray(output[:, : len(self.classes)].softmax(-1).cpu().numpy())

    def answers(self, output: Tensor) -> Array:
        """Return predicted labels ``[examples]``, or numbers in the shape in which they were given."""
        if self.classes is not None:
            best = output[:, : len(self.classes)].argmax(-1).cpu().numpy()
            return np.asarray(array_of(self.classes)[best])
        own = getattr(self.learned.converter, "answers", None)
        if own is not None:
            return np.asarray(own(output.cpu()))
        return np.asarray((output[:, 0] if self.flat else output).cpu().numpy())


@contextmanager
def as_in_test(seed: Tensor, data: Tree) -> Iterator[None]:
    """Inside, one task is computed as in a test: nothing is learned, and random numbers come from its seed."""
    with torch.no_grad(), drawing(seed, training=False), weighing(data.get("weight")):
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
    with as_in_test(seed, {}):
        for step, state in enumerate(islice(algorithm.adapt(theta, support, loss), max(steps, 1) + 1)):
            if state is None:
                values.append(nothing)
                continue
            # The curve must not change the random numbers that adaptation and prediction draw.
            with as_in_test(seed, support):
                values.append(loss(partial(algorithm.predict, theta, state), support)[0])
            if step >= steps:
                break
    return state, values


class Adapted:
    """A learner that has adapted to the examples of one task.

    Attributes:
        classes_: the labels ``[classes]``, in the order of the columns of ``predict_proba``; None for numbers.
        curve: the support loss before adaptation and after each step ``[steps + 1]``; NaN before adaptation where
            nothing can be predicted without examples.
    """

    def __init__(self, learned: Learned, support: Tree, targets: Targets, steps: int, seed: Tensor) -> None:
        self._learned, self._targets, self._seed = learned, targets, seed
        self._state, values = support_curve(learned, support, seed, loss_of(learned.family), steps)
        self.curve: Array = torch.stack(values).cpu().numpy()
        self.classes_: Array | None = None if targets.classes is None else array_of(targets.classes)

    def outputs(self, x: Any) -> Tensor:
        """Return the model's outputs ``[examples, outputs]`` for inputs as ``adapt`` takes them: logits, or numbers.

        Raises:
            ValueError: the inputs are not what the family takes.
        """
        learned, given = self._learned, inputs_of(self._learned, x)
        with as_in_test(self._seed, {}):
            output = learned.algorithm.predict(learned.theta, self._state, given)
        return own_classes(output, {} if self._targets.ways is None else {"ways": self._targets.ways.to(output)})

    def predict(self, x: Any) -> Array:
        """Return a label for each input ``[examples]``, or a number in the units and the shape of ``adapt``'s y.

        Some methods look at all inputs of a call together (column ``transductive`` of ``result.csv``).
        """
        return self._targets.answers(self.outputs(x))

    def predict_proba(self, x: Any) -> Array:
        """Return the probability of each of ``classes_`` for each input ``[examples, classes]``.

        Raises:
            UserError: the targets are numbers.
        """
        return self._targets.probabilities(self.outputs(x))


def inputs_of(learned: Learned, x: Any) -> Tensor:
    """Return a user's inputs as a tensor on the learner's device.

    Raises:
        ValueError: the inputs are not what the family takes.
        UserError: the family has no converter.
    """
    if learned.converter is None:
        raise UserError(
            f"task={learned.names['task']} says nothing of how its inputs are made; give the family a converter "
            "(metarun.contracts.Converter), and train again."
        )
    found = learned.converter.inputs(x)
    require(len(found) > 0, "x must hold at least one example")
    return found.to(learned.device)


class AdaptedTasks:
    """A learner that adapts to many tasks at once.

    Each prediction adapts to all tasks again, in one batch together with its queries, and keeps nothing in between.

    Attributes:
        classes_: the labels of each task, as in ``Adapted``; None for numbers.
    """

    def __init__(self, learned: Learned, xs: Sequence[Any], ys: Sequence[Any], steps: int, seeds: Tensor) -> None:
        require(len(xs) == len(ys) > 0, f"there must be as many x as y, at least one, not {len(xs)} and {len(ys)}")
        self._learned, self._steps, self._seeds = learned, steps, seeds
        ways = None
        if learned.spec.offers("labels"):
            ways = max(len(set(labels_of(y))) for y in ys)
        self._targets = [Targets(learned, y, ways) for y in ys]
        support = [inputs_of(learned, x) for x in xs]
        for x, targets in zip(support, self._targets, strict=True):
            check_pairs(x, targets)
        self._support = self._padded(support, [targets.y for targets in self._targets])
        self.classes_ = None if ways is None else [array_of(one.classes or ()) for one in self._targets]

    def _padded(self, xs: Sequence[Tensor], ys: Sequence[Tensor] | None = None) -> dict[str, Tensor]:
        """Return examples of all tasks ``[tasks, examples, ...]``, with weights where their numbers differ."""
        longest = max(map(len, xs))
        together = {"x": self._stacked(xs, longest)}
        if ys is not None:
            together["y"] = self._stacked(ys, longest)
        masks = [targets.ways for targets in self._targets]
        if len({len(x) for x in xs}) > 1 or any(mask is not None for mask in masks):
            together["weight"] = self._stacked(
                [x.new_ones(len(x), dtype=torch.get_default_dtype()) for x in xs], longest
            )
        if any(mask is not None for mask in masks):
            columns = self._targets[0].columns
            rows = [torch.ones(columns) if mask is None else mask for mask in masks]
            together["ways"] = self._stacked([row.expand(longest, -1) for row in rows], longest)
        return together

    def _stacked(self, parts: Sequence[Tensor], longest: int) -> Tensor:
        filled = [pad(part, (*[0, 0] * (part.ndim - 1), 0, longest - len(part))) for part in parts]
        together = torch.stack(filled).to(self._learned.device)
        return together.to(torch.get_default_dtype()) if together.is_floating_point() else together

    @cached_property
    def curve(self) -> Array:
        """The support loss of each task before adaptation and after each step ``[tasks, steps + 1]``."""
        learned, loss = self._learned, loss_of(self._learned.family)

        def of_task(task: Task) -> Tensor:
            assert task.seed is not None
            return torch.stack(support_curve(learned, task.support, task.seed, loss, self._steps)[1])

        with torch.no_grad():
            found: Tensor = over_tasks(of_task, Task(self._support, self._support, self._seeds), training=False)
        return np.asarray(found.cpu().numpy())

    def outputs(self, xs: Sequence[Any]) -> list[Tensor]:
        """Return the model's outputs ``[examples, outputs]`` for each task's inputs.

        Raises:
            ValueError: the inputs are not what the family takes, or not as many as there are tasks.
        """
        learned, loss = self._learned, loss_of(self._learned.family)
        require(len(xs) == len(self._targets), f"there must be inputs for each of {len(self._targets)} tasks")
        queries = [inputs_of(learned, x) for x in xs]

        def of_task(task: Task) -> Tensor:
            state = adapted(learned.algorithm, learned.theta, task.support, loss, self._steps)
            with weighing(task.query.get("weight")):
                output = learned.algorithm.predict(learned.theta, state, task.query["x"])
            return own_classes(output, task.query)

        with torch.no_grad():
            found = over_tasks(of_task, Task(self._support, self._padded(queries), self._seeds), training=False)
        return [output[: len(x)] for output, x in zip(found, queries, strict=True)]

    def predict(self, xs: Sequence[Any]) -> list[Array]:
        """Return, for each task, what ``Adapted.predict`` returns."""
        return [targets.answers(one) for targets, one in zip(self._targets, self.outputs(xs), strict=True)]

    def predict_proba(self, xs: Sequence[Any]) -> list[Array]:
        """Return, for each task, what ``Adapted.predict_proba`` returns."""
        return [targets.probabilities(one) for targets, one in zip(self._targets, self.outputs(xs), strict=True)]


def check_pairs(x: Tensor, targets: Targets) -> None:
    """Raise an error unless there is a target for each input."""
    require(len(x) == len(targets.y), f"x has {len(x)} examples and y has {len(targets.y)}; give one y for each")


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

    def adapt(self, x: Any, y: Any, steps: int | None = None, seed: int = 0) -> Adapted:
        """Adapt to the examples of one task.

        Args:
            x: inputs, as the family's converter takes them: arrays, tensors, tables or lists of numbers
                ``[examples, *shape]``; for sentences a list of texts, for pictures a list of paths.
            y: a label of any hashable kind for each example, or numbers ``[examples]`` or ``[examples, outputs]``.
            steps: number of adaptation steps; None: as in the run's tests.
            seed: for methods that draw random numbers while they adapt and predict.

        Raises:
            ValueError: the examples are not what the learner takes.
            UserError: the learner acts instead of predicting, or its inputs have no converter.
        """
        if self.spec.offers("policy"):
            raise UserError(f"algo={self.learned.names['algo']} acts; adapt it with adapt_to(environment).")
        targets, given = Targets(self.learned, y), inputs_of(self.learned, x)
        check_pairs(given, targets)
        support = {"x": given, "y": targets.y.to(given.device)}
        if (ways := targets.ways) is not None:
            support |= {
                "weight": support["y"].new_ones(len(given)),
                "ways": ways.to(given.device).expand(len(given), -1),
            }
        return Adapted(self.learned, support, targets, self._steps(steps), seed_of(seed, self.learned.device))

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
