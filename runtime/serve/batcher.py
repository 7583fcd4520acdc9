"""The micro-batcher: what queued while the last batch ran goes out as the next one.

One thread per engine instance takes batches straight from the queue, so between two executions there is no trip
through the event loop. `runtime.serve.fair_queue` decides the order.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil
from time import monotonic_ns
from typing import Any, Protocol

import numpy as np

from runtime.errors import RefusedError
from runtime.runners.base import Array
from runtime.serve.errors import Code, RequestError
from runtime.serve.fair_queue import Batch, FairQueue, Item

INLINE_NS = 2_000_000
WINDOW_NS = 500_000_000
SATURATED = 0.9


class RunsFeeds(Protocol):
    """The part of `runtime.runners.base.Runner` that serving needs."""

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How a batcher admits and batches; `max_rows` 0: the network has no batch axis, every request runs alone."""

    max_rows: int
    queue_size: int = 2048
    delay_ns: int = 0
    shed_target_ns: int = 4_000_000
    burst_ns: int = 100_000_000
    inline: bool = False
    probe: Callable[[RunsFeeds], None] | None = None
    """Runs an engine on shapes known to work. Given where a request may choose shapes: then a run that the engine
    refuses is the request's fault if the probe still passes, and the engine's otherwise."""


class Instance:
    """One engine, its thread's wake-up lock and the buffer its batches are gathered in."""

    def __init__(self, runner: RunsFeeds) -> None:
        self.runner = runner
        self.wake = threading.Lock()
        self.wake.acquire()
        self.staging: dict[str, Array] = {}
        self.items: list[Item] = []
        """What is being executed."""

    def gather(self, items: list[Item], capacity: int) -> dict[str, Array]:
        """The items' rows in one array per input. A lone request is passed on as it lies, if it lies aligned."""
        first = items[0].feeds
        if len(items) == 1:
            return {name: a if a.flags.aligned else a.copy() for name, a in first.items()}
        feeds = {}
        rows = sum(item.rows for item in items)
        for name, array in first.items():
            buffer = self.staging.get(name)
            if buffer is None or buffer.shape[1:] != array.shape[1:] or len(buffer) < rows:
                buffer = self.staging[name] = np.empty((max(capacity, rows), *array.shape[1:]), array.dtype)
            # Slices of memory, not of arrays: NumPy gives up the interpreter lock around every copy, and to get it back
            # under load takes longer than the copy.
            target, start = _octets(buffer), 0
            for item in items:
                source = _octets(item.feeds[name])
                target[start : start + len(source)] = source
                start += len(source)
            feeds[name] = buffer[:rows]
        return feeds


class Batcher:
    """The queue of one model version and the threads that empty it. `submit` and `check` belong to the event loop."""

    def __init__(
        self,
        runners: list[RunsFeeds],
        policy: Policy,
        *,
        on_batch: Callable[[Batch], None] = lambda batch: None,
        on_fatal: Callable[[BaseException], None] = lambda error: None,
        name: str = "model",
    ) -> None:
        self.policy = policy
        self.draining = False
        self._loop = asyncio.get_running_loop()
        self._on_batch, self._on_fatal = on_batch, on_fatal
        self._lock = threading.Lock()
        self._queue = FairQueue()
        self._idle: list[Instance] = []
        self._filling: Instance | None = None
        self._woken = 0
        """Instances that were woken and have not looked at the queue yet."""
        self._closing = False
        self._row_ns = 0.0
        self._shedding = False
        self._busy_ns = self._window = self._window_busy = 0
        self._sweeping = False
        self._instances = [Instance(runner) for runner in runners]
        self._threads = [
            threading.Thread(target=self._work, args=(i,), name=f"{name}-{n}", daemon=True)
            for n, i in enumerate(self._instances)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def pending(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    @property
    def retry_after(self) -> int:
        """Whole seconds until the present queue is done, at least 1."""
        return max(1, ceil(self._queue.rows * self._row_ns / 1e9))

    def check(self) -> None:
        """Raise RequestError(OVERLOADED) if a request that came now would be refused.

        The queue is bounded. Besides, when a backlog has stood for `burst_ns` this is overload, not a burst: from then
        until the engines are found idle a tenth of the time, only as much is let in as runs within `shed_target_ns`, so
        that what is accepted is answered soon. While draining, everything that fits is let in: it was already sent.
        """
        if len(self._queue) >= self.policy.queue_size:
            raise RequestError("the queue is full", Code.OVERLOADED)
        if self.draining:
            return
        now = monotonic_ns()
        if self._shedding:
            self._shedding = now - self._window < WINDOW_NS or self._saturated(now)
            if self._shedding and self._queue.rows * self._row_ns >= self.policy.shed_target_ns:
                raise RequestError("the server is overloaded", Code.OVERLOADED)
        elif self._queue.standing and now - self._queue.standing > self.policy.burst_ns:
            self._shedding = True
            self._window, self._window_busy = now, self._busy(now)

    def _saturated(self, now: int) -> bool:
        """Whether the engines ran nearly all the time since the window began; begins the next."""
        busy = self._busy(now)
        share = (busy - self._window_busy) / ((now - self._window) * len(self._instances))
        self._window, self._window_busy = now, busy
        return share >= SATURATED

    def _busy(self, now: int) -> int:
        """Time that the engines have run so far, together, ns."""
        running = [items[0].batch for i in self._instances if (items := i.items)]
        return self._busy_ns + sum(now - batch.taken for batch in running if batch)

    def submit(self, item: Item, *, alone: bool = False, wake: bool = True) -> asyncio.Future[dict[str, Array]]:
        """Queue a request; raises RequestError when it is refused.

        `alone` says that nothing else is under way in the process. Then a short execution runs here and now: two
        thread switches cost a small network a quarter of its speed, and there is nobody whom a blocked loop delays.
        With `wake` off the engines learn of it at the next `wake()`: requests that came together run together.
        """
        self.check()
        with self._lock:
            if self._closing:
                raise RequestError("the model is being unloaded", Code.UNAVAILABLE)
            if (
                alone
                and self.policy.inline
                and 0 < self._row_ns * item.rows < INLINE_NS
                and not self._queue
                and self._idle
            ):
                instance = self._idle.pop()
                item.batch = Batch(item.rows, taken=monotonic_ns())
                self._execute(instance, [item], _now)
                self._idle.append(instance)
                return item.future
            self._queue.push(item)
            if wake:
                self._wake()
        if item.deadline and not self._sweeping:
            self._sweeping = True
            self._loop.call_later(0.05, self._sweep)
        return item.future

    def wake(self) -> None:
        """Let idle engines see what was queued."""
        with self._lock:
            self._wake()

    def _wake(self) -> None:
        while self._idle and self._woken < len(self._queue):
            self._woken += 1
            self._idle.pop().wake.release()
        if self._filling and self._queue.rows >= self.policy.max_rows:
            self._filling.wake.release()
            self._filling = None

    def _share(self) -> int:
        """Rows for one engine of those that are about to take; the lock is held."""
        limit = self.policy.max_rows
        return min(limit, ceil(self._queue.rows / (self._woken + 1))) if self._woken else limit

    def _sweep(self) -> None:
        """Answer requests that expired behind a long execution; those at the head are caught when taken."""
        now = monotonic_ns()
        with self._lock:
            late = self._queue.expired(now)
        for item in late:
            _fail(item, _expired())
        self._sweeping = len(self._queue) > 0
        if self._sweeping:
            self._loop.call_later(0.05, self._sweep)

    async def close(self, timeout: float = 30.0) -> bool:
        """Run what is queued, then end the threads. False if a thread was still busy at the timeout."""
        with self._lock:
            self._closing = True
            for instance in self._idle:
                instance.wake.release()
            self._woken += len(self._idle)
            self._idle.clear()
            if self._filling:
                self._filling.wake.release()
                self._filling = None
        end = monotonic_ns() + timeout * 1e9
        while any(t.is_alive() for t in self._threads) and monotonic_ns() < end:
            await asyncio.sleep(0.005)
        return not any(t.is_alive() for t in self._threads)

    def abort(self, error: RequestError) -> int:
        """Fail everything queued or being executed (the drain's limit is reached); how many that was."""
        with self._lock:
            items = self._queue.clear()
            for instance in self._instances:
                items += instance.items
        for item in items:
            _fail(item, error)
        return len(items)

    def _work(self, instance: Instance) -> None:
        while (items := self._take(instance)) is not None:
            self._execute(instance, items, self._call)

    def _take(self, instance: Instance) -> list[Item] | None:
        """The next batch; blocks while there is none; None when closed and empty."""
        dropped: list[Item] = []
        woken = False
        while True:
            wait = -1.0
            with self._lock:
                if woken:
                    self._woken -= 1
                    woken = False
                if self._filling is instance:
                    self._filling = None
                if self._queue:
                    wait = self._still_filling()
                    if wait <= 0:
                        items = self._queue.take(self._share(), dropped)
                        if dropped:
                            self._call(self._drop, dropped)
                            dropped = []
                        if items:
                            return items
                        wait = 0
                    else:
                        self._filling = instance
                elif self._closing:
                    return None
                else:
                    self._queue.reset()
                    self._idle.append(instance)
            if wait < 0:
                instance.wake.acquire()
                woken = True
            elif wait > 0 and not instance.wake.acquire(timeout=wait):
                with self._lock:
                    if self._filling is instance:
                        self._filling = None
                    else:  # woken between the timeout and the lock: use the wake-up up
                        instance.wake.acquire(blocking=False)

    def _still_filling(self) -> float:
        """Seconds that the opt-in queue delay still allows this batch to grow."""
        delay = self.policy.delay_ns
        if not delay or self._closing or self._filling or self._queue.rows >= self.policy.max_rows:
            return 0.0
        return (self._queue.oldest() + delay - monotonic_ns()) / 1e9

    def _execute(self, instance: Instance, items: list[Item], call: Callable[..., None]) -> None:
        batch = items[0].batch
        assert batch is not None
        instance.items = items
        try:
            feeds = instance.gather(items, self.policy.max_rows)
            batch.fed = monotonic_ns()
            outputs = instance.runner.run(feeds)
            batch.inferred = monotonic_ns()
            if self.policy.max_rows and any(len(a) != batch.rows for a in outputs.values()):
                raise RuntimeError("the engine returned another number of rows than it was given")
            results, start = [], 0
            for item in items:
                end = start + item.rows
                results.append(outputs if len(items) == 1 else {n: a[start:end] for n, a in outputs.items()})
                start = end
            batch.done = monotonic_ns()
            cost = (batch.done - batch.taken) / max(batch.rows, 1) / len(self._instances)
            self._row_ns = 0.8 * self._row_ns + 0.2 * cost if self._row_ns else cost
            call(self._deliver, batch, items, results)
        except BaseException as error:
            if isinstance(error, RefusedError) and self._works(instance, error):
                call(self._refuse, items, RequestError(_no_path(error.message)))
            else:
                call(self._break, items, error)
        finally:
            instance.items = []
            self._busy_ns += monotonic_ns() - batch.taken

    def _works(self, instance: Instance, refusal: RefusedError) -> bool:
        if refusal.__cause__ is None:  # refused before it reached the engine
            return True
        if self.policy.probe is None:
            return False
        try:
            self.policy.probe(instance.runner)
        except BaseException:
            return False
        return True

    def _call(self, function: Callable[..., None], *args: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the loop is closed: nobody is left to answer
            self._closing = True

    def _deliver(self, batch: Batch, items: list[Item], results: list[dict[str, Array]]) -> None:
        self._on_batch(batch)
        for item, result in zip(items, results, strict=True):
            if not item.future.done():
                item.future.set_result(result)

    def _drop(self, items: list[Item]) -> None:
        for item in items:
            gone = item.connection is not None and item.connection.gone
            _fail(item, RequestError("the client went away", Code.CANCELLED) if gone else _expired())

    def _refuse(self, items: list[Item], error: RequestError) -> None:
        for item in items:
            _fail(item, error)

    def _break(self, items: list[Item], error: BaseException) -> None:
        self._on_fatal(error)
        for item in items:
            _fail(item, RequestError("the engine failed", Code.INTERNAL))


def _octets(array: Array) -> memoryview:
    octets: Any = array.reshape(-1).view(np.uint8)
    return memoryview(octets)


def _now(function: Callable[..., None], *args: Any) -> None:
    function(*args)


def _fail(item: Item, error: RequestError) -> None:
    if not item.future.done():
        item.future.set_exception(error)


def _expired() -> RequestError:
    return RequestError("the request's time in the queue ran out", Code.EXPIRED)


def _no_path(message: str) -> str:
    """A runner's refusal as the client may see it: one line, no file system path."""
    return " ".join(word for word in message.split() if not word.startswith("/"))[:300]
