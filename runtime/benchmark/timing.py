"""The timing loop. What is inside it is only what is timed: two clock reads and two appends to a typed array."""

from __future__ import annotations

import gc
import time
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.runners.base import Query, QueryTimes

#: Columns of `Trace.times`, in the order of `QueryTimes`; trtexec's --exportTimes fields.
START_ENQUEUE, END_ENQUEUE, START_H2D, END_H2D, START_COMPUTE, END_COMPUTE, START_D2H, END_D2H = range(8)

#: Seconds between two looks at the progress line. The query that follows a look is run, but not recorded.
PROGRESS_EVERY = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopOptions:
    """How long to measure: trtexec's --warmUp (ms), --duration (s, -1: until Ctrl-C), --iterations, --idleTime (ms)."""

    warm_up: float = 200.0
    duration: float = 3.0
    iterations: int = 10
    idle: float = 0.0

    @property
    def endless(self) -> bool:
        """Whether only Ctrl-C ends the loop."""
        return self.duration == -1


@dataclass(frozen=True, slots=True)
class Trace:
    """Every query after the warm-up: one row of 8 times (ms) each, in order of `QueryTimes`."""

    times: NDArray[np.float64]
    warm_up_queries: int
    interrupted: bool = False

    def __len__(self) -> int:
        return len(self.times)

    @property
    def h2d(self) -> NDArray[np.float64]:
        """Host to device copy, ms."""
        return self._delta(END_H2D, START_H2D)

    @property
    def compute(self) -> NDArray[np.float64]:
        """The inference itself, ms."""
        return self._delta(END_COMPUTE, START_COMPUTE)

    @property
    def d2h(self) -> NDArray[np.float64]:
        """Device to host copy, ms."""
        return self._delta(END_D2H, START_D2H)

    @property
    def enqueue(self) -> NDArray[np.float64]:
        """Host time to enqueue, ms."""
        return self._delta(END_ENQUEUE, START_ENQUEUE)

    @property
    def latency(self) -> NDArray[np.float64]:
        """H2D + compute + D2H, ms."""
        return self.h2d + self.compute + self.d2h

    @property
    def wall_time(self) -> float:
        """From the first query's H2D start to the last query's D2H end, ms."""
        return float(self.times[:, END_D2H].max() - self.times[:, START_H2D].min()) if len(self.times) else 0.0

    @property
    def throughput(self) -> float:
        """Queries (not images) per second of wall time."""
        return len(self.times) / self.wall_time * 1000 if self.wall_time else 0.0

    def _delta(self, end: int, start: int) -> NDArray[np.float64]:
        difference: NDArray[np.float64] = self.times[:, end] - self.times[:, start]
        return difference


Progress = Callable[[float, int], None]


class Lane(ABC):
    """One artefact, ready to be timed: what a run and a comparison both drive."""

    clock: str

    @abstractmethod
    def run(self, options: LoopOptions, progress: Progress | None = None) -> Trace:
        """Warm up, then measure. Ctrl-C ends it early: the trace then says `interrupted`."""

    @abstractmethod
    def block(self, seconds: float, minimum: int) -> NDArray[np.float64]:
        """Latencies (ms) of back-to-back queries for `seconds`, at least `minimum`; inside `quiet`, if it matters."""


class HostLane(Lane):
    """Times a call on the host clock."""

    clock = "host (perf_counter_ns around each query)"

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call

    def run(self, options: LoopOptions, progress: Progress | None = None) -> Trace:
        """See `Lane.run`."""
        call, clock = self._call, time.perf_counter_ns
        stamps = array("q")
        warm = 0
        interrupted = False
        with quiet():
            try:
                warm_until = clock() + int(options.warm_up * 1e6)
                while clock() < warm_until:
                    call()
                    warm += 1
                started = clock()
                until = _FOREVER if options.endless else started + int(options.duration * 1e9)
                stops = _stops(started, until, progress is not None)
                for stop in stops:
                    _until(call, stop, 1 if stop < until else options.iterations, stamps, options.idle)
                    if progress is not None and stop < until:
                        progress((clock() - started) / 1e9, len(stamps) // 2)
                        call()
            except KeyboardInterrupt:
                interrupted = True
        return Trace(_host_times(stamps), warm, interrupted)

    def block(self, seconds: float, minimum: int) -> NDArray[np.float64]:
        """See `Lane.block`."""
        stamps = array("q")
        _until(self._call, time.perf_counter_ns() + int(seconds * 1e9), minimum, stamps)
        pairs = np.frombuffer(stamps, dtype=np.int64).reshape(-1, 2)
        latencies: NDArray[np.float64] = (pairs[:, 1] - pairs[:, 0]) / 1e6
        return latencies


class DeviceLane(Lane):
    """Times queries on the device clock, `depth` of them in flight on each stream, as trtexec does."""

    clock = "CUDA events"

    def __init__(self, queries: Sequence[Query], streams: int = 1) -> None:
        self._streams = [_Stream(queries[stream::streams]) for stream in range(streams)]

    def run(self, options: LoopOptions, progress: Progress | None = None) -> Trace:
        """See `Lane.run`."""
        records: list[QueryTimes] = []
        warm = recorded = 0
        interrupted = False
        with quiet():
            warm_until = time.perf_counter() + options.warm_up / 1000
            until = float("inf") if options.endless else warm_until + options.duration
            look = warm_until + PROGRESS_EVERY if progress else float("inf")
            try:
                while True:
                    for stream in self._streams:
                        stream.enqueue()
                    for stream in self._streams:
                        stream.collect(records)
                    now = time.perf_counter()
                    if now < warm_until:
                        warm = len(records) + sum(stream.in_flight for stream in self._streams)
                        continue
                    recorded = len(records) - warm
                    if now >= until and recorded >= options.iterations:
                        break
                    if options.idle:
                        time.sleep(options.idle / 1000)
                    if now >= look and progress:
                        progress(now - warm_until, recorded)
                        look = now + PROGRESS_EVERY
            except KeyboardInterrupt:
                interrupted = True
            for stream in self._streams:
                stream.drain(records)
        return Trace(_device_times(records[warm:]), warm, interrupted)

    def block(self, seconds: float, minimum: int) -> NDArray[np.float64]:
        """See `Lane.block`."""
        records: list[QueryTimes] = []
        until = time.perf_counter() + seconds
        while time.perf_counter() < until or len(records) < minimum:
            for stream in self._streams:
                stream.enqueue()
            for stream in self._streams:
                stream.collect(records)
        for stream in self._streams:
            stream.drain(records)
        return Trace(_device_times(records), 0).latency


class _Stream:
    """A ring of queries: enqueue the next, then wait for the oldest once all are in flight (trtexec's Iteration)."""

    def __init__(self, queries: Sequence[Query]) -> None:
        self._queries = queries
        self._active = [False] * len(queries)
        self._next = 0

    @property
    def in_flight(self) -> int:
        return sum(self._active)

    def enqueue(self) -> None:
        self._queries[self._next].enqueue()
        self._active[self._next] = True
        self._next = (self._next + 1) % len(self._queries)

    def collect(self, records: list[QueryTimes]) -> None:
        if self._active[self._next]:
            records.append(self._queries[self._next].wait())
            self._active[self._next] = False

    def drain(self, records: list[QueryTimes]) -> None:
        for _ in self._queries:
            self.collect(records)
            self._next = (self._next + 1) % len(self._queries)


_FOREVER = 2**63 - 1


@contextmanager
def quiet() -> Iterator[None]:
    """No garbage collection pauses inside, as timeit does."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _until(call: Callable[[], object], deadline: int, minimum: int, stamps: array[int], idle: float = 0.0) -> None:
    """Run until `deadline` (ns) and until `stamps` holds `minimum` queries: the start and end (ns) of each."""
    clock, append = time.perf_counter_ns, stamps.append
    while True:
        start = clock()
        call()
        end = clock()
        append(start)
        append(end)
        if end >= deadline and len(stamps) >= 2 * minimum:
            return
        if idle:
            time.sleep(idle / 1000)


def _stops(started: int, until: int, looking: bool) -> Iterator[int]:
    """The deadlines (ns) of the stretches between two looks at the progress line."""
    step = int(PROGRESS_EVERY * 1e9)
    stop = started + step
    while looking and stop < until:
        yield stop
        stop = max(stop, time.perf_counter_ns()) + step
    yield until


def _host_times(stamps: array[int]) -> NDArray[np.float64]:
    pairs = np.frombuffer(stamps[: len(stamps) // 2 * 2], dtype=np.int64).reshape(-1, 2)
    origin = pairs[0, 0] if len(pairs) else 0
    start, end = ((pairs[:, i] - origin) / 1e6 for i in (0, 1))
    columns = [start, end, start, start, start, end, end, end]
    return np.stack(columns, axis=1)


def _device_times(records: Sequence[QueryTimes]) -> NDArray[np.float64]:
    rows = [
        (
            r.start_enqueue,
            r.end_enqueue,
            r.start_h2d,
            r.end_h2d,
            r.start_compute,
            r.end_compute,
            r.start_d2h,
            r.end_d2h,
        )
        for r in records
    ]
    return np.asarray(rows, dtype=np.float64).reshape(-1, 8)
