"""The queue of one model version: fair between clients by rows, in order within each.

Self-clocked fair queueing (Golestani 1994) on rows: a client that sends large requests does not hold up one that
sends small ones. Not locked: the batcher holds its own lock around every call.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import count
from time import monotonic_ns

from runtime.runners.base import Array

LOOK_AHEAD = 16
MANY_CLIENTS = 4096
Entry = tuple[int, int, int, "Item"]


@dataclass(slots=True)
class Batch:
    """When one execution passed each stage, monotonic ns."""

    rows: int
    taken: int = 0
    fed: int = 0
    inferred: int = 0
    done: int = 0

    @property
    def stages(self) -> tuple[int, int, int]:
        """Time for gathering inputs, executing, splitting outputs."""
        return self.fed - self.taken, self.inferred - self.fed, self.done - self.inferred


class Item:
    """One request in the queue. `future` resolves to its outputs (views of the batch's); cancelled, it is dropped."""

    __slots__ = ("batch", "client", "deadline", "feeds", "future", "key", "priority", "queued", "rows")

    def __init__(
        self, feeds: dict[str, Array], rows: int, *, client: object = None, timeout_ns: int = 0, priority: int = 0
    ) -> None:
        self.feeds = feeds
        self.rows = rows
        self.key = tuple(a.shape[1:] for a in feeds.values())
        self.client = client
        self.priority = priority
        self.queued = monotonic_ns()
        self.deadline = self.queued + timeout_ns if timeout_ns else 0
        self.future: asyncio.Future[dict[str, Array]] = asyncio.get_running_loop().create_future()
        self.batch: Batch | None = None


class FairQueue:
    """Requests by priority, then by virtual time."""

    def __init__(self) -> None:
        self.rows = 0
        self._heap: list[Entry] = []
        self._sequence = count()
        self._virtual = 0
        self._tags: dict[object, int] = {}
        self._prune_at = MANY_CLIENTS

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, item: Item) -> None:
        """Add a request."""
        tag = max(self._virtual, self._tags.get(item.client, 0)) + item.rows
        self._tags[item.client] = tag
        if len(self._tags) > self._prune_at:
            self._tags = {client: t for client, t in self._tags.items() if t > self._virtual}
            self._prune_at = max(MANY_CLIENTS, 2 * len(self._tags))
        heappush(self._heap, (item.priority, tag, next(self._sequence), item))
        self.rows += item.rows

    def reset(self) -> None:
        """Forget the clients; for when the queue is empty and the engine idle."""
        self._virtual = 0
        self._tags.clear()

    def oldest(self) -> int:
        """When the longest-waiting request was queued."""
        return min(entry[3].queued for entry in self._heap)

    def expired(self, now: int) -> list[Item]:
        """Take out what is past its deadline."""
        late = [entry[3] for entry in self._heap if 0 < entry[3].deadline <= now]
        if late:
            self._heap = [entry for entry in self._heap if not 0 < entry[3].deadline <= now]
            heapify(self._heap)
            self.rows = sum(entry[3].rows for entry in self._heap)
        return late

    def clear(self) -> list[Item]:
        """Take out everything."""
        items = [entry[3] for entry in self._heap]
        self._heap, self.rows = [], 0
        return items

    def take(self, limit: int, dropped: list[Item]) -> list[Item]:
        """The requests of one execution of at most `limit` rows (0: one request), from the head on.

        One that does not fit may be passed by later ones of other clients, a few at a time; it then heads the next
        batch. What was cancelled, expired or abandoned goes to `dropped`.
        """
        now = monotonic_ns()
        items: list[Item] = []
        passed: list[Entry] = []
        waiting: set[object] = set()
        rows = 0
        heap = self._heap
        while heap and len(passed) < LOOK_AHEAD:
            entry = heappop(heap)
            item = entry[3]
            if item.future.done() or 0 < item.deadline <= now:
                self.rows -= item.rows
                dropped.append(item)
            elif not items or (rows + item.rows <= limit and item.key == items[0].key and item.client not in waiting):
                items.append(item)
                rows += item.rows
                self.rows -= item.rows
                self._virtual = max(self._virtual, entry[1])
                if rows >= limit:
                    break
            else:
                passed.append(entry)
                waiting.add(item.client)
        for entry in passed:
            heappush(heap, entry)
        batch = Batch(rows, taken=now)
        for item in items:
            item.batch = batch
        return items
