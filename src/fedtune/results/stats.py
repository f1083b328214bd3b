"""Intervals and paired tests. Seeded, so that a re-scored result has the same numbers to the last digit."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A 95 % percentile bootstrap interval."""

    low: float
    high: float


def _percentiles(draws: np.ndarray) -> Interval:
    tail = (1 - LEVEL) / 2 * 100
    low, high = np.percentile(draws, [tail, 100 - tail])
    return Interval(float(low), float(high))


def proportion_interval(successes: int, n: int, seed: int = 0) -> Interval | None:
    """Return the bootstrap interval of successes/n over items; None for n = 0.

    Resampling n zero-or-one items with replacement is a binomial draw, so it is drawn as one. Where all
    items agree the bootstrap has no spread; then the exact (Clopper-Pearson) bound closes the open side.
    """
    if n == 0:
        return None
    edge = ((1 - LEVEL) / 2) ** (1 / n)
    if successes == 0:
        return Interval(0.0, 1 - edge)
    if successes == n:
        return Interval(edge, 1.0)
    return _percentiles(np.random.default_rng(seed).binomial(n, successes / n, RESAMPLES) / n)


def _means(values: np.ndarray, seed: int) -> np.ndarray:
    """Return the mean of each of 2,000 bootstrap samples of some values."""
    generator = np.random.default_rng(seed)
    return np.asarray([values[generator.integers(0, len(values), len(values))].mean() for _ in range(2000)])


def mean_interval(values: Sequence[float], seed: int = 0) -> Interval | None:
    """Return the bootstrap interval of a mean over items; None for no items."""
    return _percentiles(_means(np.asarray(values, dtype=np.float64), seed)) if values else None


def student_quantile(degrees: int, level: float = LEVEL) -> float:
    """Return the t that Student's |T| stays below with probability `level`.

    With t = sqrt(degrees) tan(angle) the probability is a finite sum of powers of the angle's sine and cosine
    (Abramowitz and Stegun, 26.7.3 and 26.7.4) and grows with the angle, which is found by bisection.
    `degrees` is 1 or more.
    """

    def within(angle: float) -> float:
        sine, square = math.sin(angle), math.cos(angle) ** 2
        odd = degrees % 2
        term = total = sine * math.cos(angle) if odd else sine
        for k in range(2 + odd, degrees, 2):
            term *= square * (k - 1) / k
            total += term
        return 2 / math.pi * (angle + (total if degrees > 1 else 0.0)) if odd else total

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) < level else (low, middle)
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def student(values: Sequence[float]) -> dict[str, float | None]:
    """Return mean and half width of Student's 95 % interval over runs; None for one run, of which nothing is known."""
    n = len(values)
    half = student_quantile(n - 1) * statistics.stdev(values) / math.sqrt(n) if n > 1 else None
    return {"mean": statistics.fmean(values), "half": half}


def macro_f1(gold: Sequence[str], predicted: Sequence[str]) -> float:
    """Return the mean of the F1 scores of all labels that occur, as scikit-learn's `average="macro"`."""
    hits = Counter(g for g, p in zip(gold, predicted, strict=True) if g == p)
    totals = Counter(gold)
    totals.update(predicted)
    scores = [2 * hits[label] / total for label, total in totals.items()]
    return math.fsum(scores) / len(scores) if scores else 0.0


@dataclass(frozen=True)
class Paired:
    """Two systems on the same items.

    Attributes:
        n: items both have.
        difference: second minus first, of the mean.
        interval: paired bootstrap over items.
        only_first, only_second: items that just one of them has right (None for scores that are not 0/1).
        p: exact two-sided McNemar p-value, or the bootstrap's two-sided one for other scores.
    """

    n: int
    difference: float
    interval: Interval
    only_first: int | None
    only_second: int | None
    p: float


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the exact two-sided McNemar p-value (binomial with p = 1/2 on the discordant items)."""
    n, k = only_first + only_second, min(only_first, only_second)
    if n == 0:
        return 1.0
    term, total = 1, 0
    for i in range(k + 1):
        total += term
        term = term * (n - i) // (i + 1)
    # whole numbers to the end: 2^n leaves the range of a float at 1024 items
    return min(1.0, float(2 * total / 2**n))


def compare(first: Sequence[float], second: Sequence[float], seed: int = 0) -> Paired:
    """Compare scores of two systems, item by item. Raises ValueError: no items, or not equally many."""
    if not first or len(first) != len(second):
        raise ValueError(f"cannot pair {len(first)} items with {len(second)}")
    gaps = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    draws = _means(gaps, seed)
    binary = set(first) | set(second) <= {0.0, 1.0}
    lost, won = int((gaps < 0).sum()), int((gaps > 0).sum())
    tails = min(1.0, 2 * min(float((draws <= 0).mean()), float((draws >= 0).mean())))
    return Paired(
        n=len(gaps),
        difference=float(gaps.mean()),
        interval=_percentiles(draws),
        only_first=lost if binary else None,
        only_second=won if binary else None,
        p=mcnemar(lost, won) if binary else tails,
    )
