"""What a score is called and how it is read. Free of torch, so that tables of results come at once."""

import math
from typing import NamedTuple


class Metric(NamedTuple):
    """A kind of score."""

    name: str
    higher_is_better: bool
    percent: bool = False
    """Whether it is a fraction that is read as a percentage."""

    @property
    def scale(self) -> float:
        """What a score is multiplied by to be read."""
        return 100.0 if self.percent else 1.0

    @property
    def label(self) -> str:
        """The name with its unit."""
        return f"{self.name} (%)" if self.percent else self.name

    def text(self, value: float | None) -> str:
        """A score to be read: a percentage, or three decimals."""
        if value is None or math.isnan(value):
            return "–"
        return f"{100 * value:.2f} %" if self.percent else f"{value:.3f}"

    def interval(self, value: float, half_width: float) -> str:
        """A score and the half-width of its confidence interval, to be read."""
        if self.percent:
            return f"{100 * value:.2f} ± {100 * half_width:.2f} %"
        return f"{value:.3f} ± {half_width:.3f}"
