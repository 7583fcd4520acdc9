"""One inference on a device, clocked by CUDA events: the one protocol of every runner that has them.

As in trtexec: uploads, inference and downloads have a stream each, so that queries overlap, an event stands before and
after each of the three, and the enqueue time is that of the one call that puts the inference on its stream.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

from runtime.runners.base import Query, QueryTimes


class Event(Protocol):
    """`runtime.cuda.Event`, or torch's in its words."""

    def record(self, stream: Any) -> None:
        """Put it on `stream`."""

    def synchronize(self) -> None:
        """Wait until it has happened."""

    def time_since(self, earlier: Any) -> float:
        """Milliseconds from `earlier`."""


class Streams(NamedTuple):
    """Where a query puts its uploads, its inference and its downloads."""

    up: Any
    compute: Any
    down: Any


class Origin:
    """The common zero of both clocks: an event on the device and the host's time at that event."""

    def __init__(self, event: Event, stream: Any) -> None:
        self.event = event
        event.record(stream)
        event.synchronize()
        self.host = time.perf_counter()

    def host_ms(self) -> float:
        """Host time since the origin, ms."""
        return (time.perf_counter() - self.host) * 1e3

    def span(self, start: Event, end: Event) -> tuple[float, float]:
        """When `start` and `end` happened, ms from the origin.

        An event's distance from a far origin is a float32, in steps of 1 µs after ten seconds; the duration comes from
        the two events themselves.
        """
        begin = float(start.time_since(self.event))
        return begin, begin + float(end.time_since(start))


class DeviceQuery(Query):
    """A query on three streams. `events` are six, in the order in which they are recorded."""

    def __init__(self, origin: Origin, streams: Streams, events: Sequence[Event], *, transfers: bool) -> None:
        self._origin, self._streams, self._events = origin, streams, list(events)
        self._transfers = transfers
        self._enqueued = (0.0, 0.0)

    @abstractmethod
    def current(self) -> AbstractContextManager[object]:
        """What must hold while the driver is called: the device's context, torch's modes."""

    def prepare(self) -> None:
        """What an inference needs that is no part of enqueuing it."""

    @abstractmethod
    def upload(self, stream: Any) -> None:
        """Put the copies of the inputs on `stream`."""

    @abstractmethod
    def launch(self) -> None:
        """Put the inference on the compute stream: the call whose time is the enqueue time."""

    @abstractmethod
    def download(self, stream: Any) -> None:
        """Put the copies of the outputs on `stream`."""

    def enqueue(self) -> None:
        """Put the inference on its streams and return at once."""
        up, compute, down = self._streams
        up_start, up_end, start, end, down_start, down_end = self._events
        with self.current():
            self.prepare()
            if self._transfers:
                up_start.record(up)
                self.upload(up)
                up_end.record(up)
                compute.wait_for_event(up_end)
            start.record(compute)
            began = self._origin.host_ms()
            self.launch()
            ended = self._origin.host_ms()
            end.record(compute)
            if self._transfers:
                down.wait_for_event(end)
                down_start.record(down)
                self.download(down)
                down_end.record(down)
        self._enqueued = began, ended

    def wait(self) -> QueryTimes:
        """Block until the last `enqueue` is done; its times, ms from the origin."""
        up_start, up_end, start, end, down_start, down_end = self._events
        with self.current():
            (down_end if self._transfers else end).synchronize()
            begin, finish = self._origin.span(start, end)
            up, down = (begin, begin), (finish, finish)
            if self._transfers:
                up, down = self._origin.span(up_start, up_end), self._origin.span(down_start, down_end)
        return QueryTimes(*self._enqueued, *up, begin, finish, *down)
