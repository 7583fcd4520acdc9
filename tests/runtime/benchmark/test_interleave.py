import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from runtime.benchmark.interleave import SESSION, Ratio, bootstrap_ratio, interleave, orders
from runtime.benchmark.timing import Lane, LoopOptions, Progress, Trace


class Scripted(Lane):
    """Latencies from a function of the number of blocks so far."""

    clock = "scripted"

    def __init__(self, name: str, log: list[str], latency: Callable[[int], float]) -> None:
        self.name, self._log, self._latency = name, log, latency

    def run(self, options: LoopOptions, progress: Progress | None = None) -> Trace:
        raise NotImplementedError

    def block(self, seconds: float, minimum: int) -> NDArray[np.float64]:
        self._log.append(self.name)
        return np.full(minimum, self._latency(len(self._log)))


@pytest.mark.parametrize("count", [2, 3, 4])
def test_each_artefact_has_each_place_equally_often_and_meets_each_other_in_both_orders(count: int) -> None:
    cycle = orders(count, 2 * count)
    for place in range(count):
        assert sorted(order[place] for order in cycle) == sorted(list(range(count)) * 2)
    for a, b in itertools.permutations(range(count), 2):
        assert sum(order.index(a) < order.index(b) for order in cycle) == count


def test_lanes_take_turns_in_a_rotated_order() -> None:
    log: list[str] = []
    lanes = [Scripted(name, log, lambda _: 1.0) for name in "ABC"]
    interleave(lanes, warm_up=0, seconds=0, minimum=6)
    assert "".join(log) == "ABCBCACABCBAACBBAC"


def test_a_machine_that_slows_down_does_not_move_the_ratio() -> None:
    log: list[str] = []
    lanes = [Scripted("A", log, lambda n: 1.0 + n / 200), Scripted("B", log, lambda n: 2.0 + 2 * n / 200)]
    result = interleave(lanes, warm_up=0, seconds=0, minimum=100)
    ratio = result.ratio(1)
    assert ratio.low <= 2.0 <= ratio.high
    assert ratio.value == pytest.approx(2.0, abs=0.02)
    bare = np.median(result.latencies[0])
    assert bare > 1.3, "the bare medians did move"


@pytest.mark.parametrize("true", [0.5, 1.0, 1.7])
def test_the_interval_holds_a_known_ratio_about_as_often_as_it_says(true: float) -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for seed in range(60):
        load = rng.lognormal(0, 0.3, 80)  # common to both sides of a round
        a = load * rng.lognormal(0, 0.05, 80)
        b = true * load * rng.lognormal(0, 0.05, 80)
        ratio = bootstrap_ratio(b, a, seed=seed)
        hits += ratio.low <= true <= ratio.high
        assert ratio.value == pytest.approx(true, rel=0.05)
    assert hits >= 50


def test_steady_rounds_do_not_hide_what_differs_between_runs() -> None:
    lanes = [Scripted(name, [], lambda _, value=value: value) for name, value in (("A", 1.0), ("B", 2.0))]
    ratio = interleave(lanes, warm_up=0, seconds=0, minimum=20).ratio(1)
    assert (ratio.low, ratio.value, ratio.high) == pytest.approx((2 - 2 * SESSION, 2, 2 + 2 * SESSION))


@settings(max_examples=30)
@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=30))
def test_an_artefact_against_itself_is_exactly_one(values: list[float]) -> None:
    ratio = bootstrap_ratio(np.array(values), np.array(values))
    assert (ratio.low, ratio.value, ratio.high) == (1, 1, 1)


def test_nothing_has_no_ratio() -> None:
    with pytest.raises(ValueError, match="at least one pair"):
        bootstrap_ratio(np.empty(0), np.empty(0))


def test_a_ratio_is_printed_with_its_half_width() -> None:
    assert str(Ratio(1.0, 0.98, 1.02)) == "1.00 ± 0.02"
    assert str(Ratio(1.0041, 1.003, 1.0052)) == "1.004 ± 0.001"
    assert str(Ratio(0.48, 0.2, 10.44)) == "0.48 (0.20 to 10.44)", "never an interval that reaches below zero"
    assert str(Ratio(0.998, 0.78, 1.068)) == "1.00 (0.78 to 1.07)", "as far as its two sides reach"
    assert str(Ratio(0.00534, 0.0041, 0.0092)) == "0.0053 (0.0041 to 0.0092)"
