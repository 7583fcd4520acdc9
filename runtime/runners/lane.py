"""One execution context with the streams, buffers and CUDA graph that belong to it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gmconv.errors import UnavailableError
from runtime import cuda, trt
from runtime.manifest import TensorSpec
from runtime.runners.base import Array, Query, QueryTimes, numpy_dtype

Shapes = dict[str, tuple[int, ...]]


class Buffers:
    """Device and page-locked memory for every input and output; grows, never shrinks, until `free`."""

    def __init__(self, device: cuda.Device) -> None:
        self._device = device
        self._memory: dict[str, tuple[int, Any, Any]] = {}
        self._views: dict[str, Array] = {}
        self._bytes: dict[str, Array] = {}  # what is copied: bfloat16 arrays have no buffer protocol, bytes do

    def fit(self, shapes: Shapes, dtypes: Mapping[str, np.dtype[Any]]) -> bool:
        """Make room for tensors of these shapes; True when some address changed."""
        moved = False
        self._views, self._bytes = {}, {}
        for name, shape in shapes.items():
            count = math.prod(shape)
            size = count * dtypes[name].itemsize
            if name not in self._memory or self._memory[name][0] < size:
                self._release(name)
                pinned = self._device.page_locked(size)
                try:
                    self._memory[name] = (size, pinned, self._device.allocate(size))
                except BaseException:
                    cuda.free_page_locked(pinned)
                    raise
                moved = True
            self._bytes[name] = self._memory[name][1][:size]
            self._views[name] = self._bytes[name].view(dtypes[name]).reshape(shape)
        return moved

    def address(self, name: str) -> int:
        """The device address of a tensor."""
        return int(self._memory[name][2])

    def host(self, name: str) -> Array:
        """The tensor's page-locked memory, in its present shape."""
        return self._views[name]

    def upload(self, name: str, stream: Any) -> None:
        """Enqueue page-locked -> device."""
        self._device.upload(self._memory[name][2], self._bytes[name], stream)

    def download(self, name: str, stream: Any) -> None:
        """Enqueue device -> page-locked."""
        self._device.download(self._bytes[name], self._memory[name][2], stream)

    def free(self) -> None:
        """Return everything; idempotent."""
        self._views, self._bytes = {}, {}
        for name in list(self._memory):
            self._release(name)

    def _release(self, name: str) -> None:
        if name in self._memory:
            _, pinned, device = self._memory.pop(name)
            device.free()
            cuda.free_page_locked(pinned)


class Lane:
    """An execution context, its stream and its buffers. Every method needs the CUDA context current.

    A CUDA graph is valid for one set of shapes and addresses; a lane keeps the one for its present shapes only, since
    a context holds state of the last shapes it ran. `graphs` False leaves graphs to TensorRT-RTX.
    """

    def __init__(
        self,
        device: cuda.Device,
        context: trt.IExecutionContext,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        log: trt.Log,
        *,
        graphs: bool,
        stream: Any = None,
    ) -> None:
        self.device = device
        self.context: trt.IExecutionContext | None = context
        self.stream = stream or device.stream()
        self.inputs = tuple(spec.name for spec in inputs)
        self.outputs = tuple(spec.name for spec in outputs)
        self.dtypes = {spec.name: numpy_dtype(spec.dtype) for spec in (*inputs, *outputs)}
        self.buffers = Buffers(device)
        self.graphs = graphs
        self._log = log
        # Only an engine's first context is sure to have profile 0 from the start: every one is told its profile.
        self._profile = -1
        self._shapes: Shapes = {}
        self._calls = 0
        self._graph: cuda.Graph | None = None
        self._queries: list[EngineQuery] = []
        self._using: Buffers | None = None

    def prepare(self, shapes: Shapes, profile: int) -> None:
        """Set the profile, the input shapes and the addresses; nothing is done when they are those of the last call."""
        if shapes == self._shapes and profile == self._profile:
            return
        self.drop_graph()
        self._shapes = {}  # until all of it is set
        context: trt.IExecutionContext = self.context
        if profile != self._profile:
            if not context.set_optimization_profile_async(profile, self.stream.handle):
                raise self._failure(f"optimization profile {profile} cannot be used")
            self.stream.synchronize()
            self._profile = profile
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise self._failure(f"input {name!r} cannot have shape {shape}")
        unknown = context.infer_shapes()
        if unknown:
            raise self._failure(f"the shapes of {', '.join(unknown)} do not follow from the inputs")
        outputs = self.output_shapes()
        for name, shape in outputs.items():
            if any(d < 0 for d in shape):
                raise self._failure(f"the size of output {name!r}, {shape}, is known only after a run")
        self.buffers.fit({**shapes, **outputs}, self.dtypes)
        self._using = None  # the addresses may be new
        self.use(self.buffers)
        self._shapes = dict(shapes)

    def output_shapes(self) -> Shapes:
        """The outputs' shapes for the present input shapes."""
        context: trt.IExecutionContext = self.context
        return {name: tuple(context.get_tensor_shape(name)) for name in self.outputs}

    def use(self, buffers: Buffers) -> None:
        """Let the context read and write `buffers`."""
        if buffers is self._using:
            return
        self._using = None
        context: trt.IExecutionContext = self.context
        for name in (*self.inputs, *self.outputs):
            if not context.set_tensor_address(name, buffers.address(name)):
                raise self._failure(f"the address of {name!r} was refused")
        self._using = buffers

    def execute(self) -> None:
        """Enqueue the inference itself."""
        context: trt.IExecutionContext = self.context
        if not context.execute_async_v3(self.stream.handle):
            raise self._failure("TensorRT did not enqueue the inference")

    def launch(self, cuda_graph: bool) -> None:
        """Enqueue the inference, as a CUDA graph from the second call of the same shapes on."""
        if not (cuda_graph and self.graphs):
            self.execute()
            return
        if self._graph is None and self._calls >= 1:
            self._graph = cuda.Graph(self.stream, self.execute)
        self._calls += 1
        if self._graph is None:
            self.execute()
        else:
            self._graph.launch()

    def drop_graph(self) -> None:
        """Destroy the recorded graph, if there is one."""
        graph, self._graph, self._calls = self._graph, None, 0
        if graph is not None:
            graph.close()

    def infer(self, cuda_graph: bool) -> None:
        """Upload the page-locked inputs, run, download the outputs, wait."""
        for name in self.inputs:
            self.buffers.upload(name, self.stream)
        self.launch(cuda_graph)
        for name in self.outputs:
            self.buffers.download(name, self.stream)
        self.stream.synchronize()

    def query(
        self, origin: Origin, streams: tuple[Any, Any], *, transfers: bool, cuda_graph: bool, spin: bool
    ) -> EngineQuery:
        """A query on this lane with buffers of its own, filled with the lane's inputs; the lane must be prepared."""
        graph = cuda_graph and self.graphs
        query = EngineQuery(self, origin, streams, transfers=transfers, cuda_graph=graph, spin=spin)
        self._queries.append(query)
        query.open()
        return query

    def shapes(self) -> Shapes:
        """The shapes of all tensors, as prepared."""
        return {**self._shapes, **self.output_shapes()}

    def close(self) -> None:
        """Graphs, then the context, then the memory it used; idempotent."""
        if self.stream is None:
            return
        self.stream.synchronize()
        for query in self._queries:
            query.drop_graph()
        self.drop_graph()
        self.context = None
        for query in self._queries:
            query.free()
        self._queries.clear()
        self.buffers.free()
        self.stream = None  # pycuda ends streams and events where the CUDA context is current: here

    def _failure(self, what: str) -> UnavailableError:
        return UnavailableError(f"{what}: {'; '.join(self._log.errors()) or 'TensorRT gave no reason'}")


class Origin:
    """The common zero of both clocks: an event on the device and the host's time at that event."""

    def __init__(self, device: cuda.Device, stream: Any) -> None:
        self.event = device.event()
        self.event.record(stream)
        self.event.synchronize()
        self.host = time.perf_counter()

    def host_ms(self) -> float:
        """Host time since the origin, ms."""
        return (time.perf_counter() - self.host) * 1e3


class EngineQuery(Query):
    """A query with CUDA events: uploads, inference and downloads on three streams, so that queries overlap."""

    def __init__(
        self, lane: Lane, origin: Origin, streams: tuple[Any, Any], *, transfers: bool, cuda_graph: bool, spin: bool
    ) -> None:
        self._lane = lane
        self._origin = origin
        self._up, self._down = streams
        self._transfers = transfers
        self._cuda_graph = cuda_graph
        self._buffers = Buffers(lane.device)
        self._graph: cuda.Graph | None = None
        self._events = [lane.device.event(blocking=not spin) for _ in range(6)]
        self._enqueued = (0.0, 0.0)

    def open(self) -> None:
        """Fill the buffers, run once, record the graph."""
        lane = self._lane
        self._buffers.fit(lane.shapes(), lane.dtypes)
        for name in lane.inputs:
            self._buffers.host(name)[...] = lane.buffers.host(name)
            self._buffers.upload(name, lane.stream)
        lane.use(self._buffers)
        lane.execute()
        lane.stream.synchronize()
        if self._cuda_graph:
            self._graph = cuda.Graph(lane.stream, lane.execute)

    def enqueue(self) -> None:
        """Put the inference on its streams and return at once."""
        lane, compute = self._lane, self._lane.stream
        up_start, up_end, start, end, down_start, down_end = self._events
        with lane.device.current():
            began = self._origin.host_ms()
            if self._transfers:
                up_start.record(self._up)
                for name in lane.inputs:
                    self._buffers.upload(name, self._up)
                up_end.record(self._up)
                compute.wait_for_event(up_end)
            start.record(compute)
            if self._graph is not None:
                self._graph.launch()
            else:
                lane.use(self._buffers)
                lane.execute()
            end.record(compute)
            if self._transfers:
                self._down.wait_for_event(end)
                down_start.record(self._down)
                for name in lane.outputs:
                    self._buffers.download(name, self._down)
                down_end.record(self._down)
            self._enqueued = (began, self._origin.host_ms())

    def wait(self) -> QueryTimes:
        """Block until the last `enqueue` is done; its times, ms from the origin."""
        up_start, up_end, start, end, down_start, down_end = self._events
        with self._lane.device.current():
            (down_end if self._transfers else end).synchronize()
            computes = self._span(start, end)
            if not self._transfers:
                return QueryTimes(*self._enqueued, computes[0], computes[0], *computes, computes[1], computes[1])
            return QueryTimes(
                *self._enqueued, *self._span(up_start, up_end), *computes, *self._span(down_start, down_end)
            )

    def outputs(self) -> dict[str, Array]:
        """Copies of the outputs, downloaded now: for `--exportOutput` and tests."""
        with self._lane.device.current():
            for name in self._lane.outputs:
                self._buffers.download(name, self._lane.stream)
            self._lane.stream.synchronize()
            return {name: self._buffers.host(name).copy() for name in self._lane.outputs}

    def _span(self, start: Any, end: Any) -> tuple[float, float]:
        # An event's distance from a far origin is a float32: the duration comes from its own two events.
        begin = float(start.time_since(self._origin.event))
        return begin, begin + float(end.time_since(start))

    def drop_graph(self) -> None:
        """Destroy the graph; idempotent."""
        graph, self._graph = self._graph, None
        if graph is not None:
            graph.close()

    def free(self) -> None:
        """Return the memory, the streams and the events; idempotent."""
        self._buffers.free()
        self._events = []
        self._up = self._down = None


def collect_layer_times(
    api: Any, lane: Lane, runs: int, after: Callable[[], None] = lambda: None
) -> list[tuple[str, tuple[float, ...]]]:
    """Each layer's name and its time in each of `runs` runs, ms, in the engine's order, by TensorRT's profiler."""
    seen: list[list[tuple[str, float]]] = []

    class Profiler(api.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            api.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            seen[-1].append((layer_name, ms))

    context: trt.IExecutionContext = lane.context
    profiler = Profiler()
    context.profiler = profiler
    for _ in range(runs):
        seen.append([])
        lane.execute()
        lane.stream.synchronize()
        after()
    length = min((len(run) for run in seen), default=0)
    return [(seen[0][i][0], tuple(run[i][1] for run in seen)) for i in range(length)]
