import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.statistics import central_cv, describe, drift, percentile


@pytest.mark.parametrize(
    ("count", "percentage", "index"),
    [
        # max(n - 1 - int((1 - p/100) * n), 0), worked by hand
        (1, 99, 0),
        (2, 50, 0),
        (4, 90, 3),
        (10, 95, 9),
        (100, 99, 98),
        (100, 50, 49),
        (1000, 99, 989),
        (1500, 99.9, 1498),
        (7, 0, 0),
        (7, 100, 6),
        (20, 95, 18),
    ],
)
def test_the_percentile_is_trtexecs_index_formula(count: int, percentage: float, index: int) -> None:
    assert percentile(np.arange(count, dtype=float), percentage) == index


@given(st.lists(st.floats(0.001, 1e3), min_size=1, max_size=300), st.floats(0, 100))
def test_a_percentile_is_one_of_the_values_and_grows_with_p(values: list[float], p: float) -> None:
    ascending = sorted(values)
    assert percentile(ascending, p) in ascending
    assert percentile(ascending, 0) <= percentile(ascending, p) <= percentile(ascending, 100) == ascending[-1]


@pytest.mark.parametrize("percentage", [-1, 100.5, float("nan")])
def test_a_percentile_outside_0_to_100_is_an_error(percentage: float) -> None:
    with pytest.raises(ValueError, match="not in"):
        percentile([1.0], percentage)


def test_no_values_have_no_percentile() -> None:
    with pytest.raises(ValueError, match="no queries"):
        percentile([], 50)


def test_an_even_count_has_the_mean_of_its_two_middle_values_as_median() -> None:
    found = describe(np.array([4.0, 1.0, 3.0, 2.0]), (90.0,))
    assert (found.min, found.max, found.mean, found.median) == (1, 4, 2.5, 2.5)
    assert found.cv == pytest.approx(np.std([1, 2, 3, 4]) / 2.5)


def test_one_page_fault_does_not_make_the_central_spread_large() -> None:
    values = np.full(1000, 1.0)
    values[500] = 100.0
    assert central_cv(values) == 0
    assert describe(values, ()).cv > 1


def test_drift_compares_the_last_third_with_the_first() -> None:
    assert drift(np.r_[np.full(20, 1.0), np.full(20, 1.05), np.full(20, 1.1)]) == pytest.approx(0.1)
    assert drift(np.ones(29)) is None
