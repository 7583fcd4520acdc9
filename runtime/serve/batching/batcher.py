"""The micro-batcher: what queued while the last batch ran goes out as the next one.

One thread per engine instance takes batches straight from the queue, so between two executions there is no trip
through the event loop. `runtime.serve.batching.fair_queue` decides the order.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import ceil
from queue import SimpleQueue
from time import monotonic_ns
from typing import Any

from runtime.runners.base import Array, Runner
from runtime.serve.batching.fair_queue import Batch, FairQueue, Item
from runtime.serve.batching.instance import Instance, give_way
from runtime.serve.errors import Code, RequestError

INLINE_NS = 2_000_000
WINDOW_NS = 500_000_000
SATURATED = 0.9
BACKLOG = 3
"""Executions of the shortest kind that may wait under overload, whatever the target: with less than one batch in the
queue a network whose batches take as long as single rows would never see a batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How a batcher admits and batches; `max_rows` 0: the network has no batch axis, every request runs alone."""

    max_rows: int
    queue_size: int = 2048
    delay_ns: int = 0
    shed_target_ns: int = 2_000_000
    burst_ns: int = 100_000_000
    on_cpu: bool = False
    """The engines compute on the cores that the event loop runs on: a short lone request runs on the loop itself, and
    the engines' threads give way to the loop."""
    probe: Callable[[Runner], None] | None = None
    """Runs an engine on what it is known to run: what the engine then refuses (a free axis too long, an index beyond a
    table) is the request's fault if the probe still passes, and the engine's otherwise, or where there is none."""


class Batcher:
    """The queue of one model version and the threads that empty it. `submit` and `check` belong to the event loop.

    Several engines share the queue evenly. `solo` is one more engine, for a request that is alone in the process: with
    all the threads that the others have together, while those, with fewer threads each, waste less of them on a batch.
    """

    def __init__(
        self,
        runners: list[Runner],
        policy: Policy,
        *,
        solo: Runner | None = None,
        on_batch: Callable[[Batch], None] = lambda batch: None,
        on_fatal: Callable[[BaseException], None] = lambda error: None,
        name: str = "model",
    ) -> None:
        self.policy = policy
        self.draining = False
        self._loop = asyncio.get_running_loop()
        self._on_batch, self._on_fatal = on_batch, on_fatal
        self._wakeup = threading.Condition(threading.Lock())
        """Held for whatever is shared with the engines' threads, which wait for it."""
        self._queue = FairQueue()
        self._idle: list[Instance] = []
        self._filling = 0
        """Engines that wait for a fuller batch."""
        self._waking = False
        self._closing = False
        self._row_ns = 0.0
        self._least_ns = 0.0
        """The shortest execution so far."""
        self._standing = 0
        """Since when (monotonic ns) there has been more than the engines can take at once; 0: there is not."""
        self._shedding = False
        self._busy_ns = self._window = self._window_busy = 0
        self._sweeping = False
        self._instances = [Instance(runner) for runner in runners]
        self._solo = Instance(solo) if solo else None
        self._lone: SimpleQueue[list[Item]] = SimpleQueue()
        """What the engine for lone requests has to run."""
        work: list[tuple[Instance, Callable[[], list[Item]]]] = [(i, partial(self._take, i)) for i in self._instances]
        if self._solo:
            work.append((self._solo, self._lone.get))
        self._threads = [threading.Thread(target=self._work, args=a, name=name, daemon=True) for a in work]
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

        The queue is bounded. Besides, when a backlog has stood for `burst_ns` and takes longer than that to work off,
        this is overload, neither a burst nor some dozens of clients that each wait for their answer: from then
        until the engines are found idle a tenth of the time, only as much is let in as runs within `shed_target_ns` (or
        `BACKLOG` times as long as the shortest execution), so that what is accepted is answered soon. While draining,
        everything that fits is let in: it was already sent.
        """
        if len(self._queue) >= self.policy.queue_size:
            raise RequestError("the queue is full", Code.OVERLOADED)
        if self.draining:
            return
        now = monotonic_ns()
        if self._shedding:
            self._shedding = now - self._window < WINDOW_NS or self._saturated(now)
            most = max(self.policy.shed_target_ns, BACKLOG * self._least_ns)
            if self._shedding and self._queue.rows * self._row_ns >= most:
                raise RequestError("the server is overloaded", Code.OVERLOADED)
        elif (
            self._standing
            and now - self._standing > self.policy.burst_ns
            and self._queue.rows * self._row_ns > self.policy.burst_ns
        ):
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
        return self._busy_ns + sum(now - batch.taken for batch in self._running())

    def _running(self) -> list[Batch]:
        """What the sharing engines execute now."""
        heads = [items[0].batch for i in self._instances if (items := i.items)]
        return [batch for batch in heads if batch]

    def submit(self, item: Item, *, alone: bool = False) -> asyncio.Future[dict[str, Array]]:
        """Queue a request; raises RequestError when it is refused.

        `alone` says that nothing else is under way in the process. Then a short execution runs here and now: two
        thread switches cost a small network a quarter of its speed, and there is nobody whom a blocked loop delays.
        Otherwise the engines learn of it in the next turn of the event loop: requests that came together run together.
        """
        self.check()
        if alone:
            item.deadline = 0  # there is nothing that it would have to wait for
        with self._wakeup:
            if self._closing:
                raise RequestError("the model is being unloaded", Code.UNAVAILABLE)
            if alone and not self._queue and not self.policy.delay_ns and self._run_alone(item):
                return item.future
            self._queue.push(item)
        if not self._waking:
            self._waking = True
            self._loop.call_soon(self._wake_engines)
        if item.deadline and not self._sweeping:
            self._sweeping = True
            self._loop.call_later(0.05, self._sweep)
        return item.future

    def _run_alone(self, item: Item) -> bool:
        """Run a request past the queue, if there is an engine for it; the lock is held."""
        solo = self._solo
        if solo and solo.items:  # its last request was answered (it was cancelled, say) but still runs
            return False
        inline = self.policy.on_cpu and 0 < self._row_ns * item.rows < INLINE_NS
        if not solo and not (inline and self._idle):
            return False
        item.batch = Batch(item.rows, taken=monotonic_ns())
        if solo and not inline:
            solo.items = [item]
            self._lone.put(solo.items)
            return True
        self._execute(solo or self._idle[-1], [item], _now)
        return True

    def _wake_engines(self) -> None:
        """Let idle engines see what was queued; one that waits for a fuller batch takes it when its delay is over."""
        self._waking = False
        with self._wakeup:
            if not self._filling or self._queue.rows >= self.policy.max_rows:
                self._wakeup.notify(len(self._queue))

    def _take_share(self, instance: Instance, dropped: list[Item]) -> list[Item]:
        """The batch of the engine that takes now; the lock is held.

        Of several engines each gets as much, and a share is left in the queue: an engine that is done finds work at
        once, without a wait for its answers to travel and the next requests to come. Not where a delay was asked for:
        then full batches are wanted.
        """
        limit, engines = self.policy.max_rows, len(self._instances)
        present = self._queue.rows + sum(batch.rows for batch in self._running())
        share = limit if engines == 1 or self.policy.delay_ns else min(limit, ceil(present / (engines + 1)))
        instance.items = items = self._queue.take(share, dropped)
        if not self._queue or (engines > 1 and present <= engines * limit):
            self._standing = 0
        elif not self._standing:
            self._standing = monotonic_ns()
        return items

    def _sweep(self) -> None:
        """Answer requests that expired behind a long execution; those at the head are caught when taken."""
        now = monotonic_ns()
        with self._wakeup:
            late = self._queue.expired(now)
        _fail_all(late, _expired())
        self._sweeping = len(self._queue) > 0
        if self._sweeping:
            self._loop.call_later(0.05, self._sweep)

    async def close(self, timeout: float = 30.0) -> bool:
        """Run what is queued, then end the threads. False if a thread was still busy at the timeout."""
        with self._wakeup:
            self._closing = True
            self._wakeup.notify_all()
            self._lone.put([])
        end = monotonic_ns() + timeout * 1e9
        while any(t.is_alive() for t in self._threads) and monotonic_ns() < end:
            await asyncio.sleep(0.005)
        return not any(t.is_alive() for t in self._threads)

    def abort(self, error: RequestError) -> int:
        """Fail everything queued or being executed (the drain's limit is reached); how many that was."""
        with self._wakeup:
            items = self._queue.clear()
            for instance in (*self._instances, *([self._solo] if self._solo else [])):
                items += instance.items
        _fail_all(items, error)
        return len(items)

    def _work(self, instance: Instance, take: Callable[[], list[Item]]) -> None:
        if self.policy.on_cpu:
            give_way()
        while items := take():
            self._execute(instance, items, self._call)

    def _take(self, instance: Instance) -> list[Item]:
        """The next batch; blocks while there is none; an empty one when closed."""
        with self._wakeup:
            while True:
                wait = None
                if self._queue:
                    wait = self._still_filling()
                    if wait <= 0:
                        dropped: list[Item] = []
                        items = self._take_share(instance, dropped)
                        if dropped:
                            self._call(_fail_all, dropped, _expired())
                        if items:
                            if self.policy.delay_ns:
                                self._wakeup.notify(len(self._queue))
                            return items
                        continue
                elif self._closing:
                    return []
                else:
                    self._queue.reset()
                    self._standing = 0
                self._idle.append(instance)
                self._filling += wait is not None
                self._wakeup.wait(wait)
                self._filling -= wait is not None
                self._idle.remove(instance)

    def _still_filling(self) -> float:
        """Seconds that the opt-in queue delay still allows this batch to grow."""
        delay = self.policy.delay_ns
        if not delay or self._closing or self._queue.rows >= self.policy.max_rows:
            return 0.0
        return (self._queue.oldest() + delay - monotonic_ns()) / 1e9

    def _execute(self, instance: Instance, items: list[Item], call: Callable[..., None]) -> None:
        batch = items[0].batch
        assert batch is not None
        instance.items = items
        suspects: list[Item] = []
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
            engines = 1 if instance is self._solo else len(self._instances)
            took = batch.done - batch.taken
            self._least_ns = min(took, self._least_ns or took)
            cost = took / max(batch.rows, 1) / engines
            self._row_ns = 0.8 * self._row_ns + 0.2 * cost if self._row_ns else cost
            call(self._deliver, batch, items, results)
        except BaseException as error:
            if not (refusal := instance.refusal(error, self.policy.probe)):
                call(self._break, items, error)
            elif len(items) == 1:
                call(_fail_all, items, refusal)
            else:
                suspects = items
        finally:
            instance.items = []
            self._busy_ns += monotonic_ns() - batch.taken
        for item in suspects:  # one of them is to blame: each runs alone
            item.batch = Batch(item.rows, taken=monotonic_ns())
            self._execute(instance, [item], call)

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

    def _break(self, items: list[Item], error: BaseException) -> None:
        self._on_fatal(error)
        _fail_all(items, RequestError("the engine failed", Code.INTERNAL))


def _now(function: Callable[..., None], *args: Any) -> None:
    function(*args)


def _fail_all(items: list[Item], error: RequestError) -> None:
    for item in items:
        if not item.future.done():
            item.future.set_exception(error)


def _expired() -> RequestError:
    return RequestError("the request's time in the queue ran out", Code.EXPIRED)
