"""The name of a score and how it is displayed. This module does not import torch, so that tables appear at once."""

import math
from typing import NamedTuple

MOST_DECIMALS = 8


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
        """Return a score in human-readable form: as a percentage, or with three decimals; more if it is smaller."""
        if value is None or math.isnan(value):
            return "–"
        return f"{self.scale * value:{self.precision(value)}}{' %' * self.percent}"

    def interval(self, value: float, half_width: float) -> str:
        """Return a score and the half-width of its confidence interval in human-readable form."""
        if math.isnan(value):
            return "–"
        # A half-width that is nothing but rounding errors asks for no further decimals.
        precision = self.precision(half_width if half_width > 1e-6 * abs(value) else value)
        return f"{self.scale * value:{precision}} ± {self.scale * half_width:{precision}}{' %' * self.percent}"

    def precision(self, value: float) -> str:
        """Return the format in which a number is displayed: one that is not 0 is not rounded to 0."""
        usual = 2 if self.percent else 3
        size = abs(self.scale * value)
        # What is smaller still is a rounding error of what should be 0.
        if not 1e-15 < size < 0.5 * 10**-usual:
            return f".{usual}f"
        digits = 1 - math.floor(math.log10(size))
        return f".{digits}f" if digits <= MOST_DECIMALS else ".1e"
