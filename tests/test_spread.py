"""How far figures scatter: bounds that hold what another run finds as often as they say."""

from __future__ import annotations

import math
import random

import pytest

from diffseg.bench import spread
from diffseg.bench.spread import Ratio


@pytest.mark.parametrize(("freedom", "expected"), [(1, 12.7062), (2, 4.3027), (5, 2.5706), (10, 2.2281), (30, 2.0423)])
def test_student_quantiles_are_the_tables(freedom: int, expected: float) -> None:
    assert spread.student_quantile(0.975, freedom) == pytest.approx(expected, abs=5e-5)


def test_student_quantiles_are_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    for freedom in range(1, 40):
        for share in (0.6, 0.9, 0.975, 0.9995):
            assert spread.student_quantile(share, freedom) == pytest.approx(stats.t.ppf(share, freedom), rel=1e-9)


def test_percentiles_are_linear_between_samples() -> None:
    assert spread.percentile([1.0, 2.0, 3.0, 4.0, 5.0], 20) == pytest.approx(1.8)


def test_ratio_is_taken_round_by_round() -> None:
    slow, fast = [2.0, 40.0, 6.0], [1.0, 10.0, 3.0]  # the second round was disturbed
    assert spread.ratio([slow], [fast]) == Ratio(pytest.approx(2.0), None, None)


def test_bounds_by_hand() -> None:
    """Three passes of one round at log 2 and 0.1 off it on both sides: s = 0.1, t = 4.3027 for 95 % and 2."""
    passes = [[2 * math.exp(off)] for off in (-0.1, 0.0, 0.1)]
    median, low, high = spread.ratio(passes, [[1.0]] * 3)
    half = 4.3027 * 0.1 * math.sqrt(2 * math.pi / (2 * 3 + math.pi - 2))
    assert median == pytest.approx(2)
    assert high == pytest.approx(2 * math.exp(half), rel=1e-4)
    assert low == pytest.approx(2 * math.exp(-half), rel=1e-4)


def test_bounds_hold_every_pass() -> None:
    passes = [[1.0]] * 30 + [[3.0], [0.4]]
    assert spread.ratio(passes, [[1.0]] * 32) == (1.0, pytest.approx(0.4), pytest.approx(3.0))


def test_passes_that_agree_by_chance_do_not_narrow_the_bounds() -> None:
    """Medians equal, rounds apart: what the rounds' scatter allows the medians."""
    passes = [[1.0, 2.0, 4.0]] * 5
    _, low, high = spread.ratio(passes, [[1.0] * 3] * 5)
    error = math.log(2) * math.sqrt(math.pi / (2 * 3 + math.pi - 2))
    half = 2.7764 * error * math.sqrt(2 * math.pi / (2 * 5 + math.pi - 2))
    assert high / low == pytest.approx(math.exp(2 * half), rel=1e-4)


def test_what_means_nothing_has_no_ratio() -> None:
    good, drowned = [2.0, 3.0, 4.0], [-1.0, -2.0, 6.0]
    assert spread.ratio([good, drowned], [good, good]) is None
    assert spread.ratio([good, good], [good, drowned]) is None
    assert spread.ratio([good, [-1.0, 2.0, 2.0]], [good, good]) is not None
    assert spread.ratio([good, [-1.0, 2.0]], [good, good]) is None  # half of them
    assert spread.ratio([good, []], [good, []]) is None
    assert spread.ratio([], []) is None


@pytest.mark.parametrize("between", [0.0, 0.05, 0.3])
@pytest.mark.parametrize(("passes", "rounds"), [(3, 2), (6, 1), (6, 4)])
def test_another_run_lies_within_the_bounds_as_often_as_they_say(between: float, passes: int, rounds: int) -> None:
    """Simulated runs: passes that scatter by ``between``, rounds by 0.05."""
    random.seed(1)
    ones = [[1.0] * rounds] * passes

    def simulated() -> Ratio:
        centres = [random.gauss(0, between) for _ in range(passes)]
        times = [[math.exp(random.gauss(centre, 0.05)) for _ in range(rounds)] for centre in centres]
        found = spread.ratio(times, ones)
        assert found is not None
        return found

    pairs = [(simulated(), simulated()) for _ in range(1000)]
    within = sum(one.low <= other.median <= one.high for one, other in pairs) / len(pairs)
    overlap = sum(max(one.low, other.low) <= min(one.high, other.high) for one, other in pairs) / len(pairs)
    assert within > spread.LEVEL - 0.02  # three standard errors
    assert overlap > 0.995
    if rounds == 1:
        assert within < 0.99  # no wider than need be
