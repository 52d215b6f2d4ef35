"""The contracts between task families, targets, models, algorithms and the engine."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from metarun.data.portable import portable
from metarun.targets.metric import Metric

portable(Metric)

Tree: TypeAlias = Mapping[str, Any]
"""Nested mappings with tensors as leaves."""

Weights: TypeAlias = dict[str, Tensor]
"""A module's parameters by name."""

Scores: TypeAlias = dict[str, Tensor]
"""Scalars by the names of the metrics, in their order; the first metric is used for selection."""

Need = Literal["slope", "loss", "examples", "rows", "numbers", "classes", "targets", "labels", "policy"]
"""What an algorithm needs of a target, and what a target offers:

- ``slope``: a gradient to follow in first order, which need not be that of one loss, such as the steps of two players;
  every ``loss`` has it;
- ``loss``: any differentiable loss;
- ``examples``: a loss over examples, which stays the same from one adaptation step to the next;
- ``rows``: inputs whose targets are known, row by row; ``numbers`` if these are numbers, ``classes`` if they are
  one-hot classes;
- ``targets``: rows that are the examples themselves, each with a single target; ``labels`` if that is a class;
- ``policy``: an environment to act in.
"""

Split = Literal["train", "val", "test"]

Predict: TypeAlias = Callable[[Any], Any]
"""Input → output, for the data of one task: a tensor, or a pair for a policy with a memory (see ``Seen``)."""

Loss: TypeAlias = Callable[[Predict, Tree], tuple[Tensor, Scores]]
"""(predict, data of one task) → (loss to minimise, scores), all scalars."""


class Task(NamedTuple):
    """One task, or a batch of tasks: leaves ``[tasks, ...]`` as sampled, ``[...]`` inside an algorithm.

    Supervised families hold ``x [examples, *input]`` and ``y``: targets ``[examples, outputs]``, or one-hot classes
    ``[examples, ways]``, so that the number of ways can be read off the shape. Where tasks differ in size, both parts
    also carry ``weight [examples]``: 1 for an example, 0 for padding, which may stand anywhere and whose target is
    zero. Where they differ in their number of classes, both parts also carry ``ways [examples, ways]``: 1 for each
    class that the task has, the same for all of its examples. Training tasks may carry ``class``, the identity
    ``[examples]`` of each example's class among all training classes.
    Control families hold what an environment is made of, ``[episodes, ...]`` each; and of their randomness a seed for
    each support episode, from which every step of adaptation draws, or the random numbers of a query episode.
    """

    support: Tree
    """The support set: what adaptation may see."""
    query: Tree
    """The query set: what the adapted learner is scored on."""
    seed: Tensor | None = None
    """One integer per task, attached by the loop; all other randomness of adapting and scoring comes from it."""


class Rows(NamedTuple):
    """Examples as a learner that conditions on them sees them."""

    z: Tensor
    """Features ``[rows, d]``."""
    y: Tensor
    """Targets ``[rows, outputs]``; zero where the weight is zero."""
    weight: Tensor | None
    """``[rows]``: 1, or 0 for padding; None where there is no padding."""


class Target(Protocol):
    """What a model has to predict: the width of an output, and how outputs are scored (see `metarun.targets`).

    A target whose model is given something other than a tensor ``[examples, ...]`` has ``nothing``, which maps that to
    an output of zeros, and ``task_loss``, a ``Loss`` in place of one on ``predict(data["x"])``.
    """

    @property
    def outputs(self) -> int:
        """The width of a model's output."""

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics that ``scores`` returns."""

    @property
    def offers(self) -> tuple[Need, ...]:
        """What the target has for algorithms."""


class RowTarget(Target, Protocol):
    """A target with a loss and scores of a model's output.

    A target may have outputs that do not follow from the rows of a support set, since they mean the same in every task:
    ``shared`` is their number. They are the last ones, the targets of rows lack them, and a model's trunk gives them
    after its features. ``corrected(shared, of_support, support)`` returns them after a comparison of those of the
    support set with its targets.
    """

    def loss(self, output: Tensor, data: Tree) -> Tensor:
        """Return the mean loss of the output for the data of one task."""

    def scores(self, output: Tensor, data: Tree) -> Scores:
        """Return every metric of the output, averaged over the data of one task."""

    def rows(self, z: Tensor, data: Tree) -> Rows:
        """Return the data as rows, given the features ``z`` of their inputs."""


@portable
@dataclass(frozen=True)
class Numbers:
    """Inputs that are arrays of numbers."""

    shape: tuple[int, ...]
    """Shape of one input."""


@portable
@dataclass(frozen=True)
class Tokens:
    """Inputs that are rows of token ids, where 0 is padding."""

    columns: int
    """Number of ids of one input."""
    ids: int
    """Number of ids."""
    first_bucket: int
    """The first id of a bucket of character n-grams; smaller ids are words."""
    word_columns: int
    """Number of the first columns, which hold words in their order; the others hold n-grams."""
    weights: Tensor = field(compare=False, repr=False)
    """How informative each id is by itself ``[ids]``: its inverse class frequency among the training classes."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return (self.columns,)


@portable
@dataclass(frozen=True)
class Joined:
    """Inputs that are questions joined with passages, as rows of positions with numbers (`metarun.data.passages`)."""

    question: int
    """Number of the first positions, which hold the words of the question."""
    passage: int
    """Number of the other positions, which hold the words of the passage."""
    numbers: int
    """Number of numbers of a position."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return (self.question + self.passage, self.numbers)


@portable
@dataclass(frozen=True)
class Sequences:
    """Inputs that are rows of token ids: a prompt, padded with 0, and a text whose next tokens are predicted."""

    prompt: int
    """Number of columns of the prompt; 0 where there is none."""
    text: int
    """Number of columns of the text, which begins with a token that marks its start."""
    ids: int
    """Number of ids."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return (self.prompt + self.text,)


@portable
@dataclass(frozen=True)
class Words:
    """Inputs that are sentences of words, each word a row of ids of what it looks like, where 0 is padding."""

    words: int
    """Number of words of the longest sentence."""
    columns: int
    """Number of ids of a word; the first one is that of the word itself."""
    ids: int
    """Number of ids."""
    vector: int = 0
    """Number of numbers that follow the ids of a word, such as those of a frozen model; if there are any, all are
    floating-point numbers, and zero in padding."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return (self.words, self.columns + self.vector)


class Seen(NamedTuple):
    """The input of a policy: ``steps`` successive moments of ``episodes`` parallel episodes.

    A policy returns its outputs ``[steps, episodes, outputs]``. If it has a memory, it returns a pair of its outputs
    and the carry with which it continues after the last step.
    """

    observation: Tensor
    """``[steps, episodes, observation]``."""
    action: Tensor
    """The previous action ``[steps, episodes, actions]``, one-hot where actions are discrete; 0 at the start."""
    reward: Tensor
    """The previous reward ``[steps, episodes, 1]``; 0 at the start."""
    done: Tensor
    """1 where the observation begins a new episode of the same trial ``[steps, episodes, 1]``."""
    seed: Tensor
    """A random integer of 62 bits for policies that draw more than their action ``[steps, episodes]``."""
    carry: Any = None
    """The carry that the policy returned with its last outputs; None at the start of a trial."""


@portable
@dataclass(frozen=True)
class Moments:
    """Inputs that a policy receives from an environment, as ``Seen``."""

    observation: int
    """Number of components of an observation."""
    environment: str
    horizon: int
    """Number of steps of an episode."""
    episodes: int = 1
    """Number of episodes of a trial, through which a policy keeps its memory."""
    optimal: Callable[[Tree], Callable[[Seen], Any]] | None = field(default=None, compare=False, repr=False)
    """(data of one task) → the policy that knows the task, where that policy is cheap to find."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one observation."""
        return (self.observation,)


@portable
@dataclass(frozen=True)
class Sizes:
    """Sizes of tasks; those of validation and test tasks unless stated otherwise."""

    shots: int
    """Number of support examples per class for classification, per task otherwise; episodes or trials for control.

    The largest number where tasks differ in size.
    """
    queries: int
    """The same for query examples."""
    ways: int | None = None
    train_ways: int | None = None
    training_classes: int | None = None
    """Number of classes that the training tasks draw from, where tasks share classes."""


@portable
def flat(x: Tensor) -> Tensor:
    """Flatten inputs ``[examples, *input]`` to ``[examples, numbers]``."""
    return x.flatten(1)


@portable
@dataclass(frozen=True)
class Facts:
    """What a family knows of its tasks, only for baselines and reports."""

    features: Callable[[Tensor], Tensor] = flat
    """Inputs as vectors whose distances mean something without any learning: ``[examples, numbers]``."""
    truth: Callable[[Tensor], Tensor] | None = None
    """Features in which every task's target is linear: ``[examples, numbers]``."""
    groups: tuple[str, ...] | None = None
    """Names of the kinds of task in the family, if there are several; the data carry ``group [examples]``."""
    references: Mapping[str, Callable[[Tree, Any], Tensor]] = field(default_factory=dict)
    """What can be answered without a learner, by name: (support set of one task, x) → output."""


@portable
@dataclass(frozen=True)
class Spec:
    """What an algorithm and a model may know of a task family."""

    inputs: Numbers | Tokens | Joined | Sequences | Words | Moments
    target: Target
    sizes: Sizes
    metrics: tuple[Metric, ...]
    """Metrics of the scores; the first one is used for selection."""
    facts: Facts = field(default=Facts(), compare=False, repr=False)

    @property
    def row_outputs(self) -> int:
        """The number of outputs that follow from the rows of a support set: all but the ``shared`` of `RowTarget`."""
        return self.target.outputs - int(getattr(self.target, "shared", 0))

    def offers(self, need: Need) -> bool:
        """Whether the target has what an algorithm needs."""
        return need in self.target.offers or (need == "slope" and "loss" in self.target.offers)


class Examples(NamedTuple):
    """Examples as their owner has them, read from a file or a folder."""

    x: Any
    """What ``Converter.inputs`` takes, one item per example."""
    y: Sequence[Any] | None
    """The label or the number of each example; None where there are none."""
    names: Sequence[str]
    """What each example is called in a table of predictions: a file's name, or the number of a row."""


class Request(NamedTuple):
    """What a user asks an adapted learner."""

    data: Tree
    """Leaves ``[examples, ...]`` on the CPU, ``x`` among them. Where tasks that are asked together differ in their
    numbers of examples, zeros follow the fewer ones, with ``weight`` 0."""
    make: Callable[[Predict, Tree], Tensor]
    """(predict, data) → what is found of each example ``[examples, ...]``; it works under `torch.func.vmap`, and is the
    same for all tasks that are asked together."""
    answers: Callable[[Tensor], Any]
    """What is found, on the CPU → one answer per example, as the user wants it."""


class UserTask(Protocol):
    """The examples of one task that a user shows a learner, and the way from what it says to answers.

    It may also have ``draw(count_or_beginnings, **options) -> Request`` for answers that are drawn with random numbers
    (`metarun.random`); ``rows(answer, truth) -> list[dict]``, what a table of predictions has of an answer in one or
    several rows by column, where a value may be a picture of Pillow, and the truth is None if it is not known; and
    ``compared(answers, y) -> str``, in words how well answers agree with the true ones.
    """

    @property
    def support(self) -> Tree:
        """The support set, leaves ``[examples, ...]`` on the CPU, as the family samples it."""

    def ask(self, x: Any) -> Request:
        """Return the request for answers to further inputs.

        Raises:
            ValueError: ``x`` is nothing that the family can read; the sentence says what it takes.
        """


class Reader(Protocol):
    """What a converter has in any case: it reads files."""

    def read(self, path: Path) -> Examples:
        """Read a file or a folder.

        Raises:
            ValueError: there is nothing that the family can read; the sentence says what it takes.
        """


class Converter(Reader, Protocol):
    """Turns what a user has into inputs of a family's models; the family holds it as ``converter``.

    A converter is a frozen dataclass marked with `metarun.data.portable.portable`: its fields are plain values and
    tensors (sizes, means, a vocabulary), so that a checkpoint holds it and a learner needs no training data. What it
    was fitted to is the training data alone. Where the targets of a family are not in the user's units, it also has
    ``targets(y) -> Tensor [examples, outputs]`` and its inverse ``answers(output) -> Any``; and where classes mean the
    same in every task, it may have ``class_of(labels) -> list[int]``, the column of each of the user's labels.
    """

    def inputs(self, x: Any) -> Tensor:
        """Return inputs ``[examples, *spec.inputs.shape]``, made as those that the family samples.

        Raises:
            ValueError: ``x`` is nothing that the family can read; the sentence says what it takes.
        """


class TaskConverter(Reader, Protocol):
    """A ``Converter`` of a family whose inputs, targets and answers depend on each other, such as texts or boxes."""

    def task(self, x: Any, y: Any) -> UserTask:
        """Return a user's task.

        Args:
            x: the examples' inputs.
            y: their targets; None where the examples have none besides themselves.

        Raises:
            ValueError: they are nothing that the family can read; the sentence says what it takes.
        """


class Report(NamedTuple):
    """Something shown about test tasks besides scores; a run writes it to ``NAME.csv`` and ``NAME.png``."""

    name: str
    axes: dict[str, tuple[str, ...]]
    """The names along each axis of the measured array, which has one or two axes."""
    value: Metric
    """What a measured number means."""
    measure: Callable[..., Tensor]
    """The function that measures the numbers of one task, shaped as ``axes``; NaN where there is nothing to measure.

    An algorithm's takes (theta, task, loss, adaptation steps), and a family's takes (predict, task), where ``predict``
    is the adapted learner."""
    matrix: bool = False
    """Whether the numbers of two axes are counts, which are summed over tasks and shown as a matrix."""


class Pooled(NamedTuple):
    """Metrics of all test tasks together, which are no means over tasks: the F1 of all entities, a corpus's BLEU."""

    metrics: tuple[Metric, ...]
    counts: Callable[[Predict, Task], Tensor]
    """(predict of the adapted learner, task) → what the metrics are computed from, of the same shape for every task."""
    scores: Callable[[Tensor], dict[str, float]]
    """(counts ``[tasks, ...]`` on the CPU) → every metric; the tasks are test tasks, or a resampling of them."""


class Samples(NamedTuple):
    """What a learner makes of a few test tasks, for a reader to look at: generated text, found boxes, pictures."""

    make: Callable[[Predict, Task], Tree]
    """(predict, task) → tensors."""
    show: Callable[[Mapping[str, Tree], Task], Any]
    """(``before`` and ``after`` adaptation → tensors ``[tasks, ...]``, tasks), all on the CPU → Markdown text, or a
    Matplotlib figure. ``before`` is absent for a learner that has no state without a support set."""


class Family(Protocol):
    """A task family: samples tasks, and scores predictions.

    A family may also have ``converter``, a ``Converter`` or ``TaskConverter`` of what users have; if that is fitted
    to training data, the family takes an argument ``converter``, for one that another run has fitted. It may have
    ``units``, which maps each split to the names of what tests hold out, such as classes, together with their source;
    ``different_tests``, the number of test tasks there are, where episodes are other examples of the same few, of
    which their queries then say ``unit [examples]`` (`metarun.tasks.units`);
    ``loss``, a ``Loss`` that replaces its target's loss on ``predict(data["x"])``; ``scores``, which maps (predict,
    data of one task) to those of ``spec.metrics`` that only tests need; ``pooled``, which is ``Pooled``;
    ``report``, a ``Report``; ``class_names``, the names of test classes, of which queries then say ``identity
    [examples]``, so that a run writes which classes are taken for which; ``samples``, which is ``Samples``;
    ``control``, a ``Metric``: the first metric on the queries of test tasks after adapting to ``query["control"]``,
    the support set of another task; and ``paths``, which maps (predict, data of one task) to the ``path`` of a
    policy in the plane ``[episodes, steps, 2]``, NaN where an episode is over, and its ``goal [2]``.
    """

    spec: Spec
    dataset: str
    """Where the examples come from, and every choice that makes scores incomparable."""

    def sample(self, split: Split, count: int, generator: torch.Generator) -> Task:
        """Draw ``count`` tasks of ``split`` with a CPU generator; return them on the family's device."""


class MetaLoss(NamedTuple):
    """The result of one task for ``theta``."""

    loss: Tensor
    """The loss to be minimised, a scalar."""
    scores: Scores
    """Scores of the query set after adaptation."""
    carried: Tree | None = None
    """The new value of ``theta["carried"]``, averaged over tasks; None where nothing changes."""


class MetaGradient(NamedTuple):
    """The result of a batch of tasks for ``theta``."""

    grads: Tree
    """One gradient for each leaf of ``theta`` outside ``carried``."""
    loss: Tensor
    scores: Scores
    """Mean query loss and scores after adaptation."""
    carried: Tree
    """The new value of ``theta["carried"]``, which is replaced instead of stepped."""


def only(theta: Tree) -> list[Tree]:
    """Return ``theta`` alone: the default of ``Algorithm.candidates``."""
    return [theta]


class Algorithm(NamedTuple):
    """A meta-learner as pure functions, written for one task, which close over the model and hyperparameters.

    ``theta`` is a tree of all that is meta-learned. Its branch ``carried``, if there is one, holds what the outer
    optimizer does not update (second moments, a chosen step size).
    """

    init: Callable[[torch.Generator], Tree]
    """(generator for what is random besides the model) → theta, with a copy of the freshly initialised parameters."""
    adapt: Callable[[Tree, Tree, Loss], Iterator[Any]]
    """(theta, support, loss) → the state before the first step, then after each.

    The iterator of a gradient learner never ends; the caller takes as many steps as it wants. A conditioning
    learner, which has no state without a support set, yields None first."""
    predict: Callable[[Tree, Any, Any], Tensor]
    """(theta, state, x) → output."""
    approach: Literal["agnostic", "dependent", "baseline"]
    needs: Need
    """What the algorithm needs of a task's target."""
    paper: str
    train_steps: int = 1
    """Number of adaptation steps of the default meta-loss."""
    meta_loss: Callable[[Tree, Task, Loss], MetaLoss] | None = None
    """(theta, task, loss) → the task's meta-loss; by default the query loss after ``train_steps``."""
    meta_grad: Callable[[Tree, Task, Loss], MetaGradient] | None = None
    """(theta, batch of tasks, loss) → gradient; by default the derivative of the mean meta-loss."""
    candidates: Callable[[Tree], list[Tree]] = only
    """theta → variants of ``theta``, of which the one with the best validation score is kept."""
    meta_learns: bool = True
    """False for a baseline that leaves ``theta`` as it was drawn."""
    any_ways: bool = False
    """Whether the algorithm can train on more ways than it is tested on."""
    open_ways: bool = False
    """Whether its predictions have as many classes as the support set, whatever their number was in training."""
    max_steps: int | None = None
    """Largest number of adaptation steps, where each step has learned parameters; None: there is no limit."""
    metrics: tuple[Metric, ...] = ()
    """The metrics that ``scores`` returns."""
    scores: Callable[[Tree, Any, Tree], Scores] | None = None
    """(theta, state, data of one task) → scores that only this algorithm has, such as a likelihood."""
    report: Report | None = None
    embed: Callable[[Tree, Any], Tensor] | None = None
    """(theta, x) → features ``[examples, ...]``, where the method separates classes; for a picture."""
    adapted_parameters: Callable[[Tree], int] | None = None
    """theta → how many numbers adaptation sets per task; by default all leaves outside ``carried``."""
