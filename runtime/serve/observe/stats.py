"""Counters of one model version: plain integers, read by statistics and metrics when asked."""

from __future__ import annotations

import time
from bisect import bisect_left
from dataclasses import dataclass, field

from runtime.serve.batching.fair_queue import Batch
from runtime.serve.errors import Code

LATENCY_BUCKETS_US = (500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000, 500_000, 1_000_000, 5_000_000)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
REASONS = ("REJECTED", "CANCELED", "BACKEND", "OTHER")
STAGES = ("compute_input", "compute_infer", "compute_output")


@dataclass(slots=True)
class Timer:
    """How often something happened and how long it took in total."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int) -> None:
        """Once more."""
        self.count += 1
        self.ns += ns


def _stages() -> tuple[Timer, ...]:
    return tuple(Timer() for _ in STAGES)


class Histogram:
    """Cumulative-bucket histogram over fixed upper bounds."""

    def __init__(self, bounds: tuple[int, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


@dataclass(slots=True)
class Stats:
    """Triton's statistics of one model version. Written on the event loop only; it outlives a reload."""

    inferences: int = 0
    """Rows inferred (nv_inference_count)."""
    executions: int = 0
    last_inference_ms: int = 0
    success: Timer = field(default_factory=Timer)
    fail: Timer = field(default_factory=Timer)
    queue: Timer = field(default_factory=Timer)
    compute: tuple[Timer, ...] = field(default_factory=_stages)
    """Of requests, by `STAGES`."""
    failures: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    batches: dict[int, tuple[Timer, ...]] = field(default_factory=dict)
    """Of executions, by their rows."""
    latency: Histogram = field(default_factory=lambda: Histogram(LATENCY_BUCKETS_US))
    batch_size: Histogram = field(default_factory=lambda: Histogram(BATCH_BUCKETS))

    def executed(self, batch: Batch) -> None:
        """One batch ran."""
        self.executions += 1
        self.inferences += batch.rows
        self.last_inference_ms = time.time_ns() // 1_000_000
        self.batch_size.add(batch.rows)
        if batch.rows not in self.batches:
            self.batches[batch.rows] = _stages()
        for timer, ns in zip(self.batches[batch.rows], batch.stages, strict=True):
            timer.add(ns)

    def succeeded(self, total_ns: int, queue_ns: int, batch: Batch) -> None:
        """One request was answered."""
        self.success.add(total_ns)
        self.queue.add(queue_ns)
        for timer, ns in zip(self.compute, batch.stages, strict=True):
            timer.add(ns)
        self.latency.add(total_ns / 1000)

    def failed(self, total_ns: int, code: Code) -> None:
        """One request was not."""
        self.fail.add(total_ns)
        self.failures[code.reason] += 1
