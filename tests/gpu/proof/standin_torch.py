"""torch.cuda and torch.compile in a rehearsal, without a card: the same calls on the CPU, with the host's clock."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any, Self
from unittest import mock

import torch


class Event:
    """As torch.cuda.Event; what is recorded has happened."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self._timing = enable_timing
        self._at: float | None = None

    def record(self, stream: Any = None) -> None:
        self._at = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        if not self._timing or self._at is None or end._at is None:
            raise ValueError("both events must be made with enable_timing=True and be recorded")
        return 1e3 * (end._at - self._at)


class Stream:
    """As torch.cuda.Stream."""

    cuda_stream = 0

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        pass

    def wait_stream(self, stream: Stream) -> None:
        if not isinstance(stream, Stream):
            raise TypeError(f"a stream, not {stream!r}")

    def wait_event(self, event: Event) -> None:
        pass

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        pass


class CUDAGraph:
    """As torch.cuda.CUDAGraph: what it captured was computed then, and stays."""

    captured = False

    def replay(self) -> None:
        if not self.captured:
            raise RuntimeError("replayed before it was captured")

    def reset(self) -> None:
        self.captured = False


class Graph:
    """As torch.cuda.graph, the context manager."""

    def __init__(self, cuda_graph: CUDAGraph, pool: Any = None, stream: Any = None, **_: Any) -> None:
        self._graph = cuda_graph

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        self._graph.captured = kind is None


@contextlib.contextmanager
def stand_in() -> Iterator[None]:
    """Put these in torch.cuda's place."""
    stream = Stream()
    with contextlib.ExitStack() as stack:
        for name, value in {
            "Event": Event,
            "Stream": Stream,
            "CUDAGraph": CUDAGraph,
            "graph": Graph,
            "current_stream": lambda device=None: stream,
            "stream": lambda stream: contextlib.nullcontext(),
            "synchronize": lambda device=None: None,
            "empty_cache": lambda: None,
            "mem_get_info": lambda device=None: (2**33, 2**34),
        }.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        # No compiler is started; the keywords are still checked against torch's.
        compiled = mock.create_autospec(torch.compile, side_effect=lambda model, **_: model)
        stack.enter_context(mock.patch.object(torch, "compile", compiled))
        yield
