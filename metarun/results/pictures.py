"""Grids of pictures: what is known, what a learner makes of it, and what is true."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from metarun.results.plots import blank_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNKNOWN = (0.80, 0.87, 0.95)
"""The colour of pixels that are NaN."""
EDGE = 2
"""Pixels between two pictures."""


def in_colour(picture: Tensor, ink: bool) -> np.ndarray[tuple[int, int, int], np.dtype[np.float64]]:
    """Return a picture ``[height, width, 1 or 3]`` as RGB; NaN in light blue. With ``ink``, 1 is black."""
    found = picture.double().numpy()
    unknown = np.isnan(found).any(-1)
    found = np.broadcast_to(1 - found if ink else found, (*found.shape[:2], 3)).clip(0, 1)
    return np.where(unknown[..., None], UNKNOWN, found)


def grid_of_pictures(columns: Mapping[str, Sequence[Tensor]], ink: bool = False) -> "Figure":
    """Draw a column of pictures under each name; pictures are ``[height, width, 1 or 3]`` with values from 0 to 1.

    A picture may be a mosaic of several. Those of a column have the same width, and those of a row the same height.
    """
    rows = len(next(iter(columns.values())))
    painted = [[in_colour(picture, ink) for picture in column] for column in columns.values()]
    heights = [painted[0][row].shape[0] for row in range(rows)]
    widths = [column[0].shape[1] for column in painted]
    gap = 3 * EDGE
    canvas = np.ones((sum(heights) + gap * (rows - 1), sum(widths) + gap * (len(widths) - 1), 3))
    for column, pictures in enumerate(painted):
        left = sum(widths[:column]) + gap * column
        for row, picture in enumerate(pictures):
            top = sum(heights[:row]) + gap * row
            canvas[top : top + heights[row], left : left + widths[column]] = picture
    figure = blank_figure(7.2, 0.9 + 6.8 * canvas.shape[0] / canvas.shape[1])
    axis = figure.subplots()
    axis.imshow(canvas, interpolation="nearest")
    centres = [sum(widths[:column]) + gap * column + widths[column] / 2 for column in range(len(widths))]
    axis.set_xticks(centres, list(columns))
    axis.xaxis.tick_top()
    axis.set_yticks([])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    return figure


def mosaic(pictures: Tensor, across: int) -> Tensor:
    """Return ``pictures [n, channels, height, width]`` as one picture, ``across`` in a row; empty places are NaN."""
    n, channels, height, width = pictures.shape
    down = -(-n // across)
    whole = pictures.new_full((down * (height + EDGE) - EDGE, across * (width + EDGE) - EDGE, channels), float("nan"))
    for i in range(n):
        top, left = i // across * (height + EDGE), i % across * (width + EDGE)
        whole[top : top + height, left : left + width] = pictures[i].permute(1, 2, 0)
    return whole
