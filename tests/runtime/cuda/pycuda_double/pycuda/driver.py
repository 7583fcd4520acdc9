"""pycuda.driver where it is not installed: the names that the project uses, on the library that the process finds.

As pycuda: errors are classes of `Error` and say "function failed: words"; objects give themselves back when the last
reference goes; memory is copied from and to anything with a buffer.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

_cuda = ctypes.CDLL("libcuda.so.1")


class Error(Exception):
    pass


class MemoryError(Error):
    pass


class LogicError(Error):
    pass


def _call(name: str, *arguments: Any, symbol: str = "") -> None:
    status = getattr(_cuda, symbol or name)(*arguments)
    if status:
        words = ctypes.c_char_p()
        _cuda.cuGetErrorString(status, ctypes.byref(words))
        kind = MemoryError if status == 2 else LogicError
        raise kind(f"{name} failed: {(words.value or b'').decode()}")


def init() -> None:
    _call("cuInit", 0)


class Context:
    def __init__(self, index: int, handle: ctypes.c_void_p) -> None:
        self._index, self._handle = index, handle

    def push(self) -> None:
        _call("cuCtxPushCurrent", self._handle, symbol="cuCtxPushCurrent_v2")

    @staticmethod
    def pop() -> None:
        _call("cuCtxPopCurrent", None, symbol="cuCtxPopCurrent_v2")

    def detach(self) -> None:
        _call("cuDevicePrimaryCtxRelease", self._index, symbol="cuDevicePrimaryCtxRelease_v2")


class Device:
    def __init__(self, index: int) -> None:
        self._index = index

    def retain_primary_context(self) -> Context:
        handle = ctypes.c_void_p()
        _call("cuDevicePrimaryCtxRetain", ctypes.byref(handle), self._index)
        return Context(self._index, handle)


class _Handle:
    def __init__(self, create: str, destroy: str, flags: int) -> None:
        self._destroy, self.pointer = destroy, ctypes.c_void_p()
        _call(create, ctypes.byref(self.pointer), flags)

    def __del__(self) -> None:
        if self.pointer:
            getattr(_cuda, self._destroy)(self.pointer)


class Stream(_Handle):
    def __init__(self, flags: int = 0) -> None:
        super().__init__("cuStreamCreate", "cuStreamDestroy_v2", flags)

    @property
    def handle(self) -> int:
        return int(self.pointer.value or 0)

    def synchronize(self) -> None:
        _call("cuStreamSynchronize", self.pointer)

    def wait_for_event(self, event: Event) -> None:
        _call("cuStreamWaitEvent", self.pointer, event.pointer, 0)


class event_flags:  # noqa: N801 (pycuda's name)
    DEFAULT, BLOCKING_SYNC, DISABLE_TIMING = 0, 1, 2


class host_alloc_flags:  # noqa: N801 (pycuda's name)
    PORTABLE, DEVICEMAP, WRITECOMBINED = 1, 2, 4


class Event(_Handle):
    def __init__(self, flags: int = 0) -> None:
        super().__init__("cuEventCreate", "cuEventDestroy_v2", flags)

    def record(self, stream: Stream) -> Event:
        _call("cuEventRecord", self.pointer, stream.pointer)
        return self

    def synchronize(self) -> Event:
        _call("cuEventSynchronize", self.pointer)
        return self

    def time_since(self, earlier: Event) -> float:
        ms = ctypes.c_float()
        _call("cuEventElapsedTime", ctypes.byref(ms), earlier.pointer, self.pointer)
        return ms.value


class DeviceAllocation:
    def __init__(self, size: int) -> None:
        self._address = ctypes.c_void_p()
        _call("cuMemAlloc", ctypes.byref(self._address), ctypes.c_size_t(size), symbol="cuMemAlloc_v2")

    def __int__(self) -> int:
        return int(self._address.value or 0)

    def free(self) -> None:
        address, self._address = self._address, ctypes.c_void_p()
        _call("cuMemFree", address, symbol="cuMemFree_v2")

    def __del__(self) -> None:
        if self._address:
            _cuda.cuMemFree_v2(self._address)


mem_alloc = DeviceAllocation


def mem_get_info() -> tuple[int, int]:
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    _call("cuMemGetInfo", ctypes.byref(free), ctypes.byref(total), symbol="cuMemGetInfo_v2")
    return free.value, total.value


class PagelockedHostAllocation:
    def __init__(self, size: int, flags: int) -> None:
        self._address = ctypes.c_void_p()
        _call("cuMemHostAlloc", ctypes.byref(self._address), ctypes.c_size_t(size), flags)
        data = (int(self._address.value or 0), False)
        self.__array_interface__ = {"shape": (size,), "typestr": "|u1", "data": data, "version": 3}

    def free(self) -> None:
        address, self._address = self._address, ctypes.c_void_p()
        _call("cuMemFreeHost", address)

    def __del__(self) -> None:
        if self._address:
            _cuda.cuMemFreeHost(self._address)


def pagelocked_empty(shape: int, dtype: Any, order: str = "C", mem_flags: int = 0) -> np.ndarray[Any, Any]:
    assert np.dtype(dtype) == np.uint8
    return np.asarray(PagelockedHostAllocation(shape, mem_flags))


def _copy(name: str, target: Any, source: Any, host: np.ndarray[Any, Any], stream: Stream) -> None:
    size = ctypes.c_size_t(memoryview(host).nbytes)
    _call(name, ctypes.c_void_p(target), ctypes.c_void_p(source), size, stream.pointer, symbol=f"{name}_v2")


def memcpy_htod_async(dest: DeviceAllocation, src: np.ndarray[Any, Any], stream: Stream) -> None:
    _copy("cuMemcpyHtoDAsync", int(dest), src.ctypes.data, src, stream)


def memcpy_dtoh_async(dest: np.ndarray[Any, Any], src: DeviceAllocation, stream: Stream) -> None:
    _copy("cuMemcpyDtoHAsync", dest.ctypes.data, int(src), dest, stream)
