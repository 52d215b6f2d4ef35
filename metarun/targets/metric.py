"""The name of a score and how it is displayed. This module does not import torch, so that tables appear at once."""

import math
from typing import NamedTuple


class Metric(NamedTuple):
    """A kind of score."""

    name: str
    higher_is_better: bool
    percent: bool = False
    """Whether the score is a fraction that is displayed as a percentage."""

    @property
    def scale(self) -> float:
        """The factor by which a score is multiplied for display."""
        return 100.0 if self.percent else 1.0

    @property
    def label(self) -> str:
        """The name with its unit."""
        return f"{self.name} (%)" if self.percent else self.name

    def text(self, value: float | None) -> str:
        """Return a score in human-readable form: as a percentage, or with three decimals."""
        if value is None or math.isnan(value):
            return "–"
        return f"{100 * value:.2f} %" if self.percent else f"{value:.3f}"

    def interval(self, value: float, half_width: float) -> str:
        """Return a score and the half-width of its confidence interval in human-readable form."""
        if math.isnan(value):
            return "–"
        if self.percent:
            return f"{100 * value:.2f} ± {100 * half_width:.2f} %"
        return f"{value:.3f} ± {half_width:.3f}"
