"""One engine of a batcher: the buffer its batches are gathered in, its thread's priority."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from gmconv.errors import RefusedError
from runtime.cuda import DeviceMemoryError
from runtime.runners.base import Array, Runner
from runtime.serve.batching.fair_queue import Item
from runtime.serve.errors import Code, RequestError, without_paths

NICENESS = 5


class Instance:
    """One engine and the buffer its batches are gathered in."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.staging: dict[str, Array] = {}
        self.items: list[Item] = []
        """What is being executed."""

    def gather(self, items: list[Item], capacity: int) -> dict[str, Array]:
        """The items' rows in one array per input, where the runner reads them from if it has such memory.

        A lone request is passed on as it lies, if it lies aligned.
        """
        first = items[0].feeds
        if len(items) == 1:
            return {name: a if a.flags.aligned else a.copy() for name, a in first.items()}
        feeds = {}
        rows = sum(item.rows for item in items)
        staged = self.runner.stage({name: (rows, *array.shape[1:]) for name, array in first.items()})
        for name, array in first.items():
            buffer = (staged or self.staging).get(name)
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

    def refusal(self, error: BaseException, probe: Callable[[Runner], object] | None) -> RequestError | None:
        """What clients are told of a run that failed because of what they sent; None where the engine is broken.

        A refusal that came out of the engine may be either: `probe` runs it on what it has run before.
        """
        if isinstance(error, DeviceMemoryError):  # a smaller batch, or the same one later, may fit
            return RequestError("no room on the GPU for this batch; send fewer rows", Code.OVERLOADED)
        if not isinstance(error, RefusedError):
            return None
        if error.__cause__ is not None:
            try:
                if probe is None:
                    return None
                probe(self.runner)
            except BaseException:
                return None
        return RequestError(without_paths(error.message))


def give_way() -> None:
    """Let the event loop run before the calling thread and those it starts: an answer or a request's arrival costs
    microseconds, and while it waits for a thread that computes for milliseconds the engines run dry."""
    if sys.platform == "linux":  # where a niceness belongs to a thread, not to its process
        with contextlib.suppress(OSError):
            thread = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + NICENESS)


def _octets(array: Array) -> memoryview:
    octets: Any = array.reshape(-1).view(np.uint8)
    return memoryview(octets)
