"""Checks that the tasks which a family samples agree with the family's own spec.

A family that breaks its promises often runs all the same: integer labels broadcast, a missing axis turns a mean of n
numbers into one of n², and the printed accuracy is wrong. The first training batch, and every block of validation and
test tasks, is therefore checked, which costs a pass over the numbers.
"""

from collections.abc import Iterator
from math import prod
from typing import Any, cast

import torch
from torch import Tensor
from torch.func import vmap

from metarun.assemble import Experiment
from metarun.checks.repetition import check_repetition
from metarun.contracts import Predict, RowTarget, Scores, Sequences, Spec, Split, Task, Tokens, Tree, Words
from metarun.engine.batch import adapt_and_score
from metarun.errors import UserError
from metarun.random import stream
from metarun.targets.classes import Classes
from metarun.targets.scoring import scores_in_test
from metarun.tree import first_tasks, leaves

LOOKED_AT = 4
"""Number of tasks whose support set is searched for query examples."""


def named_leaves(data: Tree, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of ``data`` with their names, such as ``query["x"]`` for ``name = "query"``."""
    for key, value in data.items():
        own = f'{name}["{key}"]'
        if isinstance(value, dict):
            yield from named_leaves(value, own)
        else:
            yield own, value


def not_finite(tasks: Task) -> str | None:
    """Return in words what is not finite in a batch of tasks, and where; None if all numbers are finite."""
    for part in ("support", "query"):
        for name, leaf in named_leaves(getattr(tasks, part), part):
            # A sum is many times faster than checking each number, and it shows NaN and infinity.
            if not leaf.is_floating_point() or bool(leaf.sum().isfinite()):
                continue
            wrong = (~leaf.isfinite()).nonzero()
            if len(wrong):
                place = wrong[0].tolist()
                axes = ("task", "example", *["column"] * (len(place) == 3))
                where = ", ".join(f"{axis} {index}" for axis, index in zip(axes, place, strict=False))
                return f"{'NaN' if leaf[tuple(place)].isnan() else 'infinity'} in {name} ({where}, counted from 0)"
    return None


def _shape(sizes: torch.Size) -> str:
    """Return a leaf's shape in words."""
    names = ["tasks", "examples"][: len(sizes)]
    return f"[{', '.join([*names, *map(str, sizes[2:])])}]"


def _check(holds: bool, sentence: str) -> None:
    if not holds:
        raise UserError(f"task: {sentence}.")


def _rows_of(name: str, data: Tree, spec: Spec) -> tuple[Tensor, Tensor]:
    """Return targets ``[tasks, rows, width]`` and weights of the rows that the target makes of examples."""
    y = data["y"]
    # Targets alone are looked at, so the features may be anything.
    found = vmap(cast(RowTarget, spec.target).rows)(y.new_zeros(*y.shape[:-1], 1), data)
    _check(
        found.y.ndim == 3 and found.z.shape[:2] == found.y.shape[:2],
        f"spec.target.rows makes rows of shape {list(found.y.shape[1:])} of {name}; let it return [rows, outputs]",
    )
    return found.y, y.new_ones(found.y.shape[:2]) if found.weight is None else found.weight.to(y.dtype)


def _check_targets(name: str, y: Tensor, weight: Tensor, spec: Spec, ways: int) -> None:
    """Require targets ``[tasks, examples, width]`` in the default dtype, one-hot for classes, and 0 in padding."""
    examples = weight.shape[1]
    classes = spec.offers("classes")
    width = ways if classes else spec.target.outputs
    wanted = f"[tasks, examples, {width}]"
    dtype = torch.get_default_dtype()
    remedy = f"make it with torch.nn.functional.one_hot(labels, {width}).to({dtype})" if classes else ""
    if y.shape[1:] != (examples, width):
        if not classes:
            missing = y.ndim == 2 and width == 1
            remedy = "add the missing axis with y[..., None]" if missing else f"give each example {width} numbers"
        what = "integer labels of shape" if classes and not y.is_floating_point() else "shape"
        has = f"{what} {_shape(y.shape)}" if y.ndim < 2 or y.shape[1] == examples else f"{what} {list(y.shape)}"
        kind = "one-hot classes" if classes else "targets"
        _check(False, f"{name} has {has}, and must hold {kind} {wanted}, where x has {examples} examples; {remedy}")
    _check(y.dtype == dtype, f"{name} has dtype {y.dtype}, and must have {dtype}; convert it with .to({dtype})")
    padding = weight == 0
    _check(
        not bool(y[padding].any()),
        f"{name} has targets where the weight is 0; make all rows of padding zero, such as with y * weight[..., None]",
    )
    if classes:
        one_hot = bool(((y == 0) | (y == 1)).all()) and bool((y[~padding].sum(-1) == 1).all())
        _check(one_hot, f"{name} is not one-hot: each row must hold a single 1 among zeros; {remedy}")


def _check_weight(name: str, weight: Tensor, examples: int) -> None:
    """Require a weight for each example, 1 or 0 for padding, and an example in each task."""
    dtype = torch.get_default_dtype()
    _check(
        weight.shape[1:] == (examples,) and weight.dtype == dtype,
        f"{name} must hold a number for each example, [tasks, {examples}] of {dtype}, and has {weight.dtype} with "
        f"shape {list(weight.shape)}; make it with real.to({dtype})",
    )
    _check(
        bool(((weight == 0) | (weight == 1)).all()),
        f"{name} must be 1 for an example and 0 for padding, and holds other numbers; weigh errors in a loss of the "
        "family's own",
    )
    _check(bool((weight.sum(1) > 0).all()), f"{name} leaves a task without any example; draw at least one per task")


def _check_classes(name: str, y: Tensor, shots: int | None, padded: bool, ways: Tensor | None) -> None:
    """Require every class in each support set, with ``shots`` examples each, or at most so many if tasks differ.

    ``ways [tasks, examples, ways]`` says which classes a task has; None: all.
    """
    counts = y.sum(1)
    there = bool((counts > 0).all() if ways is None else ((counts > 0) == (ways[:, 0] > 0)).all())
    _check(there, f"{name} lacks a class: each of the {y.shape[2]} needs an example in every task")
    if shots is not None:
        fits = bool((counts <= shots if padded else counts == shots).all())
        times = f"at most {shots}" if padded else f"{shots}"
        _check(fits, f"{name} must hold each class {times} times (spec.sizes.shots) in every task")


def _check_indices(name: str, index: Tensor, examples: int, count: int | None, what: str) -> None:
    """Raise an error if a leaf that should hold an index per example does not."""
    integer = not index.is_floating_point() and index.dtype != torch.bool
    _check(
        index.shape[1:] == (examples,) and integer,
        f"{name} must hold a whole number for each example, [tasks, {examples}], and has {index.dtype} with shape "
        f"{list(index.shape)}",
    )
    low, high = int(index.min()), int(index.max())
    inside = low >= 0 and (count is None or high < count)
    _check(
        inside, f"{name} must number {what} from 0{'' if count is None else f' to {count - 1}'}, not {low} to {high}"
    )


def _check_examples(name: str, data: Tree, spec: Spec, ways: int, per_class: int | None) -> None:
    """Check one part of supervised tasks; ``per_class`` is the number of examples per class (per task without them)."""
    for key in ("x", "y") if spec.offers("rows") else ("x",):
        _check(key in data, f'{name} lacks the leaf "{key}"; supervised tasks hold inputs x and targets y')
    x = data["x"]
    x_name, y_name, dtype = f'{name}["x"]', f'{name}["y"]', torch.get_default_dtype()
    _check(
        x.shape[2:] == spec.inputs.shape and x.ndim >= 2,
        f"{x_name} has the shape {list(x.shape)}, and must have [tasks, examples"
        f"{''.join(f', {size}' for size in spec.inputs.shape)}], since spec.inputs.shape is {spec.inputs.shape}; "
        "reshape it or correct the spec",
    )
    integer = x.dtype in (torch.int32, torch.int64)
    if isinstance(spec.inputs, Tokens | Sequences | Words):
        ids = x
        if isinstance(spec.inputs, Words) and spec.inputs.vector:
            ids = x[..., : spec.inputs.columns]
            _check(bool((ids == ids.round()).all()), f"{x_name} must hold whole numbers where it holds token ids")
        else:
            _check(integer, f"{x_name} holds token ids, so it must be of torch.int64, not {x.dtype}")
        low, high = int(ids.min()), int(ids.max())
        inside = low >= 0 and high < spec.inputs.ids
        _check(inside, f"{x_name} must hold token ids from 0 to {spec.inputs.ids - 1}, not {low} to {high}")
    _check(
        integer or x.dtype == dtype,
        f"{x_name} has dtype {x.dtype}, and must have {dtype}; convert it with .to({dtype})",
    )
    examples = x.shape[1]
    classes = spec.sizes.ways is not None
    _check(examples >= 1, f"{name} has no examples; draw at least one per task")
    padded = "weight" in data
    weight = data["weight"] if padded else x.new_ones(x.shape[:2], dtype=dtype)
    _check_weight(f'{name}["weight"]', weight, examples)
    if per_class is not None:
        wanted, most = per_class * (ways if classes else 1), int(weight.sum(1).max())
        words = f"{ways} ways with {per_class} each make {wanted}" if classes else f"the spec says {wanted}"
        fits = most <= wanted if padded else most == wanted
        _check(fits, f"{name} has {most} examples per task, and {words}; correct sample or the spec")
    if spec.offers("rows"):
        y = data["y"]
        if y.ndim > 3 and y.shape[1] == examples:
            _check_targets(f"the rows of {y_name}", *_rows_of(y_name, data, spec), spec, spec.row_outputs)
        else:
            _check_targets(y_name, y, weight, spec, ways)
            if classes and name.endswith("support"):
                _check_classes(y_name, y, per_class, padded, data.get("ways"))
    if "class" in data:
        _check_indices(f'{name}["class"]', data["class"], examples, spec.sizes.training_classes, "training classes")
    if spec.facts.groups is not None:
        _check("group" in data, f'{name} lacks the leaf "group", which spec.facts.groups promises')
        _check_indices(f'{name}["group"]', data["group"], examples, len(spec.facts.groups), "spec.facts.groups")


def _check_leaf(name: str, leaf: Any, count: int, device: str) -> None:
    """Raise an error if a leaf is not a tensor of ``count`` tasks on ``device``."""
    _check(
        isinstance(leaf, Tensor),
        f"{name} must be one tensor [tasks, ...], not {type(leaf).__name__}; give all tasks of a batch equal sizes and "
        "stack them",
    )
    _check(
        leaf.ndim > 0 and len(leaf) == count,
        f"{name} has the shape {list(leaf.shape)}, and its first axis must be the {count} tasks that were asked for; "
        "stack one entry per task",
    )
    _check(
        leaf.device.type == torch.device(device).type,
        f"{name} is on {leaf.device}, and the run is on {device}; let the family take the argument device and move "
        "its tasks there",
    )


def _check_episodes(name: str, data: Tree, wanted: int | None) -> None:
    """Check one part of control tasks: every leaf is ``[tasks, episodes, ...]`` with ``wanted`` episodes."""
    for leaf_name, leaf in named_leaves(data, name):
        episodes = leaf.shape[1] if leaf.ndim > 1 else None
        wanted = episodes if wanted is None else wanted
        _check(
            episodes is not None and episodes == wanted,
            f"{leaf_name} has the shape {list(leaf.shape)}, and must have [tasks, {wanted or 'episodes'}, ...], an "
            "entry per episode; expand it or correct the spec",
        )


def check_spec(spec: Spec) -> None:
    """Raise an error if a spec contradicts itself.

    Raises:
        UserError: the spec contradicts itself; the sentence says where.
    """
    if isinstance(spec.target, Classes):
        _check(
            spec.sizes.ways is not None and spec.sizes.ways >= 2 and spec.target.outputs == spec.sizes.ways,
            "spec.sizes.ways must be at least 2 and equal to spec.target.outputs, and they are "
            f"{spec.sizes.ways} and {spec.target.outputs}",
        )
    for metric in spec.metrics:
        own = [other for other in spec.target.metrics if other.name == metric.name]
        _check(
            not own or own[0].higher_is_better == metric.higher_is_better,
            f"spec.metrics and spec.target.metrics differ in whether a higher {metric.name} is better; take those of "
            "the target",
        )
    _check(len(spec.metrics) > 0, "spec.metrics is empty; name at least one metric, by which runs are selected")


def check_tasks(tasks: Task, spec: Spec, split: Split, count: int, device: str) -> None:
    """Raise an error if tasks do not agree with the spec.

    Args:
        tasks: the tasks as sampled.
        spec: the family's.
        split: the split that they were sampled from; training tasks may have other sizes than those in the spec.
        count: number of tasks that were requested.
        device: where the tasks should be.

    Raises:
        UserError: a sentence that names the leaf and the remedy.
    """
    _check(isinstance(tasks, Task), f"sample must return a metarun.contracts.Task, not {type(tasks).__name__}")
    parts = {"support": spec.sizes.shots, "query": spec.sizes.queries}
    for part in parts:
        data, name = getattr(tasks, part), f"{split} {part}"
        _check(isinstance(data, dict), f"{name} must be a dictionary of tensors, not {type(data).__name__}")
        for leaf_name, leaf in named_leaves(data, name):
            _check_leaf(leaf_name, leaf, count, device)
    wrong = not_finite(tasks)
    _check(
        wrong is None,
        f"the {split} tasks hold {wrong}; fill the empty cells of the data or leave those rows out, and look for "
        "divisions by zero in sample",
    )
    weighted = ["weight" in getattr(tasks, part) for part in parts]
    _check(
        all(weighted) or not any(weighted),
        f'of the {split} tasks, one of support and query has a leaf "weight" and the other has none; give both of them '
        "one, of ones where nothing is padding",
    )
    for part, size in parts.items():
        data, name = getattr(tasks, part), f"{split} {part}"
        per_class = None if split == "train" else size
        if not spec.offers("policy"):
            ways = (split == "train" and spec.sizes.train_ways) or spec.sizes.ways or 0
            _check_examples(name, data, spec, ways, per_class)
        else:
            _check_episodes(name, data, per_class)


def _leaves_of(tasks: Task) -> list[Tensor]:
    return [*leaves(tasks.support), *leaves(tasks.query)]


def _equal(a: Task, b: Task) -> bool:
    return all(torch.equal(x, y) for x, y in zip(_leaves_of(a), _leaves_of(b), strict=True))


def _rows(data: Tree, task: int) -> list[bytes]:
    """Each example of one task, input and target, as bytes."""
    real = data["weight"][task] > 0 if "weight" in data else slice(None)
    columns = [data[key][task][real].flatten(1).cpu().numpy() for key in ("x", "y")]
    return [b"".join(column[i].tobytes() for column in columns) for i in range(len(columns[0]))]


def check_draws(experiment: Experiment, test: Task) -> None:
    """Raise an error if a family does not draw from its generator, draws nothing, or tests on support examples.

    Raises:
        UserError: what is wrong with ``sample``.
    """
    family, seed = experiment.family, experiment.config.eval.seed
    first, again, other = (family.sample("test", 2, stream(seed, "test", index)) for index in (0, 0, 1))
    _check(
        _equal(first, again),
        "sample gave other test tasks for an equal generator, so no run could be repeated or compared; draw all "
        "randomness from the generator that it is given (torch.rand(..., generator=generator))",
    )
    alike = all(bool((leaf[1:] == leaf[:1]).all()) for leaf in _leaves_of(test))
    _check(
        not (_equal(first, other) or (alike and len(next(leaves(test.query))) > 1)),
        "sample gives the same test task again and again, so an interval over them would mean nothing; draw each task "
        "from the generator that it is given",
    )
    if family.spec.offers("rows"):
        count = min(LOOKED_AT, len(test.query["x"]))
        shown = all(set(_rows(test.query, i)) <= set(_rows(test.support, i)) for i in range(count))
        _check(
            not shown,
            "every query example of a test task is also in its support set, input and target alike; score a task on "
            "examples other than those it is adapted to",
        )


def check_predictions(experiment: Experiment, theta: Tree, tasks: Task) -> None:
    """Raise an error if a model's outputs would be broadcast against the targets, or a loss is not a single number.

    Raises:
        UserError: the shapes that do not fit.
    """
    family, names = experiment.family, experiment.names
    replica = experiment.replicas[0]

    def watched_loss(predict: Predict, data: Tree) -> tuple[Tensor, Scores]:
        def watched(x: Any) -> Any:
            output = predict(x)
            if family.spec.offers("rows") and not isinstance(output, Tensor):
                raise UserError(
                    f"model={names['model']} with algo={names['algo']} gives a {type(output).__name__} where one "
                    "tensor is needed; let its forward return the outputs for the task's examples alone."
                )
            if family.spec.offers("rows") and output.shape != data["y"].shape:
                raise UserError(
                    f"model={names['model']} with algo={names['algo']} gives outputs of shape {list(output.shape)} for "
                    f"the {len(data['y'])} examples of a task, whose targets have {list(data['y'].shape)}; let the "
                    "model end in spec.target.outputs numbers per example."
                )
            return output

        found = experiment.loss(watched, data)
        _check(
            isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], dict),
            "loss must return the loss and a dictionary of scores by metric; return loss, {metric.name: score}",
        )
        loss, scores = found
        every = {**scores, **scores_in_test(family, predict, data)}
        for metric in family.spec.metrics:
            _check(
                metric.name in every,
                f"spec.metrics promises {metric.name}, and neither loss nor scores gives it; give it, or take it out",
            )
        _check(
            family.spec.metrics[0].name in scores,
            f"{family.spec.metrics[0].name}, the first metric, selects what is tested, so loss itself must give it",
        )
        for what, value in {"loss": loss, **every}.items():
            _check(
                isinstance(value, Tensor) and value.shape == (),
                f"the {what} of a task must be a single number, a tensor without axes, not "
                f"{list(value.shape) if isinstance(value, Tensor) else type(value).__name__}; take the mean over its "
                "examples",
            )
        return loss, scores

    adapt_and_score(replica.algorithm, theta, first_tasks(tasks, 1), watched_loss, 0)


def check_family(experiment: Experiment, test_blocks: Iterator[Task]) -> None:
    """Check once what a run will be trained and tested on.

    Args:
        experiment: the experiment that is about to run.
        test_blocks: blocks of test tasks, of which the first is checked.

    Raises:
        UserError: a sentence that names the leaf and the remedy.
    """
    family, config = experiment.family, experiment.config
    check_spec(family.spec)
    batch = family.sample("train", config.train.meta_batch, stream(config.seed, "train"))
    check_tasks(batch, family.spec, "train", config.train.meta_batch, experiment.device)
    test = next(test_blocks)
    check_draws(experiment, test)
    theta = experiment.initial_thetas()[0]
    check_repetition(experiment, theta, first_tasks(test, 1))
    check_predictions(experiment, theta, test)


def largest(tasks: Task) -> float:
    """Return the largest magnitude among the numbers of a batch of tasks."""
    return max(float(leaf.abs().max()) for leaf in _leaves_of(tasks) if prod(leaf.shape))
