"""What a checkpoint runs as on a GPU: CUDA graphs of its network, and queries with CUDA events, in torch's words."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from runtime.runners.queries import DeviceQuery, Origin, Streams

Tensor = Any  # torch's: only the runner imports it
TorchRunner = Any  # `runtime.runners.torch.TorchRunner`, which imports this module


class Captured:
    """One CUDA graph of a network, with its static `input` and output. The device is torch's current one."""

    def __init__(self, torch: Any, call: Callable[[Any], Any], example: Tensor) -> None:
        self.input = example.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries choose their kernels before the capture
            for _ in range(3):
                call(self.input)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._output = call(self.input)

    def __call__(self, tensor: Tensor) -> Any:
        """The network's output, good until the next call; its own `input` is not copied."""
        if tensor is not self.input:
            self.input.copy_(tensor)
        self._graph.replay()
        return self._output


class Stream:
    """A torch stream as `DeviceQuery` takes it."""

    def __init__(self, found: Any) -> None:
        self.found = found

    def wait_for_event(self, event: Event) -> None:
        """Let what comes later wait for `event`."""
        self.found.wait_event(event.found)


class Event:
    """A torch event as `DeviceQuery` takes it."""

    def __init__(self, torch: Any, *, blocking: bool) -> None:
        self.found = torch.cuda.Event(enable_timing=True, blocking=blocking)

    def record(self, stream: Stream) -> None:
        """Put it on `stream`."""
        self.found.record(stream.found)

    def synchronize(self) -> None:
        """Wait until it has happened."""
        self.found.synchronize()

    def time_since(self, earlier: Event) -> float:
        """Milliseconds from `earlier`."""
        return float(earlier.found.elapsed_time(self.found))


class TorchQuery(DeviceQuery):
    """One inference of a checkpoint's network on `host`, its input in page-locked memory."""

    def __init__(
        self,
        runner: TorchRunner,
        host: Tensor,
        streams: Streams,
        origin: Origin,
        *,
        transfers: bool,
        graph: bool,
        spin: bool,
    ) -> None:
        torch = runner._torch
        super().__init__(origin, streams, [Event(torch, blocking=not spin) for _ in range(6)], transfers=transfers)
        self._runner, self._host = runner, host
        with self.current():
            self._input = runner._tensor({runner.inputs[0].name: host.numpy()})
            captured = runner.capture(self._input) if graph else None
            if captured is not None:
                self._input = captured.input  # what is uploaded is what the graph reads
            self._call: Callable[[Any], Any] = captured or runner._call
            # Kept until the next launch: torch may give freed memory to this stream while another still copies from it.
            self._outputs: Any = self._call(self._input)
            named = runner._named(self._outputs).values()
            self._results = [torch.empty(o.shape, dtype=o.dtype, pin_memory=True) for o in named]
        streams.compute.found.synchronize()

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """See `DeviceQuery`."""
        with self._runner._mode(), self._runner._torch.cuda.stream(self._streams.compute.found):
            yield

    def upload(self, stream: Stream) -> None:
        """See `DeviceQuery`."""
        with self._runner._torch.cuda.stream(stream.found):
            self._input.copy_(self._host, non_blocking=True)

    def launch(self) -> None:
        """See `DeviceQuery`."""
        self._outputs = self._call(self._input)

    def download(self, stream: Stream) -> None:
        """See `DeviceQuery`."""
        with self._runner._torch.cuda.stream(stream.found):
            for result, output in zip(self._results, self._runner._named(self._outputs).values(), strict=True):
                result.copy_(output, non_blocking=True)


def make_queries(
    runner: TorchRunner, host: Tensor, count: int, streams: int, *, transfers: bool, graph: bool, spin: bool
) -> list[TorchQuery]:
    """`count` queries on each of `streams` compute streams, one of each in turn."""
    torch, device = runner._torch, runner._device
    with runner._mode():
        lanes = [Streams(*(Stream(torch.cuda.Stream(device)) for _ in range(3))) for _ in range(streams)]
        origin = Origin(Event(torch, blocking=False), lanes[0].compute)
        return [
            TorchQuery(runner, host, lane, origin, transfers=transfers, graph=graph, spin=spin)
            for _ in range(count)
            for lane in lanes
        ]
