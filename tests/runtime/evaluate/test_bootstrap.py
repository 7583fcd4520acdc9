"""Bootstrap intervals against what theory says of means."""

from __future__ import annotations

import numpy as np
import pytest

from runtime.evaluate.bootstrap import Estimate, bootstrap


def test_the_interval_of_a_mean_is_that_of_its_standard_error() -> None:
    values = np.random.default_rng(1).normal(5.0, 2.0, 400)
    (found,) = bootstrap(len(values), lambda weights: np.array([weights @ values / weights.sum()]))
    assert found.value == pytest.approx(values.mean())
    assert found.interval is not None
    error = 1.96 * values.std() / np.sqrt(len(values))
    assert found.interval == pytest.approx((values.mean() - error, values.mean() + error), abs=0.15 * error)
    again = bootstrap(len(values), lambda weights: np.array([weights @ values / weights.sum()]))
    assert again == [found], "drawn by a fixed seed"


def test_paired_statistics_are_drawn_together() -> None:
    a = np.random.default_rng(0).normal(size=100)
    b = a - 1
    (found,) = bootstrap(100, lambda w: np.array([w @ (a - b) / w.sum()]))
    assert found.value == pytest.approx(1)
    assert found.interval is None, "nothing is known of what varies where nothing does"


def test_one_sample_has_no_interval() -> None:
    assert bootstrap(1, lambda weights: weights * 3) == [Estimate(3.0)]
    assert Estimate(0.5).shown() == "50.00"
    assert Estimate(0.5, (0.25, 0.75)).shown() == "50.00 [25.00, 75.00]"


def test_an_end_that_is_nothing_but_rounding_is_zero() -> None:
    """`[-0.000442, 8.33e-18]` is `[-0.000442, 0]`."""
    drops = np.array([-4e-4] + [0.1 + 0.2 - 0.3] * 9)
    (found,) = bootstrap(len(drops), lambda weights: np.array([weights @ drops / weights.sum()]))
    assert found.interval is not None
    assert found.interval[0] < -1e-5
    assert found.interval[1] == 0
