"""The CUDA boundary: the only file that imports pycuda or cuda-bindings, both lazily.

`driver_problem` and `device_info` ask the driver itself through ctypes, so that they work (and say why they do not)
on a machine with neither package. Memory, streams and events are pycuda's in the device's primary context, which torch
and TensorRT share. pycuda has no CUDA graphs: cuda-bindings captures them on the pycuda stream's handle.
"""

from __future__ import annotations

import atexit
import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gmconv.cli import require
from gmconv.errors import UnavailableError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_MAJOR, _MINOR = 75, 76  # CUdevice_attribute: COMPUTE_CAPABILITY_MAJOR, _MINOR (cuda.h)


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """What identifies a GPU: `compute_capability` as "8.9", memory in bytes, `cuda` the driver's CUDA version."""

    index: int
    name: str
    compute_capability: str
    memory: int
    driver: str
    cuda: str


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | str:
    """The driver library, initialised; or a sentence that says why there is none."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "this machine has no NVIDIA driver (libcuda.so.1 not found)"
    status = library.cuInit(0)
    if status:
        return f"the NVIDIA driver does not start (cuInit: CUDA error {status})"
    count = ctypes.c_int()
    status = library.cuDeviceGetCount(ctypes.byref(count))
    if status or count.value == 0:
        return f"the NVIDIA driver finds no GPU (CUDA error {status})" if status else "the NVIDIA driver finds no GPU"
    return library


def driver_problem() -> str | None:
    """Why no GPU can be used here, as a clause ("this machine has no NVIDIA driver…"); None when one can."""
    found = _library()
    return found if isinstance(found, str) else None


def device_info(index: int = 0) -> DeviceInfo:
    """The GPU `index`. Raises UnavailableError with the reason when there is no driver or no such GPU."""
    library = _library()
    if isinstance(library, str):
        raise UnavailableError(f"cuda:{index} was asked for, but {library}")
    count, handle = ctypes.c_int(), ctypes.c_int()
    library.cuDeviceGetCount(ctypes.byref(count))
    if not 0 <= index < count.value:
        raise UnavailableError(f"cuda:{index} was asked for, but this machine has {count.value} GPU(s), from cuda:0")
    name = ctypes.create_string_buffer(256)
    major, minor, memory, version = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t(), ctypes.c_int()
    for status in (
        library.cuDeviceGet(ctypes.byref(handle), index),
        library.cuDeviceGetName(name, len(name), handle),
        library.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, handle),
        library.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, handle),
        library.cuDeviceTotalMem_v2(ctypes.byref(memory), handle),
        library.cuDriverGetVersion(ctypes.byref(version)),
    ):
        if status:
            raise UnavailableError(f"cuda:{index}: the driver does not answer (CUDA error {status})")
    return DeviceInfo(
        index,
        name.value.decode(errors="replace"),
        f"{major.value}.{minor.value}",
        memory.value,
        _kernel_driver(),
        f"{version.value // 1000}.{version.value % 1000 // 10}",
    )


def _kernel_driver() -> str:
    """The driver's own version ("580.65.06"), or "" where the kernel does not tell."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split("\n")[0].split()
    except OSError:
        return ""
    return next((w for w in words if w.replace(".", "").isdigit() and "." in w), "")


def device_index(device: str) -> int:
    """The index in "cuda" or "cuda:1". Raises UnavailableError for anything else: engines run on NVIDIA GPUs only."""
    kind, _, number = device.partition(":")
    if kind != "cuda" or not (number.isdigit() or not number):
        raise UnavailableError(f"a TensorRT engine runs on an NVIDIA GPU, not on {device!r}: --device cuda:0")
    return int(number or 0)


class Device:
    """The primary context of one GPU and what lives in it. Each method needs the context current: `with d.current():`.

    Raises UnavailableError without a driver, the GPU or pycuda.
    """

    def __init__(self, index: int = 0) -> None:
        self.info = device_info(index)
        self._driver: Any = require("pycuda.driver", "cuda")
        self._context = _primary_context(self._driver, index)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the context current in this thread."""
        self._context.push()
        try:
            yield
        finally:
            self._driver.Context.pop()

    def stream(self) -> Any:
        """A new stream; `.handle` is what TensorRT takes."""
        return self._driver.Stream()

    def event(self, *, blocking: bool = False) -> Any:
        """A new event with timing. A thread that waits for a `blocking` one sleeps instead of spinning."""
        flags = self._driver.event_flags
        return self._driver.Event(flags.BLOCKING_SYNC if blocking else flags.DEFAULT)

    def page_locked(self, count: int) -> NDArray[np.uint8]:
        """`count` bytes of page-locked host memory."""
        import numpy as np

        buffer: NDArray[np.uint8] = self._driver.pagelocked_empty(count, np.uint8)
        return buffer

    def allocate(self, count: int) -> Any:
        """`count` bytes of device memory; `int()` of it is the address, `.free()` returns it."""
        try:
            return self._driver.mem_alloc(count)
        except self._driver.MemoryError as error:
            free, total = self._driver.mem_get_info()
            raise UnavailableError(
                f"cuda:{self.info.index}: no room for {count / 2**20:.0f} MiB on {self.info.name} "
                f"({free / 2**20:.0f} of {total / 2**20:.0f} MiB free); use a smaller batch or end other processes"
            ) from error

    def upload(self, target: Any, source: NDArray[Any], stream: Any) -> None:
        """Enqueue a copy of page-locked `source` to device memory."""
        self._driver.memcpy_htod_async(target, source, stream)

    def download(self, target: NDArray[Any], source: Any, stream: Any) -> None:
        """Enqueue a copy of device memory to page-locked `target`."""
        self._driver.memcpy_dtoh_async(target, source, stream)

    def memory_free(self) -> int:
        """Bytes of device memory free now."""
        return int(self._driver.mem_get_info()[0])


def free_page_locked(buffer: NDArray[np.uint8]) -> None:
    """Return page-locked memory at once; nothing may read or write `buffer` after this."""
    allocation: Any = buffer.base
    allocation.free()


_contexts: dict[int, Any] = {}


def _primary_context(driver: Any, index: int) -> Any:
    """The primary context of GPU `index`, retained once per process as pycuda.autoprimaryctx does for the default GPU.

    One pycuda object for all: pycuda frees memory only in the very context object that made it.
    """
    if index not in _contexts:
        driver.init()
        _contexts[index] = driver.Device(index).retain_primary_context()
        if len(_contexts) == 1:
            atexit.register(_release_contexts)
    return _contexts[index]


def _release_contexts() -> None:
    while _contexts:
        _contexts.popitem()[1].detach()


class Graph:
    """A CUDA graph: what `enqueue` put on `stream`, recorded once, launched again for a fraction of the host time."""

    def __init__(self, stream: Any, enqueue: Callable[[], None]) -> None:
        """Record `enqueue` on `stream` (a pycuda stream). The caller has run it once before: first runs allocate."""
        self._cuda: Any = require("cuda.bindings.driver", "cuda")
        self._stream = self._cuda.CUstream(stream.handle)
        mode = self._cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._check("begin", self._cuda.cuStreamBeginCapture(self._stream, mode))
        try:
            enqueue()
        except BaseException:
            # End the capture, or the stream stays unusable; its own error would only hide the first one.
            _, graph = self._cuda.cuStreamEndCapture(self._stream)
            if graph is not None and int(graph):  # cuda-bindings answers None beside an error
                self._cuda.cuGraphDestroy(graph)
            raise
        graph = self._check("end", self._cuda.cuStreamEndCapture(self._stream))
        try:
            self._graph = self._check("instantiate", self._cuda.cuGraphInstantiate(graph, 0))
        finally:
            self._cuda.cuGraphDestroy(graph)

    def launch(self) -> None:
        """Put the graph on its stream."""
        self._check("launch", self._cuda.cuGraphLaunch(self._graph, self._stream))

    def close(self) -> None:
        """Destroy the graph; idempotent."""
        graph, self._graph = self._graph, None
        if graph is not None:
            self._cuda.cuGraphExecDestroy(graph)

    def _check(self, step: str, answer: tuple[Any, ...]) -> Any:
        status, *rest = answer
        if int(status):
            raise UnavailableError(f"CUDA graph: {step} failed ({getattr(status, 'name', status)}); use --noCudaGraph")
        return rest[0] if rest else None
