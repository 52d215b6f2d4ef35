"""The contracts between task families, targets, models, algorithms and the engine."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from metarun.targets.metric import Metric

Tree: TypeAlias = Mapping[str, Any]
"""Nested mappings with tensors as leaves."""

Weights: TypeAlias = dict[str, Tensor]
"""A module's parameters by name."""

Scores: TypeAlias = dict[str, Tensor]
"""Scalars by the names of the metrics, in their order: the first selects."""

Need = Literal["loss", "rows", "numbers", "classes", "policy"]
"""What an algorithm asks of a target, and a target offers:

- ``loss``: any differentiable loss;
- ``rows``: inputs whose targets are known, row by row; ``numbers`` if these are numbers, ``classes`` if they are
  one-hot classes;
- ``policy``: an environment to act in.
"""

Split = Literal["train", "val", "test"]

Predict: TypeAlias = Callable[[Any], Any]
"""Input → output, for the data of one task: a tensor, or for a policy with a memory a pair (see ``Seen``)."""

Loss: TypeAlias = Callable[[Predict, Tree], tuple[Tensor, Scores]]
"""(predict, data of one task) → (loss to minimise, scores), all scalars."""


class Task(NamedTuple):
    """One task, or a batch of them: leaves ``[tasks, ...]`` as sampled, ``[...]`` inside an algorithm.

    Supervised families hold ``x [examples, *input]`` and ``y``: targets ``[examples, outputs]``, or one-hot classes
    ``[examples, ways]``, so that the number of ways can be read off the shape. Where tasks differ in size, both parts
    also carry ``weight [examples]``: 1 for an example, 0 for padding, which may stand anywhere and whose target is
    zero. Training tasks may carry ``class``, the identity ``[examples]`` of each example's class among all training
    classes.
    Control families hold what an environment is made of, ``[episodes, ...]`` each; and of their randomness a seed for
    each support episode, from which every step of adaptation draws, or the random numbers of a query episode.
    """

    support: Tree
    """What adaptation may see."""
    query: Tree
    """What scores it."""
    seed: Tensor | None = None
    """One integer per task, from which all other randomness of adapting and scoring comes; attached by the loop."""


class Rows(NamedTuple):
    """What a learner that conditions on examples sees of them."""

    z: Tensor
    """Features ``[rows, d]``."""
    y: Tensor
    """Targets ``[rows, outputs]``; zero where the weight is."""
    weight: Tensor | None
    """``[rows]``: 0 for padding; None where there is none."""


class Target(Protocol):
    """What tasks ask for: how wide an output is, and how outputs are scored (see `metarun.targets`)."""

    @property
    def outputs(self) -> int:
        """Width of a model's output."""

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """What ``scores`` gives."""

    @property
    def offers(self) -> tuple[Need, ...]:
        """What it has for algorithms."""


class RowTarget(Target, Protocol):
    """A target with a loss and scores of a model's output."""

    def loss(self, output: Tensor, data: Tree) -> Tensor:
        """Mean loss of the output for the data of one task."""

    def scores(self, output: Tensor, data: Tree) -> Scores:
        """Every metric of the output, as mean over the data of one task."""

    def rows(self, z: Tensor, data: Tree) -> Rows:
        """The data as rows, given the features ``z`` of their inputs."""


@dataclass(frozen=True)
class Numbers:
    """Inputs that are arrays of numbers."""

    shape: tuple[int, ...]
    """Of one input."""


@dataclass(frozen=True)
class Tokens:
    """Inputs that are rows of token ids, 0 being padding."""

    columns: int
    """Ids of one input."""
    ids: int
    """How many ids there are."""
    first_bucket: int
    """Smaller ids are words, the others buckets of character n-grams."""
    word_columns: int
    """The columns at the front, which hold words in their order; the others hold n-grams."""
    weights: Tensor = field(compare=False, repr=False)
    """How much each id tells by itself ``[ids]``: its inverse class frequency among the training classes."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one input."""
        return (self.columns,)


class Seen(NamedTuple):
    """What a policy is given: ``steps`` successive moments of ``episodes`` parallel episodes.

    A policy returns its outputs ``[steps, episodes, outputs]``, or, if it has a memory, the pair of them and
    the carry that continues after the last step.
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
    """What the policy returned with its last outputs; None at the start of a trial."""


@dataclass(frozen=True)
class Moments:
    """Inputs that a policy sees of an environment, as ``Seen``."""

    observation: int
    """Numbers of one observation."""
    environment: str
    horizon: int
    """Steps of an episode."""
    episodes: int = 1
    """Of a trial, through which a policy with a memory keeps it."""
    optimal: Callable[[Tree], Callable[[Seen], Any]] | None = field(default=None, compare=False, repr=False)
    """(data of one task) → the policy that knows the task, where it is cheap to find."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one observation."""
        return (self.observation,)


@dataclass(frozen=True)
class Sizes:
    """How large tasks are; of validation and test tasks where nothing else is said."""

    shots: int
    """Support examples per class for classification, per task otherwise; episodes or trials for control.

    The most of them where tasks differ in size.
    """
    queries: int
    """Likewise of query examples."""
    ways: int | None = None
    train_ways: int | None = None
    training_classes: int | None = None
    """How many classes the training tasks draw from, where tasks share classes."""


def flat(x: Tensor) -> Tensor:
    """``[examples, *input]`` → ``[examples, numbers]``."""
    return x.flatten(1)


@dataclass(frozen=True)
class Facts:
    """What a family knows of its tasks, for baselines and reports alone."""

    features: Callable[[Tensor], Tensor] = flat
    """Inputs as vectors whose distances mean something without any learning: ``[examples, numbers]``."""
    truth: Callable[[Tensor], Tensor] | None = None
    """Features in which every task's target is linear: ``[examples, numbers]``."""
    groups: tuple[str, ...] | None = None
    """Names of the kinds of task in the family, if there are several; the data carry ``group [examples]``."""


@dataclass(frozen=True)
class Spec:
    """What an algorithm and a model may know of a task family."""

    inputs: Numbers | Tokens | Moments
    target: Target
    sizes: Sizes
    metrics: tuple[Metric, ...]
    """Of the scores; the first one selects."""
    facts: Facts = field(default=Facts(), compare=False, repr=False)

    def offers(self, need: Need) -> bool:
        """Whether the target has what an algorithm asks for."""
        return need in self.target.offers


class Report(NamedTuple):
    """What is shown of test tasks besides scores; a run writes it to ``NAME.csv`` and ``NAME.png``."""

    name: str
    axes: dict[str, tuple[str, ...]]
    """The names along each axis of what is measured, one axis or two."""
    value: Metric
    """What a number means."""
    measure: Callable[..., Tensor]
    """Numbers of one task, shaped as ``axes``; NaN where the task has nothing to measure. Of an algorithm: (theta, task,
    loss, adaptation steps); of a family: (predict, task), where ``predict`` is the adapted learner."""


class Family(Protocol):
    """A task family: samples tasks, and scores predictions.

    It may also have ``loss``, a ``Loss``, in place of its target's on ``predict(data["x"])``; ``scores``, which gives
    those of ``spec.metrics`` that only tests need by (predict, data of one task); and ``report``, a ``Report``.
    """

    spec: Spec
    dataset: str
    """Where the examples come from, and every choice that makes scores incomparable."""

    def sample(self, split: Split, count: int, generator: torch.Generator) -> Task:
        """``count`` tasks of ``split``, drawn with a CPU generator, on the family's device."""


class MetaLoss(NamedTuple):
    """What one task says about ``theta``."""

    loss: Tensor
    """To be minimised, a scalar."""
    scores: Scores
    """Of the query set after adaptation."""
    carried: Tree | None = None
    """The new value of ``theta["carried"]``, which is averaged over tasks; None where nothing changes."""


class MetaGradient(NamedTuple):
    """What a batch of tasks says about ``theta``."""

    grads: Tree
    """One gradient for each leaf of ``theta`` outside ``carried``."""
    loss: Tensor
    scores: Scores
    """Mean query loss and scores after adaptation."""
    carried: Tree
    """The new value of ``theta["carried"]``: what is replaced, not stepped."""


def only(theta: Tree) -> list[Tree]:
    """The default of ``Algorithm.candidates``: ``theta`` itself."""
    return [theta]


class Algorithm(NamedTuple):
    """A meta-learner as pure functions, written for one task; its factory closes over model and hyperparameters.

    ``theta`` is a tree of all that is meta-learned. Its branch ``carried``, if there is one, holds what the outer
    optimizer leaves alone (second moments, a chosen step size).
    """

    init: Callable[[torch.Generator], Tree]
    """(generator for what is random besides the model) → theta, a copy of what the freshly initialised model holds."""
    adapt: Callable[[Tree, Tree, Loss], Iterator[Any]]
    """(theta, support, loss) → the state before the first step, then after each.

    A gradient learner's iterator never ends; the caller takes as many steps as it wants. A conditioning
    learner that has no state without a support set yields None first."""
    predict: Callable[[Tree, Any, Any], Tensor]
    """(theta, state, x) → output."""
    approach: Literal["agnostic", "dependent", "baseline"]
    needs: Need
    """What it asks of a task's target."""
    paper: str
    train_steps: int = 1
    """How many adaptation steps the default meta-loss takes."""
    meta_loss: Callable[[Tree, Task, Loss], MetaLoss] | None = None
    """(theta, task, loss) → its meta-loss; by default the query set's loss after ``train_steps``."""
    meta_grad: Callable[[Tree, Task, Loss], MetaGradient] | None = None
    """(theta, batch of tasks, loss) → gradient; by default autodiff of the mean meta-loss."""
    candidates: Callable[[Tree], list[Tree]] = only
    """Variants of ``theta`` among which validation tasks choose."""
    meta_learns: bool = True
    """False for a baseline that leaves ``theta`` as it was drawn."""
    any_ways: bool = False
    """Whether it can train on more ways than it is tested on."""
    max_steps: int | None = None
    """The most steps that it can adapt, where steps are learned one by one; None: as many as one likes."""
    metrics: tuple[Metric, ...] = ()
    """What ``scores`` gives."""
    scores: Callable[[Tree, Any, Tree], Scores] | None = None
    """(theta, state, data of one task) → scores that only this algorithm has, such as a likelihood."""
    report: Report | None = None
    adapted_parameters: Callable[[Tree], int] | None = None
    """theta → how many numbers adaptation sets for one task; by default all leaves outside ``carried``."""
