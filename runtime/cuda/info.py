"""What GPUs there are, asked of the driver itself through ctypes: it works, and says why it does not, on a machine
with no CUDA package at all."""

from __future__ import annotations

import ctypes
import uuid
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from gmconv.errors import UnavailableError

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


def device_uuid(index: int) -> str | None:
    """NVIDIA's name of the very card ("GPU-8f9c…"), by which every other tool finds it; None where it is not told."""
    library = _library()
    handle, identity = ctypes.c_int(), (ctypes.c_ubyte * 16)()
    if isinstance(library, str) or library.cuDeviceGet(ctypes.byref(handle), index):
        return None
    ask = getattr(library, "cuDeviceGetUuid_v2", None) or library.cuDeviceGetUuid
    if ask(identity, handle):
        return None
    return f"GPU-{uuid.UUID(bytes=bytes(identity))}"


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
