"""The contracts between task families, algorithms and the engine."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor, nn

Tree: TypeAlias = Mapping[str, Any]
"""Nested mappings with tensors as leaves."""

Weights: TypeAlias = dict[str, Tensor]
"""A module's parameters by name."""

Kind = Literal["regression", "classification", "sequence", "control"]
Split = Literal["train", "val", "test"]

Predict: TypeAlias = Callable[[Any], Any]
"""Input → output, for the data of one task: a tensor, or for a policy with a memory a pair (see ``Seen``)."""

Loss: TypeAlias = Callable[[Predict, Tree], tuple[Tensor, Tensor]]
"""(predict, data of one task) → (loss to minimise, score in the task's metric), both scalars."""


class Task(NamedTuple):
    """One task, or a batch of them: leaves ``[tasks, ...]`` as sampled, ``[...]`` inside an algorithm.

    Supervised families hold ``x [examples, *input]`` and ``y``: targets ``[examples, outputs]``, or one-hot
    classes ``[examples, ways]``, so that the number of ways can be read off the shape. Training tasks may
    also carry ``class``, the identity ``[examples]`` of each example's class among all training classes.
    Control families hold what an environment is made of, ``[episodes, ...]`` each; and of their randomness a seed for
    each support episode, from which every step of adaptation draws, or the random numbers of a query episode.
    """

    support: Tree
    """What adaptation may see."""
    query: Tree
    """What scores it."""
    seed: Tensor | None = None
    """One integer per task, from which all other randomness of adapting and scoring comes; attached by the loop."""


def flat(x: Tensor) -> Tensor:
    """``[examples, *input]`` → ``[examples, numbers]``."""
    return x.flatten(1)


@dataclass(frozen=True)
class Tokens:
    """How to read inputs that are rows of token ids, 0 being padding."""

    ids: int
    """How many ids there are."""
    first_bucket: int
    """Smaller ids are words, the others buckets of character n-grams."""
    word_columns: int
    """The columns at the front, which hold words in their order; the others hold n-grams."""
    weights: Tensor
    """How much each id tells by itself ``[ids]``: its inverse class frequency among the training classes."""


class Seen(NamedTuple):
    """What a policy is given: ``steps`` successive moments of ``episodes`` parallel episodes.

    A policy returns its outputs ``[steps, episodes, outputs]``, or, if it has a memory, the pair of them and
    the carry that continues behind the last step.
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
class Control:
    """What a policy may know of an environment."""

    environment: str
    continuous: bool
    """Outputs are means and logarithms of standard deviations, one after the other; else logits."""
    horizon: int
    """Steps of an episode."""
    episodes: int = 1
    """Of a trial, through which a policy with a memory keeps it."""
    optimal: Callable[[Tree], Callable[[Seen], Any]] | None = field(default=None, compare=False, repr=False)
    """(data of one task) → the policy that knows the task, where it is cheap to find."""


@dataclass(frozen=True)
class Spec:
    """What an algorithm and a model may know of a task family."""

    kind: Kind
    input_shape: tuple[int, ...]
    outputs: int
    """Width of the output: target dimensions, ways, or actions (dimensions of an action if continuous)."""
    metric: str
    higher_is_better: bool
    shots: int
    queries: int
    """Per class for classification, per task otherwise; episodes or trials for control."""
    ways: int | None = None
    train_ways: int | None = None
    training_classes: int | None = None
    """How many classes the training tasks draw from, where tasks share classes."""
    features: Callable[[Tensor], Tensor] = field(default=flat, compare=False, repr=False)
    """Inputs as vectors whose distances mean something without any learning: ``[examples, numbers]``."""
    tokens: Tokens | None = field(default=None, compare=False, repr=False)
    """Set where inputs are rows of token ids."""
    control: Control | None = field(default=None, compare=False, repr=False)
    """Set where the kind is control."""
    truth: Callable[[Tensor], Tensor] | None = field(default=None, compare=False, repr=False)
    """Features in which every task's target is linear, where the family knows them: ``[examples, numbers]``."""
    groups: tuple[str, ...] | None = field(default=None, compare=False)
    """Names of the kinds of task in the family, if there are several; the data carry ``group [examples]``."""
    second_metric: str | None = field(default=None, compare=False)
    """What ``Family.second_score`` gives, if anything."""


class Family(Protocol):
    """A task family: samples tasks, scores predictions."""

    spec: Spec
    dataset: str
    """Where the examples come from, and every choice that makes scores incomparable."""

    def sample(self, split: Split, count: int, generator: torch.Generator) -> Task:
        """``count`` tasks of ``split``, drawn with a CPU generator, on the family's device."""

    def loss(self, predict: Predict, data: Tree) -> tuple[Tensor, Tensor]:
        """Loss and score of ``predict`` on the data of one task."""

    def second_score(self, predict: Predict, data: Tree) -> Tensor:
        """``spec.second_metric`` on the data of one task; called where there is one."""


class MetaGradient(NamedTuple):
    """What one batch of tasks says about ``theta``."""

    grads: Tree
    """One gradient for each leaf of ``theta`` outside ``carried``."""
    loss: Tensor
    score: Tensor
    """Mean query loss and score after adaptation."""
    carried: Tree
    """The new value of ``theta["carried"]``: state that is replaced, not stepped."""


def only(theta: Tree) -> list[Tree]:
    """The default of ``Algorithm.candidates``: ``theta`` itself."""
    return [theta]


class Observation(NamedTuple):
    """What an algorithm shows of a test task beside its score; a run writes it to ``NAME.csv`` and ``NAME.png``."""

    name: str
    axes: dict[str, tuple[str, ...]]
    """The names along each axis of what is measured, one axis or two."""
    value: str
    """What a number means."""
    measure: Callable[[Tree, "Task", Loss, int], Tensor]
    """(theta, task, loss, adaptation steps) → numbers of one task, shaped as ``axes``."""


class Algorithm(NamedTuple):
    """A meta-learner as pure functions, written for one task; its factory closes over hyperparameters.

    ``theta`` is a tree of all that is meta-learned. Its branch ``carried``, if there is one, holds state that
    the outer optimizer leaves alone (second moments, a chosen step size).
    """

    init: Callable[[nn.Module, torch.Generator], Tree]
    """(freshly initialised model, generator for anything else that is random) → theta."""
    adapt: Callable[[Tree, Tree, Loss], Iterator[Any]]
    """(theta, support, loss) → the state before the first step, then after each.

    A gradient learner's iterator never ends; the caller takes as many steps as it wants. A conditioning
    learner that has no state without a support set yields None first."""
    predict: Callable[[Tree, Any, Any], Tensor]
    """(theta, state, x) → output."""
    family: Literal["agnostic", "dependent", "baseline"]
    kinds: tuple[Kind, ...]
    """The kinds of task it serves."""
    paper: str
    train_steps: int = 1
    """How many adaptation steps the default meta-loss takes."""
    meta_loss: Callable[[Tree, Task, Loss], tuple[Tensor, Tensor]] | None = None
    """(theta, task, loss) → (loss, score); by default those of the query set after ``train_steps``."""
    carrying_loss: Callable[[Tree, Task, Loss], tuple[Tensor, Tensor, Tree]] | None = None
    """A meta-loss with a third result, the new value of ``theta["carried"]``, which is averaged over tasks."""
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
    observation: Observation | None = None
    second_metric: str | None = None
    """What ``second_score`` gives, if anything."""
    second_score: Callable[[Tree, Any, Tree], Tensor] | None = None
    """(theta, state, data of one task) → ``second_metric``, a scalar; for families that have no second metric."""
    adapted_parameters: Callable[[Tree], int] | None = None
    """theta → how many numbers adaptation sets for one task; by default all leaves outside ``carried``."""
