"""Which examples of a model's input are padding.

A layer that looks at the whole batch, such as batch normalisation, has to leave padding out, and a module is given
nothing but its input. So whoever calls a model says by ``weighing`` what its examples weigh, and such layers ask
``weight_of_rows``. Without padding there is nothing to say.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

from metarun.errors import UserError

current: ContextVar[Tensor | None] = ContextVar("weight", default=None)


@contextmanager
def weighing(weight: Tensor | None) -> Iterator[None]:
    """Inside, models are called on examples of this ``weight [examples]``: 1, or 0 for padding; None: no padding."""
    token = current.set(weight)
    try:
        yield
    finally:
        current.reset(token)


def present_weight() -> Tensor | None:
    """The weight of each example ``[examples]`` that models are called on here; None where there is no padding."""
    return current.get()


def weight_of_rows(rows: int) -> Tensor | None:
    """The weight of each of ``rows`` rows that a model has made of its examples, as many of each and in their order.

    Raises:
        UserError: the rows cannot be the same number for each example.
    """
    weight = current.get()
    if weight is None or len(weight) == rows:
        return weight
    if rows % len(weight):
        raise UserError(
            f"model: a layer normalises over a batch of {rows} rows, which cannot be told apart into examples and "
            f"padding, since the model was given {len(weight)} examples; keep the examples on the first axis, or take "
            "another normalisation."
        )
    return weight.repeat_interleave(rows // len(weight))
