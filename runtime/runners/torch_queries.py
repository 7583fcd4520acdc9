"""What a checkpoint is timed by on a GPU: queries with CUDA events, in torch's words."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from runtime.runners.queries import DeviceQuery, Origin, Streams
from runtime.runners.torch_network import Tensors, TorchNetwork


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
    """One inference of a checkpoint's network on `host`, its inputs in page-locked memory."""

    def __init__(
        self,
        network: TorchNetwork,
        host: Tensors,
        streams: Streams,
        origin: Origin,
        *,
        transfers: bool,
        graph: bool,
        spin: bool,
    ) -> None:
        torch = network.torch
        super().__init__(origin, streams, [Event(torch, blocking=not spin) for _ in range(6)], transfers=transfers)
        self._network, self._host = network, host
        with self.current():
            feeds = {spec.name: tensor.numpy() for spec, tensor in zip(network.inputs, host, strict=True)}
            self._inputs = network.tensors(feeds)
            captured = network.capture(self._inputs) if graph else None
            if captured is not None:
                self._inputs = captured.inputs  # what is uploaded is what the graph reads
            self._call: Callable[..., Any] = captured or network.call
            # Kept until the next launch: torch may give freed memory to this stream while another still copies from it.
            self._outputs: Any = self._call(*self._inputs)
            named = network.named(self._outputs).values()
            self._results = [torch.empty(o.shape, dtype=o.dtype, pin_memory=True) for o in named]
        streams.compute.found.synchronize()

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """See `DeviceQuery`."""
        with self._network.mode(), self._network.torch.cuda.stream(self._streams.compute.found):
            yield

    def upload(self, stream: Stream) -> None:
        """See `DeviceQuery`."""
        with self._network.torch.cuda.stream(stream.found):
            for own, host in zip(self._inputs, self._host, strict=True):
                own.copy_(host, non_blocking=True)

    def launch(self) -> None:
        """See `DeviceQuery`."""
        self._outputs = self._call(*self._inputs)

    def download(self, stream: Stream) -> None:
        """See `DeviceQuery`."""
        with self._network.torch.cuda.stream(stream.found):
            for result, output in zip(self._results, self._network.named(self._outputs).values(), strict=True):
                result.copy_(output, non_blocking=True)


def make_queries(
    network: TorchNetwork, host: Tensors, count: int, streams: int, *, transfers: bool, graph: bool, spin: bool
) -> list[TorchQuery]:
    """`count` queries on each of `streams` compute streams, one of each in turn."""
    torch, place = network.torch, network.place
    with network.mode():
        lanes = [Streams(*(Stream(torch.cuda.Stream(place)) for _ in range(3))) for _ in range(streams)]
        origin = Origin(Event(torch, blocking=False), lanes[0].compute)
        return [
            TorchQuery(network, host, lane, origin, transfers=transfers, graph=graph, spin=spin)
            for _ in range(count)
            for lane in lanes
        ]
