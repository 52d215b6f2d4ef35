"""Student's t and the studentised range, from their integrals, so that no further package is needed."""

import math
from collections.abc import Callable

import numpy as np


def incomplete_beta(a: float, b: float, x: float) -> float:
    """Return the regularised incomplete beta function I_x(a, b), by Lentz's continued fraction (DLMF 8.17.22)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - incomplete_beta(b, a, 1 - x)
    front = math.exp(
        a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) - math.log(a)
    )
    tiny, c = 1e-300, 1.0
    d = 1 / (1 - (a + b) * x / (a + 1) or tiny)
    fraction = d
    for m in range(1, 10_000):
        before = fraction
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / (1 + numerator * d or tiny)
            c = 1 + numerator / c or tiny
            fraction *= c * d
        if abs(fraction - before) <= 1e-14 * abs(fraction):
            break
    return front * fraction


def t_two_sided(t: float, df: float) -> float:
    """Return the probability that Student's t with ``df`` degrees of freedom is at least ``|t|`` away from 0."""
    if math.isnan(t) or math.isnan(df):
        return math.nan
    if math.isinf(df):
        return math.erfc(abs(t) / math.sqrt(2))
    return incomplete_beta(df / 2, 0.5, df / (df + t * t)) if math.isfinite(t) else 0.0


def crossing(falling: Callable[[float], float], level: float) -> float:
    """Return where a function that falls from 0 on passes ``level``, by bisection."""
    low, high = 0.0, 1.0
    while falling(high) > level:
        low, high = high, 2 * high
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > level else (low, middle)
    return (low + high) / 2


def t_quantile(df: float, level: float = 0.05) -> float:
    """Return the t that is exceeded in absolute value with probability ``level``: 1.96 for many degrees of freedom."""
    return crossing(lambda t: t_two_sided(t, df), level)


def studentised_range(count: int, level: float = 0.05) -> float:
    """Return what the range of ``count`` independent standard normal numbers exceeds with probability ``level``.

    P(range ≤ q) = n ∫ φ(z) (Φ(z) − Φ(z − q))ⁿ⁻¹ dz
    """
    z = np.linspace(-8, 8, 2001)
    density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)

    def below(at: float) -> np.ndarray:
        return np.array([0.5 * math.erfc(-(one - at) / math.sqrt(2)) for one in z])

    up_to = below(0.0)
    return crossing(
        lambda q: 1 - count * float((density * (up_to - below(q)) ** (count - 1)).sum()) * float(z[1] - z[0]), level
    )
