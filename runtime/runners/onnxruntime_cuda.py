"""ONNX Runtime on a GPU: tensors that stay there, and sessions on a stream of ours, which CUDA events can clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from runtime import cuda
from runtime.manifest import TensorSpec
from runtime.runners.base import Array, numpy_dtype
from runtime.runners.lane import Buffers, EngineQuery, Shapes
from runtime.runners.queries import Origin, Streams

#: onnx.TensorProto.DataType of what numpy has no type for.
_ONNX_TYPES = {"bfloat16": 16, "float8_e4m3fn": 17, "float8_e5m2": 19}


class Binding:
    """Inputs and outputs of one shape in device memory, at addresses that stay (a CUDA graph needs that)."""

    def __init__(
        self,
        ort: Any,
        session: Any,
        feeds: Mapping[str, Array],
        outputs: tuple[TensorSpec, ...],
        index: int,
        graph: int,
    ) -> None:
        """`graph` is the name of the CUDA graph to record and replay; -1: none."""
        self._session, self._binding, self._options = session, session.io_binding(), _run_options(ort, graph)
        self._inputs = {
            name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), "cuda", index)
            for name, array in feeds.items()
        }
        for name, value in self._inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        for spec in outputs:
            self._binding.bind_output(spec.name, "cuda", index)
        if graph >= 0:
            # A captured graph writes to fixed addresses: run once to learn the shapes, then own the buffers.
            session.run_with_iobinding(self._binding, _run_options(ort, -1))
            shapes = [value.shape() for value in self._binding.get_outputs()]
            self._owned = []
            for spec, shape in zip(outputs, shapes, strict=True):
                owned = ort.OrtValue.ortvalue_from_shape_and_type(shape, numpy_dtype(spec.dtype), "cuda", index)
                self._owned.append(owned)
                self._binding.bind_ortvalue_output(spec.name, owned)

    def load(self, feeds: Mapping[str, Array]) -> None:
        """Copy the feeds to the device."""
        for name, array in feeds.items():
            self._inputs[name].update_inplace(np.ascontiguousarray(array))

    def execute(self) -> None:
        """Run and wait: `run_with_iobinding` synchronizes its stream before it returns."""
        self._session.run_with_iobinding(self._binding, self._options)

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """Copy, run, copy back."""
        self.load(feeds)
        self.execute()
        return list(self._binding.copy_outputs_to_cpu())


class SessionLane:
    """A session that computes on a stream of ours, as `EngineQuery` drives it. The CUDA context must be current.

    `open_session` opens it on a CUstream. With `cuda_graph` it records the run of each set of buffers by itself, in its
    first run of them.
    """

    graphs = None

    def __init__(
        self,
        ort: Any,
        device: cuda.Device,
        open_session: Callable[[int], Any],
        specs: tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]],
        *,
        cuda_graph: bool,
    ) -> None:
        self._ort, self.device, self._cuda_graph = ort, device, cuda_graph
        self.stream: cuda.Stream = device.stream()
        self._session = open_session(self.stream.handle)
        self._specs = specs
        self.inputs, self.outputs = (tuple(spec.name for spec in side) for side in specs)
        self.dtypes = {spec.name: numpy_dtype(spec.dtype) for side in specs for spec in side}
        self.buffers = Buffers(device)
        self._shapes: Shapes = {}
        self._bound: list[tuple[Buffers, Any, Any]] = []
        self._using: tuple[Buffers, Any, Any] | None = None
        self._queries: list[EngineQuery] = []

    def load(self, feeds: Mapping[str, Array], results: Mapping[str, Array]) -> None:
        """Take the inputs from `feeds` and the shapes of the outputs from `results`, what another run gave."""
        self._shapes = {name: tuple(array.shape) for name, array in (*feeds.items(), *results.items())}
        self.buffers.fit(self._shapes, self.dtypes)
        for name in self.inputs:
            np.copyto(self.buffers.host(name), feeds[name], casting="no")

    def shapes(self) -> Shapes:
        """The shapes of all tensors."""
        return self._shapes

    def use(self, buffers: Buffers) -> None:
        """Let the session read and write `buffers`."""
        self._using = next((bound for bound in self._bound if bound[0] is buffers), None)
        if self._using is None:
            binding, index = self._session.io_binding(), self.device.info.index
            for side, bind in zip(self._specs, (binding.bind_input, binding.bind_output), strict=True):
                for spec in side:
                    kind = _ONNX_TYPES.get(spec.dtype) or self.dtypes[spec.name].type
                    bind(spec.name, "cuda", index, kind, list(self._shapes[spec.name]), buffers.address(spec.name))
            graph = len(self._bound) + 1 if self._cuda_graph else -1
            self._using = (buffers, binding, _run_options(self._ort, graph, wait=False))
            self._bound.append(self._using)

    def execute(self) -> None:
        """Enqueue the inference on the stream."""
        assert self._using is not None
        self._session.run_with_iobinding(*self._using[1:])

    def query(self, origin: Origin, streams: Streams, *, transfers: bool, spin: bool) -> EngineQuery:
        """A query with buffers of its own."""
        query = EngineQuery(self, origin, streams, transfers=transfers, cuda_graph=False, spin=spin)
        self._queries.append(query)
        query.open()
        return query

    def close(self) -> None:
        """The session, then the memory it used, then its stream; idempotent."""
        self._bound, self._using, self._session = [], None, None
        for query in self._queries:
            query.free()
        self._queries.clear()
        self.buffers.free()
        self.stream.close()


def _run_options(ort: Any, graph: int, *, wait: bool = True) -> Any:
    options = ort.RunOptions()
    options.log_severity_level = 4
    options.add_run_config_entry("gpu_graph_id", str(graph))
    if not wait:
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return options
