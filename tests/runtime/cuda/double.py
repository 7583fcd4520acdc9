"""Builds and drives the double of libcuda (tests/libcuda.c). A process must be started on it: `environment`."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("libcuda.c")
ALIVE = ("device", "host", "stream", "event", "graph", "executable")


def build(folder: Path, **constants: int) -> Path:
    """Compile the double into `folder`; `constants`: COUNT of GPUs, INIT and MEMORY_STATUS answered."""
    flags = [f"-D{name}={value}" for name, value in constants.items()]
    library = folder / "libcuda.so.1"
    command = ["cc", "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", *flags, "-o", str(library), str(SOURCE)]
    subprocess.run(command, check=True)
    return library


def environment(folder: Path, **more: str) -> dict[str, str]:
    """What a process needs to find the double instead of a driver."""
    return {**os.environ, "LD_LIBRARY_PATH": str(folder), **more}


class Double:
    """The double that this process was started on."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        self._library.double_log.restype = ctypes.c_char_p
        self._kept: list[Any] = []
        self._forgotten = dict.fromkeys(ALIVE, 0)

    def log(self) -> list[str]:
        """Every call so far, oldest first."""
        text: bytes = self._library.double_log()
        return text.decode().splitlines()

    def clear(self) -> None:
        """Forget the log."""
        self._library.double_clear()

    def fail(self, name: str, code: int, after: int = 0) -> None:
        """Let the function `name` answer `code`, after it worked `after` times more."""
        self._library.double_fail(name.encode(), code, after)

    def heal(self) -> None:
        """Let nothing fail."""
        self._library.double_heal()

    def alive(self) -> dict[str, int]:
        """How many objects of each kind were not given back."""
        return {
            kind: self._library.double_alive(number) - self._forgotten[kind]
            for number, kind in enumerate(ALIVE, start=1)
        }

    def forget(self) -> None:
        """Do not count what was never given back, since it was told to fail."""
        for kind, count in self.alive().items():
            self._forgotten[kind] += count

    def kernel(self, call: Callable[[], None], stream: int) -> None:
        """Put `call` on a stream: it runs at once, or at each launch of the graph that recorded it."""
        entry = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: call())
        self._kept.append(entry)
        status = self._library.double_kernel(entry, None, ctypes.c_void_p(stream))
        assert status == 0, f"the kernel was refused (CUDA error {status})"
