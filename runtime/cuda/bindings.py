"""The contract on `cuda.bindings.driver`, a wheel without a compiler: CUDA's own C functions, which answer
(status, results...)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gmconv.cli import require
from runtime.cuda import contract
from runtime.cuda.info import DeviceInfo

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
_BLOCKING_SYNC = 1  # CU_EVENT_BLOCKING_SYNC
_PORTABLE = 1  # CU_MEMHOSTALLOC_PORTABLE: page-locked for every context


class Device(contract.Device):
    """See `contract.Device`."""

    driver = "cuda-bindings"

    def __init__(self, info: DeviceInfo) -> None:
        self.info = info
        self.api: Any = require("cuda.bindings.driver", "cuda")
        # Retained for the life of the process, whose end releases it: other libraries live in it too.
        self.call("cuInit", 0)
        self._context = self.call("cuDevicePrimaryCtxRetain", self.call("cuDeviceGet", info.index))

    def call(self, name: str, *arguments: Any) -> Any:
        """The result of a driver function. Raises CudaError."""
        status, *results = getattr(self.api, name)(*arguments)
        if status:
            self.refused(name, *self._describe(status))
        return results[0] if results else None

    def quietly(self, name: str, *arguments: Any) -> None:
        """A call that gives something back: what it says is of no use to anyone."""
        getattr(self.api, name)(*arguments)

    def _describe(self, status: Any) -> tuple[str, str]:
        words = self.api.cuGetErrorString(status)[1] or b"no description"
        return str(getattr(status, "name", status)), words.decode()

    @contextmanager
    def current(self) -> Iterator[None]:
        """See `contract.Device`."""
        self.call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            self.quietly("cuCtxPopCurrent")

    def stream(self) -> Stream:
        """See `contract.Device`."""
        return Stream(self, self.call("cuStreamCreate", _NON_BLOCKING))

    def event(self, *, blocking: bool = False) -> Event:
        """See `contract.Device`."""
        return Event(self, self.call("cuEventCreate", _BLOCKING_SYNC if blocking else 0))

    def page_locked(self, size: int) -> PageLocked:
        """See `contract.Device`."""
        return PageLocked(self, self._allocate("page-locked", size, "cuMemHostAlloc", size, _PORTABLE), size)

    def allocate(self, size: int) -> Memory:
        """See `contract.Device`."""
        return Memory(self, self._allocate("device", size, "cuMemAlloc", size))

    def _allocate(self, kind: str, size: int, name: str, *arguments: Any) -> Any:
        try:
            return self.call(name, *arguments)
        except contract.DeviceMemoryError:
            self.full(size, kind)

    def upload(self, target: Any, source: Any, size: int, stream: Any) -> None:
        """See `contract.Device`."""
        self.call("cuMemcpyHtoDAsync", target.object, source.address, size, stream.object)

    def download(self, target: Any, source: Any, size: int, stream: Any) -> None:
        """See `contract.Device`."""
        self.call("cuMemcpyDtoHAsync", target.address, source.object, size, stream.object)

    def record(self, stream: contract.Stream, enqueue: Callable[[], None]) -> Graph:
        """See `contract.Device`."""
        return record(self, self.api.CUstream(stream.handle), enqueue)

    def memory(self) -> tuple[int, int]:
        """See `contract.Device`."""
        status, free, total = self.api.cuMemGetInfo()
        if status:
            self.refused("cuMemGetInfo", *self._describe(status))
        return int(free), int(total)


class _Owned:
    """A driver object that is given back once, by the function `_release`."""

    _release = ""

    def __init__(self, device: Device, found: Any) -> None:
        self.device = device
        self.object = found

    def close(self) -> None:
        """Give it back; idempotent, never raises."""
        found, self.object = self.object, None
        if found is not None:
            self.device.quietly(self._release, found)


class Stream(_Owned):
    """See `contract.Stream`."""

    _release = "cuStreamDestroy"

    @property
    def handle(self) -> int:
        """The CUstream."""
        return int(self.object)

    def synchronize(self) -> None:
        """See `contract.Stream`."""
        self.device.call("cuStreamSynchronize", self.object)

    def wait_for_event(self, event: Any) -> None:
        """See `contract.Stream`."""
        self.device.call("cuStreamWaitEvent", self.object, event.object, 0)


class Event(_Owned):
    """See `contract.Event`."""

    _release = "cuEventDestroy"

    def record(self, stream: Any) -> None:
        """See `contract.Event`."""
        self.device.call("cuEventRecord", self.object, stream.object)

    def synchronize(self) -> None:
        """See `contract.Event`."""
        self.device.call("cuEventSynchronize", self.object)

    def time_since(self, earlier: Any) -> float:
        """See `contract.Event`."""
        return float(self.device.call("cuEventElapsedTime", earlier.object, self.object))


class Memory(_Owned):
    """See `contract.Memory`."""

    _release = "cuMemFree"

    @property
    def address(self) -> int:
        """The device address."""
        return int(self.object)

    free = _Owned.close


class PageLocked(_Owned):
    """See `contract.PageLocked`."""

    _release = "cuMemFreeHost"

    def __init__(self, device: Device, address: int, size: int) -> None:
        import numpy as np

        super().__init__(device, address)
        self.address = address
        self.array: NDArray[np.uint8] = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    free = _Owned.close


class Graph(_Owned):
    """See `contract.Graph`."""

    _release = "cuGraphExecDestroy"

    def __init__(self, device: Any, executable: Any, stream: Any) -> None:
        super().__init__(device, executable)
        self._stream = stream

    def launch(self) -> None:
        """See `contract.Graph`."""
        self.device.call("cuGraphLaunch", self.object, self._stream)


def record(device: Any, stream: Any, enqueue: Callable[[], None]) -> Graph:
    """Record `enqueue` on the CUstream `stream`; `device` is anything with `call` and `quietly`.

    Other threads may use the driver meanwhile: the capture is this thread's alone.
    """
    mode = device.api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    device.call("cuStreamBeginCapture", stream, mode)
    try:
        enqueue()
    except BaseException:
        # End the capture, or the stream stays unusable; its own error would only hide the first one.
        _, graph = device.api.cuStreamEndCapture(stream)
        if graph is not None and int(graph):  # None beside an error
            device.quietly("cuGraphDestroy", graph)
        raise
    graph = device.call("cuStreamEndCapture", stream)
    try:
        return Graph(device, device.call("cuGraphInstantiate", graph, 0), stream)
    finally:
        device.quietly("cuGraphDestroy", graph)
