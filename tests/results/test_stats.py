import random

import numpy as np
import pytest
from scipy import stats as scipy_stats
from sklearn.metrics import f1_score

from fedtune.results.stats import compare, macro_f1, mcnemar, mean_interval, proportion_interval, student


def test_macro_f1_is_scikit_learns() -> None:
    generator = random.Random(0)
    for _ in range(20):
        gold = [generator.choice("abc") for _ in range(40)]
        predicted = [generator.choice("abcd") for _ in range(40)]
        assert macro_f1(gold, predicted) == pytest.approx(f1_score(gold, predicted, average="macro", zero_division=0))


def test_macro_f1_of_as_many_labels_as_items_is_known() -> None:
    labels = [str(i) for i in range(100_000)]
    assert macro_f1(labels, labels) == 1
    assert macro_f1(labels, labels[:50_000] + ["x"] * 50_000) == pytest.approx(50_000 / 100_001)


def test_mcnemar_is_scipys_exact_binomial() -> None:
    for lost, won in [(0, 0), (3, 9), (10, 10), (1, 20)]:
        want = scipy_stats.binomtest(lost, lost + won).pvalue if lost + won else 1.0
        assert mcnemar(lost, won) == pytest.approx(want)


def test_proportion_interval_is_near_the_exact_one_and_never_empty() -> None:
    found = proportion_interval(60, 100)
    exact = scipy_stats.binomtest(60, 100).proportion_ci()
    assert found is not None
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high), abs=0.015)
    none, everything = proportion_interval(0, 50), proportion_interval(50, 50)
    assert none is not None
    assert everything is not None
    assert (none.low, none.high) == pytest.approx((0, scipy_stats.binomtest(0, 50).proportion_ci().high))
    assert (everything.low, everything.high) == pytest.approx((scipy_stats.binomtest(50, 50).proportion_ci().low, 1))
    assert proportion_interval(0, 0) is None


def test_mean_interval_covers_the_normal_one() -> None:
    values = list(np.random.default_rng(1).normal(size=400))
    found = mean_interval(values)
    assert found is not None
    half = 1.96 * np.std(values) / 20
    assert (found.low, found.high) == pytest.approx((np.mean(values) - half, np.mean(values) + half), abs=0.02)


def test_paired_comparison_sees_what_unpaired_would_not() -> None:
    generator = np.random.default_rng(0)
    first = (generator.random(400) < 0.5).astype(float)
    second = first.copy()
    second[np.flatnonzero(first == 0)[:20]] = 1.0
    found = compare(list(first), list(second))
    assert found.difference == pytest.approx(0.05)
    assert found.interval.low > 0
    assert (found.only_first, found.only_second) == (0, 20)
    assert found.p == pytest.approx(2 * 0.5**20)


def test_the_same_twice_is_no_difference_and_unequal_lengths_are_refused() -> None:
    same = compare([0.1, 0.5, 0.9], [0.1, 0.5, 0.9])
    assert (same.difference, same.only_first) == (0.0, None)
    with pytest.raises(ValueError, match="cannot pair"):
        compare([1.0], [1.0, 0.0])


def test_intervals_are_the_same_every_time() -> None:
    assert proportion_interval(31, 77) == proportion_interval(31, 77)


def test_mcnemar_holds_for_thousands_of_items() -> None:
    from scipy.stats import binomtest

    from fedtune.results.stats import mcnemar

    for a, b in ((700, 900), (3000, 3100), (0, 2000), (5, 1)):
        assert mcnemar(a, b) == pytest.approx(binomtest(min(a, b), a + b, 0.5).pvalue, rel=1e-9, abs=1e-300)


def test_an_interval_over_runs_is_students() -> None:
    assert student([0.5]) == {"mean": 0.5, "half": None}
    for count in [*range(2, 60), 100, 400, 401]:
        found = student([0.1 * i for i in range(count)])
        spread = scipy_stats.tstd([0.1 * i for i in range(count)]) / count**0.5
        assert found["mean"] == pytest.approx(0.05 * (count - 1))
        assert found["half"] == pytest.approx(scipy_stats.t.ppf(0.975, count - 1) * spread, rel=1e-9)
