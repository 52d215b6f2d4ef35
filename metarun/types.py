"""The contracts between task families, algorithms and the engine."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor, nn

Tree: TypeAlias = Mapping[str, Any]
"""Nested mappings with tensors as leaves."""

Weights: TypeAlias = dict[str, Tensor]
"""A module's parameters by name."""

Kind = Literal["regression", "classification", "sequence", "control"]
Split = Literal["train", "val", "test"]

Predict: TypeAlias = Callable[[Any], Tensor]
"""Input → output, for the data of one task."""

Loss: TypeAlias = Callable[[Predict, Tree], tuple[Tensor, Tensor]]
"""(predict, data of one task) → (loss to minimise, score in the task's metric), both scalars."""


class Task(NamedTuple):
    """One task, or a batch of them: leaves ``[tasks, ...]`` as sampled, ``[...]`` inside an algorithm.

    Supervised families hold ``x [examples, *input]`` and ``y``: targets ``[examples, outputs]``, or one-hot
    classes ``[examples, ways]``, so that the number of ways can be read off the shape. Training tasks may
    also carry ``class``, the identity ``[examples]`` of each example's class among all training classes.
    """

    support: Tree
    """What adaptation may see."""
    query: Tree
    """What scores it."""


@dataclass(frozen=True)
class Spec:
    """What an algorithm and a model may know of a task family."""

    kind: Kind
    input_shape: tuple[int, ...]
    outputs: int
    """Width of the output: target dimensions, or ways."""
    metric: str
    higher_is_better: bool
    shots: int
    queries: int
    """Per class for classification, per task otherwise."""
    ways: int | None = None
    train_ways: int | None = None
    training_classes: int | None = None
    """How many classes the training tasks draw from, where tasks share classes."""


class Family(Protocol):
    """A task family: samples tasks, scores predictions."""

    spec: Spec
    dataset: str
    """Where the examples come from, and every choice that makes scores incomparable."""

    def sample(self, split: Split, count: int, generator: torch.Generator) -> Task:
        """``count`` tasks of ``split``, drawn with a CPU generator, on the family's device."""

    def loss(self, predict: Predict, data: Tree) -> tuple[Tensor, Tensor]:
        """Loss and score of ``predict`` on the data of one task."""


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
    meta_grad: Callable[[Tree, Task, Loss], MetaGradient] | None = None
    """(theta, batch of tasks, loss) → gradient; by default autodiff of the mean meta-loss."""
    candidates: Callable[[Tree], list[Tree]] = only
    """Variants of ``theta`` among which validation tasks choose."""
    meta_learns: bool = True
    """False for a baseline that leaves ``theta`` as it was drawn."""
    any_ways: bool = False
    """Whether it can train on more ways than it is tested on."""
    adapted_parameters: Callable[[Tree], int] | None = None
    """theta → how many numbers adaptation sets for one task; by default all leaves outside ``carried``."""
