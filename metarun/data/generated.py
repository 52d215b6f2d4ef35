"""Pictures of a class as their owner has them, of which further ones are drawn."""

from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from metarun.contracts import Examples, Predict, Request, Tree
from metarun.data.converters import Drawings
from metarun.data.pictures import Pictures, read_pictures
from metarun.data.portable import portable
from metarun.errors import UserError, require
from metarun.random import fold, fresh_seed, normal
from metarun.targets.adversarial import Adversarial
from metarun.targets.flow import Flow


def drawn(target: Flow | Adversarial, steps: int, predict: Predict, data: Tree) -> Tensor:
    """Return pictures ``[pictures, *shape]`` with values from −1 to 1, one for each of ``data``."""
    noise = normal(fold(fresh_seed(), 0), (len(data["x"]), *target.noise)).to(data["x"])
    return target.sampled(predict, noise, steps).clamp(-1, 1)


class OfClass:
    """Pictures of one class, and further ones that are drawn (`metarun.contracts.UserTask`)."""

    def __init__(self, form: "Drawn", x: Any, y: Any) -> None:
        require(y is None, "pictures of a class have no y besides themselves; leave it out")
        self.form, self.x = form, form.pictures.inputs(x)

    @cached_property
    def support(self) -> Tree:
        """The support set ``x`` (`metarun.targets.flow.Flow`)."""
        return {"x": 2 * self.x - 1}

    def ask(self, x: Any) -> Request:
        """Refuse.

        Raises:
            UserError: always, since nothing is answered.
        """
        raise UserError("This learner draws pictures and predicts nothing; call sample(N), or set --count N.")

    def draw(self, x: Any, steps: int | None = None) -> Request:
        """Return the request for ``x`` pictures, as arrays of bytes ``[size, size]`` or ``[size, size, 3]``.

        ``steps`` is the number of steps of a flow from noise to a picture.
        """
        form, steps = self.form, self.form.steps if steps is None else steps
        require(isinstance(x, int) and x >= 1, f"x must be a number of pictures, at least 1, not {x!r}")
        require(steps >= 1, f"steps must be at least 1, not {steps}")
        return Request({"x": torch.zeros(x, *form.target.shape)}, partial(drawn, form.target, steps), self._pixels)

    def _pixels(self, made: Tensor) -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
        """Return pictures as arrays of bytes; drawings are dark on light paper."""
        share = (made + 1) / 2
        share = 1 - share if isinstance(self.form.pictures, Drawings) else share
        pixels = (255 * share).round().to(torch.uint8).movedim(1, -1)
        return [one[..., 0] if one.shape[-1] == 1 else one for one in pixels.numpy()]

    def rows(self, answer: np.ndarray[Any, Any], truth: Any) -> list[dict[str, Any]]:
        """Return a picture as a row of a table."""
        return [{"picture": Image.fromarray(answer)}]


@portable
@dataclass(frozen=True)
class Drawn:
    """Pictures of a class as their owner has them (`metarun.contracts.TaskConverter`)."""

    pictures: Pictures | Drawings
    """What makes inputs of pictures, with values from 0 to 1."""
    target: Flow | Adversarial
    steps: int
    """Number of steps of a flow from noise to a picture."""

    def task(self, x: Any, y: Any) -> OfClass:
        """Return a user's task.

        Args:
            x: pictures, as for `metarun.data.pictures.Pictures.inputs`.
            y: None.

        Raises:
            ValueError: there is a y.
            UserError: a picture cannot be read.
        """
        return OfClass(self, x, y)

    def read(self, path: Path) -> Examples:
        """Read a picture or a folder of pictures.

        Raises:
            ValueError: there is no picture.
        """
        found = read_pictures(path)
        return Examples(found.x, None, found.names)
