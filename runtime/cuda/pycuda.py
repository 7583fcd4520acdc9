"""The contract on `pycuda.driver`. pycuda has no CUDA graphs: cuda-bindings records them on its streams' handles."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

from gmconv.cli import require
from runtime.cuda import bindings, contract
from runtime.cuda.info import DeviceInfo

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
_contexts: dict[int, Any] = {}


class Device(contract.Device):
    """See `contract.Device`."""

    driver = "pycuda"

    def __init__(self, info: DeviceInfo) -> None:
        self.info = info
        self.api: Any = require("pycuda.driver", "pycuda")
        self._context = _primary_context(self.api, info.index)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The result of one of pycuda's functions. Raises CudaError."""
        try:
            return function(*arguments)
        except self.api.Error as error:
            self._translate(error)

    def _translate(self, error: Exception) -> NoReturn:
        call, _, words = str(error).partition(" failed: ")
        if isinstance(error, self.api.MemoryError):
            words = "out of memory"
        self.refused(call, "", words)

    @contextmanager
    def current(self) -> Iterator[None]:
        """See `contract.Device`."""
        self.call(self._context.push)
        try:
            yield
        finally:
            self.api.Context.pop()

    def stream(self) -> Stream:
        """See `contract.Device`."""
        return Stream(self, self.call(self.api.Stream, _NON_BLOCKING))

    def event(self, *, blocking: bool = False) -> Event:
        """See `contract.Device`."""
        flags = self.api.event_flags
        return Event(self, self.call(self.api.Event, flags.BLOCKING_SYNC if blocking else flags.DEFAULT))

    def page_locked(self, size: int) -> PageLocked:
        """See `contract.Device`."""
        import numpy as np

        portable = self.api.host_alloc_flags.PORTABLE
        try:
            return PageLocked(self, self.call(self.api.pagelocked_empty, size, np.uint8, "C", portable))
        except contract.DeviceMemoryError:
            self.full(size, "page-locked")

    def allocate(self, size: int) -> Memory:
        """See `contract.Device`."""
        try:
            return Memory(self, self.call(self.api.mem_alloc, size))
        except contract.DeviceMemoryError:
            self.full(size, "device")

    def upload(self, target: Any, source: Any, size: int, stream: Any) -> None:
        """See `contract.Device`."""
        self.call(self.api.memcpy_htod_async, target.object, source.array[:size], stream.object)

    def download(self, target: Any, source: Any, size: int, stream: Any) -> None:
        """See `contract.Device`."""
        self.call(self.api.memcpy_dtoh_async, target.array[:size], source.object, stream.object)

    def record(self, stream: contract.Stream, enqueue: Callable[[], None]) -> bindings.Graph:
        """See `contract.Device`."""
        return bindings.record(self._graphs, self._graphs.api.CUstream(stream.handle), enqueue)

    @cached_property
    def _graphs(self) -> bindings.Device:
        return bindings.Device(self.info)

    def memory(self) -> tuple[int, int]:
        """See `contract.Device`."""
        free, total = self.call(self.api.mem_get_info)
        return int(free), int(total)


def _primary_context(api: Any, index: int) -> Any:
    """The primary context of GPU `index`, retained once per process as pycuda.autoprimaryctx does for the default GPU.

    One pycuda object for all: pycuda frees memory only in the very context object that made it.
    """
    if index not in _contexts:
        api.init()
        _contexts[index] = api.Device(index).retain_primary_context()
        if len(_contexts) == 1:
            atexit.register(_release_contexts)
    return _contexts[index]


def _release_contexts() -> None:
    while _contexts:
        _contexts.popitem()[1].detach()


class _Owned:
    """One of pycuda's objects, which gives itself back when the last reference to it goes."""

    def __init__(self, device: Device, found: Any) -> None:
        self.device = device
        self.object = found

    def close(self) -> None:
        """Give it back; idempotent, never raises: pycuda itself only warns of what fails then."""
        self.object = None


class Stream(_Owned):
    """See `contract.Stream`."""

    @property
    def handle(self) -> int:
        """The CUstream."""
        return int(self.object.handle)

    def synchronize(self) -> None:
        """See `contract.Stream`."""
        self.device.call(self.object.synchronize)

    def wait_for_event(self, event: Any) -> None:
        """See `contract.Stream`."""
        self.device.call(self.object.wait_for_event, event.object)


class Event(_Owned):
    """See `contract.Event`."""

    def record(self, stream: Any) -> None:
        """See `contract.Event`."""
        self.device.call(self.object.record, stream.object)

    def synchronize(self) -> None:
        """See `contract.Event`."""
        self.device.call(self.object.synchronize)

    def time_since(self, earlier: Any) -> float:
        """See `contract.Event`."""
        return float(self.device.call(self.object.time_since, earlier.object))


class Memory(_Owned):
    """See `contract.Memory`."""

    @property
    def address(self) -> int:
        """The device address."""
        return int(self.object)

    def free(self) -> None:
        """Give it back."""
        found, self.object = self.object, None
        if found is not None:
            with suppress(self.device.api.Error):
                found.free()


class PageLocked:
    """See `contract.PageLocked`."""

    def __init__(self, device: Device, array: NDArray[np.uint8]) -> None:
        self.device = device
        self.array = array
        self._allocation: Any = array.base

    def free(self) -> None:
        """Give it back, whoever still holds a view of it."""
        allocation, self._allocation = self._allocation, None
        if allocation is not None:
            with suppress(self.device.api.Error):
                allocation.free()
