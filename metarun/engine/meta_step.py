"""One meta-step as a pure function of tensors, for one replica or many.

Everything that a step reads is in one tree, every leaf ``[replicas, ...]``:

- ``train_state``: the learned numbers in one vector (``weights``), the state of the optimizer (``moments``), and what
  an algorithm replaces by itself (``carried``);
- ``tasks``: a batch of tasks, which stays a ``Task`` throughout;
- ``rates``: the learning rate of this step (``lr``), and the values of every hyperparameter in which replicas differ.

The learned numbers are in one vector, because an optimizer's arithmetic on thirty small tensors costs thirty times that
on one.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.func import vmap
from torch.overrides import TorchFunctionMode

from metarun.assemble import Experiment
from metarun.contracts import Tree
from metarun.engine.batch import meta_gradient
from metarun.engine.optimizer import clipped, initial_moments, outer_step
from metarun.engine.trust_region import TrustRegion, check_trust_region, trust_region_step
from metarun.errors import UserError, first_line
from metarun.nn.transforms import stacked
from metarun.tasks.control import ControlFamily
from metarun.tree import learned, leaves, like, names_of, size, tree_map

Step = Callable[[Tree], Tree]


class Layout:
    """How the learned leaves of theta are laid out in one vector."""

    def __init__(self, theta: Tree) -> None:
        """Record the shapes of ``theta``.

        Raises:
            UserError: the leaves are of more than one dtype, or are no real numbers.
        """
        self.template = learned(theta)
        self.names = names_of(self.template)
        self.shapes = [leaf.shape for leaf in leaves(self.template)]
        self.sizes = [shape.numel() for shape in self.shapes]
        self.size = size(self.template)
        types = {leaf.dtype for leaf in leaves(self.template)}
        if unreal := sorted(str(kind) for kind in types if not kind.is_floating_point):
            raise UserError(
                f"Learned parameters must be real numbers, and the model has {', '.join(unreal)}: keep real and "
                "imaginary parts as one real parameter, and join them in forward with torch.view_as_complex."
            )
        if len(types) > 1:
            raise UserError(f"Learned parameters must all be of one type, and the model has {sorted(map(str, types))}.")

    def described(self) -> list[str]:
        """Return the name and the shape of each learned leaf, in their order."""
        return [f"{name} {list(shape)}" for name, shape in zip(self.names, self.shapes, strict=True)]

    def vector(self, theta: Tree) -> Tensor:
        """Return the learned leaves concatenated ``[numbers]``."""
        parts = [leaf.flatten() for leaf in leaves(learned(theta))]
        return torch.cat(parts) if parts else torch.empty(0)

    def theta(self, state: Tree) -> dict[str, Any]:
        """Return the tree that an algorithm uses, from the state of one replica."""
        parts = state["weights"].split(self.sizes) if self.sizes else []
        tree = like(self.template, (part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)))
        return {**tree, "carried": state["carried"]} if "carried" in state else tree


class Substitute(TorchFunctionMode):
    """Inside, every call of torch receives other tensors in place of given ones.

    An algorithm closes over its hyperparameters when it is made. Substitution is how a replica's own value reaches the
    algorithm.
    """

    def __init__(self, others: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.others = {id(named): other for named, other in others}

    def exchanged(self, value: Any) -> Any:
        """Return ``value`` with the given tensors exchanged, also in lists and tuples."""
        if isinstance(value, Tensor):
            return self.others.get(id(value), value)
        return type(value)(map(self.exchanged, value)) if type(value) in (list, tuple) else value

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = {name: self.exchanged(value) for name, value in (kwargs or {}).items()}
        return function(*map(self.exchanged, args), **named)


def replica(tree: Tree, index: int) -> dict[str, Any]:
    """Return one replica of a tree whose leaves have a leading axis of replicas."""
    return tree_map(lambda leaf: leaf[index], tree)


class MetaStep:
    """The functions that make up a meta-step of an experiment."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.count = len(experiment.replicas)
        self.thetas = experiment.initial_thetas()
        self.layout = Layout(self.thetas[0])
        train = experiment.config.train
        self.optimizer: str = train.optimizer.name
        self.clip: float | None = train.clip
        self.weight_decay = float(train.weight_decay)
        self.narrow = train.precision.name == "bfloat16"
        self.device_type = torch.device(experiment.device).type
        self.trust_region: TrustRegion | None = None
        if self.optimizer == "trpo" and experiment.algorithm.meta_learns:
            check_trust_region(experiment)
            self.trust_region = TrustRegion(**train.trust_region)

    def initial_train_state(self) -> Tree:
        """Return the state of all replicas before the first step."""

        def one(theta: Tree) -> Tree:
            weights = self.layout.vector(theta)
            state = {
                "weights": weights,
                "moments": initial_moments(weights, self.optimizer),
            }
            return {**state, "carried": theta["carried"]} if "carried" in theta else state

        state: Tree = stacked([one(theta) for theta in self.thetas])
        return state

    def over_replicas(self, function: Step) -> Step:
        """Return ``function``, which is written for one replica, mapped over all replicas."""
        if self.count > 1:
            return vmap(function)
        return lambda given: tree_map(lambda leaf: leaf[None], function(replica(given, 0)))

    def gradient(self, given: Tree, narrow: bool | None = None) -> Tree:
        """``train_state``, ``tasks`` and ``rates`` → ``gradient``, ``result`` (loss and first score) and ``carried``.

        ``narrow`` says whether products are computed in bfloat16; by default the configuration decides.
        """
        experiment, metric = self.experiment, self.experiment.family.spec.metrics[0].name

        def one(given: Tree) -> Tree:
            state, tasks = given["train_state"], given["tasks"]
            others = [(named, given["rates"][key]) for key, named in experiment.placeholders.items()]
            with (
                Substitute(others) if others else nullcontext(),
                torch.autocast(
                    self.device_type,
                    torch.bfloat16,
                    enabled=self.narrow if narrow is None else narrow,
                    cache_enabled=False,
                ),
            ):
                found = meta_gradient(
                    experiment.algorithm,
                    self.layout.theta(state),
                    tasks,
                    experiment.loss,
                    transformed=self.count > 1,
                )
            out = {
                "gradient": self.layout.vector(found.grads),
                "result": torch.stack([found.loss, found.scores[metric]]),
            }
            return {**out, "carried": found.carried} if "carried" in state else out

        return self.over_replicas(one)(given)

    def check_replicas(self, given: Tree) -> None:
        """Compare each replica's gradient with that of a separate algorithm, built from the replica's own values.

        Raises:
            UserError: a hyperparameter that differs does not reach every place where it matters.
        """
        experiment = self.experiment
        refusal = UserError(
            f"replicas.over: {experiment.names['algo']} decides by {' and '.join(experiment.placeholders)} what it "
            f"computes, so the values cannot share a process; sweep them with metarun -m "
            f"{next(iter(experiment.placeholders), '')}=..."
        )
        only_one = [[key] for key in experiment.placeholders]
        try:
            found = self.gradient(given, narrow=False)["gradient"]
        except RuntimeError as error:
            if "vmap" in str(error):
                raise refusal from error
            raise
        first, of_first = experiment.replicas[0], torch.empty(0)
        for index, one in enumerate(experiment.replicas):
            own = replica(given, index)
            tasks = own["tasks"]
            theta = self.layout.theta(own["train_state"])
            expected = self.layout.vector(meta_gradient(one.algorithm, theta, tasks, experiment.loss).grads)
            of_first = of_first if index else expected
            if (found[index] - expected).norm() > 1e-2 * expected.norm() + 1e-7:
                raise refusal
            # A value of little effect must have it here, too: at least half of what it changes in separate runs.
            if [key for key, value in one.differs.items() if value != first.differs[key]] in only_one:
                apart = (expected - of_first).norm()
                if apart > 1e-3 * of_first.norm() and (found[index] - found[0]).norm() < apart / 2:
                    raise refusal

    def update(self, given: Tree) -> Tree:
        """``train_state``, ``rates`` and what ``gradient`` gives → ``train_state`` and ``result``."""

        def one(given: Tree) -> Tree:
            state, rates, gradient = given["train_state"], given["rates"], given["gradient"]
            largest = rates.get("train.clip", self.clip)
            if largest is not None:
                gradient = clipped(gradient, largest)
            decay = rates.get("train.weight_decay", self.weight_decay)
            weights, moments = outer_step(
                self.optimizer, state["weights"], gradient, state["moments"], rates["lr"], decay
            )
            new = {"weights": weights, "moments": moments}
            return {"train_state": {**new, "carried": given["carried"]} if "carried" in state else new}

        return {**self.over_replicas(one)(given), "result": given["result"]}

    def whole(self, given: Tree) -> Tree:
        """``train_state``, ``tasks`` and ``rates`` → the next ``train_state`` and ``result``, all tasks at once."""
        if self.trust_region is not None:
            results = [self.within_trust_region(replica(given, index), index) for index in range(self.count)]
            together: Tree = stacked(results)
            return together
        return self.update({**given, **self.gradient(given)})

    def within_trust_region(self, given: Tree, index: int) -> Tree:
        """Take the ``whole`` step of replica ``index``, given its leaves; it branches on values, so is not mapped."""
        state, settings = given["train_state"], self.trust_region
        assert settings is not None

        def theta_of(weights: Tensor) -> Tree:
            return self.layout.theta({**state, "weights": weights})

        experiment = self.experiment
        algorithm, family = experiment.replicas[index].algorithm, cast(ControlFamily, experiment.family)
        weights, result = trust_region_step(
            algorithm, family, theta_of, self.layout.vector, settings, state["weights"], given["tasks"]
        )
        return {"train_state": {**state, "weights": weights}, "result": result}


def parts_of(given: Tree, chunk: int) -> list[Tree]:
    """Split ``given`` into parts of ``chunk`` tasks; ``chunk`` divides the number of tasks."""
    count = next(leaves(given["tasks"])).shape[1]

    def part(first: int) -> Tree:
        return {**given, "tasks": tree_map(lambda leaf: leaf[:, first : first + chunk], given["tasks"])}

    return [part(first) for first in range(0, count, chunk)]


def accumulated(gradient: Step, update: Step, chunk: int, pool: ThreadPoolExecutor | None = None) -> Step:
    """Return a meta-step that averages the gradients of ``chunk`` tasks at a time, computed in ``pool`` if given.

    The sum is taken in the order of the tasks, whichever is ready first, so that a run is reproducible to the bit.
    """

    def run(given: Tree) -> Tree:
        parts = parts_of(given, chunk)
        found = list(pool.map(gradient, parts)) if pool else None
        total = found[0] if found else gradient(parts[0])
        for index in range(1, len(parts)):
            total = tree_map(torch.add, total, found[index] if found else gradient(parts[index]))
        mean = tree_map(lambda leaf: leaf / len(parts), total)
        return update({**given, **mean})

    return run


def refuse_out_of_memory(error: BaseException, meta_batch: int) -> UserError:
    """Return the error that says what to do when a GPU has no room for a step."""
    return UserError(
        f"The GPU has too little memory for a meta-step of {meta_batch} tasks ({first_line(error)}); lower "
        "train.task_chunk (tasks computed at a time, with the same gradient), train.meta_batch or task.train_queries."
    )
