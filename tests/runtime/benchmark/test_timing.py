import gc
import os
import signal
import time
from typing import Any

import numpy as np
import pytest

from runtime.benchmark.measure import progress_line
from runtime.benchmark.timing import DeviceLane, HostLane, LoopOptions


def lane_of(device_runner: Any, count: int = 2, streams: int = 1) -> DeviceLane:
    queries = device_runner.queries({}, count, transfers=True, cuda_graph=True, streams=streams)
    return DeviceLane(queries, streams)


def test_iterations_are_a_minimum_and_duration_goes_on_beyond_them() -> None:
    calls = []
    few = HostLane(lambda: calls.append(1)).run(LoopOptions(warm_up=0, duration=0, iterations=7))
    assert len(few) == 7
    slow = HostLane(lambda: time.sleep(0.02)).run(LoopOptions(warm_up=0, duration=0.2, iterations=1))
    assert 8 <= len(slow) <= 11


def test_warm_up_queries_run_but_are_not_in_the_trace() -> None:
    calls = []
    trace = HostLane(lambda: (calls.append(1), time.sleep(0.01))).run(LoopOptions(warm_up=50, duration=0, iterations=5))
    assert len(trace) == 5
    assert trace.warm_up_queries >= 2
    assert len(calls) == 5 + trace.warm_up_queries


def test_a_latency_is_the_time_of_the_call_and_nothing_else() -> None:
    trace = HostLane(lambda: time.sleep(0.005)).run(LoopOptions(warm_up=0, duration=0, iterations=20, idle=10))
    assert 5 <= np.min(trace.latency) < 8
    assert trace.wall_time > 19 * 15, "idle time counts as wall time, not as latency"
    assert (trace.h2d == 0).all()
    assert (trace.d2h == 0).all()
    np.testing.assert_array_equal(trace.enqueue, trace.latency)


def test_throughput_counts_queries_over_wall_time() -> None:
    trace = HostLane(lambda: time.sleep(0.005)).run(LoopOptions(warm_up=0, duration=0.1, iterations=1))
    assert trace.throughput == pytest.approx(len(trace) / trace.wall_time * 1000)
    assert 100 < trace.throughput < 200


def test_the_collector_is_off_inside_the_loop_and_back_after_it() -> None:
    states = []
    HostLane(lambda: states.append(gc.isenabled())).run(LoopOptions(warm_up=0, duration=0, iterations=3))
    assert states == [False] * 3
    assert gc.isenabled()


def test_ctrl_c_keeps_what_was_measured() -> None:
    calls = []

    def call() -> None:
        calls.append(1)
        if len(calls) == 20:
            os.kill(os.getpid(), signal.SIGINT)

    trace = HostLane(call).run(LoopOptions(warm_up=0, duration=-1))
    assert trace.interrupted
    assert len(trace) == 19


def test_progress_past_the_time_says_what_the_run_waits_for() -> None:
    said: list[str] = []
    show = progress_line(said.append, 7, "rounds", 10)
    for elapsed, count in ((3.2, 1), (27.4, 9), (29.1, 10)):
        show(elapsed, count)
    progress_line(said.append, -1, "queries", 10)(3.2, 4000)
    assert said == [
        "3 of 7 s, 1 rounds",
        "27 s, 9 of the 10 rounds that it takes at least",
        "7 of 7 s, 10 rounds",
        "3 s, 4,000 queries",
    ]


def test_progress_is_told_between_queries_and_the_next_query_is_not_counted() -> None:
    calls, seen = [], []
    trace = HostLane(lambda: (calls.append(1), time.sleep(0.01))).run(
        LoopOptions(warm_up=0, duration=2.2), lambda elapsed, queries: seen.append((elapsed, queries))
    )
    assert [round(elapsed) for elapsed, _ in seen] == [1, 2]
    assert len(calls) == len(trace) + 2


def test_two_queries_are_in_flight_as_in_trtexec(device_runner: Any) -> None:
    trace = lane_of(device_runner).run(LoopOptions(warm_up=0, duration=0, iterations=4))
    assert device_runner.most_in_flight == 2
    assert device_runner.log[:4] == ["enqueue", "enqueue", "wait", "enqueue"]
    assert device_runner.in_flight == 0, "all queries are waited for at the end"
    assert len(trace) >= 4


def test_one_query_at_a_time_with_depth_one(device_runner: Any) -> None:
    lane_of(device_runner, count=1).run(LoopOptions(warm_up=0, duration=0, iterations=4))
    assert device_runner.most_in_flight == 1


def test_every_stream_has_its_own_queries(device_runner: Any) -> None:
    lane_of(device_runner, count=2, streams=3).run(LoopOptions(warm_up=0, duration=0, iterations=4))
    assert device_runner.most_in_flight == 6
    assert device_runner.in_flight == 0
    assert device_runner.order[:6] == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)], "(stream, query)"


def test_device_latency_is_h2d_plus_compute_plus_d2h(device_runner: Any) -> None:
    trace = lane_of(device_runner).run(LoopOptions(warm_up=0, duration=0, iterations=10))
    np.testing.assert_allclose(trace.latency, 3.5)
    np.testing.assert_allclose(trace.compute, 2)
    np.testing.assert_allclose(trace.enqueue, 0.1)
    assert trace.wall_time == pytest.approx(4 * (len(trace) - 1) + 3.5)


def test_device_warm_up_is_discarded(device_runner: Any) -> None:
    trace = lane_of(device_runner).run(LoopOptions(warm_up=50, duration=0, iterations=3))
    assert trace.warm_up_queries > 10
    assert trace.times[0, 2] >= 100 + 4 * trace.warm_up_queries


def test_a_block_has_at_least_the_minimum_of_queries(device_runner: Any) -> None:
    assert len(HostLane(lambda: None).block(0, 12)) == 12
    assert len(lane_of(device_runner).block(0, 12)) >= 12
