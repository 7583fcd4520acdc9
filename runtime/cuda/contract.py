"""What a CUDA driver package has to offer: one contract, with `bindings` (cuda-bindings) and `pycuda` behind it.

A `Device` is the primary context of one GPU, which torch and TensorRT share. Streams are non-blocking: work on the
legacy default stream (a library's synchronous copy, say) neither waits for them nor breaks a capture on them.

Every call but `current` needs the context current in the calling thread. What the driver refuses is raised as
`CudaError`, or `DeviceMemoryError` where there is no room; `close` and `free` are idempotent and never raise, so that
what failed first is what is reported.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, NoReturn, Protocol

from gmconv.errors import UnavailableError
from runtime.cuda.info import DeviceInfo

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class CudaError(UnavailableError):
    """The driver refused a call."""


class DeviceMemoryError(CudaError):
    """No room on the GPU, or no page-locked memory left: a smaller request may still fit."""


class Stream(Protocol):
    """A non-blocking stream; `handle` is what TensorRT takes."""

    @property
    def handle(self) -> int:
        """The CUstream."""

    def synchronize(self) -> None:
        """Wait until everything on it is done. Raises CudaError for what failed there."""

    def wait_for_event(self, event: Event) -> None:
        """Let what comes later on this stream wait for `event`."""

    def close(self) -> None:
        """Give it back."""


class Event(Protocol):
    """A moment on a stream, with its time."""

    def record(self, stream: Stream) -> None:
        """Put it on `stream`."""

    def synchronize(self) -> None:
        """Wait until it has happened. Raises CudaError for what failed before it."""

    def time_since(self, earlier: Event) -> float:
        """Milliseconds from `earlier` to this one, a float32 of the driver: exact for short distances only."""

    def close(self) -> None:
        """Give it back."""


class Memory(Protocol):
    """Device memory; `address` is what TensorRT takes."""

    @property
    def address(self) -> int:
        """The device address."""

    def free(self) -> None:
        """Give it back."""


class PageLocked(Protocol):
    """Page-locked host memory, as the bytes `array`; nothing may use `array` after `free`."""

    @property
    def array(self) -> NDArray[np.uint8]:
        """The bytes."""

    def free(self) -> None:
        """Give it back."""


class Graph(Protocol):
    """What was recorded on a stream, launched again for a fraction of the host time."""

    def launch(self) -> None:
        """Put it on the stream it was recorded on."""

    def close(self) -> None:
        """Give it back."""


class Device(ABC):
    """The primary context of the GPU `info` and what lives in it; `driver` is the package behind it."""

    driver: str
    info: DeviceInfo

    @abstractmethod
    def current(self) -> AbstractContextManager[None]:
        """Make the context current in this thread, as deep as asked for."""

    @abstractmethod
    def stream(self) -> Stream:
        """A new stream."""

    @abstractmethod
    def event(self, *, blocking: bool = False) -> Event:
        """A new event with timing. A thread that waits for a `blocking` one sleeps instead of spinning."""

    @abstractmethod
    def page_locked(self, size: int) -> PageLocked:
        """`size` bytes of page-locked host memory. Raises DeviceMemoryError."""

    @abstractmethod
    def allocate(self, size: int) -> Memory:
        """`size` bytes of device memory. Raises DeviceMemoryError with what is free."""

    @abstractmethod
    def upload(self, target: Memory, source: PageLocked, size: int, stream: Stream) -> None:
        """Enqueue a copy of the first `size` bytes to the device."""

    @abstractmethod
    def download(self, target: PageLocked, source: Memory, size: int, stream: Stream) -> None:
        """Enqueue a copy of the first `size` bytes from the device."""

    @abstractmethod
    def record(self, stream: Stream, enqueue: Callable[[], None]) -> Graph:
        """A graph of what `enqueue` puts on `stream`, which runs nothing now. Run it once before: first runs allocate.

        Raises CudaError, or what `enqueue` raised; the stream can be used on after either.
        """

    @abstractmethod
    def memory(self) -> tuple[int, int]:
        """Bytes of device memory: free now, and in all."""

    def refused(self, call: str, name: str, words: str) -> NoReturn:
        """Raise the error of a driver's `call` that answered `name` ("CUDA_ERROR_LAUNCH_FAILED"), or `words`."""
        if name.endswith("OUT_OF_MEMORY") or words == "out of memory":
            raise DeviceMemoryError(f"{self._place()}: no memory left at {call}; use a smaller batch")
        # What failed on the device is told at the next wait, and the context is of no use from then on.
        lost = call.endswith("Synchronize") and "captur" not in words
        advice = "; what this process holds on the GPU is lost, start it again" if lost else ""
        raise CudaError(f"{self._place()}: {call} failed ({name or 'CUDA error'}: {words}){advice}")

    def full(self, size: int, kind: str) -> NoReturn:
        """Raise the error of an allocation of `size` bytes of "device" or "page-locked" memory."""
        try:
            free, total = self.memory()
            left = f" ({free / 2**20:.0f} of {total / 2**20:.0f} MiB of the GPU's memory are free)"
        except CudaError:
            left = ""
        raise DeviceMemoryError(
            f"{self._place()}: no room for {size / 2**20:.3g} MiB of {kind} memory{left}; use a smaller batch or end "
            f"other processes"
        )

    def _place(self) -> str:
        return f"cuda:{self.info.index} ({self.info.name})"
