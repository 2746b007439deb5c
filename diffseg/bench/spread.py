"""How far figures scatter, and between what bounds another run would find a ratio.

A run measures each row in passes. Within a pass rounds follow each other closely and share the state of the machine;
passes lie minutes and processes apart, as runs do. So the scatter of the passes says how far runs differ; that of the
rounds alone says too little (Kalibera and Jones, "Rigorous Benchmarking in Reasonable Time", 2013).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

LEVEL = 0.95
"""Share of runs whose figure lies in the interval."""


class Spread(NamedTuple):
    """Median and the 20th and 80th percentiles of samples."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        return cls(statistics.median(samples), percentile(samples, 20), percentile(samples, 80))


class Ratio(NamedTuple):
    """How many times faster, and the bounds between which another run finds it; None from one pass alone."""

    median: float
    low: float | None
    high: float | None


def percentile(samples: Sequence[float], share: float) -> float:
    """The percentile ``share`` of the samples, linear between two of them."""
    ordered = sorted(samples)
    position = (len(ordered) - 1) * share / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def ratio(slow: Sequence[Sequence[float]], fast: Sequence[Sequence[float]]) -> Ratio | None:
    """The ratio of times [passes][rounds], taken round by round; None if in some pass it means nothing.

    It means nothing where times are differences, and half of a pass's rounds or more come out below 0.
    """
    passes = [_quotients(*both) for both in zip(slow, fast, strict=False)]
    if not passes or not all(passes):
        return None
    centres = [statistics.median(each) for each in passes]
    centre = statistics.median(centres)
    if len(centres) == 1:
        return Ratio(math.exp(centre), None, None)
    half = _half_width(max(statistics.stdev(centres), _error_of_a_pass(passes)), len(centres))
    return Ratio(math.exp(centre), math.exp(min(centre - half, *centres)), math.exp(max(centre + half, *centres)))


def _quotients(slow: Sequence[float], fast: Sequence[float]) -> list[float]:
    """Logarithms of the quotients of one pass; none if too few mean something."""
    pairs = list(zip(slow, fast, strict=False))
    found = [math.log(one / other) for one, other in pairs if one > 0 and other > 0]
    return found if 2 * len(found) > len(pairs) else []


def _error_of_a_pass(passes: Sequence[Sequence[float]]) -> float:
    """The standard error of a pass's median that the scatter of its rounds alone would cause.

    Passes that happen to agree better than their rounds allow do not make the interval narrower.
    """
    parts = [statistics.variance(each) / len(each) * _median_factor(len(each)) for each in passes if len(each) > 1]
    return math.sqrt(statistics.mean(parts)) if parts else 0.0


def _half_width(deviation: float, passes: int) -> float:
    """Half the width of the interval that predicts another run's median of as many passes, if they scatter normally."""
    quantile = student_quantile((1 + LEVEL) / 2, passes - 1)
    return quantile * deviation * math.sqrt(2 * _median_factor(passes) / passes)


def _median_factor(count: int) -> float:
    """Variance of a median over that of a mean, for normal samples: 1 for one, towards pi / 2 for many.

    It holds for odd counts; medians of even counts scatter less, by a fifth for 2 and a tenth for 6, whose bounds are a
    twentieth too wide: on the safe side, where runs lie further apart than passes.
    """
    return count * math.pi / (2 * count + math.pi - 2)


@cache
def student_quantile(share: float, freedom: int) -> float:
    """The t below which ``share``, above a half, of Student's distribution lies, of ``freedom`` degrees of freedom."""
    low, high = 0.0, 1.0
    while _student_share(high, freedom) < share:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_share(middle, freedom) < share else (low, middle)
    return high


def _student_share(value: float, freedom: int) -> float:
    """P(t <= value) for value >= 0: the finite sums for whole degrees of freedom (Abramowitz and Stegun, 26.7.3-4)."""
    angle = math.atan2(value, math.sqrt(freedom))
    square = math.cos(angle) ** 2
    odd = freedom % 2
    term = math.sin(angle) * (math.cos(angle) if odd else 1.0)
    total = 0.0
    for step in range(2 + odd, freedom + 1, 2):
        total += term
        term *= square * (step - 1) / step
    within = 2 / math.pi * (angle + total) if odd else total
    return (1 + within) / 2
