"""What examples/pays.py computes from accuracies."""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist, mean, variance
from typing import NamedTuple

import numpy as np

NODES, WEIGHTS = np.polynomial.legendre.leggauss(200)  # on -1 ... 1


class Difference(NamedTuple):
    """Of two means, by Welch's test, whose variances need not be equal."""

    mean: float
    error: float  # its standard error
    freedom: float  # degrees of

    @classmethod
    def of(cls, a: Sequence[float], b: Sequence[float]) -> "Difference":
        """The mean of a less that of b. Both need two values."""
        parts = [variance(values) / len(values) for values in (a, b)]
        error = math.sqrt(sum(parts))
        least = min(len(a), len(b)) - 1
        if not error:
            return cls(mean(a) - mean(b), 0.0, least)
        each = (part**2 / (len(v) - 1) for part, v in zip(parts, (a, b), strict=True))
        return cls(mean(a) - mean(b), error, sum(parts) ** 2 / sum(each))

    def p_above(self, bound: float) -> float:
        """The one-sided p of "the true difference is at most ``bound``"."""
        if not self.error:
            return 0.0 if self.mean > bound else 1.0
        return beyond((self.mean - bound) / self.error, self.freedom)

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Two-sided: it holds the true difference with this probability."""
        half = self.error * quantile((1 + level) / 2, self.freedom)
        return self.mean - half, self.mean + half


def beyond(t: float, freedom: float) -> float:
    """P(T > t) of Student's t.

    With t = sqrt(freedom) tan(angle) the density is a power of a cosine, on a finite interval.
    """
    if t < 0:
        return 1 - beyond(-t, freedom)
    start = math.atan(t / math.sqrt(freedom))
    # beyond 40 deviations there is nothing, and many degrees leave little of the interval
    half = min(math.pi / 2 - start, 40 / math.sqrt(freedom)) / 2
    angles = start + half * (1 + NODES)
    area = half * float(WEIGHTS @ np.cos(angles) ** (freedom - 1))
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    return area * math.exp(log_scale) / math.sqrt(math.pi)


def quantile(probability: float, freedom: float) -> float:
    """The t that T is below with this probability."""
    return _root(lambda t: 1 - probability - beyond(t, freedom), -1e4, 1e4)


def _root(rising: Callable[[float], float], low: float, high: float) -> float:
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if rising(middle) > 0 else (middle, high)
    return (low + high) / 2


def runs_needed(deviation: float, margin: float, level: float = 0.01, power: float = 0.8) -> int:
    """Runs of each of two arms so that a one-sided test sees a difference of ``margin``.

    The formula for a known deviation, with Guenther's correction for one that is estimated.
    """
    alpha, beta = (NormalDist().inv_cdf(p) for p in (1 - level, power))
    return math.ceil(2 * ((alpha + beta) * deviation / margin) ** 2 + alpha**2 / 4)
