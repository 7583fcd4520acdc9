"""Counters of one model version: plain integers, read by statistics and metrics when asked."""

from __future__ import annotations

import time
from bisect import bisect_left

from runtime.serve.errors import Code

LATENCY_BUCKETS_US = (500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000, 500_000, 1_000_000, 5_000_000)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
REASONS = ("REJECTED", "CANCELED", "BACKEND", "OTHER")


class Timer:
    """How often something happened and how long it took in total, in ns."""

    __slots__ = ("count", "ns")

    def __init__(self) -> None:
        self.count = 0
        self.ns = 0

    def add(self, ns: int, count: int = 1) -> None:
        """Count `count` events of `ns` together."""
        self.count += count
        self.ns += ns


class Histogram:
    """Cumulative-bucket histogram over fixed upper bounds."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[int, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class Stats:
    """Triton's statistics of one model version. Written on the event loop only; it outlives a reload."""

    def __init__(self) -> None:
        self.inferences = 0
        """Rows inferred (nv_inference_count)."""
        self.executions = 0
        self.last_inference_ms = 0
        self.success, self.fail, self.queue = Timer(), Timer(), Timer()
        self.compute_input, self.compute_infer, self.compute_output = Timer(), Timer(), Timer()
        self.failures = dict.fromkeys(REASONS, 0)
        self.batches: dict[int, tuple[Timer, Timer, Timer]] = {}
        self.latency = Histogram(LATENCY_BUCKETS_US)
        self.batch_size = Histogram(BATCH_BUCKETS)

    def executed(self, rows: int, input_ns: int, infer_ns: int, output_ns: int) -> None:
        """One batch ran."""
        self.executions += 1
        self.inferences += rows
        self.last_inference_ms = time.time_ns() // 1_000_000
        self.batch_size.add(rows)
        timers = self.batches.get(rows)
        if timers is None:
            timers = self.batches[rows] = (Timer(), Timer(), Timer())
        for timer, ns in zip(timers, (input_ns, infer_ns, output_ns), strict=True):
            timer.add(ns)

    def succeeded(self, total_ns: int, queue_ns: int, input_ns: int, infer_ns: int, output_ns: int) -> None:
        """One request was answered."""
        self.success.add(total_ns)
        self.queue.add(queue_ns)
        self.compute_input.add(input_ns)
        self.compute_infer.add(infer_ns)
        self.compute_output.add(output_ns)
        self.latency.add(total_ns / 1000)

    def failed(self, total_ns: int, code: Code) -> None:
        """One request was not."""
        self.fail.add(total_ns)
        self.failures[code.reason] += 1
