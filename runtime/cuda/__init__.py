"""The CUDA boundary: nothing else imports pycuda or cuda-bindings. `open_device` gives a `Device` on either."""

from __future__ import annotations

import importlib.util
from typing import Literal

from runtime.cuda.contract import CudaError, Device, DeviceMemoryError, Event, Graph, Memory, PageLocked, Stream
from runtime.cuda.info import DeviceInfo, device_index, device_info, device_uuid, driver_problem

__all__ = [
    "CudaError",
    "Device",
    "DeviceInfo",
    "DeviceMemoryError",
    "Driver",
    "Event",
    "Graph",
    "Memory",
    "PageLocked",
    "Stream",
    "device_index",
    "device_info",
    "device_uuid",
    "driver_problem",
    "open_device",
]

Driver = Literal["pycuda", "cuda-bindings"]


def open_device(index: int = 0, driver: Driver | None = None) -> Device:
    """The GPU `index` through `driver`; by default pycuda where it is installed, else cuda-bindings.

    Raises UnavailableError without a driver, the GPU or either package.
    """
    info = device_info(index)
    if driver is None:
        driver = "pycuda" if importlib.util.find_spec("pycuda") else "cuda-bindings"
    if driver == "pycuda":
        from runtime.cuda import pycuda

        return pycuda.Device(info)
    from runtime.cuda import bindings

    return bindings.Device(info)
