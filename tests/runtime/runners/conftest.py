"""Doubles for the TensorRT runner: TensorRT's objects autospecced from its real bindings, CUDA as a small model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import tensorrt_rtx

from gmconv.errors import UnavailableError
from gmconv.files import sha256_file
from runtime import cuda, trt
from runtime.manifest import FileDigest, Manifest, TensorSpec, sidecar
from runtime.runners.tensorrt import TensorRTRunner

GPU = cuda.DeviceInfo(0, "Test GPU", "8.9", 2**33, "580.1", "13.0")
VERSION = "10.13.3.9"
Events = list[tuple[Any, ...]]


class FakeDevice:
    """CUDA as the runner sees it: `log` holds what happened, "memory" maps addresses to bytes."""

    def __init__(self, log: Events) -> None:
        self.log = log
        self.info = GPU
        self.depth = 0
        self.memory: dict[int, np.ndarray[Any, Any]] = {}
        self.next_address = 0x1000
        self.handles = 0
        self.clock = 0.0
        self.full = False

    def current(self) -> Any:
        device = self

        class Current:
            def __enter__(self) -> None:
                device.depth += 1

            def __exit__(self, *_: object) -> None:
                device.depth -= 1

        return Current()

    def need_context(self) -> None:
        assert self.depth > 0, "a CUDA call without the context current"

    def stream(self) -> Any:
        self.need_context()
        self.handles += 1
        handle = self.handles
        return SimpleNamespace(
            handle=handle,
            synchronize=lambda: self.log.append(("synchronize", handle)),
            wait_for_event=lambda event: self.log.append(("wait", handle, event.number)),
        )

    def event(self, *, blocking: bool = False) -> Any:
        self.need_context()
        self.log.append(("event", blocking))
        self.handles += 1
        device, number = self, self.handles

        class Event:
            at = 0.0

            def __init__(self) -> None:
                self.number = number

            def record(self, stream: Any) -> None:
                device.clock += 1.0
                self.at = device.clock
                device.log.append(("record", number, stream.handle))

            def synchronize(self) -> None:
                device.log.append(("event synchronize", number))

            def time_since(self, other: Any) -> float:
                return self.at - float(other.at)

        return Event()

    def page_locked(self, count: int) -> np.ndarray[Any, Any]:
        self.need_context()
        self.log.append(("page-locked", count))
        return np.zeros(count, np.uint8)

    def allocate(self, count: int) -> Any:
        self.need_context()
        if self.full:
            raise UnavailableError("no room")
        device, address = self, self.next_address
        self.next_address += count
        self.memory[address] = np.zeros(count, np.uint8)
        self.log.append(("allocate", count))

        class Allocation:
            def __int__(self) -> int:
                return address

            def free(self) -> None:
                device.need_context()
                del device.memory[address]
                device.log.append(("free",))

        return Allocation()

    def upload(self, target: Any, source: np.ndarray[Any, Any], stream: Any) -> None:
        memoryview(source)  # pycuda asks for a buffer; arrays of bfloat16 have none
        flat = np.ascontiguousarray(source).view(np.uint8).ravel()
        self.memory[int(target)][: flat.size] = flat
        self.log.append(("upload", stream.handle))

    def download(self, target: np.ndarray[Any, Any], source: Any, stream: Any) -> None:
        size = target.nbytes
        target[...] = self.memory[int(source)][:size].view(target.dtype).reshape(target.shape)
        self.log.append(("download", stream.handle))

    def memory_free(self) -> int:
        return 0


class FakeEngine:
    """An engine of one input (batch, 4) and one output (batch, 2): the first two columns, doubled."""

    def __init__(self, log: Events, device: FakeDevice, profiles: list[tuple[int, int, int]]) -> None:
        self.log = log
        self.device = device
        self.profiles = profiles
        self.contexts: list[Any] = []
        self.refuse_execute = False
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

        def set_input_shape(name: str, shape: tuple[int, ...]) -> bool:
            log.append(("shape", number, name, shape))
            state["batch"] = shape[0]
            return True

        def set_address(name: str, address: int) -> bool:
            state["addresses"][name] = address
            return True

        def execute(handle: int) -> bool:
            device.need_context()
            if self.refuse_execute:
                return False
            log.append(("execute", number, handle))
            batch, addresses = state["batch"], state["addresses"]
            source = device.memory[addresses["input"]][: batch * 16].view(np.float32).reshape(batch, 4)
            result = np.ascontiguousarray(source[:, :2] * 2)
            device.memory[addresses["logits"]][: batch * 8] = result.view(np.uint8).ravel()
            if isinstance(context.profiler, tensorrt_rtx.IProfiler):
                context.profiler.report_layer_time("conv", 0.5)
                context.profiler.report_layer_time("fc", 0.25)
            return True

        context.set_input_shape.side_effect = set_input_shape
        context.get_tensor_shape.side_effect = lambda name: (state["batch"], 4 if name == "input" else 2)
        context.infer_shapes.return_value = []
        context.set_tensor_address.side_effect = set_address
        context.set_optimization_profile_async.side_effect = lambda index, handle: (
            log.append(("profile", number, index)) or True
        )
        context.execute_async_v3.side_effect = execute
        self.contexts.append(context)
        return context


class FakeGraph:
    """Records the enqueue without running it, and runs it on launch."""

    log: Events

    def __init__(self, stream: Any, enqueue: Callable[[], None]) -> None:
        self.log.append(("capture", stream.handle))
        self.enqueue = enqueue

    def launch(self) -> None:
        self.log.append(("launch",))
        self.enqueue()

    def close(self) -> None:
        self.log.append(("graph closed",))


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
    found = Manifest(**fields)
    sidecar(path).write_text(found.to_json())
    return found


@pytest.fixture
def manifest() -> Callable[..., Manifest]:
    """`write_manifest`: gives an engine file a sidecar that says what is passed."""
    return write_manifest


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
    FakeGraph.log = log
    monkeypatch.setattr(trt, "api", lambda flavor: api)
    monkeypatch.setattr(cuda, "device_info", lambda index=0: GPU)
    monkeypatch.setattr(cuda, "Device", lambda index: device)
    monkeypatch.setattr(cuda, "Graph", FakeGraph)
    monkeypatch.setattr(cuda, "free_page_locked", lambda buffer: log.append(("free page-locked",)))
    path = tmp_path / "model.plan"
    path.write_bytes(b"engine bytes")
    write_manifest(path)
    yield Bench(log, device, engine, runtime, path, lambda **options: TensorRTRunner(path, "cuda:0", **options))
    assert device.depth == 0
