"""Tasks of users whose examples are rows: an input each, and a label or numbers as the target."""

import math
from collections.abc import Hashable, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import one_hot

from metarun.after.load import Learned
from metarun.contracts import Predict, Request, Tree
from metarun.errors import UserError, require
from metarun.targets.classes import own_classes

Array = NDArray[Any]


def plain_list(y: Any) -> list[Any]:
    """Return an array, a tensor, a column of a table or a sequence as a list of Python's own values."""
    if isinstance(y, Tensor):
        return list(y.detach().cpu().tolist())
    return list(y.tolist() if hasattr(y, "tolist") else y)


def is_missing(value: Any) -> bool:
    """Whether a value is one that numpy or pandas has where nothing is known."""
    return type(value).__name__ in ("NAType", "NaTType") or (isinstance(value, float) and math.isnan(value))


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
    empty = next((number for number, label in enumerate(labels, 1) if is_missing(label)), None)
    require(
        empty is None, f"y must hold a label for each example, and example {empty} has none; add it, or leave it out"
    )
    return labels


def classes_of(labels: Sequence[Hashable]) -> list[Hashable]:
    """Return the different labels, sorted where they can be, else in the order in which they appear."""
    found = list(dict.fromkeys(labels))
    try:
        return sorted(found)  # type: ignore[type-var]
    except TypeError:
        return found


def as_given(name: str, labels: Sequence[Hashable]) -> Hashable:
    """Return the name of a class as a value of the kind of ``labels``, if these are numbers or truths and it is one."""
    kinds = {type(label) for label in labels}
    for kind, values in ((bool, {"0": False, "1": True}), (int, None), (float, None)):
        if kinds == {kind}:
            with suppress(ValueError):
                value = kind(name) if values is None else values.get(name, name)
                return value if float(value) == float(name) else name
    return name


def array_of(labels: Sequence[Hashable]) -> Array:
    """Return labels as an array, of objects unless they are all texts or all numbers."""
    for kinds in ((str,), (bool,), (int,), (int, float)):
        if all(type(label) in kinds for label in labels):
            return np.array(labels)
    found = np.empty(len(labels), dtype=object)
    found[:] = labels
    return found


def in_order_of(columns: Any, table: Any) -> Any:
    """Return a table with its columns in the order of ``columns``, if these are its columns; all else as it is."""
    given = getattr(table, "columns", None)
    if columns is None or given is None or len(columns) != len(given) or set(columns) != set(given):
        return table
    return table[list(columns)]


def inputs_of(learned: Learned, x: Any) -> Tensor:
    """Return a user's inputs as a tensor.

    Raises:
        ValueError: the inputs are not what the family takes.
        UserError: the family has no converter.
    """
    make = getattr(learned.converter, "inputs", None)
    if make is None:
        raise UserError(
            f"task={learned.names['task']} says nothing of how its inputs are made; give the family a converter "
            "(metarun.contracts.Converter), and train again."
        )
    found: Tensor = make(x)
    require(len(found) > 0, "x must hold at least one example")
    return found


def logits_of_own_classes(predict: Predict, data: Tree) -> Tensor:
    """Return outputs ``[examples, outputs]``, without chances for classes that the task lacks."""
    return own_classes(predict(data["x"]), data)


class Rows:
    """One task as an algorithm receives it, and outputs as the user wants them (`metarun.contracts.UserTask`)."""

    def __init__(self, learned: Learned, x: Any, y: Any, ways: int | None = None) -> None:
        """``ways`` is the number of columns that classes get, for tasks that are adapted to together."""
        spec, self.learned, self.classes, self.flat = learned.spec, learned, None, False
        require(y is not None, "y must hold a target for each example, and is None")
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
        self.x, self.columns_of_inputs = inputs_of(learned, x), getattr(x, "columns", None)
        require(
            len(self.x) == len(self.y), f"x has {len(self.x)} examples and y has {len(self.y)}; give one y for each"
        )

    def _classes(self, labels: Sequence[Hashable]) -> tuple[list[Hashable], list[int]]:
        """Return the classes by column, and each label's column; what means the same in every task has a fixed one."""
        names: tuple[str, ...] = getattr(self.learned.spec.target, "names", ())
        if not names:
            found = classes_of(labels)
            position = {label: column for column, label in enumerate(found)}
            return found, [position[label] for label in labels]
        own = getattr(self.learned.converter, "class_of", None)
        if own is not None:
            return [as_given(name, labels) for name in names], own(labels)
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

    def _own_columns(self, examples: int) -> dict[str, Tensor]:
        """Return the leaf that says which columns are classes of the task, unless all are."""
        return {} if self.ways is None else {"ways": self.ways.expand(examples, -1)}

    @cached_property
    def support(self) -> Tree:
        """The support set ``x``, ``y``, and where columns are no classes of the task, ``weight`` and ``ways``."""
        found = {"x": self.x, "y": self.y, **self._own_columns(len(self.x))}
        return found if self.ways is None else {**found, "weight": self.y.new_ones(len(self.x))}

    def ask(self, x: Any) -> Request:
        """Return the request for answers to further inputs."""
        given = inputs_of(self.learned, in_order_of(self.columns_of_inputs, x))
        return Request({"x": given, **self._own_columns(len(given))}, logits_of_own_classes, self.answers)

    def compared(self, answers: Array, y: Any) -> str:
        """Return the accuracy or the mean squared error of answers whose targets are known."""
        truth = plain_list(y)
        known = [i for i, true in enumerate(truth) if not is_missing(true)]
        some = (
            "" if len(known) == len(truth) else f" (of {len(known)} of {len(truth)} examples, as the others have none)"
        )
        if not known:
            return "no targets to compare with"
        answers, truth = answers[known], [truth[i] for i in known]
        if self.classes is None:
            return f"mean squared error on their own targets {np.square(answers - np.asarray(truth)).mean():.4g}{some}"
        if getattr(self.learned.spec.target, "names", ()):
            # A cell may hold a number where the class is called by its text, or by a range.
            truth = [self.classes[column] for column in self._classes(truth)[1]]
        # One file may hold numbers where another one holds the same as text.
        pairs = zip(answers.tolist(), truth, strict=True)
        right = np.mean([found == true or str(found) == str(true) for found, true in pairs])
        return f"accuracy on their own labels {100 * right:.2f} %{some}"

    def rows(self, answer: Any, truth: Any) -> list[dict[str, Any]]:
        """Return a prediction as columns of a table, several if it is several numbers."""
        numbers = np.ravel(answer)
        several = self.classes is None and len(numbers) > 1
        found = {f"prediction_{i + 1}": number for i, number in enumerate(numbers)} if several else {}
        found = found or {"prediction": numbers[0] if self.classes is None else answer}
        return [found if truth is None else {**found, "target": truth}]

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
