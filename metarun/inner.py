"""Learning from the support set of one task: gradient descent, fits of a head, and conditioning."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import count, islice
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from metarun.contracts import Loss, Rows, RowTarget, Spec, Task, Tree, Weights
from metarun.nn.functional import Forward
from metarun.nn.ops import channels_last
from metarun.nn.padding import present_weight, weighing
from metarun.nn.transforms import gradient
from metarun.tree import tree_map

Update = Callable[[Weights, Weights, int], Weights]
"""(weights, gradient of the support loss, number of the step) → the next weights."""


def at_step(support: Tree, step: int) -> Tree:
    """Return what the ``step``-th adaptation step, counted from 0, sees of a support set.

    Only for control families does this differ between steps: where episodes have a seed (``tape``, see
    `metarun.tasks.control`), each step plays new episodes.
    """
    return {**support, "step": step} if "tape" in support else support


def support_gradient(forward: Forward, weights: Weights, support: Tree, loss: Loss) -> Weights:
    """Return the gradient of the support loss of one task at ``weights``."""
    return cast(Weights, gradient(lambda w: loss(partial(forward, w), support)[0], weights))


def inner_loop(state: Any, slope: Callable[[Any, int], Any], update: Callable[[Any, Any, int], Any]) -> Iterator[Any]:
    """Yield the state before every step, without end: state ← update(state, slope(state, step), step)."""
    for step in count():
        yield state
        state = update(state, slope(state, step), step)


def descent(learning_rate: float | Tensor | Weights) -> Update:
    """Return the update rule of gradient descent; the learning rate is a number, or one per weight by name."""

    def update(weights: Weights, slope: Weights, step: int) -> Weights:
        rates = learning_rate if isinstance(learning_rate, dict) else dict.fromkeys(weights, learning_rate)
        return {name: w - rates[name] * slope[name] for name, w in weights.items()}

    return update


def gradient_descent(
    forward: Forward,
    weights: Weights,
    support: Tree,
    loss: Loss,
    update: Update,
    first_order: bool = False,
) -> Iterator[Weights]:
    """Yield the weights before every step on the gradient of the support loss, without end.

    ``update`` computes the next weights from the current ones, their gradient and the number of the step: ``descent``,
    or the caller's own rule.

    With ``first_order`` the gradient is treated as a constant: it is taken at detached weights, which saves the
    graph, while the path from the old weights to the new ones stays.
    """

    def slope(weights: Weights, step: int) -> Weights:
        start = {name: w.detach() for name, w in weights.items()} if first_order else weights
        return support_gradient(forward, start, at_step(support, step), loss)

    return inner_loop(weights, slope, update)


def part_descent(
    forward: Forward,
    fixed: Weights,
    part: Weights,
    support: Tree,
    loss: Loss,
    learning_rate: float,
    first_order: bool = False,
) -> Iterator[Weights]:
    """Yield ``part`` along ``gradient_descent``, without end; the loss also depends on the ``fixed`` weights."""
    still = {name: w.detach() for name, w in fixed.items()} if first_order else fixed

    def partly(weights: Weights, x: Any) -> Tensor:
        return forward({**still, **weights}, x)

    return gradient_descent(partly, part, support, loss, descent(learning_rate), first_order)


def keep_support(theta: Tree, support: Tree, loss: Loss) -> Iterator[Tree | None]:
    """Yield None, then the support set: ``Algorithm.adapt`` of a learner that conditions on the support set."""
    yield None
    yield support


def both(task: Task) -> Tree:
    """Return support and query examples of a task as one data set."""
    return {name: torch.cat([task.support[name], task.query[name]]) for name in task.support}


def padding_first(data: Tree) -> Tree:
    """Return the examples in their order, with padding before all others; ``data`` itself where there is no padding."""
    if "weight" not in data:
        return data
    order = (data["weight"] > 0).to(torch.uint8).argsort(stable=True)
    return tree_map(lambda leaf: leaf[order], data)


def weight_together(support: Tree, x: Tensor) -> Tensor | None:
    """Return the weights of the support examples and of ``x``, on which a model is called here; None: no padding."""
    own, asked = support.get("weight"), present_weight()
    if own is None and asked is None:
        return None
    parts = zip((own, asked), (support["x"], x), strict=True)
    like = cast(Tensor, own if asked is None else asked)
    return torch.cat([like.new_ones(len(part)) if weight is None else weight for weight, part in parts])


def embed_together(embed: Forward, weights: Weights, support: Tree, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return embeddings of the support examples and of ``x``, computed in one batch, whose statistics they share."""
    n, both = len(support["x"]), torch.cat([support["x"], x])
    # The weights are the same for all tasks, so these are plain convolutions, for which a GPU prefers channels last; a
    # CPU does not (docs/performance.md).
    with weighing(weight_together(support, x)):
        z = embed(weights, channels_last(both) if both.is_cuda and both.ndim == 4 else both)
    return z[:n], z[n:]


class Parted(NamedTuple):
    """Features of which the last are no features of rows, but outputs that mean the same in all tasks."""

    z: Tensor
    """``[..., d]``."""
    shared: Tensor
    """``[..., shared]``."""


def parted(spec: Spec, z: Tensor) -> Parted:
    """Return features apart from the outputs among them that all tasks share (``shared`` of `RowTarget`)."""
    width = z.shape[-1] - (spec.target.outputs - spec.row_outputs)
    return Parted(z[..., :width], z[..., width:])


def rows_together(
    spec: Spec, embed: Forward, weights: Weights, support: Tree, x: Tensor
) -> tuple[Rows, Tensor | Parted]:
    """Return the support set as rows, and features of ``x`` ``[..., d]`` for `by_row`, by ``embed_together``.

    A row is an example where an output is a vector; the target makes rows of whatever else examples consist of, such as
    the words of sentences.
    """
    z, queries = embed_together(embed, weights, support, x)
    own, target = parted(spec, z), cast(RowTarget, spec.target)
    rows = target.rows(own.z, support)
    if not hasattr(target, "shared"):
        return rows, queries
    asked = parted(spec, queries)
    return rows, asked._replace(shared=cast(Any, target).corrected(asked.shared, own.shared, support))


def by_row(answer: Callable[[Tensor], Tensor], queries: Tensor | Parted) -> Tensor:
    """Return ``answer``, a function of rows ``[rows, d]``, for features ``queries [..., d]``, in the same shape."""
    if isinstance(queries, Parted):
        return torch.cat([by_row(answer, queries.z), queries.shared], -1)
    if queries.ndim == 2:
        return answer(queries)
    answers = answer(queries.flatten(0, -2))
    return answers.view(*queries.shape[:-1], answers.shape[-1])


class Fit(NamedTuple):
    """A head to be fitted to a support set by ``step`` steps, once the features are known."""

    support: Tree
    loss: Loss
    step: int
    memo: dict[str, Any]
    """What the fits of one support set share: features, and the heads found so far."""


def fits(theta: Tree, support: Tree, loss: Loss) -> Iterator[Fit]:
    """Yield fits: ``Algorithm.adapt`` of a learner that embeds support set and queries together, then fits a head.

    They are embedded together because, where a model normalises by the batch, the features of a small support set by
    itself differ from those that the model was trained on.
    """
    memo: dict[str, Any] = {}
    return (Fit(support, loss, step, memo) for step in count())


def fit_head(
    fit: Fit, read_out: Forward, start: Weights, z: Tensor, learning_rate: float | Tensor
) -> Iterator[Weights]:
    """Yield heads along gradient descent on features ``z`` of the support set of ``fit``, from ``start``."""
    return gradient_descent(lambda w, x: read_out(w, z), start, fit.support, fit.loss, descent(learning_rate))


def answer(
    fit: Fit,
    embed: Forward,
    weights: Weights,
    x: Tensor,
    heads: Callable[[Tensor], Iterator[Weights]],
    read_out: Forward,
) -> Tensor:
    """Return the outputs for ``x`` of the head after the steps of ``fit``; ``heads`` maps support features to heads."""
    memo = fit.memo
    if memo.get("x") is not x:
        z, queries = embed_together(embed, weights, fit.support, x)
        memo |= {"x": x, "queries": queries, "heads": heads(z), "found": []}
    memo["found"] += islice(memo["heads"], max(fit.step + 1 - len(memo["found"]), 0))
    return read_out(memo["found"][fit.step], memo["queries"])
