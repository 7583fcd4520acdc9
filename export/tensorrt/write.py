"""Writes what a build makes: the log, and the engine, hashed while it is written and sent to the disk.

Each of those two takes as long as a tenth of the build.
"""

from __future__ import annotations

import contextlib
import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from gmconv.files import sync, unwritable

if TYPE_CHECKING:
    from runtime import trt


class LogFile:
    """The file of TensorRT's log; as no exception may pass through a native callback, a failure waits for `check`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stream = path.open("w", buffering=1)
        self._failed: OSError | None = None

    def write(self, line: str) -> None:
        """Add a line; nothing more once one could not be written."""
        if self._failed is None:
            try:
                self._stream.write(line)
            except OSError as error:
                self._failed = error

    def check(self) -> None:
        """Raise RefusedError or UnavailableError where lines are missing; what there is of a file then goes."""
        if self._failed is not None:
            if self._path.is_file():
                self._path.unlink()
            raise unwritable(f"--log {self._path}", self._failed)

    def close(self) -> None:
        """Whatever it may still hold."""
        with contextlib.suppress(OSError):
            self._stream.close()


def write(serialized: trt.IHostMemory, path: Path) -> str:
    """Write the engine to the disk and return its sha256. Raises RefusedError; UnavailableError where that is full."""
    data = memoryview(serialized)
    try:
        with ThreadPoolExecutor(1) as beside:
            sha256 = beside.submit(hashlib.sha256, data)
            with path.open("wb") as stream:
                stream.write(data)
            sync(path)
            return sha256.result().hexdigest()
    except OSError as error:
        raise unwritable(f"engine {path.name}", error) from error
