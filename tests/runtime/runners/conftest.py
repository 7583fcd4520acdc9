"""Doubles for the TensorRT runner: TensorRT's objects autospecced from its real bindings, CUDA as a small model."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import msgspec
import numpy as np
import pytest
import tensorrt_rtx

from gmconv.files import sha256_file
from runtime import cuda, trt
from runtime.manifest import FileDigest, Manifest, TensorSpec, sidecar
from runtime.records import Build, Device
from runtime.runners.tensorrt import TensorRTRunner

GPU = cuda.DeviceInfo(0, "Test GPU", "8.9", 2**33, "580.1", "13.0")
VERSION = "10.13.3.9"
Events = list[tuple[Any, ...]]


class FakeDevice(cuda.Device):
    """The contract of `runtime.cuda`: `log` holds what happened, `bytes_at` maps addresses to memory.

    `refuse` maps a call ("record", "synchronize", "page_locked", ...) to the error that it raises.
    """

    driver = "a double"

    def __init__(self, log: Events) -> None:
        self.log = log
        self.info = GPU
        self.depth = 0
        self.bytes_at: dict[int, np.ndarray[Any, Any]] = {}
        self.next_address = 0x1000
        self.handles = 0
        self.clock = 0.0
        self.refuse: dict[str, Exception] = {}
        self.open: Counter[str] = Counter()

    @contextmanager
    def current(self) -> Iterator[None]:
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1

    def called(self, name: str) -> None:
        assert self.depth > 0, "a CUDA call without the context current"
        if name in self.refuse:
            raise self.refuse[name]

    def stream(self) -> Any:
        self.called("stream")
        self.handles += 1
        return FakeStream(self, self.handles)

    def event(self, *, blocking: bool = False) -> Any:
        self.called("event")
        self.log.append(("event", blocking))
        self.handles += 1
        return FakeEvent(self, self.handles)

    def page_locked(self, size: int) -> Any:
        self.called("page_locked")
        self.log.append(("page-locked", size))
        return FakePageLocked(self, size)

    def allocate(self, size: int) -> Any:
        self.called("allocate")
        self.log.append(("allocate", size))
        self.next_address += size
        return FakeMemory(self, self.next_address, size)

    def upload(self, target: Any, source: Any, size: int, stream: Any) -> None:
        self.called("upload")
        self.bytes_at[target.address][:size] = source.array[:size]
        self.log.append(("upload", stream.handle))

    def download(self, target: Any, source: Any, size: int, stream: Any) -> None:
        self.called("download")
        target.array[:size] = self.bytes_at[source.address][:size]
        self.log.append(("download", stream.handle))

    def record(self, stream: Any, enqueue: Callable[[], None]) -> Any:
        self.log.append(("capture", stream.handle))
        self.called("record")
        return FakeGraph(self, enqueue)

    def memory(self) -> tuple[int, int]:
        return 0, 2**33


class Closes:
    """Given back exactly once, with the context current."""

    kind = ""

    def __init__(self, device: FakeDevice) -> None:
        self.device = device
        self.gone = False
        device.open[self.kind] += 1

    def close(self) -> None:
        if not self.gone:
            assert self.device.depth > 0, "a CUDA call without the context current"
            self.gone = True
            self.device.open[self.kind] -= 1
            self.closed()

    def closed(self) -> None:
        pass


class FakeStream(Closes):
    kind = "stream"

    def __init__(self, device: FakeDevice, handle: int) -> None:
        super().__init__(device)
        self.handle = handle

    def synchronize(self) -> None:
        self.device.log.append(("synchronize", self.handle))
        self.device.called("synchronize")

    def wait_for_event(self, event: Any) -> None:
        self.device.log.append(("wait", self.handle, event.number))


class FakeEvent(Closes):
    kind = "event"

    def __init__(self, device: FakeDevice, number: int) -> None:
        super().__init__(device)
        self.number = number
        self.at = 0.0

    def record(self, stream: Any) -> None:
        assert not self.gone
        self.device.clock += 1.0
        self.at = self.device.clock
        self.device.log.append(("record", self.number, stream.handle))

    def synchronize(self) -> None:
        self.device.log.append(("event synchronize", self.number))

    def time_since(self, earlier: Any) -> float:
        return float(np.float32(self.at - earlier.at))  # as the driver tells it


class FakePageLocked(Closes):
    kind = "page-locked"

    def __init__(self, device: FakeDevice, size: int) -> None:
        super().__init__(device)
        self.array = np.zeros(size, np.uint8)

    def closed(self) -> None:
        self.device.log.append(("free page-locked",))

    free = Closes.close


class FakeMemory(Closes):
    kind = "memory"

    def __init__(self, device: FakeDevice, address: int, size: int) -> None:
        super().__init__(device)
        self.address = address
        device.bytes_at[address] = np.zeros(size, np.uint8)

    def closed(self) -> None:
        del self.device.bytes_at[self.address]
        self.device.log.append(("free",))

    free = Closes.close


class FakeGraph(Closes):
    """Records the enqueue without running it, and runs it on launch."""

    kind = "graph"

    def __init__(self, device: FakeDevice, enqueue: Callable[[], None]) -> None:
        super().__init__(device)
        self.enqueue = enqueue

    def launch(self) -> None:
        self.device.log.append(("launch",))
        self.enqueue()

    def closed(self) -> None:
        self.device.log.append(("graph closed",))


class FakeEngine:
    """An engine of one input (batch, 4) and one output (batch, 2): the first two columns, doubled."""

    def __init__(self, log: Events, device: FakeDevice, profiles: list[tuple[int, int, int]]) -> None:
        self.log = log
        self.device = device
        self.profiles = profiles
        self.contexts: list[Any] = []
        self.refuse_execute = self.refuse_profile = self.refuse_shapes = False
        engine = mock.create_autospec(tensorrt_rtx.ICudaEngine, instance=True, spec_set=True)
        names = ["input", "logits"]
        engine.num_io_tensors = 2
        engine.num_optimization_profiles = len(profiles)
        engine.get_tensor_name.side_effect = names.__getitem__
        modes = tensorrt_rtx.TensorIOMode
        engine.get_tensor_mode.side_effect = lambda name: modes.INPUT if name == "input" else modes.OUTPUT
        engine.get_tensor_dtype.return_value = tensorrt_rtx.DataType.FLOAT
        engine.get_tensor_shape.side_effect = lambda name: (-1, 4) if name == "input" else (-1, 2)
        engine.get_tensor_profile_shape.side_effect = lambda name, index: [(size, 4) for size in profiles[index]]
        engine.create_execution_context.side_effect = self.context
        self.double = engine

    def context(self, *_: Any) -> Any:
        log, device = self.log, self.device
        context = mock.create_autospec(tensorrt_rtx.IExecutionContext, instance=True, spec_set=True)
        number = len(self.contexts)
        state: dict[str, Any] = {"batch": None, "addresses": {}, "profiler": None}

        def set_profile(index: int, handle: int) -> bool:
            if self.refuse_profile:  # the binding raises; it never answers False
                raise RuntimeError("Error in set optimization profile async.")
            log.append(("profile", number, index))
            return True

        def infer_shapes() -> list[str]:
            if self.refuse_shapes:
                raise RuntimeError("Error: inferShapes failed.")
            return []

        def set_input_shape(name: str, shape: tuple[int, ...]) -> bool:
            log.append(("shape", number, name, shape))
            state["batch"] = shape[0]
            return True

        def set_address(name: str, address: int) -> bool:
            state["addresses"][name] = address
            return True

        def execute(handle: int) -> bool:
            device.called("execute")
            if self.refuse_execute:
                return False
            log.append(("execute", number, handle))
            batch, addresses = state["batch"], state["addresses"]
            source = device.bytes_at[addresses["input"]][: batch * 16].view(np.float32).reshape(batch, 4)
            result = np.ascontiguousarray(source[:, :2] * 2)
            device.bytes_at[addresses["logits"]][: batch * 8] = result.view(np.uint8).ravel()
            if isinstance(context.profiler, tensorrt_rtx.IProfiler):
                context.profiler.report_layer_time("conv", 0.5)
                context.profiler.report_layer_time("fc", 0.25)
            return True

        context.set_input_shape.side_effect = set_input_shape
        context.get_tensor_shape.side_effect = lambda name: (state["batch"], 4 if name == "input" else 2)
        context.infer_shapes.side_effect = infer_shapes
        context.set_tensor_address.side_effect = set_address
        context.set_optimization_profile_async.side_effect = set_profile
        context.execute_async_v3.side_effect = execute
        self.contexts.append(context)
        return context


@dataclasses.dataclass
class Bench:
    """Everything a test needs: the log, the doubles, and a way to open a runner."""

    log: Events
    device: FakeDevice
    engine: FakeEngine
    runtime: Any
    path: Path
    open: Callable[..., TensorRTRunner]

    def kinds(self) -> list[str]:
        return [event[0] for event in self.log]


def write_manifest(path: Path, **changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "artefact": FileDigest("engine", path.name, sha256_file(path), path.stat().st_size),
        "inputs": (TensorSpec("input", "float32", ("batch", 4)),),
        "outputs": (TensorSpec("logits", "float32", ("batch", 2)),),
        "build": {"flavor": "tensorrt", "hardware_compatibility": "none"},
        "versions": {"tensorrt": VERSION},
        "device": {"compute_capability": "8.9", "name": "Test GPU"},
        **changes,
    }
    for name, kind in (("build", Build), ("device", Device)):
        fields[name] = fields[name] and msgspec.convert(fields[name], kind)
    found = Manifest(**fields)
    sidecar(path).write_text(found.to_json())
    return found


@pytest.fixture
def manifest() -> Callable[..., Manifest]:
    """`write_manifest`: gives an engine file a sidecar that says what is passed."""
    return write_manifest


@pytest.fixture
def fake_device() -> FakeDevice:
    """The contract of `runtime.cuda`, in memory."""
    return FakeDevice([])


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    log: Events = []
    device = FakeDevice(log)
    engine = FakeEngine(log, device, [(1, 2, 4), (4, 8, 16)])
    runtime = mock.create_autospec(tensorrt_rtx.Runtime, instance=True, spec_set=True)
    runtime.deserialize_cuda_engine.side_effect = lambda plan: log.append(("deserialize", bytes(plan))) or engine.double
    api = ModuleType("tensorrt")
    api.__dict__.update(vars(tensorrt_rtx))
    api.__dict__["__version__"] = VERSION
    api.__dict__["Runtime"] = lambda logger: runtime
    runtime.get_engine_validity.return_value = (tensorrt_rtx.EngineValidity.VALID, 0)
    monkeypatch.setattr(trt, "api", lambda flavor: api)
    monkeypatch.setattr(cuda, "device_info", lambda index=0: GPU)
    monkeypatch.setattr(cuda, "open_device", lambda index: device)
    path = tmp_path / "model.plan"
    path.write_bytes(b"engine bytes")
    write_manifest(path)
    opened: list[TensorRTRunner] = []

    def open_runner(**options: Any) -> TensorRTRunner:
        opened.append(TensorRTRunner(path, "cuda:0", **options))
        return opened[-1]

    yield Bench(log, device, engine, runtime, path, open_runner)
    assert device.depth == 0
    if opened and all(runner._closed for runner in opened):
        assert +device.open == {}, "closed runners gave everything back"
