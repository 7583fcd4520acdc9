import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.benchmark.timing import Trace
from runtime.benchmark.trtexec import device_warnings, parse, profile_table, summary, trace_averages
from runtime.runners.base import LayerTime
from runtime.statistics import describe

# Printed by NVIDIA's trtexec (format of 8.6 to 11); the numbers are of no importance.
NVIDIA = """
[11/20/2026-10:01:12] [I] === Performance summary ===
[11/20/2026-10:01:12] [I] Throughput: 1373.59 qps
[11/20/2026-10:01:12] [I] Latency: min = 0.714844 ms, max = 1.18552 ms, mean = 0.727093 ms, median = 0.725586 ms, percentile(90%) = 0.731445 ms, percentile(95%) = 0.733398 ms, percentile(99%) = 0.745117 ms
[11/20/2026-10:01:12] [I] Enqueue Time: min = 0.00195312 ms, max = 0.0539551 ms, mean = 0.00356847 ms, median = 0.00341797 ms, percentile(90%) = 0.00415039 ms, percentile(95%) = 0.00488281 ms, percentile(99%) = 0.0117188 ms
[11/20/2026-10:01:12] [I] H2D Latency: min = 0 ms, max = 0 ms, mean = 0 ms, median = 0 ms, percentile(90%) = 0 ms, percentile(95%) = 0 ms, percentile(99%) = 0 ms
[11/20/2026-10:01:12] [I] GPU Compute Time: min = 0.714844 ms, max = 1.18552 ms, mean = 0.727093 ms, median = 0.725586 ms, percentile(90%) = 0.731445 ms, percentile(95%) = 0.733398 ms, percentile(99%) = 0.745117 ms
[11/20/2026-10:01:12] [I] D2H Latency: min = 0 ms, max = 0 ms, mean = 0 ms, median = 0 ms, percentile(90%) = 0 ms, percentile(95%) = 0 ms, percentile(99%) = 0 ms
[11/20/2026-10:01:12] [I] Total Host Walltime: 3.00163 s
[11/20/2026-10:01:12] [I] Total GPU Compute Time: 2.99780 s
"""  # noqa: E501


def device_trace(
    count: int = 40, *, h2d: float = 0.1, compute: float = 1.0, d2h: float = 0.1, enqueue: float = 0.01
) -> Trace:
    start = np.arange(count) * 2.0
    columns = [start, start + enqueue, start, start + h2d, start + h2d]
    columns += [start + h2d + compute, start + h2d + compute, start + h2d + compute + d2h]
    return Trace(np.stack(columns, axis=1), 5)


def test_nvidias_text_is_read() -> None:
    found = parse(NVIDIA)
    assert found["Throughput"] == 1373.59
    assert found["GPU Compute Time"]["median"] == 0.725586
    assert found["Latency"] == {
        "min": 0.714844,
        "max": 1.18552,
        "mean": 0.727093,
        "median": 0.725586,
        "p90": 0.731445,
        "p95": 0.733398,
        "p99": 0.745117,
    }
    assert found["Total GPU Compute Time"] == 2.9978


@settings(max_examples=40)
@given(
    st.lists(st.floats(1e-3, 1e4), min_size=1, max_size=50),
    st.lists(st.integers(0, 100), unique=True, max_size=4),
)
def test_our_text_read_back_gives_the_numbers(latencies: list[float], percentages: list[int]) -> None:
    start = np.cumsum([0.0, *latencies[:-1]])
    end = start + latencies
    trace = Trace(np.stack([start, end, start, start, start, end, end, end], axis=1), 0)
    found = parse("\n".join(summary(trace, percentages, device=True)))
    wanted = describe(trace.latency, percentages)
    assert found["Latency"]["median"] == pytest.approx(wanted.median, rel=1e-5)
    assert found["Throughput"] == pytest.approx(trace.throughput, rel=1e-5)
    for p in percentages:
        assert found["Latency"][f"p{p}"] == pytest.approx(wanted.percentiles[p], rel=1e-5)


def test_our_device_summary_has_nvidias_lines_in_nvidias_order_and_words() -> None:
    ours = list(summary(device_trace(), (90, 95, 99), device=True))
    theirs = [line.partition("[I] ")[2] for line in NVIDIA.strip().splitlines()]

    def words(line: str) -> str:
        return re.sub(r"= \S+ ms|: [\d.e-]+ (qps|s)$", r"= # \1", line)

    assert [words(line) for line in ours if line] == [words(line) for line in theirs]


def test_the_host_clock_leaves_out_what_it_cannot_know() -> None:
    found = parse("\n".join(summary(device_trace(), (99,), device=False)))
    assert set(found) == {"Throughput", "Latency", "Total Host Walltime"}


def test_numbers_have_six_digits_as_a_cpp_stream_prints_them() -> None:
    line = next(s for s in summary(device_trace(compute=0.1234567891), (99.9,), device=True) if s.startswith("GPU"))
    assert "min = 0.123457 ms" in line
    assert "percentile(99.9%)" in line


def test_averages_are_printed_per_group_and_the_middle_of_a_long_run_is_left_out() -> None:
    assert sum("Average on 10 runs" in line for line in trace_averages(device_trace(45), 10, device=True)) == 4
    long = list(trace_averages(device_trace(10_000), 10, device=True))
    assert sum(line.startswith("Average") for line in long) == 400
    assert any("Omitting 6000 lines" in line for line in long)


@pytest.mark.parametrize(
    ("trace", "words"),
    [
        (device_trace(enqueue=0.9), "bound by Enqueue Time"),
        (device_trace(h2d=1.0), "bound by host-to-device transfers"),
        (device_trace(d2h=1.5), "bound by device-to-host transfers"),
    ],
)
def test_trtexecs_warnings_come_at_trtexecs_thresholds(trace: Trace, words: str) -> None:
    assert any(words in line for line in device_warnings(trace, 1))
    assert not list(device_warnings(device_trace(enqueue=0.79, h2d=0.9, d2h=0.9), 1))


def test_an_unstable_gpu_and_several_streams_are_warned_of() -> None:
    trace = device_trace()
    trace.times[::2, 5:] += 0.1
    assert any("coefficient of variance" in line for line in device_warnings(trace, 1))
    assert any("Multiple inference streams" in line for line in device_warnings(device_trace(), 2))


def test_the_profile_table_adds_up() -> None:
    lines = list(profile_table([LayerTime("conv1", (1.0, 3.0)), LayerTime("fc", (1.0, 1.0))]))
    assert lines[1] == "=== Profile (2 iterations ) ==="
    assert lines[3].split() == ["4.00", "2.0000", "2.0000", "66.7", "conv1"]
    assert lines[5].split() == ["6.00", "3.0000", "3.0000", "100.0", "Total"]
