"""Modules as functions of their parameters."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from metarun.contracts import Weights
from metarun.errors import require
from metarun.nn.substitutes import SafeForward

Forward = Callable[[Weights, Any], Tensor]
"""(weights, x) → output."""


def forward_of(module: nn.Module) -> Forward:
    """The forward pass of ``module`` as a function of its parameters; missing parameters are taken from the module.

    Torch's own layers have correct derivatives inside (`metarun.nn.substitutes`).
    """
    return SafeForward(module)


@contextmanager
def seeded(generator: torch.Generator) -> Iterator[None]:
    """Inside, modules are initialised from ``generator``'s seed; torch's global generator is restored afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(generator.initial_seed())
        yield


def own_network(
    build: Callable[[], nn.Module], model: nn.Module
) -> tuple[Callable[[Weights, Any], Any], Callable[[torch.Generator], Weights]]:
    """Return the forward pass of an algorithm's additional network, and a function that draws its weights.

    The network is separate from the configured ``model``. Weights are drawn from the generator's seed, in the dtype and
    on the device of ``model``.
    """
    with torch.random.fork_rng(devices=[]):
        forward = forward_of(build())

    def drawn(generator: torch.Generator) -> Weights:
        with seeded(generator):
            return parameters_of(build().to(number_like(model, 0.0)))

    return forward, drawn


def parameters_of(module: nn.Module) -> Weights:
    """A copy of the parameters of ``module`` by name, except for frozen ones (``requires_grad=False``)."""
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def number_like(model: nn.Module, value: float) -> Tensor:
    """``value`` as a scalar in the dtype and on the device of what ``model`` learns, or of its frozen parameters.

    A frozen parameter may be of another dtype, such as whole numbers, in which ``value`` would be rounded.
    """
    learned_first = sorted(model.parameters(), key=lambda p: not p.requires_grad)
    first = next((p for p in learned_first if p.is_floating_point()), torch.empty(0))
    return first.detach().new_tensor(value)


def trunk_and_head(model: nn.Module, algorithm: str) -> tuple[nn.Module, nn.Linear]:
    """The two parts of ``model`` that ``algorithm`` needs apart: features, and the linear layer on them."""
    trunk, head = getattr(model, "trunk", None), getattr(model, "head", None)
    if not isinstance(trunk, nn.Module) or not isinstance(head, nn.Linear):
        raise ValueError(
            f"{algorithm} needs a model with a module 'trunk' (input → features) and a linear layer 'head' "
            f"(features → output), as metarun's own models of examples have, and {type(model).__name__} lacks them; "
            "for a policy choose an algorithm that acts, such as maml"
        )
    return trunk, head


def require_own_head(model: nn.Module, algorithm: str) -> None:
    """Raise ``ValueError`` if ``model.head`` shares a parameter with the body, from which ``algorithm`` tells it."""
    head = getattr(model, "head", None)
    inside = set(head.modules()) if isinstance(head, nn.Module) else set()
    own = {id(parameter) for part in inside for parameter in part.parameters(recurse=False)}
    shared = [
        f"{name}.{key}".lstrip(".")
        for name, part in model.named_modules()
        for key, parameter in part.named_parameters(recurse=False)
        if part not in inside and id(parameter) in own
    ]
    require(
        not shared,
        f"{algorithm} tells the head from the body, and in {type(model).__name__} they share {', '.join(shared)}; give "
        "the head its own parameters, or choose an algorithm that adapts the whole model, such as maml",
    )


def head_names(model: nn.Module, algorithm: str) -> set[str]:
    """The names of the parameters of ``model.head``.

    Raises:
        ValueError: the model has no head, nothing but a head, or a head that shares a parameter with its body.
    """
    require_own_head(model, algorithm)
    names = {name for name, _ in model.named_parameters()}
    heads = {name for name in names if name.startswith("head.")}
    kind = type(model).__name__
    require(len(heads) > 0, f"{algorithm} needs a model with a part 'head'; {kind} has none, choose another")
    require(heads != names, f"{algorithm} needs a model with a body before its head; {kind} has none, choose another")
    return heads
