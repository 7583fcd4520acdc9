"""One execution context with the streams, buffers and CUDA graph that belong to it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any, Protocol

import numpy as np

from gmconv.errors import UnavailableError
from runtime import cuda, trt
from runtime.manifest import TensorSpec
from runtime.runners.base import PROFILE_WARM_UP, Array, numpy_dtype
from runtime.runners.queries import DeviceQuery, Origin, Streams

Shapes = dict[str, tuple[int, ...]]
log = logging.getLogger("gmconv.runners")


class Graphs:
    """A runner's CUDA graphs. One that cannot be recorded is said once; from then on work is enqueued as it is."""

    def __init__(self, device: cuda.Device, name: str) -> None:
        self._device, self._name = device, name
        self.problem: str | None = None

    def record(self, stream: cuda.Stream, enqueue: Callable[[], None]) -> cuda.Graph | None:
        """The graph of `enqueue`, which ran once before; None when graphs do not work here."""
        if self.problem is None:
            try:
                return self._device.record(stream, enqueue)
            except UnavailableError as error:
                self.problem = error.message
                log.warning("%s: no CUDA graph (%s); enqueued kernel by kernel instead", self._name, error.message)
        return None


class Buffers:
    """Device and page-locked memory for every input and output; grows, never shrinks, until `free`."""

    def __init__(self, device: cuda.Device) -> None:
        self._device = device
        self._memory: dict[str, tuple[int, cuda.PageLocked, cuda.Memory]] = {}
        self._views: dict[str, Array] = {}

    def fit(self, shapes: Shapes, dtypes: Mapping[str, np.dtype[Any]]) -> None:
        """Make room for tensors of these shapes. Raises DeviceMemoryError; what was there before is then gone."""
        self._views = {}
        for name, shape in shapes.items():
            size = math.prod(shape) * dtypes[name].itemsize
            if name not in self._memory or self._memory[name][0] < size:
                self._release(name)
                locked = self._device.page_locked(size)
                try:
                    self._memory[name] = (size, locked, self._device.allocate(size))
                except BaseException:
                    locked.free()
                    raise
            self._views[name] = self._memory[name][1].array[:size].view(dtypes[name]).reshape(shape)

    def address(self, name: str) -> int:
        """The device address of a tensor."""
        return self._memory[name][2].address

    def host(self, name: str) -> Array:
        """The tensor's page-locked memory, in its present shape."""
        return self._views[name]

    def upload(self, name: str, stream: cuda.Stream) -> None:
        """Enqueue page-locked -> device."""
        _, locked, memory = self._memory[name]
        self._device.upload(memory, locked, self._views[name].nbytes, stream)

    def download(self, name: str, stream: cuda.Stream) -> None:
        """Enqueue device -> page-locked."""
        _, locked, memory = self._memory[name]
        self._device.download(locked, memory, self._views[name].nbytes, stream)

    def free(self) -> None:
        """Return everything; idempotent."""
        self._views = {}
        for name in list(self._memory):
            self._release(name)

    def _release(self, name: str) -> None:
        if name in self._memory:
            _, locked, memory = self._memory.pop(name)
            memory.free()
            locked.free()


class Lane:
    """An execution context, its stream and its buffers. Every method needs the CUDA context current.

    A CUDA graph is valid for one set of shapes and addresses; a lane keeps the one for its present shapes only, since
    a context holds state of the last shapes it ran. `graphs` None leaves graphs to TensorRT-RTX; `config` is what the
    context was made with and must live as long.
    """

    def __init__(
        self,
        device: cuda.Device,
        context: trt.IExecutionContext,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        trt_log: trt.Log,
        *,
        graphs: Graphs | None,
        stream: cuda.Stream | None = None,
        config: Any = None,
    ) -> None:
        self.device = device
        self.context: trt.IExecutionContext | None = context
        self.config = config
        self.stream: cuda.Stream = stream or device.stream()
        self._owned = [self.stream] if stream is None else []
        self.inputs = tuple(spec.name for spec in inputs)
        self.outputs = tuple(spec.name for spec in outputs)
        self.dtypes = {spec.name: numpy_dtype(spec.dtype) for spec in (*inputs, *outputs)}
        self.buffers = Buffers(device)
        self.graphs = graphs
        self._log = trt_log
        # Only an engine's first context is sure to have profile 0 from the start: every one is told its profile.
        self._profile = -1
        self.prepared: Shapes = {}
        self._calls = 0
        self._graph: cuda.Graph | None = None
        self._queries: list[EngineQuery] = []
        self._using: Buffers | None = None

    def prepare(self, shapes: Shapes, profile: int) -> None:
        """Set the profile, the input shapes and the addresses; nothing is done when they are those of the last call.

        Raises DeviceMemoryError where they do not fit, UnavailableError with TensorRT's reason.
        """
        if shapes == self.prepared and profile == self._profile:
            return
        self.drop_graph()
        self.prepared = {}  # until all of it is set
        context: trt.IExecutionContext = self.context
        try:  # what the profile and the shape inference refuse, they raise
            if profile != self._profile:
                self._profile = -1
                context.set_optimization_profile_async(profile, self.stream.handle)
                self.stream.synchronize()
                self._profile = profile
            for name, shape in shapes.items():
                if not context.set_input_shape(name, shape):
                    raise self._failure(f"input {name!r} cannot have shape {shape}")
            unknown = context.infer_shapes()
        except RuntimeError as error:
            raise self._failure(f"shapes {shapes} in optimization profile {profile}: {error}") from error
        if unknown:
            raise self._failure(f"the shapes of {', '.join(unknown)} do not follow from the inputs")
        outputs = self.output_shapes()
        for name, shape in outputs.items():
            if any(d < 0 for d in shape):
                raise self._failure(f"the size of output {name!r}, {shape}, is known only after a run")
        self._using = None  # the addresses may be new
        self.buffers.fit({**shapes, **outputs}, self.dtypes)
        self.use(self.buffers)
        self.prepared = dict(shapes)

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
        if cuda_graph and self.graphs is not None and self._graph is None and self._calls >= 1:
            self._graph = self.graphs.record(self.stream, self.execute)
        self._calls += 1
        if cuda_graph and self._graph is not None:
            self._graph.launch()
        else:
            self.execute()

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

    def query(self, origin: Origin, streams: Streams, *, transfers: bool, cuda_graph: bool, spin: bool) -> EngineQuery:
        """A query on this lane with buffers of its own, filled with the lane's inputs; the lane must be prepared."""
        query = EngineQuery(self, origin, streams, transfers=transfers, cuda_graph=cuda_graph, spin=spin)
        self._queries.append(query)
        query.open()
        return query

    def shapes(self) -> Shapes:
        """The shapes of all tensors, as prepared."""
        return {**self.prepared, **self.output_shapes()}

    def close(self) -> None:
        """Graphs, then the context, then the memory it used; idempotent. What failed before is not raised again."""
        if self.context is None:
            return
        with suppress(cuda.CudaError):
            self.stream.synchronize()
        for query in self._queries:
            query.drop_graph()
        self.drop_graph()
        self.context = None
        self.config = None
        for query in self._queries:
            query.free()
        self._queries.clear()
        self.buffers.free()
        for stream in self._owned:
            stream.close()

    def _failure(self, what: str) -> UnavailableError:
        return UnavailableError(f"{what}: {'; '.join(self._log.errors()) or 'TensorRT gave no reason'}")


class Enqueues(Protocol):
    """What a query is a query of: a `Lane`, or ONNX Runtime's counterpart."""

    device: cuda.Device
    stream: cuda.Stream
    buffers: Buffers
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dtypes: dict[str, np.dtype[Any]]

    @property
    def graphs(self) -> Graphs | None:
        """What records CUDA graphs; None where the engine does so itself."""

    def shapes(self) -> Shapes:
        """The shapes of all tensors."""

    def use(self, buffers: Buffers) -> None:
        """Let the inference read and write `buffers`."""

    def execute(self) -> None:
        """Enqueue the inference itself."""


class EngineQuery(DeviceQuery):
    """A query of a lane."""

    def __init__(
        self, lane: Enqueues, origin: Origin, streams: Streams, *, transfers: bool, cuda_graph: bool, spin: bool
    ) -> None:
        events = [lane.device.event(blocking=not spin) for _ in range(6)]
        super().__init__(origin, streams, events, transfers=transfers)
        self._lane = lane
        self._cuda_graph = cuda_graph
        self._buffers = Buffers(lane.device)
        self._graph: cuda.Graph | None = None

    def open(self) -> None:
        """Fill the buffers, run once, record the graph."""
        lane = self._lane
        self._buffers.fit(lane.shapes(), lane.dtypes)
        for name in lane.inputs:
            self._buffers.host(name)[...] = lane.buffers.host(name)
        self.upload(lane.stream)
        self.prepare()
        lane.execute()
        lane.stream.synchronize()
        if self._cuda_graph and lane.graphs is not None:
            self._graph = lane.graphs.record(lane.stream, lane.execute)

    def current(self) -> AbstractContextManager[object]:
        """See `DeviceQuery`."""
        return self._lane.device.current()

    def prepare(self) -> None:
        """See `DeviceQuery`."""
        if self._graph is None:  # a graph has its addresses
            self._lane.use(self._buffers)

    def upload(self, stream: cuda.Stream) -> None:
        """See `DeviceQuery`."""
        for name in self._lane.inputs:
            self._buffers.upload(name, stream)

    def launch(self) -> None:
        """See `DeviceQuery`."""
        if self._graph is not None:
            self._graph.launch()
        else:
            self._lane.execute()

    def download(self, stream: cuda.Stream) -> None:
        """See `DeviceQuery`."""
        for name in self._lane.outputs:
            self._buffers.download(name, stream)

    def outputs(self) -> dict[str, Array]:
        """Copies of the outputs, downloaded now: for `--exportOutput` and tests."""
        with self.current():
            self.download(self._lane.stream)
            self._lane.stream.synchronize()
            return {name: self._buffers.host(name).copy() for name in self._lane.outputs}

    def drop_graph(self) -> None:
        """Destroy the graph; idempotent."""
        graph, self._graph = self._graph, None
        if graph is not None:
            graph.close()

    def free(self) -> None:
        """Return the memory and the events; idempotent."""
        self._buffers.free()
        for event in self._events:
            event.close()  # type: ignore[attr-defined]
        self._events = []


def collect_layer_times(api: Any, lane: Lane, runs: int) -> list[tuple[str, tuple[float, ...]]]:
    """Each layer's name and its time in each of `runs` runs, ms, in the engine's order, by TensorRT's profiler.

    A few runs before them are not counted: the first ones load kernels and raise clocks.
    """
    seen: list[list[tuple[str, float]]] = []

    class Profiler(api.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            api.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            seen[-1].append((layer_name, ms))

    context: trt.IExecutionContext = lane.context
    profiler = Profiler()
    context.profiler = profiler
    for _ in range(runs + PROFILE_WARM_UP):
        seen.append([])
        lane.execute()
        lane.stream.synchronize()
    counted = seen[PROFILE_WARM_UP:]
    length = min((len(run) for run in counted), default=0)
    return [(counted[0][i][0], tuple(run[i][1] for run in counted)) for i in range(length)]
