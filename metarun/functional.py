"""Modules as functions of their parameters, and the inner step that gradient learners share."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import count, islice, repeat
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from metarun.errors import require
from metarun.nn.substitutes import SafeForward
from metarun.transforms import gradient
from metarun.types import Loss, Spec, Tree, Weights

Forward = Callable[[Weights, Any], Tensor]
"""(weights, x) → output."""


def forward_of(module: nn.Module) -> Forward:
    """The forward pass of ``module`` as a function of its parameters; what they leave out stays as the module has it.

    Torch's own layers are right inside (`metarun.nn.substitutes`).
    """
    return SafeForward(module)


@contextmanager
def seeded(generator: torch.Generator) -> Iterator[None]:
    """Modules built inside are initialised from ``generator``'s seed; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(generator.initial_seed())
        yield


def own_network(
    build: Callable[[], nn.Module],
) -> tuple[Callable[[Weights, Any], Any], Callable[[nn.Module, torch.Generator], Weights]]:
    """A network of an algorithm's own, beside the configured model: its forward pass, and freshly drawn weights.

    Weights are drawn from the generator's seed, in dtype and on device of the model that is given.
    """
    with torch.random.fork_rng(devices=[]):
        forward = forward_of(build())

    def drawn(model: nn.Module, generator: torch.Generator) -> Weights:
        with seeded(generator):
            return parameters_of(build().to(next(model.parameters())))

    return forward, drawn


def parameters_of(module: nn.Module) -> Weights:
    """A copy of the parameters of ``module`` by name; frozen ones (``requires_grad=False``) are constants instead."""
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def at_step(support: Tree, step: int) -> Tree:
    """What the ``step``-th step of adaptation, from 0 on, sees of a support set: for all families but control the same.

    Where episodes have a seed (``tape``, see `metarun.tasks.control`), each step plays new ones.
    """
    return {**support, "step": step} if "tape" in support else support


def support_gradient(forward: Forward, weights: Weights, support: Tree, loss: Loss) -> Weights:
    """Gradient of the support loss of one task at ``weights``."""
    return cast(Weights, gradient(lambda w: loss(partial(forward, w), support)[0], weights))


def gradient_descent(
    forward: Forward,
    weights: Weights,
    support: Tree,
    loss: Loss,
    learning_rates: Iterable[float | Tensor | Weights],
    first_order: bool = False,
) -> Iterator[Weights]:
    """Yield the weights before every step of gradient descent on the support loss, one for each learning rate.

    A learning rate is a number, or one for each weight by name.

    With ``first_order`` the gradient counts as a constant: it is taken at detached weights, which saves the
    graph, while the path from the old weights to the new ones stays.
    """
    for step, learning_rate in enumerate(learning_rates):
        yield weights
        start = {name: w.detach() for name, w in weights.items()} if first_order else weights
        slope = support_gradient(forward, start, at_step(support, step), loss)
        rates = learning_rate if isinstance(learning_rate, dict) else dict.fromkeys(weights, learning_rate)
        weights = {name: w - rates[name] * slope[name] for name, w in weights.items()}


def part_descent(
    forward: Forward,
    fixed: Weights,
    part: Weights,
    support: Tree,
    loss: Loss,
    learning_rate: float,
    first_order: bool = False,
) -> Iterator[Weights]:
    """``gradient_descent`` on ``part`` without end; the loss depends on the ``fixed`` weights too, which stay."""
    still = {name: w.detach() for name, w in fixed.items()} if first_order else fixed

    def partly(weights: Weights, x: Any) -> Tensor:
        return forward({**still, **weights}, x)

    return gradient_descent(partly, part, support, loss, repeat(learning_rate), first_order)


def keep_support(theta: Tree, support: Tree, loss: Loss) -> Iterator[Tree | None]:
    """``Algorithm.adapt`` of a learner that conditions on the support set: no state without it, then itself."""
    yield None
    yield support


def channels_last(x: Tensor) -> Tensor:
    """Images ``[n, channels, height, width]`` with channels innermost in memory, under ``torch.func.vmap`` too, where
    torch's own way is not supported."""
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def embed_together(embed: Forward, weights: Weights, support: Tree, x: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings of the support examples and of ``x``, made in one batch, whose statistics they share."""
    n, both = len(support["x"]), torch.cat([support["x"], x])
    # The weights are the same for all tasks, so these are plain convolutions, which a GPU wants so; a CPU does not
    # (docs/performance.md).
    z = embed(weights, channels_last(both) if both.is_cuda and both.ndim == 4 else both)
    return z[:n], z[n:]


class Fit(NamedTuple):
    """A head that ``step`` steps fit to a support set, once its features are known."""

    support: Tree
    loss: Loss
    step: int
    memo: dict[str, Any]
    """What the fits of one support set share: features, and the heads that were found along the way."""


def fits(theta: Tree, support: Tree, loss: Loss) -> Iterator[Fit]:
    """``Algorithm.adapt`` of a learner that fits a head on features of support set and queries embedded together.

    Where a model normalises by the batch, features of a small support set by itself are others than it was trained on.
    """
    memo: dict[str, Any] = {}
    return (Fit(support, loss, step, memo) for step in count())


def fit_head(
    fit: Fit, read_out: Forward, start: Weights, z: Tensor, learning_rate: float | Tensor
) -> Iterator[Weights]:
    """Heads along gradient descent on features ``z`` of the support set of ``fit``, from ``start``."""
    return gradient_descent(lambda w, x: read_out(w, z), start, fit.support, fit.loss, repeat(learning_rate))


def answer(
    fit: Fit,
    embed: Forward,
    weights: Weights,
    x: Tensor,
    heads: Callable[[Tensor], Iterator[Weights]],
    read_out: Forward,
) -> Tensor:
    """Outputs for ``x`` of the head after the steps of ``fit``; ``heads``: features of the support set → heads."""
    memo = fit.memo
    if memo.get("x") is not x:
        z, queries = embed_together(embed, weights, fit.support, x)
        memo |= {"x": x, "queries": queries, "heads": heads(z), "found": []}
    memo["found"] += islice(memo["heads"], max(fit.step + 1 - len(memo["found"]), 0))
    return read_out(memo["found"][fit.step], memo["queries"])


def trunk_and_head(model: nn.Module, spec: Spec, algorithm: str) -> tuple[nn.Module, nn.Linear]:
    """The two parts of ``model`` that ``algorithm`` needs apart: features, and the linear layer on them."""
    require(
        spec.kind != "control",
        f"{algorithm} learns from examples, and this task has actions; choose an algorithm that acts, such as maml",
    )
    trunk, head = getattr(model, "trunk", None), getattr(model, "head", None)
    if not isinstance(trunk, nn.Module) or not isinstance(head, nn.Linear):
        raise ValueError(
            f"{algorithm} needs a model with a module 'trunk' (input → features) and a linear layer 'head' "
            f"(features → output), as metarun's own models have, and {type(model).__name__} lacks them"
        )
    return trunk, head


def head_names(model: nn.Module, algorithm: str) -> set[str]:
    """Names of the parameters of ``model.head``; a model that has none, or nothing else, is refused."""
    names = {name for name, _ in model.named_parameters()}
    heads = {name for name in names if name.startswith("head.")}
    kind = type(model).__name__
    require(len(heads) > 0, f"{algorithm} needs a model with a part 'head'; {kind} has none, choose another")
    require(heads != names, f"{algorithm} needs a model with a body before its head; {kind} has none, choose another")
    return heads


def unit_rows(x: Tensor) -> Tensor:
    """``x [n, d]`` with rows of length one; a row of zeros stays one, with finite derivatives."""
    return x / (x.square().sum(1, keepdim=True) + 1e-12).sqrt()


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared Euclidean distance of every row of ``a [n, d]`` to every row of ``b [m, d]``: ``[n, m]``."""
    return (a[:, None] - b[None]).square().sum(-1)


def multi_head(queries: Tensor, keys: Tensor, values: Tensor, heads: int, weight: Tensor | None = None) -> Tensor:
    """Values ``[n, width]`` weighed for every query ``[m, width]`` by scaled dot products, a share of the width a head.

    Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, §3.2: ``[m, width]``, not yet mixed. Values whose ``weight
    [n]`` is 0 are not seen.
    """

    def by_head(z: Tensor) -> Tensor:
        return z.view(len(z), heads, -1).movedim(1, 0)

    q, k, v = map(by_head, (queries, keys, values))
    logits = q @ k.transpose(1, 2) / math.sqrt(k.shape[-1])
    weights = (logits if weight is None else logits.masked_fill(weight == 0, -math.inf)).softmax(-1)
    return torch.cat((weights @ v).unbind(0), -1)


@contextmanager
def full_precision(like: Tensor) -> Iterator[None]:
    """Inside, products on the device of ``like`` are not rounded by autocast."""
    device = like.device.type
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
        yield


def lstm(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """One step of an LSTM (Hochreiter and Schmidhuber 1997): hidden state and cell ``[..., width]``.

    ``gates [..., 4 width]`` are linear in input and hidden state. Written out, so that it maps and differentiates.
    """
    enter, keep, leave, new = gates.chunk(4, -1)
    # Kept rather than forgotten before anything is learned (Gers et al. 2000).
    cell = (keep + 1).sigmoid() * cell + enter.sigmoid() * new.tanh()
    return leave.sigmoid() * cell.tanh(), cell


def one_hot(index: Tensor, size: int, like: Tensor) -> Tensor:
    """``index [...]`` as ``[..., size]`` in the dtype of ``like``; torch's own fails under ``grad`` inside ``vmap``."""
    return (index[..., None] == torch.arange(size, device=index.device)).to(like.dtype)
