"""The CUDA boundary without a GPU: a driver made of a few C functions, and stand-ins for pycuda and cuda-bindings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gmconv.errors import UnavailableError
from runtime import cuda

DRIVER = """
#include <string.h>
int cuInit(unsigned flags) { return INIT; }
int cuDeviceGetCount(int *count) { *count = COUNT; return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuDeviceGetName(char *name, int size, int device) { strncpy(name, "Test GPU", size); return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? 8 : attribute == 76 ? 9 : -1;
    return 0;
}
int cuDeviceTotalMem_v2(unsigned long *bytes, int device) { *bytes = 8UL << 30; return NAME_STATUS; }
int cuDriverGetVersion(int *version) { *version = 12090; return 0; }
"""
ASK = """
import dataclasses, json
from runtime import cuda
from gmconv.errors import UnavailableError
answer = {"problem": cuda.driver_problem()}
try:
    answer["info"] = dataclasses.asdict(cuda.device_info(0))
    cuda.device_info(7)
except UnavailableError as error:
    answer["error"] = error.message
print(json.dumps(answer))
"""


@pytest.fixture
def ask(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """What this module says on a machine with such a driver, in a process of its own."""

    def run(init: int = 0, count: int = 1, memory_status: int = 0) -> dict[str, Any]:
        source = tmp_path / "driver.c"
        source.write_text(DRIVER)
        names = {"INIT": init, "COUNT": count, "NAME_STATUS": memory_status}
        flags = [f"-D{name}={value}" for name, value in names.items()]
        library = tmp_path / "libcuda.so.1"
        subprocess.run(["cc", "-shared", "-fPIC", "-w", *flags, "-o", str(library), str(source)], check=True)
        environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", ASK], env=environment, capture_output=True, text=True, check=True, timeout=60
        )
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    return run


def test_a_gpu_is_described_without_pycuda(ask: Callable[..., dict[str, Any]]) -> None:
    answer = ask()
    assert answer["problem"] is None
    info = answer["info"]
    assert (info["name"], info["compute_capability"], info["memory"], info["cuda"]) == (
        "Test GPU",
        "8.9",
        2**33,
        "12.9",
    )
    assert answer["error"] == "cuda:7 was asked for, but this machine has 1 GPU(s), from cuda:0"


@pytest.mark.parametrize(
    ("driver", "words"),
    [
        ({"init": 999}, "the NVIDIA driver does not start (cuInit: CUDA error 999)"),
        ({"count": 0}, "the NVIDIA driver finds no GPU"),
    ],
)
def test_a_driver_that_does_not_work_is_a_reason(
    ask: Callable[..., dict[str, Any]], driver: dict[str, int], words: str
) -> None:
    answer = ask(**driver)
    assert answer["problem"] == words
    assert answer["error"] == f"cuda:0 was asked for, but {words}"


def test_a_driver_that_stops_answering_is_unavailable(ask: Callable[..., dict[str, Any]]) -> None:
    assert "does not answer (CUDA error 700)" in ask(memory_status=700)["error"]


@pytest.mark.parametrize(("device", "index"), [("cuda", 0), ("cuda:0", 0), ("cuda:3", 3)])
def test_device_names(device: str, index: int) -> None:
    assert cuda.device_index(device) == index


Calls = list[tuple[Any, ...]]


@pytest.fixture
def bindings(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`cuda.bindings.driver` with the calling convention of cuda-bindings: (status, *results)."""
    calls: Calls = []
    module = ModuleType("cuda.bindings.driver")
    failing: set[str] = set()

    def function(name: str, *results: Any) -> Callable[..., Any]:
        def call(*arguments: Any) -> tuple[Any, ...]:
            calls.append((name, *arguments))
            return (900, *(None for _ in results)) if name in failing else (0, *results)

        return call

    mode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL="thread local")
    module.__dict__.update(
        CUstream=lambda handle: f"stream {handle}",
        CUstreamCaptureMode=mode,
        cuStreamBeginCapture=function("begin"),
        cuStreamEndCapture=function("end", 11),
        cuGraphInstantiate=function("instantiate", "executable"),
        cuGraphLaunch=function("launch"),
        cuGraphDestroy=function("destroy"),
        cuGraphExecDestroy=function("destroy executable"),
    )
    monkeypatch.setattr(cuda, "require", lambda name, extra: module)
    return SimpleNamespace(calls=calls, failing=failing, names=lambda: [call[0] for call in calls])


STREAM = SimpleNamespace(handle=5)


def test_a_graph_is_recorded_once_launched_often_and_destroyed_once(bindings: Any) -> None:
    graph = cuda.Graph(STREAM, lambda: bindings.calls.append(("enqueue",)))
    assert bindings.names() == ["begin", "enqueue", "end", "instantiate", "destroy"]
    assert bindings.calls[0] == ("begin", "stream 5", "thread local")
    bindings.calls.clear()
    graph.launch()
    graph.launch()
    graph.close()
    graph.close()
    assert bindings.names() == ["launch", "launch", "destroy executable"]
    assert bindings.calls[0] == ("launch", "executable", "stream 5")


def test_an_error_while_recording_ends_the_capture_and_is_the_one_reported(bindings: Any) -> None:
    def enqueue() -> None:
        raise UnavailableError("TensorRT did not enqueue")

    with pytest.raises(UnavailableError, match="did not enqueue"):
        cuda.Graph(STREAM, enqueue)
    assert bindings.names() == ["begin", "end", "destroy"]


def test_a_capture_that_the_error_made_invalid_does_not_hide_it(bindings: Any) -> None:
    def enqueue() -> None:
        raise ValueError("first")

    bindings.failing.add("end")
    with pytest.raises(ValueError, match="first"):
        cuda.Graph(STREAM, enqueue)
    assert bindings.names() == ["begin", "end"]


@pytest.mark.parametrize("step", ["begin", "end", "instantiate"])
def test_what_cannot_be_recorded_says_so_and_leaks_nothing(bindings: Any, step: str) -> None:
    bindings.failing.add(step)
    with pytest.raises(UnavailableError, match=f"CUDA graph: {step} failed .*--noCudaGraph"):
        cuda.Graph(STREAM, lambda: None)
    assert bindings.names().count("destroy") == (step == "instantiate")


class Driver:
    """pycuda.driver's names that `Device` uses."""

    class MemoryError(Exception):
        pass

    def __init__(self, calls: Calls) -> None:
        self.calls = calls
        driver = self

        class Context:
            def push(self) -> None:
                driver.calls.append(("push",))

            @staticmethod
            def pop() -> None:
                driver.calls.append(("pop",))

            def detach(self) -> None:
                driver.calls.append(("detach",))

        class Device:
            def __init__(self, index: int) -> None:
                self.index = index

            def retain_primary_context(self) -> Context:
                driver.calls.append(("retain", self.index))
                return Context()

        self.Context, self.Device = Context, Device

    def init(self) -> None:
        self.calls.append(("init",))

    def mem_alloc(self, count: int) -> int:
        if count > 2**20:
            raise self.MemoryError
        return count

    def mem_get_info(self) -> tuple[int, int]:
        return 2**30, 2**33

    def pagelocked_empty(self, shape: int, dtype: Any) -> np.ndarray[Any, Any]:
        return np.empty(shape, dtype)

    class event_flags:  # noqa: N801 (pycuda's name)
        DEFAULT, BLOCKING_SYNC = 0, 1

    def Event(self, flags: int) -> int:
        return flags


@pytest.fixture
def pycuda(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls: Calls = []
    driver = Driver(calls)
    monkeypatch.setattr(cuda, "require", lambda name, extra: driver)
    monkeypatch.setattr(cuda, "device_info", lambda index: cuda.DeviceInfo(index, "Test GPU", "8.9", 2**33, "", "13.0"))
    monkeypatch.setattr(cuda, "_contexts", {})
    return calls


def test_devices_share_one_primary_context_per_gpu(pycuda: Calls) -> None:
    first, second, other = cuda.Device(0), cuda.Device(0), cuda.Device(1)
    assert [call for call in pycuda if call[0] == "retain"] == [("retain", 0), ("retain", 1)]
    pycuda.clear()
    with first.current(), second.current(), other.current():
        pass
    assert [call[0] for call in pycuda] == ["push"] * 3 + ["pop"] * 3


def test_an_event_that_blocks_is_asked_for_as_such(pycuda: Calls) -> None:
    device = cuda.Device(0)
    assert (device.event(), device.event(blocking=True)) == (0, 1)


def test_the_context_is_popped_when_the_work_fails(pycuda: Calls) -> None:
    device = cuda.Device(0)
    with pytest.raises(ZeroDivisionError), device.current():
        raise ZeroDivisionError
    assert pycuda[-2:] == [("push",), ("pop",)]


def test_a_full_device_is_named_with_what_is_free(pycuda: Calls) -> None:
    device = cuda.Device(0)
    assert device.allocate(64) == 64
    with pytest.raises(UnavailableError, match="no room for 8 MiB on Test GPU .1024 of 8192 MiB free"):
        device.allocate(2**23)


def test_page_locked_memory_is_bytes(pycuda: Calls) -> None:
    buffer = cuda.Device(0).page_locked(24)
    assert buffer.dtype == np.uint8
    assert buffer.shape == (24,)


def test_without_pycuda_the_package_to_install_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "device_info", lambda index: cuda.DeviceInfo(index, "Test GPU", "8.9", 1, "", "13.0"))
    monkeypatch.setitem(sys.modules, "pycuda", None)
    with pytest.raises(UnavailableError, match=r"pip install 'gmconv-deploy\[cuda\]'"):
        cuda.Device(0)
